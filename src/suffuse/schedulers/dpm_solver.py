"""The exponential integrators of DPM-Solver and DPM-Solver++, shared by the multistep and the singlestep scheduler.

Over a step of length `h` in lambda, from (alpha_s, sigma_s) to (alpha_t, sigma_t), a solver of order k returns

    x_t = c_x x_s + c_0 D_0 + c_1 D_1 + c_2 D_2 + c_z z

with `D_i` the i-th divided difference of the model's x_0 (DPM-Solver++, Lu et al., 2022b, https://arxiv.org/abs/2211.01095) or
epsilon (DPM-Solver, Lu et al., 2022a, https://arxiv.org/abs/2206.00927), and z noise where the equation is stochastic. `c_1`
comes in two kinds: "midpoint" halves `c_0`, "heun" integrates the Taylor expansion exactly.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from suffuse.errors import ConfigError
from suffuse.schedulers.choices import Choices

AlgorithmType = Literal["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis"]
SolverType = Literal["midpoint", "heun", "logrho", "bh1", "bh2"]

TRANSLATIONS = {
    "algorithm_type": {"deis": "dpmsolver++"},
    "solver_type": {"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"},
}
"""What the values that other schedulers have in these entries mean here."""

DATA = ("dpmsolver++", "sde-dpmsolver++")
"""The algorithms that integrate x_0; the others integrate epsilon."""


class Step(NamedTuple):
    """The coefficients of a step; every field is a tensor of shape (steps,)."""

    c_x: Tensor
    c_0: Tensor
    midpoint: Tensor
    heun: Tensor
    c_2: Tensor
    c_z: Tensor


def _data_ode(alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor, h: Tensor) -> Step:
    phi = torch.exp(-h) - 1.0
    return Step(
        c_x=sigma_t / sigma_s,
        c_0=-(alpha_t * phi),
        midpoint=-0.5 * (alpha_t * phi),
        heun=alpha_t * (phi / h + 1.0),
        c_2=-(alpha_t * ((phi + h) / h**2 - 0.5)),
        c_z=torch.zeros_like(h),
    )


def _noise_ode(alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor, h: Tensor) -> Step:
    phi = torch.exp(h) - 1.0
    return Step(
        c_x=alpha_t / alpha_s,
        c_0=-(sigma_t * phi),
        midpoint=-0.5 * (sigma_t * phi),
        heun=-(sigma_t * (phi / h - 1.0)),
        c_2=-(sigma_t * ((phi - h) / h**2 - 0.5)),
        c_z=torch.zeros_like(h),
    )


def _data_sde(alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor, h: Tensor) -> Step:
    lost = 1.0 - torch.exp(-2.0 * h)
    return Step(
        c_x=sigma_t / sigma_s * torch.exp(-h),
        c_0=alpha_t * lost,
        midpoint=0.5 * (alpha_t * lost),
        heun=alpha_t * (lost / (-2.0 * h) + 1.0),
        c_2=alpha_t * ((lost - 2.0 * h) / (2.0 * h) ** 2 - 0.5),
        c_z=sigma_t * torch.sqrt(lost.clamp(min=0)),  # where the last sigma stands twice, rounding can take it below
    )


def _noise_sde(alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor, h: Tensor) -> Step:
    phi = torch.exp(h) - 1.0
    return Step(
        c_x=alpha_t / alpha_s,
        c_0=-2.0 * (sigma_t * phi),
        midpoint=-(sigma_t * phi),
        heun=-2.0 * (sigma_t * (phi / h - 1.0)),
        c_2=torch.full_like(h, torch.nan),  # nobody has derived it: `check` refuses the third order
        c_z=sigma_t * torch.sqrt(torch.exp(2 * h) - 1.0),
    )


INTEGRATORS = Choices(
    "algorithm_type",
    {"dpmsolver++": _data_ode, "dpmsolver": _noise_ode, "sde-dpmsolver++": _data_sde, "sde-dpmsolver": _noise_sde},
)
"""algorithm_type → `Step` from (alpha_t, sigma_t, alpha_s, sigma_s, h)."""


def check(name: str, config: Any) -> None:
    """Raise `ConfigError` where algorithm, order and final sigma do not go together."""
    algorithm = config["algorithm_type"]
    INTEGRATORS[algorithm]
    if config["solver_order"] not in (1, 2, 3):
        raise ConfigError(f"{name}: solver_order is not possible", found=config["solver_order"], expected="1, 2 or 3")
    if algorithm not in DATA and config.get("final_sigmas_type") == "zero":
        raise ConfigError(
            f"{name}: algorithm_type={algorithm!r} cannot end at sigma 0", remedy="use final_sigmas_type='sigma_min'"
        )
    if algorithm == "sde-dpmsolver" and config["solver_order"] == 3:
        raise ConfigError(f"{name}: sde-dpmsolver has no third order", remedy="use solver_order=2")


def combined(sample: Tensor, noise: Tensor | None, c_x: Tensor, c_z: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
    """`c_x x + sum of c D over terms + c_z z`, added from left to right."""
    x_t = c_x * sample
    for coefficient, difference in terms:
        x_t = x_t + coefficient * difference
    return x_t if noise is None else x_t + c_z * noise
