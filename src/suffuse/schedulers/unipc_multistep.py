"""UniPC: a Unified Predictor-Corrector (Zhao et al., 2023, https://arxiv.org/abs/2302.04867).

From `s` to `t`, a step of length `h` in lambda, with the outputs `m_k` of the steps before at `r_k = (lambda_k - lambda_s) / h`:

    x_t = c_x x_s + c_0 m_0 + c_B (sum_k rho_k (m_k - m_0) / r_k + rho_c (m_t - m_0))

where the `rho` solve a small Vandermonde system `R rho = b` (section 3.2), and `m_t`, only known one call of the model later,
makes the corrector UniC out of the predictor UniP.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from suffuse.configuration import register_to_config
from suffuse.errors import ConfigError, InputError
from suffuse.schedulers.log_snr import LogSnrScheduler, MultistepMemory, needed
from suffuse.schedulers.noise_schedule import (
    Array,
    BetaSchedule,
    FinalSigma,
    TimestepSpacing,
    checked_count,
    chosen_ladder,
    respaced_sigmas,
    shifted,
)
from suffuse.schedulers.prediction import FlowPredictionType
from suffuse.schedulers.scheduler import Remembered, SchedulerMixin, stepped


@dataclass
class UniPCMemory(MultistepMemory):
    """Adds the order of the last prediction, the sample it started from, and the run of a predictor of the caller's choice."""

    this_order: int = 0
    last_sample: Tensor | None = None
    solver_p: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "solver_p": copy.copy(self.solver_p)}


