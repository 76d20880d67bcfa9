"""DDIM run backwards: from a clean sample to the noise it comes from (Mokady et al., 2023, https://arxiv.org/abs/2211.09794).

x_{t+1} = sqrt(alpha_{t+1}) x_0 + sqrt(1 - alpha_{t+1}) epsilon        (Song, Meng and Ermon, 2021, equation 13, reversed)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from suffuse.configuration import register_to_config
from suffuse.schedulers.noise_schedule import BetaSchedule, TimestepSpacing, checked_count
from suffuse.schedulers.prediction import EPSILON, X0, PredictionType
from suffuse.schedulers.scheduler import Memory, on_device, stepped
from suffuse.schedulers.variance_preserving import VariancePreservingScheduler, alpha_bars


class DDIMInverseScheduler(VariancePreservingScheduler):
    """Timesteps rise: each step makes the sample noisier.

    Attributes:
        initial_alpha_cumprod: `alpha_bar` before the first step.
    """

    _compatibles = []

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: BetaSchedule = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: PredictionType = "epsilon",
        clip_sample_range: float = 1.0,
        timestep_spacing: TimestepSpacing = "leading",
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._prepare()
        self._start(Memory(torch.arange(num_train_timesteps)))

    @property
    def initial_alpha_cumprod(self) -> Tensor:
        """`alpha_bar` before the first step, zero-dimensional."""
        return self.final_alpha_cumprod

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the timesteps of a run, rising."""
        count = checked_count(num_inference_steps, len(self))
        self.memory = Memory(on_device(self._spaced(count)[::-1].copy(), device, torch.int64), count)

    def _factors(self, gap: int) -> Tensor:
        """Sqrt of alpha_{t-gap}, of 1 - alpha_{t-gap}, of alpha_t and of 1 - alpha_t: (training timesteps, 4)."""
        alpha_next, alpha = alpha_bars(self, self.final_alpha_cumprod, gap)
        return torch.stack([alpha**0.5, (1 - alpha) ** 0.5, alpha_next**0.5, (1 - alpha_next) ** 0.5], dim=1)

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        """Step to `timestep` from the one before, which is less noisy."""
        self._check_ready()
        t, kind = self._training_timestep(timestep), self.config["prediction_type"]
        signal, noise, signal_next, noise_next = self._row_at(t, self._factors, len(self) // self.memory.num_inference_steps)
        x0, epsilon = X0[kind](sample, model_output, signal, noise), EPSILON[kind](sample, model_output, signal, noise)
        x0 = self._bounded(x0)
        return stepped(return_dict, signal_next * x0 + noise_next * epsilon, x0)
