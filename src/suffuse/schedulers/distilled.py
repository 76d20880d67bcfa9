"""What few-step models that were distilled on a part of the timesteps have in common: which timesteps a run may use."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from suffuse.configuration import register_to_config
from suffuse.errors import InputError
from suffuse.schedulers.noise_schedule import (
    Array,
    BetaSchedule,
    TimestepSpacing,
    check_one_given,
    checked_count,
    checked_timesteps,
)
from suffuse.schedulers.prediction import PredictionType
from suffuse.schedulers.scheduler import Memory, on_device
from suffuse.schedulers.variance_preserving import VariancePreservingScheduler


class DistilledScheduler(VariancePreservingScheduler):
    """Base of LCM and TCD."""

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
        distilled = self._distilled(original_inference_steps, strength)
        if timesteps is not None:
            chosen = checked_timesteps(timesteps, len(self)).astype("int64")
            count = len(chosen)
            if strange := sorted(set(chosen.tolist()) - set(self._distilled(original_inference_steps, 1.0).tolist())):
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

    def _distilled(self, original: int | None, strength: float) -> Array:
        """The timesteps the model was distilled on, rising: `original` of them, or the configured number."""
        original = original or int(self.config["original_inference_steps"])
        if not 1 <= original <= len(self):
            raise InputError("original_inference_steps is not possible", found=original, expected=f"1 to {len(self)}")
        return np.arange(1, int(original * strength) + 1) * (len(self) // original) - 1

    def previous_timestep(self, timestep: int | Tensor) -> int:
        """The timestep that a step from `timestep` leads to; -1 after the last."""
        after = self.index_for_timestep(timestep) + 1
        return int(self.timesteps[after]) if after < len(self.timesteps) else -1
