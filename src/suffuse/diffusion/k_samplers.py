"""Samplers that walk down noise levels with a denoiser D(x; sigma), by the names that k-diffusion (Crowson) gives them.

    dx / d sigma = (x - D(x; sigma)) / sigma                     Karras et al., 2022, equation 3
    lambda = -log sigma, h = lambda_next - lambda                in which DPM-Solver++ (Lu et al., 2022) integrates D

Each sampler is a function of one step, from `sigmas[i]` to `sigmas[i + 1]`: what it is given is all it knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.polynomial import polynomial
from torch import Tensor

from suffuse.diffusion.conditioning import Denoiser
from suffuse.diffusion.guidance import Guidance
from suffuse.diffusion.loop import Step
from suffuse.schedulers.noise_schedule import timesteps_of, training_sigmas
from suffuse.schedulers.prediction import EXPLODED_X0, exploded_scales
from suffuse.schedulers.sigma_space import SigmaMemory, SigmaScheduler, ancestral

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x, sigma) → D(x; sigma), the clean sample it believes in."""
Noise = Callable[[Tensor, Tensor], Tensor]
"""(sigma, sigma of the next level) → standard normal noise of the shape of the latents."""


class Place(NamedTuple):
    """Where a sampler is, and what it may use.

    Attributes:
        sigmas: Noise levels, falling, the last one 0; zero-dimensional when indexed, float32 on the CPU.
        i: Which step it is.
        past: What the sampler remembered of the last steps, oldest first.
        noise: Where noise comes from.
    """

    sigmas: Tensor
    i: int
    past: Sequence[Tensor]
    noise: Noise

    @property
    def step(self) -> tuple[Tensor, Tensor]:
        """(sigma, sigma of the next level)."""
        return self.sigmas[self.i], self.sigmas[self.i + 1]

    def h(self, back: int = 0) -> Tensor:
        """The length of the step `back` steps ago, in lambda."""
        return (self.sigmas[self.i - back] / self.sigmas[self.i + 1 - back]).log()


Sample = Callable[[Denoise, Tensor, Place], tuple[Tensor, Tensor]]
"""(D, x, place) → x at the next level, and what to remember."""


def slope(x: Tensor, denoised: Tensor, sigma: Tensor) -> Tensor:
    """The derivative of x by sigma."""
    return (x - denoised) / sigma


def between(sigma: Tensor, other: Tensor) -> Tensor:
    """The level half way in lambda."""
    return (sigma * other).sqrt()


# ---------------------------------------------------------------- one step after another


