"""Painting by example with Stable Diffusion (Yang et al., 2022)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from suffuse.diffusion.conditioning import Channels
from suffuse.diffusion.latents import repeats
from suffuse.errors import InputError
from suffuse.noise import Generators, Seeds
from suffuse.pipelines.arguments import recipe
from suffuse.pipelines.features import Guided
from suffuse.pipelines.image_variation.shown import Shown
from suffuse.pipelines.saved_run import SavedRun
from suffuse.pipelines.stable_diffusion.painting import Painting, check_aspects
from suffuse.processing.image import ImageInput

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor
    from typing_extensions import Unpack

    from suffuse.models.autoencoder_kl import AutoencoderKL
    from suffuse.models.unet_2d_condition import UNet2DConditionModel
    from suffuse.pipelines.paint_by_example.image_encoder import PaintByExampleImageEncoder
    from suffuse.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from suffuse.schedulers.scheduler import SchedulerMixin


class PaintByExamplePipeline(Shown, Painting):
    """Pictures painted as an example shows."""

    model_cpu_offload_seq = "unet->vae"
    _exclude_from_cpu_offload = ["image_encoder", "safety_checker"]
    shown_as = "example_image"

    def __init__(
        self,
        vae: AutoencoderKL,
        image_encoder: PaintByExampleImageEncoder,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        safety_checker: StableDiffusionSafetyChecker | None,
        feature_extractor: CLIPImageProcessor | None,
        requires_safety_checker: bool = False,
    ) -> None:
        super().__init__(vae, image_encoder, unet, scheduler, safety_checker, feature_extractor, requires_safety_checker)

    @classmethod
    def input_channels(cls, latents: int) -> tuple[int, ...]:
        """Latents, those of the masked picture, and the mask."""
        return (2 * latents + 1,)

    def check_call(self, arguments: dict[str, Any]) -> None:
        """Raise `InputError` unless the example is pictures, and the mask is of the picture; or if a text is told."""
        super().check_call(arguments)
        check_aspects(arguments["image"], arguments["mask_image"])
        if arguments["negative_prompt"] is not None:
            raise InputError("negative_prompt is given and this model is told no text", remedy="leave it out")

    @recipe
    def __call__(
        self,
        example_image: ImageInput | None = None,
        image: ImageInput | None = None,
        mask_image: ImageInput | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[..., Any] | None = None,
        callback_steps: int = 1,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        seed: Seeds = None,
        save_run: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | SavedRun | None = None,
        **values: Unpack[Guided],
    ) -> Any:
        """Paint pictures anew where the mask is white, as an example shows.

        Returns:
            `StableDiffusionPipelineOutput(images, nsfw_content_detected)`, or the same as a tuple.

        Raises:
            InputError, LimitError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says where, and what to do.
        """
        run = self._run
        run.guidance = self.guidance_for(guidance_scale)
        pictures = on_the_grid(self.image_processor.preprocess(image, height, width))
        painted = self.mask_processor.preprocess(mask_image, height, width, name="mask_image")
        way, steps = self.way()
        conditioning = self.encode()
        batch, dtype = conditioning.batch, conditioning.tensors["prompt_embeds"].dtype
        for name, given in (("image", pictures), ("mask_image", painted)):
            repeats(batch, given, name)

        # The generator is spent on the noise, then on the masked picture.
        noise = self.make_noise(self.latent_shape(batch, *pictures.shape[-2:]), dtype)
        told = self.encode_masked(pictures, painted, None, batch, dtype)
        conditioning.share(masked_image_latents=told["masked_image_latents"], kept=1 - told["mask"])
        conditioners = [*self.conditioners(conditioning), Channels(["masked_image_latents", "kept"])]
        noisy = noise * run.scheduler.init_noise_sigma
        return self.finish(self.denoise(self.unet, conditioning, noisy, way, steps, conditioners), dtype)

    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """What the UNet is told of examples, (batch, 1, width), and of none, (1, 1, width)."""
        return self.image_encoder(pixels, return_uncond_vector=True)


def on_the_grid(pictures: Tensor) -> Tensor:
    """Pictures in [-1, 1] that were bytes, with the values this model was trained on: bytes / 127.5 - 1, to the last bit."""
    levels = (pictures + 1) * 127.5
    whole = levels.round()
    return whole / 127.5 - 1 if bool(torch.isclose(levels, whole, rtol=0, atol=1e-4).all()) else pictures
