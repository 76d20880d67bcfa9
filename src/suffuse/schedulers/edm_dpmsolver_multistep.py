"""DPM-Solver++ (Lu et al., 2022, https://arxiv.org/abs/2211.01095, algorithm 2) for EDM models (Karras et al., 2022).

The updates are those of `dpmsolver_multistep` with alpha = 1, so that lambda = -log(sigma).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from suffuse.configuration import register_to_config
from suffuse.errors import ConfigError
from suffuse.schedulers.dpm_solver import DATA, TRANSLATIONS, AlgorithmType, SolverType, check
from suffuse.schedulers.dpmsolver_multistep import DPMSolverMultistepScheduler
from suffuse.schedulers.edm import FINAL, PreconditionedScheduler
from suffuse.schedulers.log_snr import MultistepMemory, needed
from suffuse.schedulers.noise_schedule import FinalSigma, checked_count


class ExplodingDPMSolver(  # pyright: ignore[reportIncompatibleVariableOverride]  init_noise_sigma follows from the configuration
    PreconditionedScheduler, DPMSolverMultistepScheduler
):
    """Base of the DPM-Solvers for EDM models: where they get their sigmas, and x_0."""

    _compatibles = []

    def _prepare(self, **translations: dict[str, str]) -> None:
        """Check what the configuration names, and make the first memory."""
        for entry, values in translations.items():
            if self.config[entry] in values:
                self.register_to_config(**{entry: values[self.config[entry]]})
        self._check_config()
        self._start(self._begun(None, torch.linspace(0, 1, len(self)), 0.0))

    def _begun(self, count: int | None, ramp: Tensor, final: float, device: str | torch.device | None = None) -> MultistepMemory:
        sigmas, timesteps = self._sigmas(ramp), self.precondition_noise(self._sigmas(ramp))
        return self._memory(timesteps.to(device), count, torch.cat([sigmas, torch.tensor([final])]).numpy())

    def set_timesteps(  # pyright: ignore[reportIncompatibleMethodOverride]  it takes no timesteps
        self, num_inference_steps: int | None = None, device: str | torch.device | None = None
    ) -> None:
        """Choose the schedule of a run."""
        count = checked_count(num_inference_steps, len(self))
        final = self.config["sigma_min"] * FINAL[self.config["final_sigmas_type"]]
        self.memory = self._begun(count, torch.linspace(0, 1, count), float(final), device)

    def _signal_and_noise(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(sigma), sigma

    def _denoising(self, memory: MultistepMemory) -> tuple[Tensor, ...]:
        return self._skip_and_out(memory.sigmas[:-1])

    def convert_model_output(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model_output: Tensor, sample: Tensor | None = None
    ) -> Tensor:
        """The clean sample, thresholded as configured, from what the model made of `sample` at the current step."""
        c_skip, c_out = self._row(None, self._denoising)
        return self._thresholded(c_skip * needed(sample) + c_out * model_output)

    def _type(self, output: Tensor) -> torch.dtype:
        return output.dtype


class EDMDPMSolverMultistepScheduler(ExplodingDPMSolver):
    """Order 1 to 3 with one call of the model a step."""

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        sigma_schedule: Literal["karras", "exponential"] = "karras",
        num_train_timesteps: int = 1000,
        prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
        rho: float = 7.0,
        solver_order: int = 2,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: AlgorithmType = "dpmsolver++",
        solver_type: SolverType = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        final_sigmas_type: FinalSigma = "zero",
    ) -> None:
        self._prepare(**TRANSLATIONS)
        if self.config["algorithm_type"] not in DATA:
            raise ConfigError(
                f"{type(self).__name__}: algorithm_type is not possible", found=algorithm_type, expected=" or ".join(DATA)
            )
        check(type(self).__name__, self.config)
