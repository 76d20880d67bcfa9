"""SA-Solver: stochastic Adams methods (Xue et al., 2023, https://arxiv.org/abs/2309.05019), a predictor and a corrector.

With the share of noise tau(t), the x_0 predictor over lambda_s … lambda_t is

    x_t = (sigma_t / sigma_s) e^(-tau² h) x_s + sum_i b_i x_0(t_i) + sigma_t sqrt(1 - e^(-2 tau² h)) z
    b_i = (1 + tau²) sigma_t e^(-tau² lambda_t) integral of e^((1 + tau²) lambda) l_i(lambda) d lambda

with Lagrange polynomials l_i over past steps; the corrector has the new step among them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from suffuse.configuration import register_to_config
from suffuse.errors import ConfigError
from suffuse.noise import Generators, randn_tensor
from suffuse.schedulers.log_snr import LogSnrScheduler, MultistepMemory, needed
from suffuse.schedulers.noise_schedule import Array, BetaSchedule, TimestepSpacing, chosen_ladder, to_tensor, training_sigmas
from suffuse.schedulers.prediction import FlowPredictionType
from suffuse.schedulers.scheduler import Remembered, stepped

RISING: tuple[Callable[[Tensor], Any], ...] = (
    lambda x: 1.0,
    lambda x: x - 1,
    lambda x: x**2 - 2 * x + 2,
    lambda x: x**3 - 3 * x**2 + 6 * x - 6,
)
"""e^x p(x) is the integral of x^n e^x."""

FALLING: tuple[Callable[[Tensor], Any], ...] = (
    lambda x: 1.0,
    lambda x: x + 1,
    lambda x: x**2 + 2 * x + 2,
    lambda x: x**3 + 3 * x**2 + 6 * x + 6,
)
"""-e^(-x) p(x) is the integral of x^n e^(-x)."""


@dataclass
class StochasticAdamsMemory(MultistepMemory):
    """Adds what the corrector wants of the last step: the sample, the noise, the timestep and the order."""

    last_sample: Tensor | None = None
    last_noise: Tensor | None = None
    last_timestep: Any = None
    this_corrector_order: int = 1


def middle_noise(t: Any) -> int:
    """The share of noise the authors suggest: full between timesteps 200 and 800, none elsewhere."""
    return 1 if 200 <= t <= 800 else 0


class SASolverScheduler(LogSnrScheduler):
    """Order 1 to 4 with one call of the model a step, stochastic where `tau_func(timestep)` is above 0."""

    memory_class = StochasticAdamsMemory
    last_sample = Remembered()
    last_noise = Remembered()

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: BetaSchedule = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        predictor_order: int = 2,
        corrector_order: int = 2,
        prediction_type: FlowPredictionType = "epsilon",
        tau_func: Callable[[Any], float] | None = None,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: Literal["data_prediction", "noise_prediction"] = "data_prediction",
        lower_order_final: bool = True,
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
        for entry, order in {"predictor_order": predictor_order, "corrector_order": corrector_order}.items():
            if order not in (1, 2, 3, 4):
                raise ConfigError(f"{type(self).__name__}: {entry} is not possible", found=order, expected="1, 2, 3 or 4")
        self.tau_func = tau_func or middle_noise
        self.predict_x0 = algorithm_type == "data_prediction"
        self._prepare()

    def set_timesteps(  # pyright: ignore[reportIncompatibleMethodOverride]  it takes no timesteps
        self, num_inference_steps: int | None = None, device: str | torch.device | None = None
    ) -> None:
        """Choose the schedule of a run."""
        super().set_timesteps(num_inference_steps, device)

    def _kept(self) -> int:
        return max(self.config["predictor_order"], self.config["corrector_order"] - 1)

    def _memory(self, timesteps: Tensor, count: int | None, sigmas: Array) -> Any:
        return self.memory_class(timesteps, count, sigmas=to_tensor(sigmas), model_outputs=[None] * self._kept())

    def _shift(self, mu: float | None) -> float:
        return self.config["flow_shift"]

    def _final_sigma(self) -> float:
        return float(training_sigmas(self.alphas_cumprod)[0])

    def _set(self, sigmas: Array, timesteps: Array, final: float, device: str | torch.device | None) -> None:
        super()._set(sigmas, timesteps, float(sigmas[-1]) if chosen_ladder(self.config, self.ladders) else final, device)

    def convert_model_output(self, model_output: Tensor, *, sample: Tensor | None = None) -> Tensor:
        """x_0 or epsilon, whichever is integrated, from the model's prediction at the current step."""
        to = self._x0 if self.predict_x0 else self._thresholded_epsilon
        return to(model_output, needed(sample))

    # ------------------------------------------------------------ coefficients

    def get_coefficients_exponential_negative(self, order: int, interval_start: Tensor, interval_end: Tensor) -> Tensor:
        """The integral of lambda^order e^(-lambda) over an interval."""
        p = FALLING[order]
        return torch.exp(-interval_end) * (p(interval_start) * torch.exp(interval_end - interval_start) - p(interval_end))

    def get_coefficients_exponential_positive(
        self, order: int, interval_start: Tensor, interval_end: Tensor, tau: float | Tensor
    ) -> Tensor:
        """The integral of lambda^order e^((1 + tau²) lambda) over an interval."""
        p, rate = RISING[order], 1 + tau**2
        start, end = rate * interval_start, rate * interval_end
        return torch.exp(end) * (p(end) - p(start) * torch.exp(-(end - start))) / rate ** (order + 1)

    def lagrange_polynomial_coefficient(self, order: int, lambda_list: list[Tensor]) -> list[list[Any]]:
        """The coefficients of each Lagrange polynomial over `lambda_list`, `order` + 1 of them, the highest power first."""
        polynomials: list[list[Any]] = []
        for i, node in enumerate(lambda_list):
            others = [*lambda_list[:i], *lambda_list[i + 1 :]]
            scale = math.prod((node - other for other in others), start=1.0)  # pyright: ignore[reportArgumentType, reportCallIssue]
            symmetric = [sum(math.prod(some) for some in itertools.combinations(others, k)) for k in range(order + 1)]
            polynomials.append([(-1) ** k * value / scale for k, value in enumerate(symmetric)])
        return polynomials

    def get_coefficients_fn(
        self, order: int, interval_start: Tensor, interval_end: Tensor, lambda_list: list[Tensor], tau: float | Tensor
    ) -> list[Any]:
        """The integral of each of `order` Lagrange polynomials over an interval, weighed as the algorithm wants it."""
        if self.predict_x0:
            integrals = [
                self.get_coefficients_exponential_positive(n, interval_start, interval_end, tau) for n in reversed(range(order))
            ]
        else:
            integrals = [
                self.get_coefficients_exponential_negative(n, interval_start, interval_end) for n in reversed(range(order))
            ]
        polynomials = self.lagrange_polynomial_coefficient(order - 1, lambda_list)
        return [sum(c * integral for c, integral in zip(row, integrals, strict=True)) for row in polynomials]

    def _predictor(self, memory: StochasticAdamsMemory, order: int, tau: float) -> tuple[Tensor, ...]:
        return self._coefficients(memory, order, tau, correct=False)

    def _corrector(self, memory: StochasticAdamsMemory, order: int, tau: float) -> tuple[Tensor, ...]:
        return self._coefficients(memory, order, tau, correct=True)

    def _coefficients(self, memory: StochasticAdamsMemory, order: int, tau: float, correct: bool) -> tuple[Tensor, ...]:
        """Of every step: the factors of x, of the noise, and of the model outputs, the newest first."""
        whole = self._path(memory)
        here = [values[:-1] for values in whole]
        if correct:
            (alpha, sigma, end), (alpha_s, sigma_s, start) = here, [torch.roll(values, 1) for values in here]
        else:
            (alpha, sigma, end), (alpha_s, sigma_s, start) = [values[1:] for values in whole], here
        h, rate = end - start, 1 + tau**2
        nodes = [torch.roll(here[2], back) for back in range(order)]
        weights = self.get_coefficients_fn(order, start, end, nodes, tau)
        if not self.predict_x0:
            factors = [-rate * alpha * weight for weight in weights]
            return alpha / alpha_s, tau * sigma * torch.sqrt(torch.exp(2 * h) - 1), *factors
        if order == 2:  # a slope that is right to second order whatever the step, as the authors' code has it
            rest = h * rate - 1 + torch.exp(rate * -h)
            if correct:
                slope = torch.exp(rate * end) * (h / 2 - rest / (rate**2 * h))
            else:
                slope = torch.exp(rate * end) * (h**2 / 2 - rest / rate**2) / (start - nodes[1])
            weights = [weights[0] + slope, weights[1] - slope]
        factors = [rate * sigma * torch.exp(-(tau**2) * end) * weight for weight in weights]
        return torch.exp(-(tau**2) * h) * (sigma / sigma_s), sigma * torch.sqrt(1 - torch.exp(-2 * tau**2 * h)), *factors

    # ------------------------------------------------------------ steps

    def stochastic_adams_bashforth_update(
        self, model_output: Tensor, *, sample: Tensor, noise: Tensor, order: int, tau: float | Tensor
    ) -> Tensor:
        """The predictor: a step from the current sigma to the next, by the last `order` converted outputs."""
        outputs = [*self.memory.model_outputs[:-1], model_output]
        return _combined(self._row(None, self._predictor, order, float(tau)), sample, noise, outputs)

    def stochastic_adams_moulton_update(
        self,
        this_model_output: Tensor,
        *,
        last_sample: Tensor,
        last_noise: Tensor,
        this_sample: Tensor,
        order: int,
        tau: float | Tensor,
    ) -> Tensor:
        """The corrector: the step that led to `this_sample`, again, now that the output there is known."""
        outputs = [*self.memory.model_outputs, this_model_output]
        return _combined(self._row(None, self._corrector, order, float(tau)), last_sample, last_noise, outputs)

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, generator: Generators = None, return_dict: bool = True
    ) -> Any:
        """Correct `sample`, and step to the next sigma."""
        self._check_ready()
        memory, config = self.memory, self.config
        self._row(timestep, self._now)
        output = self.convert_model_output(model_output, sample=sample)
        if memory.step_index > 0 and memory.last_sample is not None:
            sample = self.stochastic_adams_moulton_update(
                output,
                last_sample=memory.last_sample,
                last_noise=memory.last_noise,
                this_sample=sample,
                order=memory.this_corrector_order,
                tau=self.tau_func(memory.last_timestep),
            )
        memory.model_outputs = [*memory.model_outputs[1:], output]
        noise = randn_tensor(model_output.shape, generator, model_output.device, model_output.dtype)
        left = len(memory.timesteps) - memory.step_index if config["lower_order_final"] else 4
        order = min(config["predictor_order"], left, memory.lower_order_nums + 1)
        memory.this_corrector_order = min(config["corrector_order"], left + 1, memory.lower_order_nums + 2)
        memory.last_sample, memory.last_noise, memory.last_timestep = sample, noise, timestep
        previous = self.stochastic_adams_bashforth_update(
            output, sample=sample, noise=noise, order=order, tau=self.tau_func(timestep)
        )
        memory.lower_order_nums = min(memory.lower_order_nums + 1, self._kept())
        memory.step_index += 1
        return stepped(return_dict, previous)


def _combined(row: tuple[Tensor, ...], sample: Tensor, noise: Tensor, outputs: list[Any]) -> Tensor:
    c_x, c_z, *factors = row
    gradient = factors[0] * outputs[-1]
    for factor, output in zip(factors[1:], reversed(outputs[:-1]), strict=False):
        gradient = gradient + factor * output
    return (c_x * sample + gradient + c_z * noise).to(sample.dtype)
