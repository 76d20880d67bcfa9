"""Gaussian noise, drawn where its generator lives.

The same seed must give the same picture on every device, so a generator on the CPU draws on the CPU and the result is moved.

A `torch.Generator` is a stream: what it draws depends on all that was drawn before, by other pictures of the batch too. A
`CounterNoise` is a function of (seed, image, step): it draws the same for image 3 whether that is made alone or in a batch, at
once or after an interruption, and on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Generator, Tensor

from suffuse.errors import InputError


class CounterNoise:
    """The noise of one image: Philox4x64-10 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3").

    The key is (seed, 0) and the counter (block, draw, step, image). Normal numbers are made of uniform ones by Box and Muller
    (1958), in float64 on the CPU, and then rounded and moved, so that neither type nor device changes them.

    Args:
        seed: 0 to 2**64 - 1.
        image: Which image of this seed.

    Attributes:
        step: 0 before the first step of a run, k in its k-th.
        drawn: How often was drawn in this step.
    """

    def __init__(self, seed: int, image: int = 0) -> None:
        for name, value in (("seed", seed), ("image", image)):
            whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)  # pyright: ignore[reportUnnecessaryIsInstance]
            if not whole or not 0 <= value < 2**64:
                raise InputError(f"{name} must be a whole number", found=value, expected="0 to 2**64 - 1")
        self.seed, self.image = int(seed), int(image)
        self.step, self.drawn = 0, 0

    def __repr__(self) -> str:
        return f"CounterNoise({self.seed}, image={self.image})"

    def _bits(self, count: int) -> np.ndarray:
        counter, key = np.array([0, self.drawn, self.step, self.image], np.uint64), np.array([self.seed, 0], np.uint64)
        philox = np.random.Philox(counter=counter, key=key)
        self.drawn += 1
        return np.asarray(philox.random_raw(count)) >> np.uint64(11)

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Numbers in [0, 1), float64, of `shape`."""
        return torch.from_numpy(self._bits(int(np.prod(shape))) * 2.0**-53).reshape(tuple(shape))

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers, float64, of `shape`."""
        count = int(np.prod(shape))
        bits = self._bits(count + count % 2).reshape(-1, 2)
        radius, angle = np.sqrt(-2 * np.log((bits[:, 0] + np.uint64(1)) * 2.0**-53)), bits[:, 1] * (2.0**-53 * 2 * np.pi)
        pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
        return torch.from_numpy(pairs.ravel()[:count]).reshape(tuple(shape))


Source = Generator | CounterNoise
"""What noise is drawn from."""
Generators = Source | list[Source] | None
"""One for all images, one for each, or what PyTorch's calls share."""
Seeds = int | list[int] | None
"""One for all images, or one for each."""


def fresh(generator: Generators) -> Generators:
    """The same sources: those of `torch` as they are, counters at their beginning."""
    if isinstance(generator, list):
        return [cast(Source, fresh(one)) for one in generator]
    return CounterNoise(generator.seed, generator.image) if isinstance(generator, CounterNoise) else generator


def belongs_to_images(generator: Generators) -> bool:
    """Whether each image has noise of its own, which must not depend on how many are made beside it."""
    return isinstance(generator, list) and all(isinstance(source, CounterNoise) for source in generator)


def move_to(generator: Generators, step: int) -> None:
    """Tell counters that a step begins; what is drawn before the first belongs to step 0."""
    for source in generator if isinstance(generator, list) else [generator]:
        if isinstance(source, CounterNoise):
            source.step, source.drawn = step, 0


def randn_tensor(
    shape: Sequence[int],
    generator: Generators = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
) -> Tensor:
    """Standard normal noise of `shape`.

    Args:
        shape: The shape, batch first.
        generator: Source of randomness; with a list, item `i` draws sample `i` of the batch.
        device: Where the result is to be; "cpu" if not given.
        dtype: Floating point type, in which a `torch.Generator` also draws.
        layout: Memory layout, strided if not given.

    Raises:
        InputError: A list of generators of another length than the batch, or a generator of another accelerator than `device`.
    """
    device = torch.device(device or "cpu")
    sources = list(generator) if isinstance(generator, (list, tuple)) else [generator]
    if len(sources) not in (1, shape[0]):
        raise InputError(f"{len(sources)} generators for a batch of {shape[0]}", expected="one generator, or one for each sample")
    each = tuple(shape) if len(sources) == 1 else (1, *shape[1:])
    drawn = [_normal(source, each, device, dtype, layout or torch.strided) for source in sources]
    return (drawn[0] if len(drawn) == 1 else torch.cat(drawn)).to(device)


def _normal(
    source: Source | None, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype | None, layout: torch.layout
) -> Tensor:
    """Noise from one source, where it lives."""
    if isinstance(source, CounterNoise):
        return source.normal(shape).to(dtype or torch.get_default_dtype())
    place = device if source is None else source.device
    if place.type not in ("cpu", device.type):
        raise InputError(
            f"a generator on {place.type} cannot draw noise for {device}", remedy=f"use a generator on cpu or {device.type}"
        )
    place = device if place.type == device.type else place
    return torch.randn(shape, generator=source, device=place, dtype=dtype, layout=layout)
