"""LCM: Latent Consistency Models (Luo et al., 2023, https://arxiv.org/abs/2310.04378).

f(x_t, t) = c_skip x_t + c_out x_0,  x_{t'} = sqrt(alpha_bar_{t'}) f(x_t, t) + sqrt(1 - alpha_bar_{t'}) z
c_skip = sigma_d² / ((s t)² + sigma_d²),  c_out = s t / sqrt((s t)² + sigma_d²)     (Song et al., 2023, appendix C; sigma_d = 1/2)
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from suffuse.configuration import register_to_config
from suffuse.errors import InputError
from suffuse.noise import randn_tensor
from suffuse.outputs import BaseOutput
from suffuse.schedulers.noise_schedule import (
    Array,
    BetaSchedule,
    TimestepSpacing,
    check_one_given,
    checked_count,
    checked_timesteps,
)
from suffuse.schedulers.prediction import X0, PredictionType
from suffuse.schedulers.scheduler import Memory, on_device
from suffuse.schedulers.variance_preserving import VariancePreservingScheduler

SIGMA_DATA = 0.5


@dataclass
class LCMSchedulerOutput(BaseOutput):
    """What a step returns.

    Attributes:
        prev_sample: The sample one step less noisy, (batch, channels, height, width).
        denoised: The consistency function's clean sample, same shape.
    """

    prev_sample: Tensor
    denoised: Tensor | None = None


class LCMScheduler(VariancePreservingScheduler):
    """One to eight steps of a consistency model, each to the clean sample and back up with new noise."""

    _compatibles = []

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: BetaSchedule = "scaled_linear",
        trained_betas: np.ndarray | list[float] | None = None,
        original_inference_steps: int = 50,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: PredictionType = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: TimestepSpacing = "leading",
        timestep_scaling: float = 10.0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._prepare()
        self._start(Memory(torch.arange(num_train_timesteps).flip(0)))

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        original_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        strength: float = 1.0,
    ) -> None:
        """Choose the timesteps of a run out of those the model was distilled on, or (falling) which.

        Keywords of its own:
            original_inference_steps: How many timesteps the model was distilled on, instead of the configured number.
            strength: Use only this share of them, the less noisy ones, above 0 to 1.
        """
        check_one_given(num_inference_steps=num_inference_steps, timesteps=timesteps)
        if not 0 < strength <= 1:
            raise InputError("strength is not possible", found=strength, expected="above 0, to 1")
        original = original_inference_steps or self.config["original_inference_steps"]
        distilled = self._distilled(original, strength)
        if timesteps is not None:
            chosen = checked_timesteps(timesteps, len(self)).astype("int64")
            count = len(chosen)
            if strange := sorted(set(chosen.tolist()) - set(self._distilled(original, 1.0).tolist())):
                warnings.warn(f"the model was not distilled on timesteps {strange}", stacklevel=2)
            chosen = chosen[max(count - int(count * strength), 0) :]
        else:
            count = checked_count(num_inference_steps, len(self))
            if count > len(distilled):
                raise InputError(
                    f"num_inference_steps={count} is more than the {len(distilled)} timesteps to choose from",
                    remedy="use fewer steps, more original_inference_steps or more strength",
                )
            chosen = distilled[::-1][np.floor(np.linspace(0, len(distilled), count, endpoint=False)).astype("int64")]
        self.memory = Memory(on_device(chosen.copy(), device, torch.int64), count)

    def _distilled(self, original: int, strength: float) -> Array:
        """The timesteps the model was distilled on, rising."""
        if not 1 <= original <= len(self):
            raise InputError("original_inference_steps is not possible", found=original, expected=f"1 to {len(self)}")
        return np.arange(1, int(original * strength) + 1) * (len(self) // original) - 1

    def previous_timestep(self, timestep: int | Tensor) -> int:
        """The timestep that a step from `timestep` leads to; -1 after the last."""
        after = self.index_for_timestep(timestep) + 1
        return int(self.timesteps[after]) if after < len(self.timesteps) else -1

    def get_scalings_for_boundary_condition_discrete(self, timestep: float | Tensor) -> tuple[Any, Any]:
        """(c_skip, c_out) at `timestep`: 1 and 0 at timestep 0, so that `f(x_0, 0) = x_0`."""
        scaled = timestep * self.config["timestep_scaling"]
        square = scaled**2 + SIGMA_DATA**2
        return SIGMA_DATA**2 / square, scaled / square**0.5

    def _factors(self, memory: Memory) -> tuple[Tensor, ...]:
        """Signal, noise, c_skip and c_out of every step, and signal and noise of the one after."""
        t, alpha_bar = memory.timesteps.cpu(), self.alphas_cumprod.cpu()
        here, after = alpha_bar[t], alpha_bar[torch.cat([t[1:], t[-1:]])]
        scalings = self.get_scalings_for_boundary_condition_discrete(t)
        return here.sqrt(), (1 - here).sqrt(), *scalings, after.sqrt(), (1 - after).sqrt()

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generator | list[Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Step to the next timestep; the last step ends at the clean sample. Returns an `LCMSchedulerOutput`."""
        self._check_ready()
        signal, noise, c_skip, c_out, signal_next, noise_next = self._row(timestep, self._factors)
        memory = self.memory
        x0 = self._bounded(X0[self.config["prediction_type"]](sample, model_output, signal, noise))
        denoised = previous = c_out * x0 + c_skip * sample
        if memory.step_index != memory.num_inference_steps - 1:
            drawn = randn_tensor(model_output.shape, generator, model_output.device, denoised.dtype)
            previous = signal_next * denoised + noise_next * drawn
        memory.step_index += 1
        return LCMSchedulerOutput(previous, denoised) if return_dict else (previous, denoised)
