"""Text to image with a latent consistency model (Luo et al., 2023)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from suffuse.noise import Generators, Seeds
from suffuse.pipelines.arguments import recipe
from suffuse.pipelines.features import BesidePicture
from suffuse.pipelines.latent_consistency.consistent import Consistent
from suffuse.pipelines.saved_run import SavedRun
from suffuse.processing.image import ImageInput

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LatentConsistencyModelPipeline(Consistent):
    """Pictures from prompts, in a few steps."""

    @recipe
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 4,
        original_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        guidance_scale: float = 8.5,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
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
        """Draw what prompts say.

        Returns:
            `StableDiffusionPipelineOutput(images, nsfw_content_detected)`, or the same as a tuple.

        Raises:
            InputError, LimitError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says where, and what to do.
        """
        self._run.guidance = self.guidance_for(guidance_scale)
        return self.draw(*self.default_size(height, width))
