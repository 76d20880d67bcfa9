"""Stochastic Heun in variance exploding time (Karras et al., 2022, https://arxiv.org/abs/2206.00364, algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from suffuse.configuration import register_to_config
from suffuse.errors import InputError
from suffuse.noise import Generators, randn_tensor
from suffuse.outputs import BaseOutput
from suffuse.schedulers.noise_schedule import MOST_TIMESTEPS, checked_count
from suffuse.schedulers.scheduler import Memory, Remembered, SchedulerMixin, per_sample


@dataclass
class KarrasVeMemory(Memory):
    """Adds the noise level of every timestep."""

    schedule: Tensor = field(default_factory=lambda: torch.zeros(0))


@dataclass
class KarrasVeOutput(BaseOutput):
    """What a step returns.

    Attributes:
        prev_sample: The sample one step less noisy, (batch, channels, height, width).
        derivative: dx / dsigma at the beginning of the step, same shape.
        pred_original_sample: The clean sample the step believes in, same shape.
    """

    prev_sample: Tensor
    derivative: Tensor
    pred_original_sample: Tensor | None = None


class KarrasVeScheduler(SchedulerMixin):
    """A step is `add_noise_to_input`, the model, `step`, the model, `step_correct`."""

    memory_class: ClassVar[type[KarrasVeMemory]] = KarrasVeMemory
    _compatibles = []
    order = 2
    schedule = Remembered()

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.02,
        sigma_max: float = 100,
        s_noise: float = 1.007,
        s_churn: float = 80,
        s_min: float = 0.05,
        s_max: float = 50,
    ) -> None:
        self._start(self.memory_class(torch.zeros(0, dtype=torch.int64)))

    @property
    def init_noise_sigma(self) -> Any:
        """Standard deviation of the noise a run begins with."""
        return self.config["sigma_max"]

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the schedule of a run of two steps or more: a geometric series from `sigma_min`² to `sigma_max`²."""
        count = checked_count(num_inference_steps, MOST_TIMESTEPS)
        if count < 2:
            raise InputError("num_inference_steps is not possible", found=count, expected="2 or more")
        timesteps, top, ratio = torch.arange(count).flip(0), self.config["sigma_max"] ** 2, self.config["sigma_min"] ** 2
        schedule = torch.stack(
            [top * (ratio / top) ** (i / (count - 1)) for i in timesteps]
        )  # one by one: pow of many rounds otherwise
        self.memory = self.memory_class(timesteps.to(device), count, schedule=schedule.to(device))

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """`sample` as the model wants to see it, which is as it is."""
        return sample

    def add_noise_to_input(self, sample: Tensor, sigma: float | Tensor, generator: Generators = None) -> tuple[Tensor, Any]:
        """(the sample with some noise more, its sigma_hat), where `sigma` is from `s_min` to `s_max`."""
        self._check_ready()
        config = self.config
        churned = config["s_min"] <= sigma <= config["s_max"]
        gamma = min(config["s_churn"] / self.memory.num_inference_steps, 2**0.5 - 1) if churned else 0
        noise = config["s_noise"] * randn_tensor(sample.shape, generator).to(sample.device)
        sigma_hat = sigma + gamma * sigma
        return sample + (sigma_hat**2 - sigma**2) ** 0.5 * noise, sigma_hat

    def step(
        self,
        model_output: Tensor,
        sigma_hat: float | Tensor,
        sigma_prev: float | Tensor,
        sample_hat: Tensor,
        return_dict: bool = True,
    ) -> Any:
        """Step from `sigma_hat` to `sigma_prev` by Euler. Returns a `KarrasVeOutput`."""
        x0 = sample_hat + sigma_hat * model_output
        derivative = (sample_hat - x0) / sigma_hat
        previous = sample_hat + (sigma_prev - sigma_hat) * derivative
        return KarrasVeOutput(previous, derivative, x0) if return_dict else (previous, derivative)

    def step_correct(
        self,
        model_output: Tensor,
        sigma_hat: float | Tensor,
        sigma_prev: float | Tensor,
        sample_hat: Tensor,
        sample_prev: Tensor,
        derivative: Tensor,
        return_dict: bool = True,
    ) -> Any:
        """The same step with the mean of the slopes at both ends. Returns a `KarrasVeOutput`."""
        x0 = sample_prev + sigma_prev * model_output
        slope = (sample_prev - x0) / sigma_prev
        previous = sample_hat + (sigma_prev - sigma_hat) * (0.5 * derivative + 0.5 * slope)
        return KarrasVeOutput(previous, derivative, x0) if return_dict else (previous, derivative)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`x_0 + sigma epsilon` at the noise levels of timesteps (batch,)."""
        self._check_ready()
        return original_samples + noise * per_sample(self.schedule[timesteps], original_samples)
