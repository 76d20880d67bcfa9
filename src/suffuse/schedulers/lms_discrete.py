"""Linear multistep method (Adams and Bashforth; Crowson, k-diffusion, `sample_lms`).

    x_{i+1} = x_i + sum_j d_{i-j} ∫ l_j(tau) dtau  from sigma_i to sigma_{i+1}

where `l_j` are the Lagrange polynomials through the last `order` sigmas, and `d = (x - x_0) / sigma`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from suffuse.configuration import register_to_config
from suffuse.errors import InputError, MissingPackageError
from suffuse.schedulers.noise_schedule import BetaSchedule, TimestepSpacing
from suffuse.schedulers.prediction import PredictionType
from suffuse.schedulers.scheduler import Remembered, stepped
from suffuse.schedulers.sigma_space import SigmaMemory, SigmaScheduler, levels


@dataclass
class LMSMemory(SigmaMemory):
    """Adds the derivatives of the last steps, oldest first."""

    derivatives: list[Tensor] = field(default_factory=list[Tensor])


class LMSDiscreteScheduler(SigmaScheduler):
    """Up to `order` past derivatives, one call of the model a step. Needs scipy, for the integrals."""

    memory_class = LMSMemory
    ladders = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    derivatives = Remembered()

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: BetaSchedule = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        use_karras_sigmas: bool | None = False,
        prediction_type: PredictionType = "epsilon",
        timestep_spacing: TimestepSpacing = "linspace",
        steps_offset: int = 0,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
    ) -> None:
        self._prepare()
        self._start(self._memory(num_train_timesteps, *self._levels(self._spaced(num_train_timesteps), num_train_timesteps)))

    def get_lms_coefficient(self, order: int, t: int, current_order: int) -> float:
        """The integral of the Lagrange polynomial of derivative `current_order` steps ago, over step `t`.

        Raises:
            MissingPackageError: scipy is not installed.
        """
        try:
            from scipy import integrate
        except ImportError as error:
            raise MissingPackageError(
                "LMSDiscreteScheduler needs the package scipy", remedy='pip install "suffuse[lms]"'
            ) from error
        sigmas: Any = self.sigmas.numpy()
        here, others = sigmas[t - current_order], [sigmas[t - k] for k in range(order) if k != current_order]

        def polynomial(tau: float) -> float:
            product = 1.0
            for other in others:  # in float32, as the sigmas are: other implementations integrate exactly this
                product = product * ((np.float32(tau) - other) / (here - other))
            return product

        return integrate.quad(polynomial, float(sigmas[t]), float(sigmas[t + 1]), epsrel=1e-4)[0]

    def _coefficients(self, order: int, t: int) -> list[float]:
        return [self.get_lms_coefficient(order, t, current) for current in range(order)]

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, order: int = 4, return_dict: bool = True
    ) -> Any:
        """Step to the next sigma.

        Keywords of its own:
            order: How many derivatives to use, at least 1.
            MissingPackageError: scipy is not installed.
        """
        if order < 1:
            raise InputError("order is not possible", found=order, expected="1 or more")
        self._check_scaled()
        sigma, c_out, variance, _ = self._row(timestep, levels)
        memory = self.memory
        x0 = self._x0(sample, model_output, sigma, c_out, variance)
        memory.derivatives = [*memory.derivatives, (sample - x0) / sigma][-order:]
        at = memory.step_index
        use = min(at + 1, order)
        coefficients = memory.derive(("lms", use, at), self._coefficients, use, at)
        first, *others = zip(coefficients, reversed(memory.derivatives), strict=False)
        total = first[0] * first[1]
        for coefficient, derivative in others:
            total = total + coefficient * derivative
        memory.step_index += 1
        return stepped(return_dict, sample + total, x0)
