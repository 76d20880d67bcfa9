"""Inpainting with Stable Diffusion: paint a picture anew where a mask is white.

A UNet with nine input channels was trained for it and sees the mask and the masked picture; with a plain UNet of four the known
picture is laid back, at the right noise level, after every step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from suffuse.diffusion.conditioning import Channels
from suffuse.diffusion.hooks import KeepUnmasked
from suffuse.diffusion.latents import Generators, encode_image, repeats
from suffuse.diffusion.loop import Hook
from suffuse.errors import InputError
from suffuse.models.autoencoder_asymmetric_kl import AsymmetricAutoencoderKL
from suffuse.pipelines.arguments import check_shape, recipe
from suffuse.pipelines.stable_diffusion.base import StableDiffusionBase
from suffuse.processing.image import ImageInput, VaeImageProcessor
from suffuse.processing.pixels import edges


class StableDiffusionInpaintPipeline(StableDiffusionBase):
    """Pictures painted anew where a mask is white."""

    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds", "mask", "masked_image_latents"]
    _scheduler_settings = {"steps_offset": 1, "skip_prk_steps": True}

    @classmethod
    def input_channels(cls, latents: int) -> tuple[int, ...]:
        """A plain UNet sees latents; one trained for inpainting the mask and the masked picture's latents too."""
        return latents, 2 * latents + 1

    @cached_property
    def mask_processor(self) -> VaeImageProcessor:
        """Masks to tensors of zeros and ones."""
        return VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor, do_normalize=False, do_binarize=True, do_convert_grayscale=True
        )

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
    ) -> Any:
        """Paint pictures anew where the mask is white.

        Returns:
            `StableDiffusionPipelineOutput(images, nsfw_content_detected)`, or the same as a tuple.

        Raises:
            InputError, LimitError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says where, and what to do.
        """
        run = self._run
        run.guidance = self.guidance_for(guidance_scale)
        height, width = self.default_size(height, width)
        check_aspects(image, mask_image)
        crop = self.crop_region(image, mask_image, padding_mask_crop, height, width)
        frame: dict[str, Any] = {
            "height": height,
            "width": width,
            "crops_coords": crop,
            "resize_mode": "fill" if crop else "default",
        }
        pictures = self.image_processor.preprocess(image, **frame).float()
        painted = self.mask_processor.preprocess(mask_image, name="mask_image", **frame)
        if strength == 0:
            return self.unchanged(pictures)
        way, steps = run.timesteps_for(run.set_timesteps(self._execution_device), strength)
        conditioning = self.encode()
        batch, dtype = conditioning.batch, conditioning.tensors["prompt_embeds"].dtype
        shape = self.latent_shape(batch, height, width)
        self.check_noise(shape)
        for name, given in (("image", pictures), ("mask_image", painted), ("masked_image_latents", masked_image_latents)):
            if given is not None:
                repeats(batch, given, name)
        self.check_latents(pictures, masked_image_latents, shape)
        conditioners, hooks = self.conditioners(conditioning), list[Hook]()

        # The generator is spent on the picture, the noise, the masked picture: in this order.
        plain, from_picture = self.unet.config.in_channels == self.latent_channels, strength < 1 and latents is None
        known = self.repeated(batch, self.encode_pictures(pictures, dtype), "image") if plain or from_picture else pictures
        noise = self.make_noise(shape, dtype)
        start = way[:1].repeat(batch)
        noisy = run.scheduler.add_noise(known, noise, start) if from_picture else noise * run.scheduler.init_noise_sigma
        mask, masked = self.encode_masked(pictures, painted, masked_image_latents, batch, dtype)
        conditioning.share(mask=mask, masked_image_latents=masked)

        if plain:
            hooks.append(KeepUnmasked(run.scheduler, way, known, noise, conditioning))
        else:
            conditioners.append(Channels(["mask", "masked_image_latents"]))
        painting = self.denoise(self.unet, conditioning, noisy, way, steps, conditioners, hooks)
        images, flagged = self.pictures(painting, dtype, **self.decoder_conditions(pictures, painted, batch, dtype))
        return self.output(self.laid_back(images, crop), flagged)

    def laid_back(self, images: Any, crop: tuple[int, int, int, int] | None) -> Any:
        """Pictures with the crop that was painted laid back into the whole."""
        if crop is None:
            return images
        whole, mask = self._run.arguments["image"], self._run.arguments["mask_image"]
        return [self.image_processor.apply_overlay(mask, whole, image, crop) for image in images]

    def check_latents(self, pictures: Tensor, masked_latents: Tensor | None, shape: tuple[int, ...]) -> None:
        """Raise `InputError` unless latents that came as pictures, or of masked ones, are of the shape of a picture's."""
        if masked_latents is not None:
            check_shape("masked_image_latents", masked_latents, (len(masked_latents), *shape[1:]))
        if pictures.shape[1] != self.latent_channels:
            return
        check_shape("image", pictures, (len(pictures), *shape[1:]))
        if masked_latents is None:
            raise InputError(
                "image holds latents, of which no masked picture can be made",
                remedy="pass masked_image_latents=… with them, or a picture",
            )

    def crop_region(
        self, image: Any, mask_image: Any, padding: int | None, height: int, width: int
    ) -> tuple[int, int, int, int] | None:
        """(left, top, right, bottom) of the crop to paint, or None for the whole picture."""
        if padding is None:
            return None
        for name, value in (("image", image), ("mask_image", mask_image)):
            if not isinstance(value, Image.Image):
                raise InputError(f"padding_mask_crop needs a PIL picture for {name}", found=type(value).__name__)
        if self._run.arguments["output_type"] != "pil":
            raise InputError("padding_mask_crop needs output_type='pil'", found=self._run.arguments["output_type"])
        if image.size != mask_image.size:
            raise InputError(
                "padding_mask_crop needs a mask_image of the size of image", found=f"{mask_image.size} and {image.size}"
            )
        return self.mask_processor.get_crop_region(mask_image, width, height, pad=padding)

    def encode_masked(
        self, pictures: Tensor, painted: Tensor, masked_latents: Tensor | None, batch: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """(mask, latents of the masked pictures) at the resolution of the latents, for each of the batch."""
        rows, columns = pictures.shape[-2] // self.vae_scale_factor, pictures.shape[-1] // self.vae_scale_factor
        mask = F.interpolate(painted, size=(rows, columns)).to(device=self._execution_device, dtype=dtype)
        if masked_latents is None:
            masked = (pictures * (painted < 0.5)).to(device=self._execution_device, dtype=dtype)
            masked_latents = encode_image(self.vae, masked, self._run.arguments["generator"])
        masked_latents = masked_latents.to(device=self._execution_device, dtype=dtype)
        mask = mask if len(mask) == batch else self.repeated(batch, mask, "mask_image")
        masked_latents = masked_latents if len(masked_latents) == batch else self.repeated(batch, masked_latents, "image")
        return mask, masked_latents

    @staticmethod
    def repeated(batch: int, values: Tensor, name: str) -> Tensor:
        """`values` for each of the batch, in plain layout."""
        return values.repeat(repeats(batch, values, name), 1, 1, 1)

    def decoder_conditions(self, pictures: Tensor, painted: Tensor, batch: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """What the decoder sees besides latents: an asymmetric autoencoder is shown the known part of the picture."""
        if not isinstance(self.vae, AsymmetricAutoencoderKL):
            return {}
        known = {"image": pictures.to(self._execution_device, dtype), "mask": painted.to(self._execution_device, dtype)}
        return {name: value if len(value) == batch else self.repeated(batch, value, name) for name, value in known.items()}


def check_aspects(image: Any, mask_image: Any) -> None:
    """Raise `InputError` if picture and mask are of different aspect: the mask would lie beside what it means."""
    (height, width), (mask_height, mask_width) = edges(image, "image"), edges(mask_image, "mask_image")
    if abs(width * mask_height / (height * mask_width) - 1) > 0.02:
        raise InputError(
            "mask_image has another aspect than image",
            found=f"{mask_width} x {mask_height} and {width} x {height}",
            remedy="make the mask on the picture it belongs to",
        )
