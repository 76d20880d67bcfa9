"""Editing by instruction with Stable Diffusion XL (Brooks et al., 2023; Podell et al., 2023)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from suffuse.configuration import check_type
from suffuse.diffusion.two_scale_guidance import TwoScaleGuidance
from suffuse.noise import Generators, Seeds
from suffuse.pipelines.arguments import recipe
from suffuse.pipelines.features import BesideGuidance
from suffuse.pipelines.instruct_pix2pix.editing import Editing
from suffuse.pipelines.saved_run import SavedRun
from suffuse.pipelines.stable_diffusion_xl.base import StableDiffusionXLBase
from suffuse.processing.image import ImageInput

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
    from typing_extensions import Unpack

    from suffuse.models.autoencoder_kl import AutoencoderKL
    from suffuse.models.unet_2d_condition import UNet2DConditionModel
    from suffuse.schedulers.scheduler import SchedulerMixin


class StableDiffusionXLInstructPix2PixPipeline(StableDiffusionXLBase, Editing):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Pictures edited as prompts tell.

    Args:
        vae: The autoencoder.
        text_encoder: The first text encoder.
        text_encoder_2: The second.
        tokenizer: Of the first text encoder.
        tokenizer_2: Of the second.
        unet: The UNet, which sees the picture beside the latents.
        scheduler: The solver.
        force_zeros_for_empty_prompt: Without a negative prompt, the unconditional embeddings are zeros.
        add_watermarker: Mark pictures invisibly; None for where the package for it is installed.
        is_cosxl_edit: The UNet was trained with latents of the picture at the scale of those it denoises (CosXL).
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet->vae"
    _optional_components = ["tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"]
    _callback_tensor_inputs = [
        *("latents", "prompt_embeds", "negative_prompt_embeds", "add_text_embeds", "add_time_ids"),
        *("negative_pooled_prompt_embeds", "image_latents"),
    ]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel | None,
        text_encoder_2: CLIPTextModelWithProjection | None,
        tokenizer: CLIPTokenizer | None,
        tokenizer_2: CLIPTokenizer | None,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
        is_cosxl_edit: bool = False,
    ) -> None:
        check_type(type(self).__name__, "is_cosxl_edit", is_cosxl_edit, bool)
        text = (text_encoder, text_encoder_2, tokenizer, tokenizer_2)
        settings = (None, None, None, force_zeros_for_empty_prompt, add_watermarker)
        super().__init__(vae, *text, unet, scheduler, *settings)
        self.register_to_config(is_cosxl_edit=is_cosxl_edit)

    def prepare_image_latents(
        self,
        image: Tensor,
        batch_size: int,
        num_images_per_prompt: int,
        dtype: torch.dtype,
        device: torch.device,
        do_classifier_free_guidance: bool,
        generator: Generators = None,
    ) -> Tensor:
        """Latents of pictures as the UNet sees them; at the scale of those it denoises, if it was trained so."""
        how = (batch_size, num_images_per_prompt, dtype, device, do_classifier_free_guidance, generator)
        latents = super().prepare_image_latents(image, *how)
        return latents * self.vae.config.scaling_factor if self.config["is_cosxl_edit"] else latents

    @recipe
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        image: ImageInput | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 100,
        denoising_end: float | None = None,
        guidance_scale: float = 5.0,
        image_guidance_scale: float = 1.5,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[..., Any] | None = None,
        callback_steps: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        seed: Seeds = None,
        save_run: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | SavedRun | None = None,
        **values: Unpack[BesideGuidance],
    ) -> Any:
        """Edit pictures as prompts tell: "make it winter".

        Returns:
            `StableDiffusionXLPipelineOutput(images)`, or the same as a tuple.

        Raises:
            InputError, LimitError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says where, and what to do.
        """
        self._run.guidance = TwoScaleGuidance(guidance_scale, image_guidance_scale, guidance_rescale)
        height, width = self.default_size(height, width)
        return self.edit(self.image_processor.preprocess(image, height=height, width=width))
