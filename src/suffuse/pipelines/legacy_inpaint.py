"""Inpainting with a plain UNet as it was first done: image to image, with the known part laid back after each step."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from suffuse.diffusion.known_part import LayBack, RememberUnconditional
from suffuse.diffusion.latents import repeats
from suffuse.errors import InputError
from suffuse.noise import Generators, Seeds, randn_tensor
from suffuse.pipelines.arguments import recipe
from suffuse.pipelines.features import BesidePicture
from suffuse.pipelines.saved_run import SavedRun
from suffuse.pipelines.stable_diffusion.base import StableDiffusionBase
from suffuse.pipelines.stable_diffusion.painting import check_aspects
from suffuse.processing.image import Frame, ImageInput, VaeImageProcessor

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection
    from typing_extensions import Unpack

    from suffuse.models.autoencoder_kl import AutoencoderKL
    from suffuse.models.unet_2d_condition import UNet2DConditionModel
    from suffuse.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from suffuse.schedulers.scheduler import SchedulerMixin


class StableDiffusionInpaintPipelineLegacy(StableDiffusionBase):
    """Pictures painted anew where a mask is white; where it is gray, in part."""

    mask_processor = VaeImageProcessor(vae_scale_factor=1, resample="nearest", do_normalize=False, do_convert_grayscale=True)
    _only_here = ("image_encoder",)

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        safety_checker: StableDiffusionSafetyChecker | None,
        feature_extractor: CLIPImageProcessor | None,
        requires_safety_checker: bool = True,
        image_encoder: CLIPVisionModelWithProjection | None = None,
    ) -> None:
        checker = (safety_checker, feature_extractor, image_encoder, requires_safety_checker)
        super().__init__(vae, text_encoder, tokenizer, unet, scheduler, *checker)

    def check_call(self, arguments: dict[str, Any]) -> None:
        """Raise `InputError` unless the arguments of a call go together."""
        super().check_call(arguments)
        if arguments["add_predicted_noise"] and (arguments["guidance_scale"] <= 1 or arguments["guidance"] is not None):
            raise InputError(
                "add_predicted_noise needs predictions without a prompt",
                found=f"guidance_scale={arguments['guidance_scale']}, guidance={type(arguments['guidance']).__name__}",
                remedy="pass a guidance_scale above 1, and no guidance",
            )

    @recipe
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: ImageInput | None = None,
        mask_image: ImageInput | None = None,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        add_predicted_noise: bool = False,
        eta: float = 0.0,
        generator: Generators = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[..., Any] | None = None,
        callback_steps: int | None = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        ip_adapter_image: ImageInput | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        seed: Seeds = None,
        save_run: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | SavedRun | None = None,
        **values: Unpack[BesidePicture],
    ) -> Any:
        """Paint pictures anew where the mask is white.

        Returns:
            `StableDiffusionPipelineOutput(images, nsfw_content_detected)`, or the same as a tuple.

        Raises:
            InputError, LimitError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says where, and what to do.
        """
        run = self._run
        run.guidance = RememberUnconditional(guidance_scale) if add_predicted_noise else self.guidance_for(guidance_scale)
        pictures = self.image_processor.preprocess(image)
        check_aspects(image, mask_image)
        size = self.size_of(pictures)
        painted = self.mask_processor.preprocess(mask_image, *self.latent_shape(1, *size)[2:], name="mask_image")
        if strength == 0:
            return self.unchanged(pictures)
        further = self.further(Frame(*size))
        way, steps = self.way()
        run.scheduler.begin_index = None  # else solvers by sigma would take the level that a step ends with
        conditioning = self.encode()
        batch, dtype = conditioning.batch, self.unet.dtype
        kept = 1 - painted.to(self._execution_device, dtype)
        kept = kept.repeat(repeats(batch, kept, "mask_image"), 1, 1, 1)
        prompts = batch // num_images_per_prompt
        known = self.clean(torch.cat([pictures] * repeats(prompts, pictures, "image")), batch, dtype)
        noise = randn_tensor(known.shape, generator, self._execution_device, dtype)
        begun = run.scheduler.add_noise(known, noise, way[:1].repeat(batch))
        hook = LayBack(run.scheduler, known, kept, None if add_predicted_noise else noise, run.guidance)
        conditioners = [*self.conditioners(conditioning), *further]
        made = self.denoise(self.unet, conditioning, begun, way, steps, conditioners, [hook])
        return self.finish(hook.over(known, made), dtype)
