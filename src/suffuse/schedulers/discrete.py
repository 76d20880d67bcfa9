"""Drawing tokens: what the schedulers of discrete models share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from suffuse.noise import CounterNoise, Generators, Source


def for_each_image(draw: Callable[[Tensor, Source | None], Tensor], values: Tensor, generator: Generators) -> Tensor:
    """`draw(values, source)`, image by image where each has a source of its own."""
    if not isinstance(generator, list):
        return draw(values, generator)
    return torch.cat([draw(one, source) for one, source in zip(values.split(1), generator, strict=True)])


def uniform(shape: Sequence[int], source: Source | None, device: torch.device) -> Tensor:
    """Numbers in [0, 1), float32, drawn where the source is and moved to `device`."""
    if isinstance(source, CounterNoise):
        return source.uniform(shape).to(device, torch.float32)
    return torch.rand(tuple(shape), device=device if source is None else source.device, generator=source).to(device)


def categorical(probabilities: Tensor, source: Source | None) -> Tensor:
    """One class of each row, (…), by its probability, (…, classes)."""
    rows = probabilities.reshape(-1, probabilities.shape[-1])
    if isinstance(source, CounterNoise):
        below = rows.double().cumsum(dim=-1).cpu()
        drawn = torch.searchsorted(below, source.uniform((len(rows), 1)) * below[:, -1:], right=True)
    else:
        place = probabilities.device if source is None else source.device
        rows = rows.to(place, torch.float32 if place.type == "cpu" else rows.dtype)
        drawn = torch.multinomial(rows, 1, generator=source)
    return drawn.to(probabilities.device).view(probabilities.shape[:-1])
