"""DDPM in continuous time, with the cosine schedule of Nichol and Dhariwal (2021), for Würstchen (Pernias et al., 2024).

alpha_bar(t) = cos²((t + s) / (1 + s) pi / 2) / alpha_bar(0),  t in [0, 1]    (https://arxiv.org/abs/2102.09672, equation 17)
x_s = (x_t - (1 - alpha) / sqrt(1 - alpha_bar_t) epsilon) / sqrt(alpha) + sigma z,    sigma² = (1 - alpha) (1 - alpha_bar_s) /
(1 - alpha_bar_t),    alpha = alpha_bar_t / alpha_bar_s            (Ho et al., 2020, algorithm 2, between any two times)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from suffuse.configuration import register_to_config
from suffuse.errors import ConfigError, InputError
from suffuse.noise import Generators, randn_tensor
from suffuse.outputs import BaseOutput
from suffuse.schedulers.noise_schedule import MOST_TIMESTEPS, check_one_given, checked_count
from suffuse.schedulers.scheduler import Memory, SchedulerMixin, per_sample


@dataclass
class DDPMWuerstchenSchedulerOutput(BaseOutput):
    """What a step returns.

    Attributes:
        prev_sample: The sample one step less noisy, (batch, channels, height, width).
    """

    prev_sample: Tensor


class DDPMWuerstchenScheduler(SchedulerMixin):
    """Timesteps are one more than there are steps, and fall from 1 to 0; `step` wants one for each sample."""

    _compatibles = []
    init_noise_sigma: float = 1.0

    @register_to_config
    def __init__(self, scaler: float = 1.0, s: float = 0.008) -> None:
        if not scaler > 0 or not s >= 0:
            raise ConfigError(
                f"{type(self).__name__} has no schedule", found=f"scaler={scaler}, s={s}", expected="above 0; 0 or more"
            )
        self.scaler = scaler
        self.s = torch.tensor([s])
        self._start(Memory(torch.zeros(0)))

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        timesteps: list[float] | Tensor | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        """Choose the timesteps of a run: how many steps, or (falling) which timesteps, the last one among them."""
        check_one_given(num_inference_steps=num_inference_steps, timesteps=timesteps)
        if timesteps is None:
            chosen = torch.linspace(1.0, 0.0, checked_count(num_inference_steps, MOST_TIMESTEPS) + 1, device=device)
        else:
            chosen = torch.as_tensor(timesteps, dtype=torch.float32, device=device)
            if chosen.ndim != 1 or len(chosen) < 2 or not bool((chosen.diff() < 0).all()):
                raise InputError("timesteps must be in descending order", found=timesteps, expected="two or more in 0 … 1")
        self.memory = Memory(chosen, len(chosen) - 1)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | None = None) -> Tensor:
        """`sample` as the model wants to see it, which is as it is."""
        return sample

    def previous_timestep(self, timestep: Tensor) -> Tensor:
        """The timestep that a step from `timestep`, (batch,), leads to, same shape."""
        timesteps = self.timesteps
        after = int((timesteps - timestep[0]).abs().argmin()) + 1
        if after >= len(timesteps):
            raise InputError("all steps of the run are taken", remedy="leave out the last entry of scheduler.timesteps")
        return timesteps[after][None].expand(timestep.shape[0])

    def _alpha_bar(self, t: Tensor, like: Tensor) -> Tensor:
        """alpha_bar at times (batch,), shaped to multiply with `like`."""
        if self.scaler > 1:
            t = 1 - (1 - t) ** self.scaler
        elif self.scaler < 1:
            t = t**self.scaler
        s = self.s.to(like.device)
        first = torch.cos(s / (1 + s) * torch.pi * 0.5) ** 2
        return per_sample((torch.cos((t + s) / (1 + s) * torch.pi * 0.5) ** 2 / first).clamp(0.0001, 0.9999), like)

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, generator: Generators = None, return_dict: bool = True
    ) -> Any:
        """Step from `timestep`, (batch,), to the next one. Returns a `DDPMWuerstchenSchedulerOutput`."""
        self._check_ready()
        before = self.previous_timestep(timestep)
        bar, bar_before = self._alpha_bar(timestep, sample), self._alpha_bar(before, sample)
        alpha = bar / bar_before
        mean = (1.0 / alpha).sqrt() * (sample - (1 - alpha) * model_output / (1 - bar).sqrt())
        noise = randn_tensor(mean.shape, generator, model_output.device, model_output.dtype)
        added = ((1 - alpha) * (1.0 - bar_before) / (1.0 - bar)).sqrt() * noise
        previous = (mean + added * per_sample((before != 0).float(), sample)).to(model_output.dtype)
        return DDPMWuerstchenSchedulerOutput(previous) if return_dict else (previous,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`x_t` from `x_0` and noise at times (batch,) in [0, 1]."""
        bar = self._alpha_bar(timesteps, original_samples)
        return (bar.sqrt() * original_samples + (1 - bar).sqrt() * noise).to(original_samples.dtype)
