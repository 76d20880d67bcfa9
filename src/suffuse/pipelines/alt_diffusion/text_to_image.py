"""Text to image with AltDiffusion (Ye et al., 2023, "AltDiffusion: A multilingual text-to-image diffusion model")."""

from __future__ import annotations

from suffuse.pipelines.alt_diffusion.multilingual import Multilingual
from suffuse.pipelines.stable_diffusion.text_to_image import StableDiffusionPipeline


class AltDiffusionPipeline(Multilingual, StableDiffusionPipeline):
    """Pictures from prompts, in any of eighteen languages."""
