"""Microbenchmarks: what is measured (cases), by whom else (peers), how (run), and the pictures (plot)."""
