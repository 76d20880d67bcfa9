"""Gaussian noise, drawn where its generator lives.

The same seed must give the same picture on every device, so a generator on the CPU draws on the CPU and the result is moved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from suffuse.errors import InputError


def randn_tensor(
    shape: Sequence[int],
    generator: Generator | list[Generator] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
) -> Tensor:
    """Standard normal noise of `shape`.

    Args:
        shape: The shape, batch first.
        generator: Source of randomness; with a list, item `i` draws sample `i` of the batch.
        device: Where the result is to be; "cpu" if not given.
        dtype: Floating point type, in which the noise is also drawn.
        layout: Memory layout, strided if not given.

    Raises:
        InputError: A list of generators of another length than the batch, or a generator of another accelerator than `device`.
    """
    device = torch.device(device or "cpu")
    generators = list(generator) if isinstance(generator, (list, tuple)) else [generator]
    if len(generators) not in (1, shape[0]):
        raise InputError(
            f"{len(generators)} generators for a batch of {shape[0]}", expected="one generator, or one for each sample"
        )
    source = generators[0].device.type if generators[0] is not None else device.type
    if source not in ("cpu", device.type):
        raise InputError(
            f"a generator on {source} cannot draw noise for {device}", remedy=f"use a generator on cpu or {device.type}"
        )
    place = device if source == device.type else torch.device("cpu")
    each = tuple(shape) if len(generators) == 1 else (1, *shape[1:])
    drawn = [torch.randn(each, generator=one, device=place, dtype=dtype, layout=layout or torch.strided) for one in generators]
    return (drawn[0] if len(drawn) == 1 else torch.cat(drawn)).to(device)
