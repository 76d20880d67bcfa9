"""DDIM: Denoising Diffusion Implicit Models (Song, Meng and Ermon, 2021, https://arxiv.org/abs/2010.02502).

x_{t-1} = sqrt(alpha_{t-1}) x_0 + sqrt(1 - alpha_{t-1} - sigma_t²) epsilon + sigma_t z            (equation 12)
sigma_t = eta sqrt((1 - alpha_{t-1}) / (1 - alpha_t)) sqrt(1 - alpha_t / alpha_{t-1})             (equation 16)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from suffuse.configuration import register_to_config
from suffuse.errors import InputError
from suffuse.noise import Generators, randn_tensor
from suffuse.schedulers.noise_schedule import BetaSchedule, TimestepSpacing, checked_count
from suffuse.schedulers.prediction import EPSILON, X0, PredictionType, epsilon_of_x0
from suffuse.schedulers.scheduler import Memory, on_device, stepped
from suffuse.schedulers.variance_preserving import VariancePreservingScheduler, alpha_bars


class DDIMScheduler(VariancePreservingScheduler):
    """Deterministic sampling with few steps; `eta=1` gives back the noise of DDPM."""

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
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: TimestepSpacing = "leading",
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._prepare()
        self._start(Memory(torch.arange(num_train_timesteps).flip(0)))

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the timesteps of a run."""
        count = checked_count(num_inference_steps, len(self))
        self.memory = Memory(on_device(self._spaced(count), device, torch.int64), count)

    def _factors(self, gap: int, eta: float) -> Tensor:
        """Sqrt of alpha_t, of 1 - alpha_t, of alpha_{t-1}, of what noise is left, and sigma_t: (training timesteps, 5)."""
        alpha, alpha_prev = alpha_bars(self, self.final_alpha_cumprod, gap)
        noise = 1 - alpha
        sigma = eta * (((1 - alpha_prev) / noise) * (1 - alpha / alpha_prev)) ** 0.5
        left = (1 - alpha_prev - sigma**2).clamp(min=0) ** 0.5  # with eta=1 and little signal, rounding can take it below 0
        return torch.stack([alpha**0.5, noise**0.5, alpha_prev**0.5, left, sigma], dim=1)

    def _parts(
        self, model_output: Tensor, sample: Tensor, signal: Tensor, noise: Tensor, again: bool = False
    ) -> tuple[Tensor, Tensor]:
        """`x_0`, bounded as configured, and epsilon, derived from it `again` or not."""
        kind = self.config["prediction_type"]
        x0, epsilon = X0[kind](sample, model_output, signal, noise), EPSILON[kind](sample, model_output, signal, noise)
        x0 = self._bounded(x0)
        return x0, epsilon_of_x0(sample, x0, signal, noise) if again else epsilon

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Step from `timestep` to the one before.

        Keywords of its own:
            eta: Share of the noise of DDPM, 0 to 1.
            use_clipped_model_output: Derive epsilon again from the clipped `x_0` (GLIDE does).
        """
        self._check_ready()
        if not 0 <= eta <= 1:
            raise InputError("eta is not possible", found=eta, expected="0 (deterministic) to 1 (as much noise as DDPM)")
        memory, t = self.memory, self._training_timestep(timestep)
        gap = len(self) // memory.num_inference_steps
        signal, noise, signal_prev, direction, sigma = self._row_at(t, self._factors, gap, eta)
        x0, epsilon = self._parts(model_output, sample, signal, noise, use_clipped_model_output)
        previous = signal_prev * x0 + direction * epsilon
        if eta > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(model_output.shape, generator, model_output.device, model_output.dtype)
            elif generator is not None:
                raise InputError("generator and variance_noise cannot both be given", remedy="leave one of them None")
            previous = previous + sigma * variance_noise
        return stepped(return_dict, previous, x0)
