"""DDPM: Denoising Diffusion Probabilistic Models (Ho, Jain and Abbeel, 2020, https://arxiv.org/abs/2006.11239).

x_{t-1} = sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t) x_0
        + sqrt(alpha_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) x_t + sigma_t z                 (equations 6 and 7)
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from suffuse.configuration import register_to_config
from suffuse.errors import InputError
from suffuse.noise import Generators, randn_tensor
from suffuse.schedulers.noise_schedule import BetaSchedule, TimestepSpacing, check_one_given, checked_count, checked_timesteps
from suffuse.schedulers.prediction import X0, PredictionType
from suffuse.schedulers.scheduler import Memory, on_device, rows, stepped
from suffuse.schedulers.variance_preserving import VariancePreservingScheduler


class DDPMScheduler(VariancePreservingScheduler):
    """The sampler of the original paper: every step adds noise again."""

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: BetaSchedule = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        variance_type: Literal[
            "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"
        ] = "fixed_small",
        clip_sample: bool = True,
        prediction_type: PredictionType = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: TimestepSpacing = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._prepare()
        self._start(Memory(torch.arange(num_train_timesteps).flip(0)))

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: str | torch.device | None = None, timesteps: list[int] | None = None
    ) -> None:
        """Choose the timesteps of a run: how many, or (falling) which."""
        check_one_given(num_inference_steps=num_inference_steps, timesteps=timesteps)
        if timesteps is None:
            chosen = self._spaced(checked_count(num_inference_steps, len(self)))
        else:
            chosen = checked_timesteps(timesteps, len(self)).astype("int64")
        self.memory = Memory(on_device(chosen, device, torch.int64), num_inference_steps or len(chosen))

    def previous_timestep(self, timestep: int | Tensor) -> int:
        """The timestep that a step from `timestep` leads to; -1 after the last."""
        return self._steps()[self._training_timestep(timestep)][0]

    def _steps(self) -> dict[int, tuple[Any, ...]]:
        return self.memory.derive("steps", self._all_steps)

    def _all_steps(self) -> dict[int, tuple[Any, ...]]:
        """Timestep → (previous timestep, *its coefficients)."""
        t = self.timesteps.cpu()
        previous, alpha_bar = torch.cat([t[1:], torch.tensor([-1])]), self.alphas_cumprod.cpu()
        bar, bar_prev = alpha_bar[t], torch.cat([alpha_bar[t[1:]], torch.tensor([1.0])])
        beta = 1 - bar / bar_prev
        small = torch.clamp((1 - bar_prev) / (1 - bar) * beta, min=1e-20)
        scales = {
            "fixed_small": lambda: small**0.5,
            "fixed_small_log": lambda: torch.exp(0.5 * torch.log(small)),
            "fixed_large": lambda: beta**0.5,
            "fixed_large_log": lambda: torch.exp(0.5 * torch.log(beta)),
        }
        deviation = scales.get(self.config["variance_type"], lambda: small)()
        columns = rows((*posterior(bar, bar_prev), deviation, torch.log(small), torch.log(beta)))
        return {now: (before, *row) for now, before, row in zip(t.tolist(), previous.tolist(), columns, strict=True)}

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, generator: Generators = None, return_dict: bool = True
    ) -> Any:
        """Step from `timestep` to the next one of the schedule."""
        t = self._training_timestep(timestep)
        row = self._steps().get(t)
        if row is None:
            raise InputError(f"timestep {t} is not one of scheduler.timesteps", remedy="pass an entry of scheduler.timesteps")
        _, signal, noise, of_x0, of_sample, deviation, log_small, log_large = row
        learned = self.config["variance_type"] in ("learned", "learned_range")
        if learned:
            if model_output.shape[1] != 2 * sample.shape[1]:
                raise InputError(
                    f"variance_type={self.config['variance_type']!r} needs a model with twice the channels of the sample",
                    found=f"{model_output.shape[1]} for {sample.shape[1]}",
                )
            model_output, predicted = model_output.split(sample.shape[1], dim=1)
            if self.config["variance_type"] == "learned":
                deviation = predicted**0.5
            else:
                share = (predicted + 1) / 2
                deviation = torch.exp(0.5 * (share * log_large + (1 - share) * log_small))
        x0 = self._bounded(X0[self.config["prediction_type"]](sample, model_output, signal, noise))
        previous = of_x0 * x0 + of_sample * sample
        if t > 0:
            drawn = randn_tensor(model_output.shape, generator, model_output.device, model_output.dtype)
            previous = previous + deviation * drawn
        return stepped(return_dict, previous, x0)


def posterior(bar: Tensor, bar_prev: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a step from `alpha_bar_t` to `alpha_bar_{t-1}`: signal and noise, and the weights of x_0 and x_t in its mean."""
    noise, alpha = 1 - bar, bar / bar_prev
    return bar**0.5, noise**0.5, bar_prev**0.5 * (1 - alpha) / noise, alpha**0.5 * (1 - bar_prev) / noise
