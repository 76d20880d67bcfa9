"""From a picture to the noise it comes from, and back with a part of it changed (Couairon et al., 2023, "DiffEdit")."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from suffuse.diffusion.conditioning import Denoiser
from suffuse.diffusion.guidance import ClassifierFreeGuidance
from suffuse.diffusion.loop import SilentHook, Step
from suffuse.noise import CounterNoise, Generators, Source


@dataclass
class Record(SilentHook):
    """Keep the latents of each step."""

    latents: list[Tensor] = field(default_factory=list[Tensor])

    def after(self, step: Step) -> None:
        """Keep these."""
        self.latents.append(step.latents)


@dataclass
class KeepOutside(SilentHook):
    """Lay back, outside of a mask, the latents that led to the noise (section 3.2, step 3).

    Attributes:
        mask: 1 where the picture changes, (batch, 1, rows, columns).
        latents: Those to be laid back after each step, (steps, batch, channels, rows, columns).
    """

    mask: Tensor
    latents: Tensor

    def after(self, step: Step) -> None:
        """Lay them back."""
        step.latents = step.latents * self.mask + self.latents[step.index] * (1 - self.mask)


def difference_mask(one: Tensor, other: Tensor, ratio: float) -> Tensor:
    """Where predictions differ (section 3.2, step 1).

    Args:
        one: (pictures, maps, channels, rows, columns): predictions from several noises.
        other: Of the same shape.
        ratio: Differences are cut off at so many times the mean of all.

    Returns:
        (pictures, rows, columns), 1 where they differ by more than half of what they are cut off at, 0 elsewhere.
    """
    differences = (one - other).abs().mean([1, 2])
    limit = differences.mean() * ratio
    return torch.where(differences.minimum(limit) / limit > 0.5, 1, 0)


@dataclass
class LikeNoise(ClassifierFreeGuidance):
    """Classifier-free guidance whose predictions are moved towards what noise looks like (Parmar et al., 2023, section 3.1).

    Attributes:
        epsilon: From (prediction, latents, timestep) to the noise that is predicted.
        steps: How often.
        correlation: How far against correlation between neighbours.
        divergence: How far against another mean than 0 and another variance than 1.
        rolls: By how many random distances correlation is measured.
        generator: Where distances are drawn from.
    """

    epsilon: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda prediction, latents, timestep: prediction
    steps: int = 1
    correlation: float = 20.0
    divergence: float = 20.0
    rolls: int = 5
    generator: Generators = None

    def __call__(self, denoiser: Denoiser, step: Step) -> Tensor:
        """One prediction, of the shape of the latents."""
        prediction = super().__call__(denoiser, step)

        def slope(loss: Callable[[Tensor], Tensor]) -> Tensor:
            with torch.enable_grad():
                moved = prediction.detach().clone().requires_grad_(True)
                return torch.autograd.grad(loss(self.epsilon(moved, step.latents, step.timestep)), moved)[0]

        for _ in range(self.steps):
            for _ in range(self.rolls if self.correlation > 0 else 0):
                prediction = prediction - self.correlation * (slope(self._correlated) / self.rolls)
            if self.divergence > 0:
                prediction = prediction - self.divergence * slope(divergence)
        return prediction

    def _correlated(self, noise: Tensor) -> Tensor:
        return auto_correlation(noise, self.generator)


def divergence(noise: Tensor) -> Tensor:
    """How far the mean is from 0 and the variance from 1, as the Kullback-Leibler divergence of two Gaussians, doubled."""
    return noise.var() + noise.mean() ** 2 - 1 - torch.log(noise.var() + 1e-7)


def auto_correlation(noise: Tensor, generator: Generators = None) -> Tensor:
    """How alike noise, (batch, channels, rows, columns), is to itself moved by a random distance, at each of its halvings."""
    total = torch.zeros((), device=noise.device)
    for image in range(len(noise)):
        source = generator[image] if isinstance(generator, list) else generator
        for channel in range(noise.shape[1]):
            level = noise[image : image + 1, channel : channel + 1]
            while True:
                distance = _distance(level.shape[2] // 2, source)
                for axis in (2, 3):
                    total = total + (level * level.roll(distance, axis)).mean() ** 2
                if level.shape[2] <= 8:
                    break
                level = F.avg_pool2d(level, 2)
    return total


def _distance(limit: int, source: Source | None) -> int:
    if isinstance(source, CounterNoise):
        return int(source.uniform((1,)) * limit)
    device = "cpu" if source is None else source.device
    return int(torch.randint(limit, (1,), generator=source, device=device))
