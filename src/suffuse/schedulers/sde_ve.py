"""Predictor and corrector of the variance exploding SDE (Song et al., 2021, https://arxiv.org/abs/2011.13456).

predictor    x' = x + (sigma_i² - sigma_{i-1}²) score + sqrt(sigma_i² - sigma_{i-1}²) z
corrector    x' = x + e score + sqrt(2 e) z,   e = 2 (snr |z| / |score|)²                                 (algorithm 4)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from suffuse.configuration import register_to_config
from suffuse.noise import Generators, randn_tensor
from suffuse.outputs import BaseOutput
from suffuse.schedulers.noise_schedule import checked_count
from suffuse.schedulers.scheduler import Memory, Remembered, SchedulerMixin, per_sample, stepped


@dataclass
class SdeVeMemory(Memory):
    """Adds the noise levels: at the timesteps of the run, and the rising series that steps look them up in."""

    sigmas: Tensor = field(default_factory=lambda: torch.zeros(0))
    discrete_sigmas: Tensor = field(default_factory=lambda: torch.zeros(0))


@dataclass
class SdeVeOutput(BaseOutput):
    """What a predictor step returns.

    Attributes:
        prev_sample: The sample one step less noisy, (batch, channels, height, width).
        prev_sample_mean: The same without the noise the step adds.
    """

    prev_sample: Tensor
    prev_sample_mean: Tensor


class ScoreSdeVeScheduler(SchedulerMixin):
    """Continuous time: timesteps fall from 1 to `sampling_eps`; a step is `step_correct` some times, then `step_pred`."""

    memory_class: ClassVar[type[SdeVeMemory]] = SdeVeMemory
    _compatibles = []
    sigmas = Remembered()
    discrete_sigmas = Remembered()

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 2000,
        snr: float = 0.15,
        sigma_min: float = 0.01,
        sigma_max: float = 1348.0,
        sampling_eps: float = 1e-5,
        correct_steps: int = 1,
    ) -> None:
        self._start(self.memory_class(torch.linspace(1, sampling_eps, num_train_timesteps)))
        self._fill(self.memory, num_train_timesteps, sigma_min, sigma_max)

    @property
    def init_noise_sigma(self) -> Any:
        """Standard deviation of the noise a run begins with."""
        return self.config["sigma_max"]

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """`sample` as the model wants to see it, which is as it is."""
        return sample

    def set_timesteps(
        self, num_inference_steps: int, sampling_eps: float | None = None, device: str | torch.device | None = None
    ) -> None:
        """Choose the timesteps of a run; `set_sigmas` chooses their noise levels.

        Keywords of its own:
            sampling_eps: The last one, instead of the configured one.
        """
        count = checked_count(num_inference_steps, len(self))
        last, old = self.config["sampling_eps"] if sampling_eps is None else sampling_eps, self.memory
        timesteps = torch.linspace(1, last, count, device=device)
        self.memory = self.memory_class(timesteps, count, sigmas=old.sigmas, discrete_sigmas=old.discrete_sigmas)

    def set_sigmas(
        self,
        num_inference_steps: int,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        sampling_eps: float | None = None,
    ) -> None:
        """Choose the noise levels of a run, as many as it has timesteps; `sampling_eps` has no effect here."""
        count = checked_count(num_inference_steps, len(self))
        low = self.config["sigma_min"] if sigma_min is None else sigma_min
        self._fill(self.memory, count, low, self.config["sigma_max"] if sigma_max is None else sigma_max)

    def _fill(self, memory: SdeVeMemory, count: int, low: float, high: float) -> None:
        # One by one: the power of many at once rounds otherwise.
        memory.sigmas = torch.tensor([low * (high / low) ** t for t in memory.timesteps])
        memory.discrete_sigmas = torch.exp(torch.linspace(math.log(low), math.log(high), count))

    def get_adjacent_sigma(self, timesteps: Tensor, t: Tensor) -> Tensor:
        """The noise level below each of the indices `timesteps`, 0 below the lowest; the result is like `t`."""
        below = self.discrete_sigmas[timesteps.cpu() - 1].to(timesteps.device)
        return torch.where(timesteps == 0, torch.zeros_like(t.to(timesteps.device)), below)

    def step_pred(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        """Step from `timestep` to the next, by the model's score. Returns an `SdeVeOutput`."""
        times = timestep * torch.ones(sample.shape[0], device=sample.device)
        indices = (times * (len(self.timesteps) - 1)).long()
        sigma = self.discrete_sigmas[indices.cpu()].to(sample.device)
        deviation = per_sample((sigma**2 - self.get_adjacent_sigma(indices, times) ** 2) ** 0.5, sample)
        mean = sample + deviation**2 * model_output
        previous = mean + deviation * randn_tensor(sample.shape, generator, sample.device, sample.dtype)
        return SdeVeOutput(previous, mean) if return_dict else (previous, mean)

    def step_correct(self, model_output: Tensor, sample: Tensor, generator: Generators = None, return_dict: bool = True) -> Any:
        """Move `sample` along the score at its own noise level (Langevin dynamics)."""
        noise = randn_tensor(sample.shape, generator).to(sample.device)
        score_length, noise_length = (torch.linalg.vector_norm(v.flatten(1), dim=-1).mean() for v in (model_output, noise))
        size = (self.config["snr"] * noise_length / score_length) ** 2 * 2
        size = per_sample(size * torch.ones(sample.shape[0], device=sample.device), sample)
        return stepped(return_dict, sample + size * model_output + (size * 2) ** 0.5 * noise)

    def add_noise(self, original_samples: Tensor, noise: Tensor | None, timesteps: Tensor) -> Tensor:
        """`x_0 + sigma epsilon`.

        Args:
            original_samples: `x_0`, (batch, …).
            noise: Same shape; drawn if None.
            timesteps: Indices of `discrete_sigmas`, (batch,).
        """
        noise = torch.randn_like(original_samples) if noise is None else noise
        sigma = self.discrete_sigmas[timesteps.cpu()].to(original_samples.device)
        return noise * per_sample(sigma, original_samples) + original_samples
