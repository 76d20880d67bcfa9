"""DPM-Solver++ run backwards, from a clean sample to the noise it comes from (Mokady et al., 2023, https://arxiv.org/abs/2211.09794).

The updates are those of `dpmsolver_multistep` (Lu et al., 2022, https://arxiv.org/abs/2211.01095, algorithm 2), sigmas rise:
lambda falls, every h is negative.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from suffuse.configuration import register_to_config
from suffuse.errors import ConfigError
from suffuse.schedulers.dpm_solver import TRANSLATIONS, AlgorithmType, SolverType, check
from suffuse.schedulers.dpmsolver_multistep import DPMSolverMultistepScheduler
from suffuse.schedulers.log_snr import LogSnrScheduler
from suffuse.schedulers.noise_schedule import (
    Array,
    BetaSchedule,
    TimestepSpacing,
    chosen_ladder,
    spaced_timesteps,
    training_sigmas,
)
from suffuse.schedulers.prediction import FlowPredictionType


class DPMSolverMultistepInverseScheduler(DPMSolverMultistepScheduler):
    """Timesteps rise: each step makes the sample noisier."""

    ladders = LogSnrScheduler.ladders

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: BetaSchedule = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        solver_order: int = 2,
        prediction_type: FlowPredictionType = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: AlgorithmType = "dpmsolver++",
        solver_type: SolverType = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        use_karras_sigmas: bool | None = False,
        lambda_min_clipped: float = -float("inf"),
        variance_type: str | None = None,
        timestep_spacing: TimestepSpacing = "linspace",
        steps_offset: int = 0,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        use_flow_sigmas: bool | None = False,
        flow_shift: float = 1.0,
    ) -> None:
        if algorithm_type.startswith("sde"):
            raise ConfigError(
                f"{type(self).__name__}: algorithm_type={algorithm_type!r} adds noise, which cannot be taken back",
                remedy=f"use algorithm_type={algorithm_type.removeprefix('sde-')!r}",
            )
        self._prepare(**TRANSLATIONS)
        check(type(self).__name__, self.config)
        self.memory.timesteps = self.memory.timesteps.flip(0)

    def set_timesteps(  # pyright: ignore[reportIncompatibleMethodOverride]  it takes no timesteps
        self, num_inference_steps: int | None = None, device: str | torch.device | None = None
    ) -> None:
        """Choose the schedule of a run, rising. Timesteps that would stand twice stand once, so there may be fewer steps."""
        super().set_timesteps(num_inference_steps, device)

    def _rounds(self, ladder: str) -> bool:
        return ladder == "use_karras_sigmas"

    def _shift(self, mu: float | None) -> float:
        return self.config["flow_shift"]

    def _final_sigma(self) -> float:
        return float(training_sigmas(self.alphas_cumprod)[self._usable() - 1])

    def _spaced(self, count: int) -> Array:
        """Whole timesteps, rising, that leave out the highest: it is where the last step leads."""
        config = self.config
        spare = 0 if config["timestep_spacing"] == "trailing" else 1
        spaced = spaced_timesteps(
            config["timestep_spacing"], count + spare, len(self), config["steps_offset"], last=self._usable()
        ).round()
        return spaced[spare:][::-1].copy()

    def _ends(self, training: Array) -> Array:
        return training

    def _type(self, output: Tensor) -> torch.dtype:
        return output.dtype

    def _set(self, sigmas: Array, timesteps: Array, final: float, device: str | torch.device | None) -> None:
        if chosen_ladder(self.config, self.ladders):
            final = float(sigmas[-1])
        once = timesteps[np.sort(np.unique(timesteps, return_index=True)[1])]
        super()._set(sigmas, once, final, device)
