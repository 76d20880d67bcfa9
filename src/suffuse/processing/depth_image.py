"""Pictures with depth: six channels, of which the last two are the bytes of a depth of 16 bits (Stan et al., 2023, "LDM3D")."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from suffuse.configuration import register_to_config
from suffuse.errors import InputError
from suffuse.processing.image import VaeImageProcessor, check_output_type
from suffuse.processing.pixels import listed


class VaeImageProcessorLDM3D(VaeImageProcessor):
    """Pictures and depth to what autoencoders see, and back."""

    @register_to_config
    def __init__(
        self, do_resize: bool = True, vae_scale_factor: int = 8, resample: str = "lanczos", do_normalize: bool = True
    ) -> None:
        super().__init__(do_resize, vae_scale_factor, resample, do_normalize)
        unsaid = list(VaeImageProcessor.parameters_of_init().items())[4:]
        self.register_to_config(**{name: parameter.default for name, parameter in unsaid})

    @staticmethod
    def numpy_to_pil(images: np.ndarray) -> list[Image.Image]:
        """The colours of (batch, height, width, channels) in [0, 1]."""
        return VaeImageProcessor.numpy_to_pil(images[..., :1] if images.shape[-1] == 1 else images[..., :3])

    @staticmethod
    def depth_pil_to_numpy(images: list[Image.Image] | Image.Image) -> np.ndarray:
        """Depth of 16 bits, one picture or several of a size, as (batch, height, width) in [0, 1]."""
        each = images if isinstance(images, list) else [images]
        return np.stack([np.asarray(image).astype(np.float32) / 65535 for image in each])

    @staticmethod
    def rgblike_to_depthmap(image: Any) -> Any:
        """256 times the second channel and the third of (height, width, 3): bytes become 16 bits, floats stay floats."""
        octets = image.dtype in (torch.uint8, np.uint8)
        wider = (image.to(torch.int32) if isinstance(image, Tensor) else image.astype(np.uint16)) if octets else image
        return wider[:, :, 1] * 256 + wider[:, :, 2]

    def numpy_to_depth(self, images: np.ndarray) -> list[Image.Image]:
        """The depth of (batch, height, width, 6 or 4 channels) in [0, 1], as pictures of 16 bits."""
        if images.shape[-1] == 6:
            return [Image.fromarray(self.rgblike_to_depthmap(one)) for one in (images[..., 3:] * 255).round().astype(np.uint8)]
        if images.shape[-1] == 4:
            return [Image.fromarray(one) for one in (images[..., 3] * 65535.0).astype(np.uint16)]
        raise InputError("no depth among the channels", found=images.shape[-1], expected="6 channels, or 4")

    def postprocess(self, image: Tensor, output_type: str = "pil", do_denormalize: list[bool] | None = None) -> Any:
        """(colours, depth) of what an autoencoder made.

        Args:
            image: (batch, 6 or 4, height, width).
            output_type: "pil", "np" or "pt"; "latent" returns `image` and None.
            do_denormalize: Which pictures are in [-1, 1]; all, if None.

        Returns:
            Two lists of pictures, depth of 16 bits; or colours as (batch, height, width, 3), "pt" as (batch, 3, height, width),
            in [0, 1], and depth: of six channels (batch, height, width), a 255th of what 16 bits would be; of four the last one.
        """
        check_output_type(output_type)
        if output_type == "latent":
            return image, None
        colors = super().postprocess(image, "pt", do_denormalize)
        values = self.pt_to_numpy(colors)
        if output_type == "pil":
            return self.numpy_to_pil(values), self.numpy_to_depth(values)
        depth = np.stack([self.rgblike_to_depthmap(one[..., 3:]) for one in values]) if values.shape[-1] == 6 else values[..., 3:]
        return (values[..., :3], depth) if output_type == "np" else (colors[:, :3], torch.from_numpy(depth))

    def preprocess(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, rgb: Any, depth: Any, height: int | None = None, width: int | None = None, target_res: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Pictures and their depth as tensors, (batch, 3, height, width) and (batch, 1, height, width), in [-1, 1] if normalised.

        Args:
            rgb: PIL pictures or arrays, as `VaeImageProcessor` takes them.
            depth: PIL pictures of 16 bits, or arrays (height, width) in [0, 1]; as many.
            height: Rows wanted; those of the pictures, cut to a multiple of `vae_scale_factor`, if None.
            width: Columns wanted, likewise.
            target_res: (height, width) in the place of both.
        """
        height, width = (height, width) if target_res is None else target_res
        colors = super().preprocess(rgb, height, width)
        maps = listed(depth, "depth")
        if len(maps) != len(colors):
            raise InputError(f"depth: {len(maps)} given for {len(colors)} pictures", remedy="pass one for each picture")
        size = (colors.shape[-1], colors.shape[-2])
        arrays = [
            self.depth_pil_to_numpy(self.resize(one, size[1], size[0]))[0] if isinstance(one, Image.Image) else one
            for one in maps
        ]
        if any(array.shape != size[::-1] for array in arrays):
            found = ", ".join(str(array.shape) for array in arrays)
            raise InputError("depth is of another size than the pictures", found=found, expected=size[::-1])
        values = torch.from_numpy(np.stack(arrays)).float()[:, None]
        return colors, self.normalize(values) if self.config.do_normalize else values
