"""A model that is never wrong: of a mixture of Gaussians all that a diffusion model predicts is known in closed form.

With x_0 from `sum_k w_k N(m_k, s_k²)` and `x = alpha x_0 + sigma epsilon`,

    p(x) = sum_k w_k N(alpha m_k, alpha² s_k² + sigma²)
    E[x_0 | x] = sum_k p(k | x) (m_k + alpha s_k² (x - alpha m_k) / (alpha² s_k² + sigma²))

so what a solver returns is off by its own error alone. Used by the tests of convergence and by benchmarks/convergence.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import suffuse

MEANS = torch.tensor([[-1.0, 0.2], [0.5, 0.9], [0.8, -0.7]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
DEVIATIONS = torch.tensor([0.5, 0.35, 0.4], dtype=torch.float64)
COUNTS = (10, 20, 40, 50, 100, 200)
"""Numbers of steps that divide 1000: spacings by whole timesteps are even, then."""


def clean(x: Tensor, alpha: float, sigma: float) -> Tensor:
    """E[x_0 | x] of points (…, 2)."""
    variances = alpha**2 * DEVIATIONS**2 + sigma**2
    away = x.unsqueeze(-2) - alpha * MEANS
    logs = WEIGHTS.log() - variances.log() - (away**2).sum(dim=-1) / (2 * variances)
    each = MEANS + (alpha * DEVIATIONS**2 / variances).unsqueeze(-1) * away
    return (logs.softmax(dim=-1).unsqueeze(-1) * each).sum(dim=-2)


def data_moments() -> tuple[Tensor, Tensor]:
    """Mean and covariance of the data."""
    mean = WEIGHTS @ MEANS
    away = MEANS - mean
    return mean, (WEIGHTS[:, None] * away).T @ away + (WEIGHTS * DEVIATIONS**2).sum() * torch.eye(2)


@dataclass(frozen=True)
class Form:
    """How the samples of a family of schedulers hold signal and noise, and what its models are asked.

    Attributes:
        level: (scheduler, which call, timestep) → (alpha, sigma) of the sample that the solver holds.
        predicts: (x, alpha, sigma) → the model's output, x as the solver holds it.
        path: Place on the path → (alpha, sigma, their derivatives), where the exact solution is sought.
        place: (alpha, sigma) → place on the path.
        scale: (alpha, sigma) → what a sample is divided by to lie on the path.
    """

    level: Callable[[Any, int, Tensor], tuple[float, float]]
    predicts: Callable[[Tensor, float, float], Tensor]
    path: Callable[[float], tuple[float, float, float, float]] = lambda s: (1.0, math.exp(s), 0.0, math.exp(s))
    place: Callable[[float, float], float] = lambda alpha, sigma: math.log(sigma / alpha)
    scale: Callable[[float, float], float] = lambda alpha, sigma: 1.0


def _noise(x: Tensor, alpha: float, sigma: float) -> Tensor:
    return (x - alpha * clean(x, alpha, sigma)) / sigma


def _velocity(x: Tensor, alpha: float, sigma: float) -> Tensor:
    return alpha * _noise(x, alpha, sigma) - sigma * clean(x, alpha, sigma)


def _flow(x: Tensor, alpha: float, sigma: float) -> Tensor:
    return _noise(x, alpha, sigma) - clean(x, alpha, sigma)


def _preconditioned(data: float, sign: int) -> Callable[[Tensor, float, float], Tensor]:
    def predicts(x: Tensor, alpha: float, sigma: float) -> Tensor:
        square = sigma**2 + data**2
        return (clean(x, 1.0, sigma) - x * data**2 / square) / (sign * sigma * data / square**0.5)

    return predicts


def _of_timestep(scheduler: Any, call: int, timestep: Tensor) -> tuple[float, float]:
    alpha_bar = scheduler.alphas_cumprod[int(timestep)].double().item()
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5


def _exploding(scheduler: Any, call: int, timestep: Tensor) -> tuple[float, float]:
    return 1.0, (scheduler._call(timestep)[0] if hasattr(scheduler, "_call") else scheduler.sigmas[call]).item()


def _of_ratio(scheduler: Any, call: int, timestep: Tensor) -> tuple[float, float]:
    ratio = scheduler.sigmas[call].item()
    return (1 + ratio**2) ** -0.5, ratio * (1 + ratio**2) ** -0.5


PRESERVING = Form(_of_timestep, _noise, scale=lambda alpha, sigma: alpha)
LOG_SNR = Form(_of_ratio, _noise, scale=lambda alpha, sigma: alpha)
EXPLODING = Form(_exploding, _noise)
EDM = Form(_exploding, _preconditioned(0.5, 1))
COSINE = Form(_exploding, _preconditioned(1.0, -1))
FLOW = Form(
    lambda scheduler, call, timestep: (1 - scheduler.sigmas[call].item(), scheduler.sigmas[call].item()),
    _flow,
    lambda s: (1 - s, s, -1.0, 1.0),
    lambda alpha, sigma: sigma,
)
CIRCLE = Form(
    lambda scheduler, call, timestep: (scheduler.alphas[call].item(), scheduler.betas[call].item()),
    _velocity,
    lambda s: (math.cos(s), math.sin(s), -math.sin(s), math.cos(s)),
    lambda alpha, sigma: math.atan2(sigma, alpha),
)


@dataclass(frozen=True)
class Case:
    """A scheduler in a configuration in which its convergence can be seen.

    Attributes:
        name: Its class.
        form: Of its samples and its model.
        options: Of its configuration.
        order: The power of the number of steps that its error falls with.
    """

    name: str
    form: Form
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    order: int = 1

    def __str__(self) -> str:
        return self.name + "".join(f", {option}={value}" for option, value in self.options.items())

    def made(self, library: Any = suffuse) -> Any:
        """The scheduler."""
        return getattr(library, self.name)(**self.options)


EVEN = {"use_exponential_sigmas": True}
"""Steps of one length in log sigma, none of which stays long where there are more of them."""

TRAILING = {"timestep_spacing": "trailing"}

ODE = [
    Case("DDIMScheduler", PRESERVING, TRAILING | {"clip_sample": False}),
    Case("DDIMParallelScheduler", PRESERVING, TRAILING | {"clip_sample": False}),
    Case("PNDMScheduler", PRESERVING, TRAILING, 2),
    Case("PNDMScheduler", PRESERVING, TRAILING | {"skip_prk_steps": True}, 2),
    Case("IPNDMScheduler", CIRCLE),
    Case("EulerDiscreteScheduler", EXPLODING, EVEN),
    Case("HeunDiscreteScheduler", EXPLODING, EVEN, 2),
    Case("KDPM2DiscreteScheduler", EXPLODING, EVEN, 2),
    Case("LMSDiscreteScheduler", EXPLODING, EVEN, 4),
    Case("DPMSolverMultistepScheduler", LOG_SNR, EVEN | {"solver_order": 1}),
    Case("DPMSolverMultistepScheduler", LOG_SNR, EVEN, 2),
    Case("DPMSolverMultistepScheduler", LOG_SNR, EVEN | {"solver_type": "heun"}, 2),
    Case("DPMSolverMultistepScheduler", LOG_SNR, EVEN | {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, 2),
    Case("DPMSolverMultistepScheduler", LOG_SNR, EVEN | {"solver_order": 3}, 2),
    Case("DPMSolverSinglestepScheduler", LOG_SNR, EVEN, 2),
    Case("DPMSolverSinglestepScheduler", LOG_SNR, EVEN | {"solver_order": 3}, 3),
    Case("UniPCMultistepScheduler", LOG_SNR, EVEN | {"solver_order": 1}, 2),
    Case("UniPCMultistepScheduler", LOG_SNR, EVEN, 3),
    Case("DEISMultistepScheduler", LOG_SNR, EVEN, 2),
    Case("EDMEulerScheduler", EDM),
    Case("EDMDPMSolverMultistepScheduler", EDM, {}, 2),
    Case("FlowMatchEulerDiscreteScheduler", FLOW),
    Case("FlowMatchHeunDiscreteScheduler", FLOW, {}, 2),
]
"""What follows the probability flow."""

SDE = [
    Case("DDIMScheduler", PRESERVING, TRAILING | {"clip_sample": False}),
    Case("DDPMScheduler", PRESERVING, TRAILING | {"clip_sample": False}),
    Case("DDPMParallelScheduler", PRESERVING, TRAILING | {"clip_sample": False}),
    Case("EulerAncestralDiscreteScheduler", EXPLODING),
    Case("KDPM2AncestralDiscreteScheduler", EXPLODING),
    Case("DPMSolverSDEScheduler", EXPLODING, {"noise_sampler_seed": 1}),
    Case("SASolverScheduler", LOG_SNR),
    Case("DPMSolverMultistepScheduler", LOG_SNR, EVEN | {"algorithm_type": "sde-dpmsolver++"}),
    Case("EDMDPMSolverMultistepScheduler", EDM, {"algorithm_type": "sde-dpmsolver++"}),
    Case("CosineDPMSolverMultistepScheduler", COSINE, {"sigma_min": 0.02, "sigma_max": 80.0}),
]
"""What adds noise on the way."""


def walk(case: Case, scheduler: Any, x: Tensor, whole: bool = False, **options: Any) -> Tensor:
    """The sample at the level of the last timestep, or with `whole` the clean one; x at the level of the first."""
    timesteps = scheduler.timesteps if whole else scheduler.timesteps[:-1]
    for call, timestep in enumerate(timesteps):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, timestep)
        output = case.form.predicts(x.double(), *case.form.level(scheduler, call, timestep))
        x = scheduler.step(output, timestep, x, **options).prev_sample
    return x


def exact(form: Form, x: Tensor, begin: tuple[float, float], end: tuple[float, float], steps: int = 300) -> Tensor:
    """The solution of the probability flow `dx = alpha' x_0 + sigma' epsilon`, by Runge and Kutta's fourth order, in float64."""
    places = torch.linspace(form.place(*begin), form.place(*end), steps + 1, dtype=torch.float64).tolist()

    def slope(x: Tensor, place: float) -> Tensor:
        alpha, sigma, d_alpha, d_sigma = form.path(place)
        return d_alpha * clean(x, alpha, sigma) + d_sigma * _noise(x, alpha, sigma)

    x = x.double() / form.scale(*begin)
    for here, there in itertools.pairwise(places):
        h, middle = there - here, (here + there) / 2
        first = slope(x, here)
        second = slope(x + h / 2 * first, middle)
        third = slope(x + h / 2 * second, middle)
        x = x + h / 6 * (first + 2 * second + 2 * third + slope(x + h * third, there))
    return x * form.scale(*end)


