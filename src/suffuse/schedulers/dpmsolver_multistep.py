"""DPM-Solver++(2M, 3M) and relatives (Lu et al., 2022, https://arxiv.org/abs/2211.01095): differences over past steps.

r_0 = h_{i-1} / h_i,   D_1 = (m_i - m_{i-1}) / r_0                                                 (algorithm 2)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from suffuse.configuration import register_to_config
from suffuse.noise import Generators, randn_tensor
from suffuse.schedulers.dpm_solver import INTEGRATORS, TRANSLATIONS, AlgorithmType, SolverType, check, combined
from suffuse.schedulers.log_snr import LogSnrScheduler, MultistepMemory, needed
from suffuse.schedulers.noise_schedule import BetaSchedule, FinalSigma, TimestepSpacing
from suffuse.schedulers.prediction import FlowPredictionType
from suffuse.schedulers.scheduler import stepped


class DPMSolverMultistepScheduler(LogSnrScheduler):
    """Order 1 to 3 with one call of the model a step; good pictures in 20 steps."""

    ladders = ("use_karras_sigmas", "use_lu_lambdas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas")

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
        use_lu_lambdas: bool | None = False,
        final_sigmas_type: FinalSigma = "zero",
        lambda_min_clipped: float = -float("inf"),
        variance_type: str | None = None,
        timestep_spacing: TimestepSpacing = "linspace",
        steps_offset: int = 0,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        use_flow_sigmas: bool | None = False,
        flow_shift: float = 1.0,
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
    ) -> None:
        self._prepare(**TRANSLATIONS)
        check(type(self).__name__, self.config)

    def _rounds(self, ladder: str) -> bool:
        return ladder in ("use_karras_sigmas", "use_lu_lambdas") and self.config["beta_schedule"] != "squaredcos_cap_v2"

    @property
    def _algorithm(self) -> str:
        return self.config["algorithm_type"]

    def _noise(self, output: Tensor, generator: Generators) -> Tensor:
        """Noise for this step."""
        return randn_tensor(output.shape, generator, output.device, self._type(output))

    def _coefficients(self, memory: MultistepMemory, order: int) -> tuple[Tensor, ...]:
        """Of every step: c_x, c_z, c_0, and what `_update` wants for the differences of this order."""
        config, (alpha, sigma, lamda) = self.config, self._path(memory)
        h = lamda[1:] - lamda[:-1]
        step = INTEGRATORS[self._algorithm](alpha[1:], sigma[1:], alpha[:-1], sigma[:-1], h)
        r0, r1 = (torch.roll(h, back) / h for back in (1, 2))
        common = step.c_x, step.c_z, step.c_0
        if order == 1:
            return common
        if order == 2:
            return *common, getattr(step, config["solver_type"]), 1.0 / r0
        return *common, step.heun, 1.0 / r0, step.c_2, 1.0 / r1, r0 / (r0 + r1), 1.0 / (r0 + r1)

    def _update(self, outputs: list[Tensor], sample: Tensor | None, noise: Tensor | None) -> Tensor:
        """A step of the order that `outputs` (oldest first) allow."""
        c_x, c_z, c_0, *c = self._row(None, self._coefficients, len(outputs))
        match outputs:
            case [m1, m0]:
                terms = [(c[0], c[1] * (m0 - m1))]
            case [m2, m1, m0]:
                first, second = c[1] * (m0 - m1), c[3] * (m1 - m2)
                terms = [(c[0], first + c[4] * (first - second)), (c[2], c[5] * (first - second))]
            case _:
                terms = []
        return combined(needed(sample), noise, c_x, c_z, (c_0, outputs[-1]), *terms)

    def dpm_solver_first_order_update(
        self, model_output: Tensor, *, sample: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """A first-order step (DDIM) from a converted model output."""
        return self._update([model_output], sample, noise)

    def multistep_dpm_solver_second_order_update(
        self, model_output_list: list[Tensor], *, sample: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """A second-order step from the last two converted model outputs, oldest first."""
        return self._update(model_output_list[-2:], sample, noise)

    def multistep_dpm_solver_third_order_update(
        self, model_output_list: list[Tensor], *, sample: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """A third-order step from the last three converted model outputs, oldest first."""
        return self._update(model_output_list[-3:], sample, noise)

    def _order(self, memory: Any) -> int:
        """How many outputs to use at this step: fewer at both ends of a run."""
        config, total = self.config, len(memory.timesteps)
        left, short = total - memory.step_index, config["lower_order_final"] and total < 15
        if left == 1 and (short or config["euler_at_final"] or config.get("final_sigmas_type") == "zero"):
            return 1
        if left == 1 and memory.derive("stays", self._stays, memory):
            return 1
        return min(memory.lower_order_nums, config["solver_order"], 2 if left == 2 and short else 3)

    def _stays(self, memory: Any) -> bool:
        """Whether the last sigma stands twice, so that the last step has no length to divide by."""
        lamda = self._path(memory)[2]
        return bool(lamda[-1] == lamda[-2])

    def _type(self, output: Tensor) -> torch.dtype:
        """The type to add up a step in."""
        return torch.float32

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        variance_noise: Tensor | None = None,
    ) -> Any:
        """Step to the next sigma."""
        self._check_ready()
        memory = self.memory
        self._row(timestep, self._now)
        output = self.convert_model_output(model_output, sample=sample)
        noise = None
        if self._algorithm.startswith("sde"):
            noise = self._noise(output, generator) if variance_noise is None else variance_noise
            noise = noise.to(output.device, self._type(output))
        memory.model_outputs = [*memory.model_outputs[1:], output]
        memory.lower_order_nums = min(memory.lower_order_nums + 1, self.config["solver_order"])
        order = self._order(memory)
        previous = self._update(memory.model_outputs[-order:], sample.to(self._type(output)), noise)
        memory.step_index += 1
        return stepped(return_dict, previous.to(output.dtype))
