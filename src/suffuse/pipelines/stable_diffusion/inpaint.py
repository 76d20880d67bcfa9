"""Inpainting with Stable Diffusion: paint a picture anew where a mask is white.

A UNet with nine input channels was trained for it and sees the mask and the masked picture; with a plain UNet of four the known
picture is laid back, at the right noise level, after every step.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from suffuse.noise import Generators, Seeds
from suffuse.pipelines.arguments import recipe
from suffuse.pipelines.features import BesidePicture
from suffuse.pipelines.saved_run import SavedRun
from suffuse.pipelines.stable_diffusion.painting import Painting
from suffuse.processing.image import ImageInput

if TYPE_CHECKING:
    from typing_extensions import Unpack


class StableDiffusionInpaintPipeline(Painting):
    """Pictures painted anew where a mask is white."""

    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds", "mask", "masked_image_latents"]
    _scheduler_settings = {"steps_offset": 1, "skip_prk_steps": True}

    @recipe
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: ImageInput | None = None,
        mask_image: ImageInput | None = None,
        masked_image_latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 1.0,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
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
        """Paint pictures anew where the mask is white.

        Returns:
            `StableDiffusionPipelineOutput(images, nsfw_content_detected)`, or the same as a tuple.

        Raises:
            InputError, LimitError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says where, and what to do.
        """
        self._run.guidance = self.guidance_for(guidance_scale)
        return self.paint(*self.default_size(height, width))
