"""Reverse diffusion of the variance preserving SDE (Song et al., 2021, https://arxiv.org/abs/2011.13456).

x' = x + (-beta(t) x / 2 - beta(t) score) dt + sqrt(beta(t) |dt|) z,   beta(t) = beta_min + t (beta_max - beta_min)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from suffuse.configuration import register_to_config
from suffuse.noise import Generators, randn_tensor
from suffuse.schedulers.noise_schedule import checked_count
from suffuse.schedulers.scheduler import Memory, SchedulerMixin, per_sample


class ScoreSdeVpScheduler(SchedulerMixin):
    """Euler-Maruyama in continuous time: timesteps fall from 1 to `sampling_eps`, and `step_pred` is a step."""

    _compatibles = []

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 2000, beta_min: float = 0.1, beta_max: float = 20, sampling_eps: float = 0.001
    ) -> None:
        self._start(Memory(torch.zeros(0)))

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the timesteps of a run."""
        count = checked_count(num_inference_steps, len(self))
        self.memory = Memory(torch.linspace(1, self.config["sampling_eps"], count, device=device), count)

    def step_pred(self, score: Tensor, x: Tensor, t: Tensor, generator: Generators = None) -> tuple[Tensor, Tensor]:
        """A step from `t`.

        Args:
            score: The model's prediction of epsilon, (batch, …).
            x: The sample, same shape.
            t: Times in (0, 1], (batch,) or (1,).
            generator: Source of the noise.

        Returns:
            The sample one step less noisy, and its mean.
        """
        self._check_ready()
        low, width = self.config["beta_min"], self.config["beta_max"] - self.config["beta_min"]
        log_mean = -0.25 * t**2 * width - 0.5 * t * low
        score = -score / per_sample(torch.sqrt(1.0 - torch.exp(2.0 * log_mean)), score)
        dt, beta = -1.0 / len(self.timesteps), per_sample(low + t * width, x)
        deviation = torch.sqrt(beta)
        mean = x + (-0.5 * beta * x - deviation**2 * score) * dt
        return mean + deviation * math.sqrt(-dt) * randn_tensor(x.shape, generator, x.device, x.dtype), mean
