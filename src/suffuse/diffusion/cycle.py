"""Editing with the noise of the picture itself (Wu and De la Torre, 2023, "CycleDiffusion", algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from suffuse.diffusion.advance import GuidedStep
from suffuse.diffusion.conditioning import Conditioning, Denoiser, Foreseen
from suffuse.diffusion.guidance import ClassifierFreeGuidance
from suffuse.diffusion.holding_guidance import HoldingGuidance
from suffuse.diffusion.loop import Step
from suffuse.noise import randn_tensor


@dataclass
class TargetOnly(Conditioning):
    """The tensors of a run whose batch is the source and then the target: those of the target."""

    def select(self, name: str, branches: tuple[str, ...]) -> Tensor:
        """The rows of `name` that belong to `branches`, in their order; of each, those of the target."""
        return _of_target(super().select(name, branches), branches)

    def shown(self, pictures: Tensor, branches: tuple[str, ...]) -> Tensor:
        """Pictures, or features of them, for each row of the target."""
        return _of_target(super().shown(pictures, branches), branches)


def _of_target(values: Tensor, branches: tuple[str, ...]) -> Tensor:
    return torch.cat(values.chunk(2 * len(branches))[1::2])


@dataclass
class SourceAndTarget(HoldingGuidance):
    """Guidance for a batch whose first half is the source and whose second half is the target, which another guides.

    Attributes:
        source_scale: The guidance scale of the first half, where the other asks for an unconditional prediction.
        source: Latents of the source, which go the same way as those of the target.
    """

    remembers: ClassVar[tuple[str, ...]] = ("source",)
    source_scale: float = 1.0
    source: Tensor = field(default_factory=lambda: torch.zeros(0))

    def __call__(self, denoiser: Denoiser, step: Step) -> Tensor:
        """One prediction, of the shape of the latents; the model is asked for both halves at once."""
        said = {branch: both.chunk(2) for branch, both in denoiser(step, self.branches).items()}
        source = ClassifierFreeGuidance(self.source_scale).combine(
            {branch: said[branch][0] for branch in ("cond", "uncond") if branch in said}
        )
        told = denoiser.conditioning
        alone = replace(denoiser, conditioning=TargetOnly(**vars(told)))
        own = Foreseen.of(alone, {branch: target for branch, (_, target) in said.items()})
        return torch.cat([source, self.guidance(own, replace(step, latents=step.latents.chunk(2)[1]))])


@dataclass
class CycleStep(GuidedStep):
    """A step of DDIM with the noise that takes the source from its latents to those one step nearer to the picture.

    Attributes:
        clean: Latents of the picture, as many as those of the run.
    """

    clean: Tensor = field(default_factory=lambda: torch.zeros(0))

    def __call__(self, step: Step) -> Tensor:
        """The latents of the next timestep."""
        guidance: Any = self.guidance
        source = guidance.source.to(step.latents)
        both = torch.cat([source, step.latents])
        # diffusers lays several branches out in plain order and a single one as the encoder left it, which decides the last bit.
        both = both.contiguous() if len(guidance.branches) > 1 else both
        prediction = guidance(self.denoiser, replace(step, latents=both))
        of_source, of_target = prediction.chunk(2)
        guidance.source, noise = self._noise(source, of_source, step.timestep)
        options = {"eta": self.options["eta"], "variance_noise": noise, "return_dict": False}
        return self.scheduler.step(of_target, step.timestep, step.latents, **options)[0]

    def _noise(self, source: Tensor, prediction: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of the source drawn one step nearer to the picture, and the noise with which DDIM would come to them."""
        scheduler: Any = self.scheduler
        eta, t = self.options["eta"], int(timestep)
        before = t - len(scheduler) // scheduler.num_inference_steps
        alpha = scheduler.alphas_cumprod[t]
        alpha_before = scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod
        deviation = ((1 - alpha_before) / (1 - alpha) * (1 - alpha / alpha_before)) ** 0.5
        nearer = self.clean
        if before > 0:
            sigma = eta * deviation
            epsilon = (source - alpha**0.5 * self.clean) / (1 - alpha) ** 0.5
            drawn = randn_tensor(source.shape, self.options.get("generator"), source.device, source.dtype)
            nearer = alpha_before**0.5 * self.clean + (1.0 - alpha_before - sigma**2) ** 0.5 * epsilon + sigma * drawn
        still = torch.zeros_like(source)
        mean = scheduler.step(prediction, timestep, source, eta=eta, variance_noise=still, return_dict=False)[0]
        return nearer, (nearer - mean) / (deviation * eta) if eta * deviation > 0 else still
