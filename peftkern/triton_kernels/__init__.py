"""@triton.jit kernels and, beside each, the plan that launches it. Nothing here knows the backends above."""
