"""Text to image with Stable Diffusion and the samplers of k-diffusion (Karras et al., 2022; Crowson)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from suffuse.noise import Generators, Seeds
from suffuse.pipelines.arguments import recipe
from suffuse.pipelines.features import BesidePicture
from suffuse.pipelines.k_diffusion.sampled import Sampled
from suffuse.pipelines.saved_run import SavedRun
from suffuse.processing.image import ImageInput

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection
    from typing_extensions import Unpack

    from suffuse.models.autoencoder_kl import AutoencoderKL
    from suffuse.models.unet_2d_condition import UNet2DConditionModel
    from suffuse.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from suffuse.schedulers.scheduler import SchedulerMixin


class StableDiffusionKDiffusionPipeline(Sampled):
    """Pictures from prompts."""

    model_cpu_offload_seq = "text_encoder->image_encoder->unet->vae"
    _optional_components = ["safety_checker", "feature_extractor", "image_encoder"]
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

    @recipe
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
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
        use_karras_sigmas: bool | None = False,
        noise_sampler_seed: int | list[int] | None = None,
        clip_skip: int | None = None,
        ip_adapter_image: ImageInput | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        seed: Seeds = None,
        save_run: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | SavedRun | None = None,
        **values: Unpack[BesidePicture],
    ) -> Any:
        """Draw what prompts say, by the sampler that is set.

        Returns:
            `StableDiffusionPipelineOutput(images, nsfw_content_detected)`, or the same as a tuple.

        Raises:
            InputError, LimitError: An argument is not what it may be; no generator was used.
            MissingPackageError: The sampler draws noise, and torchsde is not installed; or it is one of the package k-diffusion.
            NonFiniteError: The numbers overflowed; says where, and what to do.
        """
        self._run.guidance = self.guidance_for(guidance_scale)
        return self.sample(*self.default_size(height, width))
