"""The subject of a picture in another (Li et al., 2023, "BLIP-Diffusion")."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from suffuse.noise import Generators, Seeds
from suffuse.pipelines.arguments import recipe
from suffuse.pipelines.blip_diffusion.subject import SubjectDriven
from suffuse.pipelines.features import Guided
from suffuse.pipelines.saved_run import SavedRun

if TYPE_CHECKING:
    from typing_extensions import Unpack


class BlipDiffusionPipeline(SubjectDriven):
    """Pictures of a subject, from a picture of it and prompts."""

    @recipe
    def __call__(
        self,
        prompt: list[str],
        reference_image: Image.Image,
        source_subject_category: list[str],
        target_subject_category: list[str],
        latents: Tensor | None = None,
        guidance_scale: float = 7.5,
        height: int = 512,
        width: int = 512,
        num_inference_steps: int = 50,
        generator: Generators = None,
        neg_prompt: str | None = "",
        prompt_strength: float = 1.0,
        prompt_reps: int = 20,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        seed: Seeds = None,
        save_run: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | SavedRun | None = None,
        **values: Unpack[Guided],
    ) -> Any:
        """Draw the subject of `reference_image` as prompts say.

        Returns:
            `ImagePipelineOutput(images)`, or the same as a tuple.

        Raises:
            InputError, LimitError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says where.
        """
        return self.draw()
