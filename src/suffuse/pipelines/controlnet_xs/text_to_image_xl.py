"""Text to image with Stable Diffusion XL and a control side (Zavadski et al., 2024, "ControlNet-XS")."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from suffuse.noise import Generators, Seeds
from suffuse.pipelines.arguments import recipe
from suffuse.pipelines.controlnet_xs.sided import Sided, with_side
from suffuse.pipelines.features import Guided
from suffuse.pipelines.saved_run import SavedRun
from suffuse.pipelines.stable_diffusion.drawing import Drawing
from suffuse.pipelines.stable_diffusion_xl.base import StableDiffusionXLBase
from suffuse.processing.image import ImageInput

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
    from typing_extensions import Unpack

    from suffuse.models.autoencoder_kl import AutoencoderKL
    from suffuse.models.controlnet_xs import ControlNetXSAdapter, UNetControlNetXSModel
    from suffuse.models.unet_2d_condition import UNet2DConditionModel
    from suffuse.schedulers.scheduler import SchedulerMixin


class StableDiffusionXLControlNetXSPipeline(Sided, StableDiffusionXLBase, Drawing):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Pictures from prompts and control pictures."""

    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet->vae"
    _optional_components = ["tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "feature_extractor"]
    _negative_ids = "negative_add_time_ids"

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel | None,
        text_encoder_2: CLIPTextModelWithProjection | None,
        tokenizer: CLIPTokenizer | None,
        tokenizer_2: CLIPTokenizer | None,
        unet: UNet2DConditionModel | UNetControlNetXSModel,
        controlnet: ControlNetXSAdapter,
        scheduler: SchedulerMixin,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
    ) -> None:
        text = (text_encoder, text_encoder_2, tokenizer, tokenizer_2)
        settings = (None, force_zeros_for_empty_prompt, add_watermarker)
        StableDiffusionXLBase.__init__(
            self, vae, *text, with_side(unet, controlnet), scheduler, None, feature_extractor, *settings
        )
        self.register_modules(controlnet=controlnet)

    @recipe
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        image: ImageInput | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
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
        cross_attention_kwargs: dict[str, Any] | None = None,
        controlnet_conditioning_scale: float | list[float] = 1.0,
        control_guidance_start: float = 0.0,
        control_guidance_end: float = 1.0,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        negative_original_size: tuple[int, int] | None = None,
        negative_crops_coords_top_left: tuple[int, int] = (0, 0),
        negative_target_size: tuple[int, int] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        seed: Seeds = None,
        save_run: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | SavedRun | None = None,
        **values: Unpack[Guided],
    ) -> Any:
        """Draw what prompts say and control pictures show.

        Returns:
            `StableDiffusionXLPipelineOutput(images)`, or the same as a tuple.

        Raises:
            InputError, LimitError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says where, and what to do.
        """
        self._run.guidance = self.guidance_for(guidance_scale)
        return self.draw(*self.size_by("image", height, width))
