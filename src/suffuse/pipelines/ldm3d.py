"""Pictures with depth (Stan et al., 2023, "LDM3D"): Stable Diffusion, whose autoencoder knows six channels."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from suffuse.noise import Generators, Seeds
from suffuse.outputs import BaseOutput
from suffuse.pipelines.arguments import recipe
from suffuse.pipelines.features import BesidePicture
from suffuse.pipelines.saved_run import SavedRun
from suffuse.pipelines.stable_diffusion.drawing import Drawing
from suffuse.processing.depth_image import VaeImageProcessorLDM3D
from suffuse.processing.image import ImageInput

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass
class LDM3DPipelineOutput(BaseOutput):
    """Colours, depth, and for each whether the safety checker blanked it (None: there is no checker)."""

    rgb: Any
    depth: Any
    nsfw_content_detected: list[bool] | None


class StableDiffusionLDM3DPipeline(Drawing):
    """Pictures with depth from prompts."""

    model_cpu_offload_seq = "text_encoder->unet->vae"

    def set_up(self, **components: Any) -> None:
        """Take the components, and a picture processor that knows depth."""
        super().set_up(**components)
        self.image_processor = VaeImageProcessorLDM3D(vae_scale_factor=self.vae_scale_factor)

    @recipe
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 49,
        guidance_scale: float = 5.0,
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
        callback: Callable[..., Any] | None = None,
        callback_steps: int | None = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        timesteps: list[int] | None = None,
        guidance_rescale: float = 0.0,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        seed: Seeds = None,
        save_run: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | SavedRun | None = None,
        **values: Unpack[BesidePicture],
    ) -> Any:
        """Draw what prompts say, and how far away it is.

        Returns:
            `LDM3DPipelineOutput(rgb, depth, nsfw_content_detected)`, or `((rgb, depth), nsfw_content_detected)`.

        Raises:
            InputError, LimitError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says where, and what to do.
        """
        self._run.guidance = self.guidance_for(guidance_scale, guidance_rescale)
        return self.draw(*self.default_size(height, width))

    def run_safety_checker(self, image: Any, device: torch.device, dtype: torch.dtype) -> tuple[Any, list[bool] | None]:
        """Blank the pictures whose colours the safety checker objects to; says which they are (None: no checker)."""
        if self.safety_checker is None:
            return image, None
        colors, _ = self.image_processor.postprocess(image, output_type="pil")
        features = self.feature_extractor(colors, return_tensors="pt").to(device)
        return self.safety_checker(images=image, clip_input=features.pixel_values.to(dtype))

    def output(self, images: Any, flagged: list[bool] | None) -> Any:
        """The result of a call, as an output object or a plain tuple."""
        rgb, depth = images if isinstance(images, tuple) else (images, None)
        return LDM3DPipelineOutput(rgb, depth, flagged) if self._run.arguments["return_dict"] else ((rgb, depth), flagged)
