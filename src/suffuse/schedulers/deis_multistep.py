"""DEIS: Diffusion Exponential Integrator Sampler (Zhang and Chen, 2023, https://arxiv.org/abs/2204.13902), rhoAB-DEIS.

With rho = sigma / alpha, epsilon is extrapolated by a Lagrange polynomial in log rho over past steps and integrated exactly:

    x_t = alpha_t (x_s / alpha_s + sum_i C_i epsilon_i),  C_i = integral of prod_{j≠i} log(rho / rho_j) / log(rho_i / rho_j) d rho
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from suffuse.configuration import register_to_config
from suffuse.errors import ConfigError
from suffuse.schedulers.log_snr import LogSnrScheduler, MultistepMemory, needed
from suffuse.schedulers.noise_schedule import Array, BetaSchedule, TimestepSpacing, chosen_ladder, training_sigmas
from suffuse.schedulers.prediction import FlowPredictionType, epsilon_of_x0
from suffuse.schedulers.scheduler import stepped

TRANSLATIONS: dict[str, dict[str, str]] = {
    "algorithm_type": dict.fromkeys(("dpmsolver", "dpmsolver++"), "deis"),
    "solver_type": dict.fromkeys(("midpoint", "heun", "bh1", "bh2"), "logrho"),
}
"""What the values that other schedulers have in these entries mean here."""


class DEISMultistepScheduler(LogSnrScheduler):
    """Order 1 to 3 with one call of the model a step, deterministic."""

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
        algorithm_type: Literal["deis", "dpmsolver", "dpmsolver++"] = "deis",
        solver_type: Literal["logrho", "midpoint", "heun", "bh1", "bh2"] = "logrho",
        lower_order_final: bool = True,
        use_karras_sigmas: bool | None = False,
        timestep_spacing: TimestepSpacing = "linspace",
        steps_offset: int = 0,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        use_flow_sigmas: bool | None = False,
        flow_shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: Literal["exponential"] = "exponential",
    ) -> None:
        if solver_order not in (1, 2, 3):
            raise ConfigError(f"{type(self).__name__}: solver_order is not possible", found=solver_order, expected="1, 2 or 3")
        self._prepare(**TRANSLATIONS)

    def set_timesteps(  # pyright: ignore[reportIncompatibleMethodOverride]  it takes no timesteps
        self, num_inference_steps: int, device: str | torch.device | None = None, mu: float | None = None
    ) -> None:
        """Choose the schedule of a run.

        Keywords of its own:
            mu: Logarithm of the time shift, with `use_dynamic_shifting`.
        """
        super().set_timesteps(num_inference_steps, device, mu)

    def _usable(self) -> int:
        return len(self)

    def _final_sigma(self) -> float:
        return float(training_sigmas(self.alphas_cumprod)[0])

    def _set(self, sigmas: Array, timesteps: Array, final: float, device: str | torch.device | None) -> None:
        super()._set(sigmas, timesteps, float(sigmas[-1]) if chosen_ladder(self.config, self.ladders) else final, device)

    def convert_model_output(self, model_output: Tensor, *, sample: Tensor | None = None) -> Tensor:
        """Epsilon, thresholded as configured, from the model's prediction at the current step."""
        sample = needed(sample)
        return epsilon_of_x0(sample, self._x0(model_output, sample), *self._row(None, self._now))

    def _coefficients(self, memory: MultistepMemory, order: int) -> tuple[Tensor, ...]:
        """Of every step: alpha_t, alpha_s and C_i, the newest first; of order 1, the factors of x and epsilon."""
        alpha, sigma, lamda = self._path(memory)
        if order == 1:
            return alpha[1:] / alpha[:-1], sigma[1:] * (torch.exp(lamda[1:] - lamda[:-1]) - 1.0)
        rho = sigma / alpha
        known = [torch.roll(rho[:-1], back) for back in range(order)]
        integrals = [
            INTEGRALS[order](rho[1:], *_turned(known, i)) - INTEGRALS[order](known[0], *_turned(known, i)) for i in range(order)
        ]
        return alpha[1:], alpha[:-1], *integrals

    def _update(self, outputs: list[Tensor], sample: Tensor | None) -> Tensor:
        """A step of the order that `outputs` (oldest first) allow."""
        sample = needed(sample)
        if len(outputs) == 1:
            c_x, c_0 = self._row(None, self._coefficients, 1)
            return c_x * sample - c_0 * outputs[0]
        alpha_t, alpha_s, *integrals = self._row(None, self._coefficients, len(outputs))
        total = sample / alpha_s
        for integral, epsilon in zip(integrals, reversed(outputs), strict=True):
            total = total + integral * epsilon
        return alpha_t * total

    def deis_first_order_update(self, model_output: Tensor, *, sample: Tensor | None = None) -> Tensor:
        """A first-order step (DDIM) from a converted model output."""
        return self._update([model_output], sample)

    def multistep_deis_second_order_update(self, model_output_list: list[Tensor], *, sample: Tensor | None = None) -> Tensor:
        """A second-order step from the last two converted model outputs, oldest first."""
        return self._update(model_output_list[-2:], sample)

    def multistep_deis_third_order_update(self, model_output_list: list[Tensor], *, sample: Tensor | None = None) -> Tensor:
        """A third-order step from the last three converted model outputs, oldest first."""
        return self._update(model_output_list[-3:], sample)

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        """Step to the next sigma."""
        self._check_ready()
        memory, config = self.memory, self.config
        self._row(timestep, self._now)
        output = self.convert_model_output(model_output, sample=sample)
        memory.model_outputs = [*memory.model_outputs[1:], output]
        memory.lower_order_nums = min(memory.lower_order_nums + 1, config["solver_order"])
        total = len(memory.timesteps)
        left = total - memory.step_index if config["lower_order_final"] and total < 15 else 3
        previous = self._update(memory.model_outputs[-min(memory.lower_order_nums, left) :], sample)
        memory.step_index += 1
        return stepped(return_dict, previous)


def _turned(known: list[Tensor], i: int) -> list[Tensor]:
    return [*known[i:], *known[:i]]


def _log(rho: Tensor) -> Tensor:
    return torch.from_numpy(np.log(rho.numpy()))  # NumPy's rounds differently from torch's, and is what others use here


def _second_integral(t: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The antiderivative, at t, of log(rho / c) / log(b / c)."""
    return t * (-_log(c) + _log(t) - 1) / (_log(b) - _log(c))


def _third_integral(t: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """The antiderivative, at t, of log(rho / c) log(rho / d) / (log(b / c) log(b / d))."""
    log_b, log_c, log_d, log_t = map(_log, (b, c, d, t))
    numerator = t * (log_c * (log_d - log_t + 1) - log_d * log_t + log_d + log_t**2 - 2 * log_t + 2)
    return numerator / ((log_b - log_c) * (log_b - log_d))


INTEGRALS: dict[int, Any] = {2: _second_integral, 3: _third_integral}
