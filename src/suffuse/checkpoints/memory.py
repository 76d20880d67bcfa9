"""Memory for weights: taken in large blocks of large pages, because to touch a page for the first time costs more than to fill it."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

BLOCK = 64 << 20
"""Bytes of a block. It is given back when the last of its tensors goes, so moving a model frees it block by block."""

_ALIGNMENT = 64

Kind = tuple[torch.Size, torch.dtype]


def allocate(kinds: Sequence[Kind]) -> list[Tensor]:
    """Uninitialised tensors on the CPU, of these shapes and types, each with a storage of its own."""
    return [tensor for block in _blocks(kinds) for tensor in _fill_block(block)]


def _bytes(kind: Kind) -> int:
    """The bytes of a tensor, up to where the next may begin."""
    return -(-kind[0].numel() * kind[1].itemsize // _ALIGNMENT) * _ALIGNMENT


def _blocks(kinds: Sequence[Kind]) -> Iterator[list[Kind]]:
    block: list[Kind] = []
    filled = 0
    for kind in kinds:
        if block and filled + _bytes(kind) > BLOCK:
            yield block
            block, filled = [], 0
        block.append(kind)
        filled += _bytes(kind)
    if block:
        yield block


def _fill_block(kinds: Sequence[Kind]) -> Iterator[Tensor]:
    total = sum(map(_bytes, kinds))
    if not hasattr(mmap, "MADV_HUGEPAGE") or total < mmap.PAGESIZE * 512:
        yield from (torch.empty(shape, dtype=dtype) for shape, dtype in kinds)
        return
    memory = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    offset = 0
    for shape, dtype in kinds:
        if shape.numel():
            yield torch.frombuffer(memory, dtype=dtype, count=shape.numel(), offset=offset).view(shape)
        else:
            yield torch.empty(shape, dtype=dtype)
        offset += _bytes((shape, dtype))
