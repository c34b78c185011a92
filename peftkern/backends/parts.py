"""Rows in parts: what is as wide as x and made in between exists for some of them at a time."""

from __future__ import annotations

from torch import Tensor


def split(rows: int, most: int) -> int:
    """The size of as few equal parts of at most `most` rows as there can be, one at least."""
    return -(-rows // -(-rows // max(1, most))) if rows else 1


def cut(tensor: Tensor, start: int, rows: int) -> Tensor:
    """Rows start … start + rows."""
    return tensor if tensor.shape[0] == rows else tensor[start : start + rows]
