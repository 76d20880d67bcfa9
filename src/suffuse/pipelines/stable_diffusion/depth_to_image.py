"""Depth to image with Stable Diffusion 2: image to image with a depth map as the fifth channel the UNet sees."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from suffuse.diffusion.conditioning import Channels
from suffuse.diffusion.latents import repeats
from suffuse.errors import InputError
from suffuse.noise import Generators, Seeds
from suffuse.pipelines.arguments import recipe
from suffuse.pipelines.features import BesidePicture
from suffuse.pipelines.pipeline import ImagePipelineOutput
from suffuse.pipelines.saved_run import SavedRun
from suffuse.pipelines.stable_diffusion.base import StableDiffusionBase
from suffuse.processing.image import Frame, ImageInput

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer, DPTForDepthEstimation, DPTImageProcessor
    from typing_extensions import Unpack

    from suffuse.models.autoencoder_kl import AutoencoderKL
    from suffuse.models.unet_2d_condition import UNet2DConditionModel
    from suffuse.schedulers.scheduler import SchedulerMixin


class StableDiffusionDepth2ImgPipeline(StableDiffusionBase):
    """Pictures from a picture, its depth and prompts: the scene keeps its shape."""

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["depth_estimator", "feature_extractor"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds", "depth_mask"]

    depth_estimator: Any
    safety_checker = None

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        depth_estimator: DPTForDepthEstimation | None,
        feature_extractor: DPTImageProcessor | None,
    ) -> None:
        self.set_up(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            depth_estimator=depth_estimator,
            feature_extractor=feature_extractor,
        )

    @classmethod
    def input_channels(cls, latents: int) -> tuple[int, ...]:
        """Latents and depth."""
        return (latents + 1,)

    @recipe
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: ImageInput | None = None,
        depth_map: Tensor | None = None,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
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
        """Redraw pictures as prompts say, keeping their depth.

        Returns:
            `ImagePipelineOutput(images)`, or the same as a tuple.

        Raises:
            InputError, LimitError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says where, and what to do.
        """
        run = self._run
        run.guidance = self.guidance_for(guidance_scale)
        pictures = self.image_processor.preprocess(image)
        if strength == 0:
            return self.unchanged(pictures)
        further = self.further(Frame(*self.size_of(pictures)))
        way, steps = self.way()
        conditioning = self.encode()
        dtype = conditioning.tensors["prompt_embeds"].dtype
        depth = self.prepare_depth_map(
            image, depth_map, conditioning.batch, self.do_classifier_free_guidance, dtype, self._execution_device
        )
        conditioning.tensors["depth_mask"] = depth
        conditioners = [*self.conditioners(conditioning), *further, Channels(["depth_mask"])]
        latents = self.noised(pictures, way[:1], conditioning.batch, dtype)
        latents = self.denoise(self.unet, conditioning, latents, way, steps, conditioners)
        return self.finish(latents, dtype)

    def output(self, images: Any, flagged: list[bool] | None) -> Any:
        """The result of a call, as an output object or a plain tuple."""
        return ImagePipelineOutput(images) if self._run.arguments["return_dict"] else (images,)

    def prepare_depth_map(
        self,
        image: Any,
        depth_map: Tensor | None,
        batch_size: int,
        do_classifier_free_guidance: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """Depth as the UNet sees it: (batch · branches, 1, rows, columns) in [-1, 1], at the resolution of the latents.

        Args:
            image: The pictures, to take the size from and, without `depth_map`, the depth; or, with one, latents.
            depth_map: (batch, height, width) in any range.
            batch_size: Pictures made at once.
            do_classifier_free_guidance: Whether the UNet sees every picture twice.
            dtype: The floating point type wanted.
            device: Where it is wanted.

        Raises:
            InputError: Latents without a depth map; no depth map and no estimator; a map that is flat or not finite.
        """
        latents = (
            isinstance(image, Tensor) and image.is_floating_point() and image.ndim > 2 and image.shape[-3] == self.latent_channels
        )
        factor = 1 if latents else self.vae_scale_factor
        if depth_map is None:
            if latents:
                raise InputError(
                    "image holds latents, whose depth cannot be estimated", remedy="pass depth_map=… with them, or a picture"
                )
            depth_map = self.estimate_depth(image, device, dtype)
        height, width = image.shape[-2:] if latents else self.image_processor.preprocess(image).shape[-2:]
        depth = F.interpolate(
            depth_map.to(device=device, dtype=dtype).unsqueeze(1),
            size=(height // factor, width // factor),
            mode="bicubic",
            align_corners=False,
        )
        low, high = depth.amin((1, 2, 3), keepdim=True), depth.amax((1, 2, 3), keepdim=True)
        if not bool((low < high).all()):  # false for NaN too
            found = f"from {low.flatten()[0].item():g} to {high.flatten()[0].item():g}"
            raise InputError("depth_map is flat, or not finite", found=found, expected="near and far")
        depth = (2.0 * (depth - low) / (high - low) - 1.0).to(dtype)
        depth = depth.repeat(repeats(batch_size, depth, "depth_map"), 1, 1, 1)
        return torch.cat([depth] * 2) if do_classifier_free_guidance else depth

    def estimate_depth(self, image: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(batch, height, width) depth of pictures, as the depth estimator sees it; larger is nearer."""
        if self.depth_estimator is None or self.feature_extractor is None:
            raise InputError("this pipeline has no depth estimator", remedy="pass depth_map=…, or load it with depth_estimator")
        items = image if isinstance(image, list) else [image]
        if isinstance(items[0], Image.Image):
            pictures = [self.image_processor.convert_to_rgb(item) for item in items]
        else:  # the feature extractor counts in bytes, whatever range arrays and tensors are in
            pictures = self.image_processor.postprocess(self.image_processor.preprocess(image))
        pixels = self.feature_extractor(images=pictures, return_tensors="pt").pixel_values.to(device=device, dtype=dtype)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            return self.depth_estimator(pixels).predicted_depth
