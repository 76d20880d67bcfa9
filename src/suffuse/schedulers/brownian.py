"""Noise from one path of Brownian motion over the noise levels, for solvers of stochastic differential equations.

The noise of a step from sigma to sigma' is `(W(sigma) - W(sigma')) / sqrt(|sigma - sigma'|)`. Runs of the same seed share the
path W, so that one with more steps draws the same picture more finely (Crowson, k-diffusion; W is the virtual Brownian tree
of Li et al., 2020, https://arxiv.org/abs/2001.01328). It is made of numbers (seed, ends, shape): a run that was saved goes on
along the same path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from suffuse.errors import InputError, MissingPackageError
from suffuse.noise import CounterNoise, Generators, Source
from suffuse.schedulers.scheduler import Memory

Seed = int | tuple[int, ...]
"""One path for the whole batch, or one for each sample."""

DIGITS = 6
"""Decimals of sigma that the path distinguishes."""


def seed_of(generator: Generators) -> Seed:
    """The seed that a generator was given, of a list one each; without a generator, one that torch's global generator draws."""
    if generator is None:
        return int(torch.randint(0, 2**63 - 1, []).item())
    return tuple(map(_seed_of_one, generator)) if isinstance(generator, list) else _seed_of_one(generator)


def _seed_of_one(source: Source) -> int:
    return source.image << 64 | source.seed if isinstance(source, CounterNoise) else source.initial_seed()


def brownian_noise(
    memory: Memory, seed: Seed, ends: tuple[float, float], like: Tensor, sigma: Tensor, sigma_next: Tensor
) -> Tensor:
    """Standard normal noise for a step, of the shape, type and device of `like`.

    Args:
        memory: Of the run; the path is kept there for as long as its sigmas stay.
        seed: Of the path.
        ends: The lowest and the highest sigma of the path; beyond them it stands still.
        like: (batch, …).
        sigma: Where the step begins, zero-dimensional.
        sigma_next: Where it ends, another one.

    Raises:
        InputError: There are seeds for another number of samples.
        MissingPackageError: torchsde is not installed.
    """
    key = "brownian", seed, ends, like.shape, like.dtype, like.device
    first, last, low, high = (round(float(at), DIGITS) for at in (*ends, *sorted((sigma, sigma_next))))
    low, high = max(low, first), min(high, last)
    if low >= high:
        return torch.zeros_like(like)
    way = torch.stack([path(low, high) for path in memory.derive(key, _paths, seed, ends, like)])
    sign = 1.0 if sigma < sigma_next else -1.0
    return (way if isinstance(seed, tuple) else way[0]) * sign / (sigma_next - sigma).abs().sqrt()


def _paths(seed: Seed, ends: tuple[float, float], like: Tensor) -> Sequence[Callable[[float, float], Tensor]]:
    try:
        import torchsde
    except ImportError as error:
        raise MissingPackageError(
            "noise from a Brownian path needs the package torchsde", remedy='pip install "suffuse[sde]"'
        ) from error
    if isinstance(seed, tuple) and len(seed) != len(like):
        raise InputError(f"{len(seed)} generators for a batch of {len(like)}", expected="one generator, or one for each sample")
    interval: Any = torchsde.BrownianInterval
    place = {"dtype": like.dtype, "device": like.device, "tol": 10**-DIGITS, "pool_size": 24, "halfway_tree": True}
    seeds, shape = (seed, like.shape[1:]) if isinstance(seed, tuple) else ((seed,), like.shape)
    return [interval(t0=ends[0], t1=ends[1], size=shape, entropy=one, **place) for one in seeds]
