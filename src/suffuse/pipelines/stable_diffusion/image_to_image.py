"""Image to image with Stable Diffusion: noise a picture part of the way, denoise it to the prompt (SDEdit, Meng et al., 2021)."""

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
from suffuse.processing.image import ImageInput

if TYPE_CHECKING:
    from typing_extensions import Unpack


class StableDiffusionImg2ImgPipeline(Drawing):
    """Pictures from a picture and prompts."""

    @recipe
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: ImageInput | None = None,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: ImageInput | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
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
            `StableDiffusionPipelineOutput(images, nsfw_content_detected)`, or the same as a tuple.

        Raises:
            InputError, LimitError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says where, and what to do.
        """
        self._run.guidance = self.guidance_for(guidance_scale)
        return self.redraw(self.image_processor.preprocess(image))
