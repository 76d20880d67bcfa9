"""Image to image with Stable Diffusion XL, and what its refiner does: go on from a picture, or from latents half way."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from suffuse.noise import Generators, Seeds
from suffuse.pipelines.arguments import recipe
from suffuse.pipelines.features import BesidePicture
from suffuse.pipelines.saved_run import SavedRun
from suffuse.pipelines.stable_diffusion.drawing import Drawing
from suffuse.pipelines.stable_diffusion_xl.base import StableDiffusionXLBase
from suffuse.processing.image import ImageInput

if TYPE_CHECKING:
    from typing_extensions import Unpack


class StableDiffusionXLImg2ImgPipeline(StableDiffusionXLBase, Drawing):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Pictures from a picture and prompts."""

    _callback_tensor_inputs = [
        *("latents", "prompt_embeds", "negative_prompt_embeds", "add_text_embeds", "add_time_ids"),
        *("negative_pooled_prompt_embeds", "add_neg_time_ids"),
    ]

    @recipe
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        image: ImageInput | None = None,
        strength: float = 0.3,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
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
        ip_adapter_image: ImageInput | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        negative_original_size: tuple[int, int] | None = None,
        negative_crops_coords_top_left: tuple[int, int] = (0, 0),
        negative_target_size: tuple[int, int] | None = None,
        aesthetic_score: float = 6.0,
        negative_aesthetic_score: float = 2.5,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        callback: Callable[..., Any] | None = None,
        callback_steps: int | None = None,
        seed: Seeds = None,
        save_run: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | SavedRun | None = None,
        **values: Unpack[BesidePicture],
    ) -> Any:
        """Redraw pictures as prompts say.

        Returns:
            `StableDiffusionXLPipelineOutput(images)`, or the same as a tuple.

        Raises:
            InputError, LimitError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says where, and what to do.
        """
        self._run.guidance = self.guidance_for(guidance_scale, guidance_rescale)
        return self.redraw(self.image_processor.preprocess(image))
