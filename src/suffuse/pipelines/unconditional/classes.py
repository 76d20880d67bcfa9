"""Classes of pictures: the numbers by which models that were trained with labels know them."""

from __future__ import annotations

import torch
from torch import Tensor

from suffuse.errors import InputError
from suffuse.noise import CounterNoise, Generators


def checked_classes(classes: Tensor | list[int] | int, known: int, batch: int) -> Tensor:
    """Classes as (batch,) whole numbers.

    Args:
        classes: One, for one picture; or one for each.
        known: How many the model knows.
        batch: How many pictures are made.

    Raises:
        InputError: They are not one for each picture, no whole numbers, or outside of 0 to `known` - 1.
    """
    try:
        labels = torch.as_tensor(classes).reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        raise InputError("class_labels are no numbers", found=classes, expected=f"0 to {known - 1}, one a picture") from None
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError("class_labels are no whole numbers", found=classes, expected=f"0 to {known - 1}, one a picture")
    if len(labels) != batch:
        raise InputError(f"class_labels: {len(labels)} given for {batch} pictures", expected="one for each")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < known:
        raise InputError("class_labels are out of range", found=labels.tolist(), expected=f"0 to {known - 1}")
    return labels


def drawn_classes(known: int, batch: int, generator: Generators = None) -> Tensor:
    """Classes at random, (batch,), from the generator of the call; each picture's from its own, if there are several."""
    sources = generator if isinstance(generator, list) else [generator]

    def draw(source: torch.Generator | CounterNoise | None, count: int) -> Tensor:
        if isinstance(source, CounterNoise):
            return (source.uniform((count,)) * known).long()
        device = None if source is None else source.device
        return torch.randint(0, known, (count,), generator=source, device=device).cpu()

    return torch.cat([draw(source, batch // len(sources)) for source in sources])
