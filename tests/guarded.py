"""Tensors whose memory ends, or begins, at a forbidden page: an access past it is a SIGSEGV."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def _protect(address: int) -> None:
    if _libc.mprotect(address, _PAGE, 0) != 0:  # 0 is PROT_NONE
        raise OSError(ctypes.get_errno(), "mprotect")


def guarded(tensor: Tensor, at: str) -> Tensor:
    """A contiguous copy with a forbidden page behind its last byte ("end") or before its first ("start")."""
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes == 0:
        return tensor.clone()
    pages = -(-nbytes // _PAGE)
    memory = mmap.mmap(-1, (pages + 2) * _PAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    _protect(base)
    _protect(base + (pages + 1) * _PAGE)
    offset = _PAGE if at == "start" else (pages + 1) * _PAGE - nbytes
    # frombuffer keeps the mapping alive
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(
        tensor.shape
    )
    return copy.copy_(tensor)