def start(case: Case, scheduler: Any, points: int) -> Tensor:
    """Points (points, 1, 1, 2) from the true distribution at the first level, float64."""
    alpha, sigma = case.form.level(scheduler, 0, scheduler.timesteps[0])
    drawn = torch.Generator().manual_seed(0)
    which = torch.multinomial(WEIGHTS, points, replacement=True, generator=drawn)
    data, noise = torch.randn(2, points, 2, generator=drawn, dtype=torch.float64)
    x = alpha * (MEANS[which] + DEVIATIONS[which, None] * data) + sigma * noise
    return x.view(points, 1, 1, 2)


def error(case: Case, steps: int, points: int = 64) -> float:
    """Root mean square error at the level of the last timestep, of a run of so many steps."""
    scheduler = case.made()
    scheduler.set_timesteps(steps)
    x = start(case, scheduler, points)
    begin = case.form.level(scheduler, 0, scheduler.timesteps[0])
    reached = walk(case, scheduler, x)
    end = case.form.level(scheduler, len(scheduler.timesteps) - 1, scheduler.timesteps[-1])
    return ((reached - exact(case.form, x, begin, end)) ** 2).mean().sqrt().item()


def moments_error(case: Case, steps: int, points: int = 4000, **options: Any) -> float:
    """The largest error of the mean and the covariance of the samples that a run of so many steps ends with."""
    scheduler = case.made()
    scheduler.set_timesteps(steps)
    drawn = walk(
        case, scheduler, start(case, scheduler, points), whole=True, generator=torch.Generator().manual_seed(3), **options
    )
    mean, covariance = data_moments()
    drawn = drawn.double().view(-1, 2)
    return max((drawn.mean(dim=0) - mean).abs().max().item(), (drawn.T.cov() - covariance).abs().max().item())


def slope(counts: Sequence[int], errors: Sequence[float], floor: float = 2e-6) -> float:
    """The order that errors fall with: least squares of log error over log steps, over the last four above rounding."""
    pairs = [(math.log(n), math.log(e)) for n, e in zip(counts, errors, strict=True) if e > floor][-4:]
    x, y = torch.tensor(pairs, dtype=torch.float64).T
    return (-((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()).item()
