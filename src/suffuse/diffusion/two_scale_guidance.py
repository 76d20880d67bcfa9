"""Guidance by a text and by a picture, each with a scale of its own (Brooks et al., 2023, "InstructPix2Pix")."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from suffuse.diffusion.conditioning import Denoiser
from suffuse.diffusion.guidance import Guidance, rescale_to
from suffuse.diffusion.loop import Step


@dataclass
class TwoScaleGuidance(Guidance):
    """From nothing towards the picture, and from there towards the text (equation 3).

    "cond" is told text and picture, "image" the picture alone, "uncond" neither.

    Attributes:
        scale: How far towards the text; at 1 or below only the conditional branch is computed.
        image_scale: How far towards the picture; below 1 only the conditional branch is computed.
        rescale: As of `ClassifierFreeGuidance`.
    """

    scale: float
    image_scale: float
    rescale: float = 0.0

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the branches, in batch order."""
        return ("cond", "image", "uncond") if self.scale > 1 and self.image_scale >= 1 else ("cond",)

    def __call__(self, denoiser: Denoiser, step: Step) -> Tensor:
        """One prediction, of the shape of the latents."""
        predictions = denoiser(step, self.branches)
        cond = predictions["cond"]
        if len(predictions) == 1:
            return cond
        image, uncond = predictions["image"], predictions["uncond"]
        guided = uncond + self.scale * (cond - image) + self.image_scale * (image - uncond)
        return rescale_to(cond, guided, self.rescale) if self.rescale > 0 else guided