class UniPCMultistepScheduler(LogSnrScheduler):
    """Any order, one call of the model a step; good pictures in 10 steps."""

    memory_class = UniPCMemory
    this_order = Remembered()
    last_sample = Remembered()

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
        predict_x0: bool = True,
        solver_type: Literal["bh1", "bh2", "midpoint", "heun", "logrho"] = "bh2",
        lower_order_final: bool = True,
        disable_corrector: list[int] = [],  # noqa: B006  the default stands in configuration files
        solver_p: SchedulerMixin | None = None,
        use_karras_sigmas: bool | None = False,
        timestep_spacing: TimestepSpacing = "linspace",
        steps_offset: int = 0,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        use_flow_sigmas: bool | None = False,
        flow_shift: float = 1.0,
        final_sigmas_type: FinalSigma = "zero",
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        shift_terminal: float | None = None,
    ) -> None:
        self._prepare(solver_type=dict.fromkeys(("midpoint", "heun", "logrho"), "bh2"))
        if solver_order < 1:
            raise ConfigError("UniPCMultistepScheduler: solver_order is not possible", found=solver_order, expected="1 or more")
        if shift_terminal is not None and not use_flow_sigmas:
            raise ConfigError("shift_terminal is for use_flow_sigmas=True", found=shift_terminal)
        self.predict_x0, self.disable_corrector, self.solver_p = predict_x0, disable_corrector, solver_p

    # ------------------------------------------------------------ the schedule of a run

    def set_timesteps(  # pyright: ignore[reportIncompatibleMethodOverride]  the order of the keywords is the contract's
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Choose the schedule of a run.

        Keywords of its own:
            sigmas: Instead, falling noise shares of flow matching, without the final one.
            mu: Logarithm of the time shift, with `use_dynamic_shifting`.
        """
        config = self.config
        if sigmas is not None and not config["use_flow_sigmas"]:
            raise InputError("sigmas can be given with use_flow_sigmas=True only", remedy="give num_inference_steps")
        if mu is None and config["use_dynamic_shifting"]:
            raise InputError("use_dynamic_shifting=True needs mu", remedy="give mu, the logarithm of the time shift")
        count = checked_count(num_inference_steps if sigmas is None else len(sigmas), len(self))
        ladder = chosen_ladder(config, self.ladders)
        self._check_end(ladder)
        if ladder == "use_flow_sigmas":
            levels = self._shares(count, sigmas, mu)
            timesteps = levels * len(self)
        elif sigmas is not None:
            levels = respaced_sigmas(config, ladder, np.array(sigmas)[::-1], count)
            timesteps = levels
        else:
            levels, timesteps = self._levels(self._spaced(count), count, 1.0)
        if config["use_flow_sigmas"] and ladder == "use_karras_sigmas":
            levels = levels / (levels + 1)
            timesteps = levels * len(self)
        final = self._final_sigma()
        self._set(levels, timesteps, float(levels[-1]) if final and ladder else final, device)
        if self.solver_p is not None:
            predictor: Any = self.solver_p.fork()
            predictor.set_timesteps(len(self.timesteps), device=device)
            self.memory.solver_p = predictor

    def _usable(self) -> int:
        return len(self)

    def _check_end(self, ladder: str) -> None:
        """Raise where the last step has no finite result, because of its length in lambda."""
        config = self.config
        zero, high = config["final_sigmas_type"] == "zero", not config["lower_order_final"] and config["solver_order"]
        if zero and not self.predict_x0:
            raise ConfigError("predict_x0=False cannot end at sigma 0", remedy="use final_sigmas_type='sigma_min'")
        if (zero and high > 1) or (ladder and high > 2):
            raise ConfigError(
                f"UniPC of order {high} cannot take the last step",
                remedy="use lower_order_final=True, or another final_sigmas_type",
            )

    def _shares(self, count: int, given: list[float] | None, mu: float | None) -> Array:
        """Noise shares of flow matching: even or given, shifted, and stretched to end at `shift_terminal`."""
        config = self.config
        shares = np.linspace(1, 1 / len(self), count + 1)[:-1] if given is None else np.array(given, dtype=np.float64)
        if config["use_dynamic_shifting"] and mu is not None:
            shift = math.exp(mu) if config["time_shift_type"] == "exponential" else mu
            shares = shift / (shift + (1 / shares - 1) ** 1.0)
        else:
            shares = shifted(shares, config["flow_shift"])
        if config["shift_terminal"]:
            shares = 1 - (1 - shares) / ((1 - shares[-1]) / (1 - config["shift_terminal"]))
        if abs(shares[0] - 1) < 1e-6:  # nothing but noise has no log signal-to-noise ratio
            shares = np.concatenate([shares[:1] - 1e-6, shares[1:]])
        return shares

    # ------------------------------------------------------------ the update

    def convert_model_output(self, model_output: Tensor, *, sample: Tensor | None = None) -> Tensor:
        """x_0 (`predict_x0`) or epsilon, from the model's prediction at the current step."""
        return (self._x0 if self.predict_x0 else self._epsilon)(model_output, needed(sample))

    def _coefficients(self, memory: MultistepMemory, order: int) -> tuple[Tensor, ...]:
        """Of every step: c_x, c_0, c_B, rho of the predictor and of the corrector, and r_k, k = 1 … order - 1."""
        alpha, sigma, lamda = self._path(memory)
        h = lamda[1:] - lamda[:-1]
        r = torch.stack([(torch.roll(lamda[:-1], k) - lamda[:-1]) / h for k in range(1, order)] + [torch.ones_like(h)], dim=1)
        length = -h if self.predict_x0 else h
        phi_1 = torch.expm1(length)  # length × phi_1(length)
        b_h = length if self.config["solver_type"] == "bh1" else phi_1
        phi, columns = phi_1 / length - 1, list[Tensor]()
        for i in range(1, order + 1):
            columns.append(phi * math.factorial(i) / b_h)
            phi = phi / length - 1 / math.factorial(i + 1)
        b = torch.stack(columns, dim=1)
        matrix = torch.stack([r**i for i in range(order)], dim=1)
        predictor = _solved(matrix[:, :-1, :-1], b[:, :-1])
        corrector = _solved(matrix, b)
        here, there, scale = (sigma, sigma, alpha) if self.predict_x0 else (alpha, alpha, sigma)
        return here[1:] / there[:-1], scale[1:] * phi_1, scale[1:] * b_h, predictor, corrector, r

    def _update(self, row: tuple[Tensor, ...], x: Tensor, outputs: list[Tensor], corrected_by: Tensor | None = None) -> Tensor:
        """One step from `x`, with the outputs of the steps before it (oldest first), and in hindsight its own."""
        c_x, c_0, c_b, predictor, corrector, r = row
        m0, rho = outputs[-1], (predictor if corrected_by is None else corrector).to(x.dtype)
        x_t = c_x * x - c_0 * m0
        differences = [(m - m0) / r_k for m, r_k in zip(reversed(outputs[:-1]), r, strict=False)]
        residual = _weighted(rho, differences) if differences else None
        if corrected_by is not None:
            last = rho[-1] * (corrected_by - m0)
            residual = last if residual is None else residual + last
        return (x_t if residual is None else x_t - c_b * residual).to(x.dtype)

    def multistep_uni_p_bh_update(
        self, model_output: Tensor, *, sample: Tensor | None = None, order: int | None = None
    ) -> Tensor:
        """UniP-`order`: predict the next sample; `model_output` is for `solver_p`, which may stand in for it."""
        memory, sample = self.memory, needed(sample)
        points: int = order or memory.this_order
        if memory.solver_p is not None:
            return memory.solver_p.step(model_output, memory.timesteps[memory.step_index], sample).prev_sample
        return self._update(self._row(None, self._coefficients, points), sample, memory.model_outputs[-points:])

    def multistep_uni_c_bh_update(
        self,
        this_model_output: Tensor,
        *,
        last_sample: Tensor | None = None,
        this_sample: Tensor | None = None,
        order: int | None = None,
    ) -> Tensor:
        """UniC-`order`: the step that led to `this_sample` once more, knowing the model's output there."""
        memory = self.memory
        points: int = order or memory.this_order
        row = self._table(self._coefficients, points)[memory.step_index - 1]
        return self._update(row, needed(last_sample), memory.model_outputs[-points:], this_model_output)

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        """Correct the sample in hindsight, then step to the next sigma."""
        self._check_ready()
        memory, config = self.memory, self.config
        self._row(timestep, self._now)
        output, at = self.convert_model_output(model_output, sample=sample), memory.step_index
        if at > 0 and at - 1 not in self.disable_corrector and memory.last_sample is not None:
            sample = self.multistep_uni_c_bh_update(
                output, last_sample=memory.last_sample, this_sample=sample, order=memory.this_order
            )
        memory.model_outputs, memory.last_sample = [*memory.model_outputs[1:], output], sample
        memory.lower_order_nums = min(memory.lower_order_nums + 1, config["solver_order"])
        left = len(memory.timesteps) - at if config["lower_order_final"] else config["solver_order"]
        memory.this_order = min(left, memory.lower_order_nums)
        previous = self.multistep_uni_p_bh_update(model_output, sample=sample, order=memory.this_order)
        memory.step_index += 1
        return stepped(return_dict, previous)


def _solved(matrix: Tensor, b: Tensor) -> Tensor:
    """The solution of every step's system; 1/2 for one unknown, of which that is the limit for small steps."""
    return torch.full_like(b, 0.5) if b.shape[1] <= 1 else torch.linalg.solve_ex(matrix, b)[0]


def _weighted(rho: Tensor, differences: list[Tensor]) -> Tensor:
    if len(differences) == 1:
        return rho[0] * differences[0]
    return torch.einsum("k,bkc...->bc...", rho[: len(differences)], torch.stack(differences, dim=1))
