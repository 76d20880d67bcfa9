"""What pipelines for inpainting share: from a picture and a mask to the picture painted anew where the mask is white."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from suffuse.diffusion.conditioning import Channels
from suffuse.diffusion.hooks import KeepUnmasked
from suffuse.diffusion.latents import repeats
from suffuse.diffusion.loop import Hook
from suffuse.errors import InputError
from suffuse.models.autoencoder_asymmetric_kl import AsymmetricAutoencoderKL
from suffuse.noise import belongs_to_images
from suffuse.pipelines.arguments import check_shape
from suffuse.pipelines.stable_diffusion.base import StableDiffusionBase
from suffuse.processing.image import Frame, VaeImageProcessor
from suffuse.processing.pixels import edges


class Painting(StableDiffusionBase):
    """The verbs of inpainting."""

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

    def crop_frame(self, height: int, width: int) -> Frame:
        """What is painted: a picture of this size, or a crop of it at this size."""
        image, mask_image = self._run.arguments["image"], self._run.arguments["mask_image"]
        check_aspects(image, mask_image)
        crop = self.crop_region(image, mask_image, self._run.arguments["padding_mask_crop"], height, width)
        return Frame(height, width, "fill" if crop else "default", crop)

    def paint(self, height: int, width: int) -> Any:
        """The recipe of every pipeline for inpainting, once the guidance of the run is set.

        Args:
            height: Rows of the picture, or of the crop that is painted.
            width: Columns.

        Returns:
            The result of the call.
        """
        frame = self.crop_frame(height, width)
        run = self._run
        image, mask_image, latents, strength = (run.arguments[name] for name in ("image", "mask_image", "latents", "strength"))
        masked_image_latents, resumed = (
            run.arguments.get("masked_image_latents"),
            run.arguments.get("denoising_start") is not None,
        )
        pictures = self.image_processor.preprocess(image, *frame).float()
        painted = self.mask_processor.preprocess(mask_image, *frame, "mask_image")
        if strength == 0 and not resumed:
            return self.unchanged(pictures)
        further = self.further(frame)
        way, steps = self.way()
        conditioning = self.encode()
        batch, dtype = conditioning.batch, conditioning.tensors["prompt_embeds"].dtype
        shape = self.latent_shape(batch, *frame[:2])
        self.check_noise(shape)
        for name, given in (("image", pictures), ("mask_image", painted), ("masked_image_latents", masked_image_latents)):
            if given is not None:
                repeats(batch, given, name)
        self.check_latents(pictures, masked_image_latents, shape)
        conditioners, hooks = [*self.conditioners(conditioning), *further], list[Hook]()

        # The generator is spent on the picture, the noise, the masked picture: in this order.
        from_picture = resumed or (strength < 1 and latents is None)
        known = self.repeated(batch, self.encode_for(batch, pictures, dtype), "image") if self.plain or from_picture else pictures
        noise = self.make_noise(shape, dtype)
        noisy = noise * run.scheduler.init_noise_sigma
        if from_picture:
            noisy = known if resumed else run.scheduler.add_noise(known, noise, way[:1].repeat(batch))
        conditioning.share(**self.encode_masked(pictures, painted, masked_image_latents, batch, dtype))

        if self.plain:
            hooks.append(KeepUnmasked(run.scheduler, way, known, noise, conditioning))
        else:
            conditioners.append(Channels(["mask", "masked_image_latents"]))
        painting = self.denoise(self.unet, conditioning, noisy, way, steps, conditioners, hooks)
        images, flagged = self.pictures(painting, dtype, **self.decoder_conditions(pictures, painted, batch, dtype))
        return self.output(self.laid_back(images, frame.crops_coords), flagged)

    @property
    def plain(self) -> bool:
        """Whether the UNet sees latents alone, and the known part of the picture has to be laid back into them."""
        return self.unet.config.in_channels == self.latent_channels

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
        if masked_latents is None and not self.plain:
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
    ) -> dict[str, Tensor]:
        """The mask, and latents of the masked pictures unless those are latents, for each of the batch."""
        mask = F.interpolate(painted, size=self.latent_shape(batch, *painted.shape[-2:])[2:]).to(
            device=self._execution_device, dtype=dtype
        )
        mask = mask if len(mask) == batch else self.repeated(batch, mask, "mask_image")
        if masked_latents is None and pictures.shape[1] == self.latent_channels:
            return {"mask": mask}
        if masked_latents is None:
            masked_latents = self.encode_for(batch, pictures * (painted < 0.5), dtype)
        masked_latents = masked_latents.to(device=self._execution_device, dtype=dtype)
        masked_latents = masked_latents if len(masked_latents) == batch else self.repeated(batch, masked_latents, "image")
        return {"mask": mask, "masked_image_latents": masked_latents}

    def encode_for(self, batch: int, pictures: Tensor, dtype: torch.dtype) -> Tensor:
        """Latents of pictures: of each picture, or of each of the batch where each has noise of its own."""
        apart = belongs_to_images(self._run.arguments["generator"])
        return self.encode_pictures(self.repeated(batch, pictures, "image") if apart else pictures, dtype)

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
