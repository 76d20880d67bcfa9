"""Text to image, away from what should not be shown (Schramowski et al., 2023, "Safe latent diffusion")."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from suffuse.diffusion.decoders import decode_latents
from suffuse.diffusion.safe_guidance import CONCEPT, SafeGuidance
from suffuse.noise import Generators, Seeds
from suffuse.outputs import BaseOutput
from suffuse.pipelines.arguments import recipe
from suffuse.pipelines.features import BesideGuidance
from suffuse.pipelines.saved_run import SavedRun
from suffuse.pipelines.stable_diffusion.drawing import Drawing
from suffuse.processing.image import ImageInput

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SafetyConfig:
    """Settings of the paper, from the weakest to the strongest: `pipe(prompt, **SafetyConfig.MEDIUM)`."""

    WEAK: Mapping[str, Any] = {
        "sld_warmup_steps": 15,
        "sld_guidance_scale": 20,
        "sld_threshold": 0.0,
        "sld_momentum_scale": 0.0,
        "sld_mom_beta": 0.0,
    }
    MEDIUM: Mapping[str, Any] = {
        "sld_warmup_steps": 10,
        "sld_guidance_scale": 1000,
        "sld_threshold": 0.01,
        "sld_momentum_scale": 0.3,
        "sld_mom_beta": 0.4,
    }
    STRONG: Mapping[str, Any] = {
        "sld_warmup_steps": 7,
        "sld_guidance_scale": 2000,
        "sld_threshold": 0.025,
        "sld_momentum_scale": 0.5,
        "sld_mom_beta": 0.7,
    }
    MAX: Mapping[str, Any] = {
        "sld_warmup_steps": 0,
        "sld_guidance_scale": 5000,
        "sld_threshold": 1.0,
        "sld_momentum_scale": 0.5,
        "sld_mom_beta": 0.7,
    }


@dataclass
class StableDiffusionSafePipelineOutput(BaseOutput):
    """Pictures, and what was done so that they can be shown.

    Attributes:
        images: Pictures; those the safety checker objects to are blank.
        nsfw_content_detected: For each whether it is; None if there is no checker.
        unsafe_images: The pictures it objects to as they were, in their order; None if there is none.
        applied_safety_concept: What was guided away from; None if nothing was.
    """

    images: Any
    nsfw_content_detected: list[bool] | None
    unsafe_images: Any
    applied_safety_concept: str | None


class StableDiffusionPipelineSafe(Drawing):
    """Pictures from prompts, away from what should not be shown."""

    model_cpu_offload_seq = "text_encoder->unet->vae"

    safety_concept: str = CONCEPT
    """What pictures are guided away from: set it on a pipeline, or pass it to a call."""

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
        ip_adapter_image: ImageInput | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[..., Any] | None = None,
        callback_steps: int | None = 1,
        sld_guidance_scale: float = 1000,
        sld_warmup_steps: int = 10,
        sld_threshold: float = 0.01,
        sld_momentum_scale: float = 0.3,
        sld_mom_beta: float = 0.4,
        safety_concept: str | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        seed: Seeds = None,
        save_run: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | SavedRun | None = None,
        **values: Unpack[BesideGuidance],
    ) -> Any:
        """Draw what prompts say.

        Returns:
            `StableDiffusionSafePipelineOutput(images, nsfw_content_detected, unsafe_images, applied_safety_concept)`, or a
            tuple of the same with the last two exchanged.

        Raises:
            InputError, LimitError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says where, and what to do.
        """
        concept = [self._run.arguments["safety_concept"]]  # in a list it may be empty, as in diffusers
        self._run.guidance = SafeGuidance(
            guidance_scale, concept, sld_guidance_scale, sld_warmup_steps, sld_threshold, sld_momentum_scale, sld_mom_beta
        )
        if not self.is_guarded:
            warnings.warn(
                "nothing guides the pictures away from what should not be shown: that takes a guidance_scale and a "
                "sld_guidance_scale above 1",
                stacklevel=3,
            )
        return self.draw(*self.default_size(height, width))

    @property
    def is_guarded(self) -> bool:
        """Whether the last run of this thread is guided away from a concept."""
        return "safety" in self._run.guidance.branches

    def check_call(self, arguments: dict[str, Any]) -> None:
        """Raise `InputError` unless arguments go together; what nobody says of the concept, the pipeline does."""
        super().check_call(arguments)
        arguments["safety_concept"] = arguments["safety_concept"] or self.safety_concept

    def finish(self, latents: Tensor, dtype: torch.dtype) -> Any:
        """Latents to the result of the call, with what the checker objects to as it was."""
        arguments = self._run.arguments
        if arguments["output_type"] == "latent":
            return self.result(latents, None, None)
        image = decode_latents(self.vae, latents, arguments["generator"], self.upcasts("decode"))
        image, flagged, unsafe = self.run_safety_checker(image, self._execution_device, dtype)
        shown = None if flagged is None else [not hidden for hidden in flagged]
        unsafe = None if unsafe is None else self.image_processor.postprocess(unsafe, arguments["output_type"])
        return self.result(self.image_processor.postprocess(image, arguments["output_type"], shown), flagged, unsafe)

    def run_safety_checker(  # pyright: ignore[reportIncompatibleMethodOverride]: the result has one part more, as in diffusers
        self, image: Tensor, device: torch.device, dtype: torch.dtype, enable_safety_guidance: bool = True
    ) -> tuple[Tensor, list[bool] | None, Tensor | None]:
        """Blank what the safety checker objects to.

        Returns:
            The pictures; for each whether it was blanked (None: no checker); and those as they were (None: no such).
        """
        before = image.clone()
        image, flagged = super().run_safety_checker(image, device, dtype)
        for index, objected in enumerate(flagged or ()):
            image[index] = torch.zeros_like(image[index]) if objected else image[index]
        return image, flagged, before[torch.tensor(flagged)] if any(flagged or ()) else None

    def result(self, images: Any, flagged: list[bool] | None, unsafe: Any) -> Any:
        """The result of a call, as an output object or a plain tuple."""
        concept = self._run.arguments["safety_concept"] if self.is_guarded else None
        if not self._run.arguments["return_dict"]:
            return images, flagged, concept, unsafe
        return StableDiffusionSafePipelineOutput(images, flagged, unsafe, concept)
