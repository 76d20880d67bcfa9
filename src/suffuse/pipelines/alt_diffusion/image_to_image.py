"""Image to image with AltDiffusion (Ye et al., 2023)."""

from __future__ import annotations

from suffuse.pipelines.alt_diffusion.multilingual import Multilingual
from suffuse.pipelines.stable_diffusion.image_to_image import StableDiffusionImg2ImgPipeline


class AltDiffusionImg2ImgPipeline(Multilingual, StableDiffusionImg2ImgPipeline):
    """Pictures from a picture and prompts, in any of eighteen languages."""
