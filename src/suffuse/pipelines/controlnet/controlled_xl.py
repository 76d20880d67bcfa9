"""What the pipelines of Stable Diffusion XL with ControlNets share: the components."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from suffuse.pipelines.controlnet.controlled import Controlled
from suffuse.pipelines.stable_diffusion_xl.base import StableDiffusionXLBase

if TYPE_CHECKING:
    from transformers import (
        CLIPImageProcessor,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        CLIPVisionModelWithProjection,
    )

    from suffuse.models.autoencoder_kl import AutoencoderKL
    from suffuse.models.controlnet import ControlNetModel, MultiControlNetModel
    from suffuse.models.unet_2d_condition import UNet2DConditionModel
    from suffuse.schedulers.scheduler import SchedulerMixin


class ControlledXL(StableDiffusionXLBase, Controlled):  # pyright: ignore[reportIncompatibleMethodOverride]
    """The components of ControlNets with Stable Diffusion XL."""

    _optional_components = ["tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "feature_extractor", "image_encoder"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel | None,
        text_encoder_2: CLIPTextModelWithProjection | None,
        tokenizer: CLIPTokenizer | None,
        tokenizer_2: CLIPTokenizer | None,
        unet: UNet2DConditionModel,
        controlnet: ControlNetModel | Sequence[ControlNetModel] | MultiControlNetModel,
        scheduler: SchedulerMixin,
        requires_aesthetics_score: bool | None = False,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
    ) -> None:
        text = (text_encoder, text_encoder_2, tokenizer, tokenizer_2)
        settings = (requires_aesthetics_score, force_zeros_for_empty_prompt, add_watermarker)
        super().__init__(vae, *text, unet, scheduler, image_encoder, feature_extractor, *settings)
        self.take(controlnet)