def sample_euler(denoise: Denoise, x: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    """Euler steps (Karras et al., 2022, algorithm 2 without its second order)."""
    sigma, sigma_next = place.step
    denoised = denoise(x, sigma)
    return x + slope(x, denoised, sigma) * (sigma_next - sigma), denoised


def sample_euler_ancestral(denoise: Denoise, x: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    """Euler steps to below the next level, and noise up to it."""
    sigma, sigma_next = place.step
    up, down = ancestral(sigma, sigma_next)
    denoised = denoise(x, sigma)
    x = x + slope(x, denoised, sigma) * (down - sigma)
    return _noised(x, up, place), denoised


def sample_heun(denoise: Denoise, x: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    """Heun's second order steps (Karras et al., 2022, algorithm 2)."""
    sigma, sigma_next = place.step
    denoised = denoise(x, sigma)
    d = slope(x, denoised, sigma)
    x_next = x + d * (sigma_next - sigma)
    if sigma_next > 0:
        d_next = slope(x_next, denoise(x_next, sigma_next), sigma_next)
        x_next = x + (d + d_next) / 2 * (sigma_next - sigma)
    return x_next, denoised


def sample_dpm_2(denoise: Denoise, x: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    """DPM-Solver-2 (Lu et al., 2022, algorithm 1): the slope half way in lambda."""
    sigma, sigma_next = place.step
    denoised = denoise(x, sigma)
    return _midpoint(denoise, x, denoised, sigma, sigma_next), denoised


def sample_dpm_2_ancestral(denoise: Denoise, x: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    """The same to below the next level, and noise up to it."""
    sigma, sigma_next = place.step
    up, down = ancestral(sigma, sigma_next)
    denoised = denoise(x, sigma)
    return _noised(_midpoint(denoise, x, denoised, sigma, down), up, place), denoised


def sample_dpmpp_2s_ancestral(denoise: Denoise, x: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    """DPM-Solver++(2S) (Lu et al., 2022, algorithm 1) to below the next level, and noise up to it."""
    sigma, sigma_next = place.step
    up, down = ancestral(sigma, sigma_next)
    denoised = denoised_half = denoise(x, sigma)
    if down > 0:
        half = between(sigma, down)
        denoised_half = denoise(_toward(x, denoised, sigma, half), half)
    return _noised(_toward(x, denoised_half, sigma, down), up, place), denoised


def sample_dpmpp_sde(denoise: Denoise, x: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    """DPM-Solver++ of the stochastic differential equation, with a step half way in lambda."""
    sigma, sigma_next = place.step
    denoised = denoised_half = denoise(x, sigma)
    if sigma_next > 0:
        half = between(sigma, sigma_next)
        up, down = ancestral(sigma, half)
        denoised_half = denoise(_toward(x, denoised, sigma, down) + place.noise(sigma, half) * up, half)
    up, down = ancestral(sigma, sigma_next)
    return _noised(_toward(x, denoised_half, sigma, down), up, place), denoised


# ---------------------------------------------------------------- several steps together


def sample_lms(denoise: Denoise, x: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    """Linear multistep: the integral of the polynomial through the last four slopes (Adams and Bashforth)."""
    sigma, _ = place.step
    d = slope(x, denoise(x, sigma), sigma)
    slopes = [*place.past, d]
    for weight, known in zip(_lms_weights(place.sigmas, place.i, len(slopes)), slopes, strict=True):
        x = x + weight * known
    return x, d


def sample_dpmpp_2m(denoise: Denoise, x: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    """DPM-Solver++(2M) (Lu et al., 2022, algorithm 2): D goes on as it did in the last step."""
    sigma, sigma_next = place.step
    denoised = ahead = denoise(x, sigma)
    if place.past and sigma_next > 0:
        r = place.h(1) / place.h()
        ahead = denoised + (denoised - place.past[-1]) / (2 * r)
    return _toward(x, ahead, sigma, sigma_next), denoised


def sample_dpmpp_2m_sde(denoise: Denoise, x: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    """DPM-Solver++(2M) of the stochastic differential equation, by the midpoint (Lu et al., 2022, section 5)."""
    sigma, sigma_next = place.step
    denoised = denoise(x, sigma)
    if sigma_next == 0:
        return denoised, denoised
    x = _drifted(x, denoised, place)
    if place.past:
        r = place.h(1) / place.h()
        x = x - (-2 * place.h()).expm1() / (2 * r) * (denoised - place.past[-1])
    return _diffused(x, place), denoised


def sample_dpmpp_3m_sde(denoise: Denoise, x: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    """The same with two steps before (Crowson, k-diffusion): D goes on as a parabola."""
    sigma, sigma_next = place.step
    denoised = denoise(x, sigma)
    if sigma_next == 0:
        return denoised, denoised
    x, h = _drifted(x, denoised, place), 2 * place.h()
    phi_2 = (-h).expm1() / h + 1
    if len(place.past) == 2:
        phi_3 = phi_2 / h - 0.5
        r_0, r_1 = place.h(1) / place.h(), place.h(2) / place.h()
        first, second = (denoised - place.past[1]) / r_0, (place.past[1] - place.past[0]) / r_1
        bend = (first - second) / (r_0 + r_1)
        x = x + phi_2 * (first + bend * r_0) - phi_3 * bend
    elif place.past:
        x = x + phi_2 * (denoised - place.past[-1]) * place.h() / place.h(1)
    return _diffused(x, place), denoised


# ---------------------------------------------------------------- what they share


def _noised(x: Tensor, up: Tensor, place: Place) -> Tensor:
    return x + place.noise(*place.step) * up if place.step[1] > 0 else x


def _midpoint(denoise: Denoise, x: Tensor, denoised: Tensor, sigma: Tensor, end: Tensor) -> Tensor:
    d = slope(x, denoised, sigma)
    if end > 0:
        half = between(sigma, end)
        x_half = x + d * (half - sigma)
        d = slope(x_half, denoise(x_half, half), half)
    return x + d * (end - sigma)


def _toward(x: Tensor, denoised: Tensor, sigma: Tensor, end: Tensor) -> Tensor:
    """The exact solution if D were constant: e^-h x - (e^-h - 1) D, and D itself at 0."""
    return (end / sigma) * x - (end / sigma - 1) * denoised


def _drifted(x: Tensor, denoised: Tensor, place: Place) -> Tensor:
    """The same under noise: e^-2h x - (e^-2h - 1) D."""
    h = 2 * place.h()
    return (-h).exp() * x - (-h).expm1() * denoised


def _diffused(x: Tensor, place: Place) -> Tensor:
    return x + place.noise(*place.step) * place.step[1] * (-(-2 * place.h()).expm1()).sqrt()


def _lms_weights(sigmas: Tensor, i: int, order: int) -> list[float]:
    """For each of the last `order` levels, oldest first: the integral over the step of its Lagrange polynomial."""
    nodes = sigmas[i - order + 1 : i + 1].double().numpy()
    ends = sigmas[i : i + 2].double().numpy()
    weights: list[float] = []
    for index, node in enumerate(nodes):
        others = np.delete(nodes, index)
        integral = polynomial.polyint(polynomial.polyfromroots(others) / np.prod(node - others))
        weights.append(float(np.diff(polynomial.polyval(ends, integral))[0]))
    return weights


# ---------------------------------------------------------------- by name, and in the loop


class Sampler(NamedTuple):
    """A sampler, and how many steps it remembers."""

    sample: Sample
    remembers: int = 0


SAMPLERS: dict[str, Sampler] = {
    "sample_euler": Sampler(sample_euler),
    "sample_euler_ancestral": Sampler(sample_euler_ancestral),
    "sample_heun": Sampler(sample_heun),
    "sample_dpm_2": Sampler(sample_dpm_2),
    "sample_dpm_2_ancestral": Sampler(sample_dpm_2_ancestral),
    "sample_lms": Sampler(sample_lms, 3),
    "sample_dpmpp_2s_ancestral": Sampler(sample_dpmpp_2s_ancestral),
    "sample_dpmpp_sde": Sampler(sample_dpmpp_sde),
    "sample_dpmpp_2m": Sampler(sample_dpmpp_2m, 1),
    "sample_dpmpp_2m_sde": Sampler(sample_dpmpp_2m_sde, 1),
    "sample_dpmpp_3m_sde": Sampler(sample_dpmpp_3m_sde, 2),
}
"""The names of k-diffusion."""


@dataclass
class SamplerMemory(SigmaMemory):
    """Adds which sampler it is, and what it remembers, so that a run goes on with what it began with."""

    sampler: str = ""
    past: list[Tensor] = field(default_factory=list[Tensor])


@dataclass
class DenoiserAt:
    """D(x; sigma) of a guided model: it is shown x at unit variance, and the timestep with that much noise.

    Attributes:
        denoiser: The model and what it sees.
        guidance: How its predictions are combined.
        scheduler: Says what the model predicts, and how much noise there was at each timestep of training.
        step: Of the loop.
    """

    denoiser: Denoiser
    guidance: Guidance
    scheduler: SigmaScheduler
    step: Step

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The clean sample."""
        scaled = replace(self.denoiser, scheduler=UnitVariance(sigma))
        prediction = self.guidance(scaled, replace(self.step, latents=x, timestep=self.timestep(sigma)))
        return EXPLODED_X0[self.scheduler.config["prediction_type"]](x, prediction, sigma, *exploded_scales(sigma))

    def timestep(self, sigma: Tensor) -> Tensor:
        """The timestep with that much noise, between those of training."""
        training = self.scheduler.memory.derive("training sigmas", training_sigmas, self.scheduler.alphas_cumprod)
        t = timesteps_of(sigma.reshape(1).numpy(), training)[0]
        return torch.tensor(t, dtype=torch.float32, device=self.step.latents.device)


@dataclass
class UnitVariance:
    """Scales what a model is shown at one noise level, whatever the timestep."""

    sigma: Tensor

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """`sample / sqrt(sigma² + 1)`."""
        return sample / (self.sigma**2 + 1) ** 0.5


@dataclass
class SamplerStep:
    """Advances with the sampler that the memory of the run names."""

    denoiser: Denoiser
    guidance: Guidance
    scheduler: Any
    options: dict[str, Any]
    noise: Callable[[Tensor, Tensor, Tensor], Tensor]

    def denoiser_at(self, step: Step) -> DenoiserAt:
        """D(x; sigma) in a step."""
        return DenoiserAt(self.denoiser, self.guidance, self.scheduler, step)

    def __call__(self, step: Step) -> Tensor:
        """The latents of the next level."""
        memory, x = self.scheduler.memory, step.latents
        sampler = SAMPLERS[memory.sampler]
        place = Place(memory.sigmas, step.index, memory.past, lambda sigma, sigma_next: self.noise(x, sigma, sigma_next))
        made, kept = sampler.sample(self.denoiser_at(step), x, place)
        memory.past = [*memory.past, kept][-sampler.remembers :] if sampler.remembers else []
        return made
