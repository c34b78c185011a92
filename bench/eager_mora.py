"""MoRA as one writes it in PyTorch: an operator for each step of the published formulas (arXiv 2405.12130),
the wrap-around pad by concatenation, groups by view and sum, the way out by repeating."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _grouped_sum(x: Tensor, groups: int) -> Tensor:
    """[M, I] → [M, groups]: contiguous groups, the first I mod groups of them one column longer."""
    short, longer = divmod(x.shape[1], groups)
    cut = longer * (short + 1)
    z = torch.unflatten(x[:, cut:], 1, (groups - longer, short)).sum(2)
    return torch.cat([torch.unflatten(x[:, :cut], 1, (longer, short + 1)).sum(2), z], 1) if longer else z


def _grouped_repeat(z: Tensor, columns: int) -> Tensor:
    """[M, groups] → [M, columns], each value as often as its group has columns."""
    short, longer = divmod(columns, z.shape[1])
    y = z[:, longer:].repeat_interleave(short, 1)
    return torch.cat([z[:, :longer].repeat_interleave(short + 1, 1), y], 1) if longer else y


class EagerMora(nn.Module):
    """forward(x [M, in_features], matrix [rank, rank]) → [M, out_features], everything in x's dtype."""

    def __init__(self, mora_type: int, in_features: int, out_features: int, rank: int, dtype: torch.dtype):
        super().__init__()
        self.mora_type, self.out_features, self.rank = mora_type, out_features, rank
        self.pad = -in_features % rank
        if self.pad > in_features:
            raise ValueError(
                f"in_features: expected at least {self.pad}, which the pad takes, got {in_features}"
            )
        self.tables: tuple[Tensor, ...] = ()
        if mora_type == 6:
            frequency = 10000 ** (-torch.arange(0, rank, 2).double() / rank)
            angle = torch.outer(torch.arange(-(-in_features // rank)).double(), frequency).repeat(1, 2)
            self.tables = angle.cos().to(dtype), angle.sin().to(dtype)  # [n, rank]

    def forward(self, x: Tensor, matrix: Tensor) -> Tensor:
        if self.mora_type in (2, 3):
            z = _grouped_sum(x, self.rank)
        else:
            if self.pad:
                x = torch.cat([x, x[:, : self.pad]], 1)
            z = x.view(x.shape[0], -1, self.rank)  # [M, n, rank]
            if self.mora_type == 6:
                cos, sin = self.tables
                first, second = z.chunk(2, 2)
                z = z * cos + torch.cat([-second, first], 2) * sin
            else:
                z = z.sum(1)
        y = F.linear(z, matrix)
        if self.mora_type in (2, 4):
            return _grouped_repeat(y, self.out_features)
        y = y.flatten(1)
        times = -(-self.out_features // y.shape[1])
        return (y.repeat(1, times) if times > 1 else y)[:, : self.out_features]
