"""Text to image with Stable Diffusion under control of a picture (Zhang et al., 2023)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from suffuse.noise import Generators, Seeds
from suffuse.pipelines.arguments import recipe
from suffuse.pipelines.controlnet.controlled import Controlled
from suffuse.pipelines.features import BesideControl
from suffuse.pipelines.saved_run import SavedRun
from suffuse.pipelines.stable_diffusion.drawing import Drawing
from suffuse.processing.image import ImageInput

if TYPE_CHECKING:
    from typing_extensions import Unpack


class StableDiffusionControlNetPipeline(Controlled, Drawing):
    """Pictures from prompts and control pictures."""

    called = {"control_image": "image"}

    prepare_image = Controlled.prepare_control_image

    @recipe
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: ImageInput | None = None,
        height: int | None = None,
        width: int | None = None,
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
        controlnet_conditioning_scale: float | list[float] = 1.0,
        guess_mode: bool = False,
        control_guidance_start: float | list[float] = 0.0,
        control_guidance_end: float | list[float] = 1.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        callback: Callable[..., Any] | None = None,
        callback_steps: int | None = None,
        seed: Seeds = None,
        save_run: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | SavedRun | None = None,
        **values: Unpack[BesideControl],
    ) -> Any:
        """Draw what prompts say and control pictures show.

        Returns:
            `StableDiffusionPipelineOutput(images, nsfw_content_detected)`, or the same as a tuple.

        Raises:
            InputError, LimitError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says where, and what to do.
        """
        self._run.guidance = self.guidance_for(guidance_scale)
        return self.draw(*self.size_by("image", height, width))
