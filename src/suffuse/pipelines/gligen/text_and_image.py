"""Text to image with phrases and pictures in boxes (Li et al., 2023, "GLIGEN")."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from suffuse.noise import Generators, Seeds
from suffuse.pipelines.arguments import recipe
from suffuse.pipelines.features import BesideBoxes
from suffuse.pipelines.gligen.grounded import Grounded
from suffuse.pipelines.saved_run import SavedRun

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection
    from typing_extensions import Unpack

    from suffuse.models.autoencoder_kl import AutoencoderKL
    from suffuse.models.clip_image_projection import CLIPImageProjection
    from suffuse.models.unet_2d_condition import UNet2DConditionModel
    from suffuse.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from suffuse.schedulers.scheduler import SchedulerMixin


class StableDiffusionGLIGENTextImagePipeline(Grounded):
    """Pictures from prompts, with things, told by phrases or shown in pictures, where boxes say."""

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["safety_checker", "feature_extractor"]

    processor: Any
    image_encoder: Any
    image_project: Any

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        processor: CLIPProcessor,
        image_encoder: CLIPVisionModelWithProjection,
        image_project: CLIPImageProjection,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        safety_checker: StableDiffusionSafetyChecker | None,
        feature_extractor: CLIPImageProcessor | None,
        requires_safety_checker: bool = True,
    ) -> None:
        checker = (safety_checker, feature_extractor, image_encoder, requires_safety_checker)
        super().__init__(vae, text_encoder, tokenizer, unet, scheduler, *checker)
        self.register_modules(processor=processor, image_project=image_project)

    def needed_components(self, arguments: dict[str, Any]) -> list[str]:
        """Those of boxes, and what sees pictures, if there are any."""
        seeing = ["processor", "image_encoder", "image_project"] if arguments["gligen_images"] is not None else []
        return [*super().needed_components(arguments), *seeing]

    @recipe
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        gligen_scheduled_sampling_beta: float = 0.3,
        gligen_phrases: list[str | None] | None = None,
        gligen_images: list[Image.Image | None] | None = None,
        input_phrases_mask: int | list[int] | None = None,
        input_images_mask: int | list[int] | None = None,
        gligen_boxes: list[list[float]] | None = None,
        gligen_inpaint_image: Image.Image | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[..., Any] | None = None,
        callback_steps: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        gligen_normalize_constant: float = 28.7,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        seed: Seeds = None,
        save_run: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | SavedRun | None = None,
        **values: Unpack[BesideBoxes],
    ) -> Any:
        """Draw what prompts say, with what phrases say and pictures show where boxes say, in all steps: as in diffusers,
        `gligen_scheduled_sampling_beta` has no effect here.

        Returns:
            `StableDiffusionPipelineOutput(images, nsfw_content_detected)`, or the same as a tuple.

        Raises:
            InputError, LimitError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says where, and what to do.
        """
        self._run.guidance = self.guidance_for(guidance_scale)
        return self.ground(height, width, part=1.0)
