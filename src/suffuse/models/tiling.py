"""Large maps in tiles: each is run alone, and neighbours fade into one another where they overlap."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Tiles(NamedTuple):
    """How to cut a map and join the results.

    Attributes:
        size: Height and width of a tile.
        stride: From the start of a tile to the start of the next.
        fade: In the result, how far a tile fades into the one before.
        keep: In the result, how much of a tile is kept.
    """

    size: int
    stride: int
    fade: int
    keep: int


def run_in_tiles(function: Callable[[Tensor], Tensor], x: Tensor, tiles: Tiles) -> Tensor:
    """Apply `function` to `x` (batch, channels, height, width) tile by tile.

    Only two rows of results are held before they are joined.
    """
    joined: list[Tensor] = []
    above: list[Tensor] = []
    for top in range(0, x.shape[2], tiles.stride):
        row: list[Tensor] = []
        for left in range(0, x.shape[3], tiles.stride):
            tile = function(x[:, :, top : top + tiles.size, left : left + tiles.size])
            if above:
                tile = blend_v(above[len(row)], tile, tiles.fade)
            if row:
                tile = blend_h(row[-1], tile, tiles.fade)
            row.append(tile)
        joined.append(torch.cat([tile[:, :, : tiles.keep, : tiles.keep] for tile in row], dim=3))
        above = row
    return torch.cat(joined, dim=2)


def blend_v(a: Tensor, b: Tensor, blend_extent: int) -> Tensor:
    """Fade the top of `b` in over the bottom of `a`, in `b` itself."""
    extent = min(a.shape[2], b.shape[2], blend_extent)
    if extent:
        b[:, :, :extent] = _fade(a[:, :, -extent:], b[:, :, :extent], dim=2)
    return b


def blend_h(a: Tensor, b: Tensor, blend_extent: int) -> Tensor:
    """Fade the left of `b` in over the right of `a`, in `b` itself."""
    extent = min(a.shape[3], b.shape[3], blend_extent)
    if extent:
        b[:, :, :, :extent] = _fade(a[:, :, :, -extent:], b[:, :, :, :extent], dim=3)
    return b


def _fade(a: Tensor, b: Tensor, dim: int) -> Tensor:
    extent = a.shape[dim]
    # In double until the product, each product then rounded: what multiplying row by row with Python numbers gives.
    weights = torch.arange(extent, dtype=torch.float64) / extent
    kind = torch.promote_types(a.dtype, torch.float32)
    shape = [-1 if axis == dim else 1 for axis in range(a.ndim)]
    rising, falling = (w.to(a.device, kind).view(shape) for w in (weights, 1 - weights))
    return (a * falling).to(a.dtype) + (b * rising).to(b.dtype)
