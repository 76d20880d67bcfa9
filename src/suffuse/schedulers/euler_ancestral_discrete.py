"""Ancestral sampling with Euler steps (Crowson, k-diffusion, `sample_euler_ancestral`).

sigma_up² = sigma_next² (sigma² - sigma_next²) / sigma²,  sigma_down² = sigma_next² - sigma_up²
x_next = x + (sigma_down - sigma) (x - x_0) / sigma + sigma_up z
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from suffuse.configuration import register_to_config
from suffuse.noise import Generators, randn_tensor
from suffuse.schedulers.noise_schedule import BetaSchedule, TimestepSpacing, training_sigmas
from suffuse.schedulers.prediction import PredictionType
from suffuse.schedulers.scheduler import stepped
from suffuse.schedulers.sigma_space import SigmaMemory, SigmaScheduler, ancestral, levels


class EulerAncestralDiscreteScheduler(SigmaScheduler):
    """Euler steps that go further down than asked, and add noise to come back up."""

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: BetaSchedule = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        prediction_type: PredictionType = "epsilon",
        timestep_spacing: TimestepSpacing = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._prepare()
        falling = training_sigmas(self.alphas_cumprod)[::-1]
        self._start(self._memory(None, falling, np.arange(num_train_timesteps)[::-1]))

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        """Step to the next sigma."""
        self._check_no_index(timestep)
        self._check_scaled()
        sigma, c_out, variance, sigma_up, down = self._row(timestep, _ancestral)
        sample = sample.to(torch.float32)
        x0 = self._x0(sample, model_output, sigma, c_out, variance)
        derivative = (sample - x0) / sigma
        noise = randn_tensor(model_output.shape, generator, model_output.device, model_output.dtype)
        previous = sample + derivative * down + noise * sigma_up
        self.memory.step_index += 1
        return stepped(return_dict, previous.to(model_output.dtype), x0)


def _ancestral(memory: SigmaMemory) -> tuple[Tensor, ...]:
    """sigma, the scales of a v-prediction, sigma_up, and sigma_down - sigma, of every step."""
    sigma, c_out, variance, _ = levels(memory)
    up, down = ancestral(sigma, memory.sigmas[1:])
    return sigma, c_out, variance, up, down - sigma
