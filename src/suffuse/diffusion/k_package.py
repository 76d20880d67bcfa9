"""Samplers that the package k-diffusion (Crowson) has and this library has not: they walk the whole way by themselves.

Their model is our D(x; sigma), and the hooks of the run are told of each of their steps; how many there are, they decide.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from suffuse.diffusion.k_samplers import SAMPLERS, SamplerStep
from suffuse.diffusion.loop import Finished, Hook, Step
from suffuse.errors import InputError, MissingPackageError, nearest

OTHERS = ("sample_dpm_fast", "sample_dpm_adaptive")
"""What the package is known to have besides; it may have more."""
GIVEN = ("model", "x", "sigmas", "sigma_min", "sigma_max", "n", "noise_sampler", "callback", "disable")
"""What its samplers are given, of these what they take."""


def packaged_sampler(name: str) -> Callable[..., Tensor]:
    """A sampler of the package by its name.

    Raises:
        InputError: There is none of this name, here or there, or it asks for what a pipeline does not know.
        MissingPackageError: It is one of the package, which is not installed.
    """
    there = dict[str, Any]()
    try:
        there = vars(importlib.import_module("k_diffusion.sampling"))
    except ImportError as error:
        if name in OTHERS:
            message = f"{name} is a sampler of the package k-diffusion"
            raise MissingPackageError(message, found=str(error), remedy='pip install "suffuse[k-diffusion]"') from error
    if name not in there or not name.startswith("sample_"):
        known = [*SAMPLERS, *(own for own in there or OTHERS if own.startswith("sample_") and own not in SAMPLERS)]
        close = nearest(name, known)
        remedy = f"did you mean {close}?" if close else ""
        raise InputError(f"there is no sampler {name!r}", expected=", ".join(known), remedy=remedy)
    parameters = inspect.signature(there[name]).parameters
    unknown = [own for own, each in parameters.items() if each.default is each.empty and own not in GIVEN]
    if unknown:
        raise InputError(f"{name} asks for {unknown[0]}, which no pipeline has", expected="what samplers of images ask for")
    return there[name]


def packaged_walk(
    sample: Callable[..., Tensor], latents: Tensor, timesteps: Tensor, advance: Any, hooks: Sequence[Hook] = (), begin: int = 0
) -> Tensor:
    """Go the way of a run, from its beginning, by a sampler of the package.

    Args:
        sample: The sampler.
        latents: (batch, channels, height, width), to begin with.
        timesteps: As many as steps were asked for.
        advance: The `SamplerStep` of the run.
        hooks: Called before and after each step that the sampler makes.
        begin: 0.

    Returns:
        Latents at the end, or where a hook ends the way.

    Raises:
        InputError: A hook replaced the latents, of which the sampler would not know.
    """
    taken: SamplerStep = advance
    sigmas: Tensor = taken.scheduler.memory.sigmas
    step, dtype = Step(latents, len(timesteps), timestep=timesteps[0]), latents.dtype
    at = latents.float()  # levels would be rounded to the type of what they multiply

    def denoise(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        level = sigma.flatten()[0].float().cpu()
        here = replace(step, latents=x.to(dtype), index=level_below(sigmas, level))
        return taken.denoiser_at(here)(here.latents, level).to(x.dtype)

    def noise(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        return taken.noise(at, sigma.cpu(), sigma_next.cpu())

    def arrived(x: Tensor) -> None:
        nonlocal at
        at = x
        made = step.latents = x.to(dtype)
        for hook in hooks:
            hook.after(step)
        if step.latents is not made:
            message = f"latents were replaced on the way, and {sample.__name__} would not know"
            raise InputError(message, remedy=f"choose another sampler: {', '.join(SAMPLERS)}")

    def listen(told: Mapping[str, Any]) -> None:
        # Of some it is heard before a step, of others after it, accepted or not: one is made when there is another x.
        if told["x"] is at:
            return
        arrived(told["x"])
        step.index += 1
        step.timestep = taken.denoiser_at(step).timestep(torch.as_tensor(told["sigma"]).float().cpu())
        for hook in hooks:
            hook.before(step)

    ends = {"sigma_min": float(sigmas[-2]), "sigma_max": float(sigmas[0]), "sigmas": sigmas.to(latents.device)}
    given: dict[str, Any] = {**ends, "n": len(timesteps), "noise_sampler": noise, "callback": listen, "disable": True}
    accepted = inspect.signature(sample).parameters
    try:
        for hook in hooks:
            hook.before(step)
        made = sample(denoise, at, **{name: value for name, value in given.items() if name in accepted})
        if made is not at:
            arrived(made)
    except Finished:
        pass
    return step.latents


def level_below(sigmas: Tensor, sigma: Tensor) -> int:
    """Which step of the way a noise level lies in: the last of the levels, the 0 aside, that is not below it."""
    return max(int((sigmas[:-1] >= sigma * (1 - 1e-4)).sum()) - 1, 0)
