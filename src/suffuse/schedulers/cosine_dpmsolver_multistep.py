"""DPM-Solver++ for the stochastic equation, with the noise of a Brownian path (Stable Audio Open: Evans et al., 2024).

The updates are those of `dpmsolver_multistep` (Lu et al., 2022, https://arxiv.org/abs/2211.01095, algorithm "SDE-DPM-Solver++"),
the preconditioning that of `edm`. The model knows sigma by 2 atan(sigma) / pi: the time of a cosine schedule, 0 to 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from suffuse.configuration import register_to_config
from suffuse.errors import ConfigError
from suffuse.noise import Generators
from suffuse.schedulers.brownian import Seed, brownian_noise, seed_of
from suffuse.schedulers.dpm_solver import TRANSLATIONS, SolverType
from suffuse.schedulers.edm_dpmsolver_multistep import ExplodingDPMSolver
from suffuse.schedulers.log_snr import MultistepMemory
from suffuse.schedulers.noise_schedule import FinalSigma
from suffuse.schedulers.scheduler import Remembered


@dataclass
class BrownianMultistepMemory(MultistepMemory):
    """Adds the seed of the noise."""

    noise_seed: Seed | None = None


class CosineDPMSolverMultistepScheduler(ExplodingDPMSolver):
    """Order 1 or 2 with one call of the model and one draw of noise a step. Needs torchsde.

    `step` takes of `generator` only its seed, at the first step.
    """

    memory_class = BrownianMultistepMemory
    noise_seed = Remembered()

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.3,
        sigma_max: float = 500,
        sigma_data: float = 1.0,
        sigma_schedule: Literal["exponential", "karras"] = "exponential",
        num_train_timesteps: int = 1000,
        solver_order: int = 2,
        prediction_type: Literal["epsilon", "v_prediction"] = "v_prediction",
        rho: float = 7.0,
        solver_type: SolverType = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        final_sigmas_type: FinalSigma = "zero",
    ) -> None:
        if solver_order not in (1, 2):
            raise ConfigError(f"{type(self).__name__}: solver_order is not possible", found=solver_order, expected="1 or 2")
        self._prepare(solver_type=TRANSLATIONS["solver_type"])

    @property
    def _algorithm(self) -> str:
        return "sde-dpmsolver++"

    def precondition_noise(self, sigma: float | Tensor) -> Tensor:
        """The timestep that the model knows `sigma` by, 0 to 1."""
        return torch.atleast_1d(torch.as_tensor(sigma)).atan() / math.pi * 2

    def _noise(self, output: Tensor, generator: Generators) -> Tensor:
        memory = self.memory
        if memory.noise_seed is None:
            memory.noise_seed = seed_of(generator)
        low, high = torch.tensor([self.config["sigma_min"], self.config["sigma_max"]], dtype=torch.float32).tolist()
        sigma, sigma_next = memory.sigmas[memory.step_index : memory.step_index + 2]
        return brownian_noise(memory, memory.noise_seed, (low, high), output, sigma, sigma_next)
