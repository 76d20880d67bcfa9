"""DPM-Solver(2S, 3S) and relatives (Lu et al., 2022, https://arxiv.org/abs/2206.00927): differences within a step.

A step of order k is k calls of the model, which all start from the sample at its beginning; the sigmas between are its
intermediate points, so that the differences are relative to the first of its outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from suffuse.configuration import register_to_config
from suffuse.errors import InputError
from suffuse.noise import Generators, randn_tensor
from suffuse.schedulers.dpm_solver import INTEGRATORS, TRANSLATIONS, AlgorithmType, SolverType, check, combined
from suffuse.schedulers.log_snr import LogSnrScheduler, MultistepMemory, needed
from suffuse.schedulers.noise_schedule import Array, BetaSchedule, FinalSigma, spaced_timesteps
from suffuse.schedulers.prediction import FlowPredictionType
from suffuse.schedulers.scheduler import Remembered, stepped


@dataclass
class SinglestepMemory(MultistepMemory):
    """Adds the order of every call, and the sample at the beginning of the step under way."""

    order_list: list[int] = field(default_factory=list[int])
    sample: Tensor | None = None


class DPMSolverSinglestepScheduler(LogSnrScheduler):
    """Order 1 to 3, whose calls of the model count as steps: 20 steps of order 2 are 10 of the solver's."""

    memory_class = SinglestepMemory
    order_list = Remembered()
    sample = Remembered()

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
        lower_order_final: bool = False,
        use_karras_sigmas: bool | None = False,
        final_sigmas_type: FinalSigma = "zero",
        lambda_min_clipped: float = -float("inf"),
        variance_type: str | None = None,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        use_flow_sigmas: bool | None = False,
        flow_shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
    ) -> None:
        self._prepare(**TRANSLATIONS)
        check(type(self).__name__, self.config)
        self.memory.order_list = self.get_order_list(num_train_timesteps)

    def _spaced(self, count: int) -> Array:
        return spaced_timesteps("linspace", count, len(self), spare=1, last=self._usable()).round()

    def _set(self, sigmas: Array, timesteps: Array, final: float, device: str | torch.device | None) -> None:
        super()._set(sigmas, timesteps, final, device)
        self.memory.order_list = self.get_order_list(len(timesteps))

    def get_order_list(self, num_inference_steps: int) -> list[int]:
        """The order of every call: 1, 2, …, k, 1, 2, …, k, as far as they go.

        The steps at the end get lower orders with `lower_order_final`, and also without where the calls do not divide into
        whole steps or the last sigma is 0, where only the first order is defined.
        """
        order, zero = self.config["solver_order"], self.config["final_sigmas_type"] == "zero"
        steps, rest = divmod(num_inference_steps, order)
        whole = list(range(1, order + 1))
        if rest == 0 and not (self.config["lower_order_final"] or zero):
            return whole * steps
        if rest == 0 and order > 1:
            steps, rest = steps - 1, order
            orders = whole * steps + [*range(1, rest), 1]
        else:
            orders = whole * steps + list(range(1, rest + 1))
        return [*orders[:-1], 1] if zero else orders

    def _coefficients(self, memory: MultistepMemory, order: int) -> tuple[Tensor, ...]:
        """Of every call: c_x, c_z, c_0, and what `_update` wants for the differences of this order."""
        config, path = self.config, self._path(memory)
        alpha, sigma, lamda = (values[1:] for values in path)
        alpha_s, sigma_s, lamda_s = (torch.roll(values[:-1], order - 1) for values in path)
        h = lamda - lamda_s
        step = INTEGRATORS[config["algorithm_type"]](alpha, sigma, alpha_s, sigma_s, h)
        common = step.c_x, step.c_z, step.c_0
        if order == 1:
            return common
        r0 = (path[2][:-1] - lamda_s) / h
        if order == 2:
            return *common, getattr(step, config["solver_type"]), 1.0 / r0
        r1 = (torch.roll(path[2][:-1], 1) - lamda_s) / h
        return *common, step.heun, 1.0 / r0, step.c_2, 1.0 / r1, r0, r1, r0 - r1

    def _update(self, outputs: list[Tensor], sample: Tensor | None, noise: Tensor | None) -> Tensor:
        """The call that has so many `outputs` of its step, oldest first."""
        c_x, c_z, c_0, *c = self._row(None, self._coefficients, len(outputs))
        terms: list[tuple[Tensor, Tensor]] = []
        match outputs:
            case [m1, m0]:
                terms = [(c[0], c[1] * (m0 - m1))]
            case [m2, m1, m0] if self.config["solver_type"] == "midpoint":
                terms = [(c[0], c[1] * (m0 - m2))]
            case [m2, m1, m0]:
                first, second = c[3] * (m1 - m2), c[1] * (m0 - m2)
                terms = [(c[0], (c[4] * first - c[5] * second) / c[6]), (c[2], 2.0 * (second - first) / c[6])]
            case _:
                pass
        return combined(needed(sample), noise, c_x, c_z, (c_0, outputs[0]), *terms)

    def singlestep_dpm_solver_update(
        self,
        model_output_list: list[Tensor],
        *,
        sample: Tensor | None = None,
        order: int | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """A call of this order, from the converted model outputs of its step, oldest first.

        Raises:
            InputError: `order` is not 1, 2 or 3.
        """
        order = order or self.order_list[self.step_index]
        if order not in (1, 2, 3):
            raise InputError("order is not possible", found=order, expected="1, 2 or 3")
        return self._update(model_output_list[-order:], sample, noise)

    def dpm_solver_first_order_update(
        self, model_output: Tensor, *, sample: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """The first call of a step."""
        return self._update([model_output], sample, noise)

    def singlestep_dpm_solver_second_order_update(
        self, model_output_list: list[Tensor], *, sample: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """The second call of a step."""
        return self._update(model_output_list[-2:], sample, noise)

    def singlestep_dpm_solver_third_order_update(
        self, model_output_list: list[Tensor], *, sample: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """The third call of a step."""
        return self._update(model_output_list[-3:], sample, noise)

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True, generator: Generators = None
    ) -> Any:
        """Take the next call of a step."""
        self._check_ready()
        memory = self.memory
        self._row(timestep, self._now)
        output = self.convert_model_output(model_output, sample=sample)
        noise = None
        if self.config["algorithm_type"].startswith("sde"):
            noise = randn_tensor(output.shape, generator, output.device, output.dtype)
        memory.model_outputs = [*memory.model_outputs[1:], output]
        have = sum(one is not None for one in memory.model_outputs)
        order = min(memory.order_list[memory.step_index], have)
        if order == 1:
            memory.sample = sample
        previous = self._update(memory.model_outputs[-order:], memory.sample, noise)
        memory.step_index += 1
        return stepped(return_dict, previous)
