"""Pictures to tensors and back.

Whatever holds a picture (PIL in any mode, NumPy, torch, lists of them) becomes a float tensor (batch, channels, height, width);
what is no picture is refused with the reason, and nothing is guessed: a fourth channel of a PIL picture or an array is alpha,
only a torch tensor can hold latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch.nn import functional as F

from suffuse.configuration import ConfigMixin, register_to_config
from suffuse.errors import InputError, nearest

MAX_PIXELS = 64 * 10**6
"""Larger pictures are refused before they are decoded."""

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

ImageInput: TypeAlias = "Image.Image | np.ndarray | Tensor | Sequence[Image.Image | np.ndarray | Tensor]"
"""What may be given as a picture, or as several."""

RESAMPLING = {name: getattr(Image.Resampling, name.upper()) for name in ("nearest", "bilinear", "bicubic", "lanczos")}


class VaeImageProcessor(ConfigMixin):
    """Pictures in and out of an autoencoder.

    Args:
        do_resize: Bring pictures to the height and width asked for, or down to a multiple of `vae_scale_factor`.
        vae_scale_factor: Pixels along an edge of what one latent stands for.
        vae_latent_channels: A tensor with this many channels holds latents, and is passed through.
        resample: How PIL pictures are resized: "nearest", "bilinear", "bicubic" or "lanczos".
        do_normalize: From [0, 1] to [-1, 1].
        do_binarize: To 0 below one half, else 1.
        do_convert_rgb: Kept for its name; PIL pictures always become RGB unless they become gray.
        do_convert_grayscale: To one channel.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        do_resize: bool = True,
        vae_scale_factor: int = 8,
        resample: str = "lanczos",
        do_normalize: bool = True,
        do_binarize: bool = False,
        do_convert_rgb: bool = False,
        do_convert_grayscale: bool = False,
        vae_latent_channels: int = 4,
    ) -> None:
        if do_convert_rgb and do_convert_grayscale:
            raise InputError("do_convert_rgb and do_convert_grayscale exclude each other", remedy="set one of them to False")
        if resample not in RESAMPLING:
            raise InputError(f"resample={resample!r} is unknown", expected=sorted(RESAMPLING))

    # ------------------------------------------------------------ in

    def preprocess(
        self,
        image: ImageInput,
        height: int | None = None,
        width: int | None = None,
        resize_mode: Literal["default", "fill", "crop"] = "default",
        crops_coords: tuple[int, int, int, int] | None = None,
        name: str = "image",
    ) -> Tensor:
        """Pictures as one float tensor.

        Args:
            image: PIL pictures (any mode; alpha is laid over white), arrays (height, width, channels), tensors (channels, height,
                width), batches of them, or lists. Floats in [0, 1], or [-1, 1] in tensors; integers in their full range.
            height: Rows wanted; those of the picture, cut to a multiple of `vae_scale_factor`, if None.
            width: Columns wanted, likewise.
            resize_mode: "fill" and "crop" keep the aspect of PIL pictures.
            crops_coords: (left, top, right, bottom) to cut out of PIL pictures first.
            name: The argument's name, for errors.

        Returns:
            (batch, channels, height, width), in [-1, 1] if `do_normalize`, else [0, 1]; latents as they came.

        Raises:
            InputError: No picture, a broken one, one of a size or range that cannot be meant.
        """
        items = _listed(image, name)
        if isinstance(items[0], Image.Image):
            pictures = [self._opened(item, name) for item in items]
            pictures = [picture.crop(crops_coords) for picture in pictures] if crops_coords else pictures
            if (height is None or width is None) and len({picture.size for picture in pictures}) > 1:
                raise InputError(f"{name}: pictures of several sizes", found=[p.size for p in pictures], expected="one size")
            if self.config.do_resize:
                size = self._checked_size(pictures[0], height, width, name)
                pictures = [self.resize(picture, *size, resize_mode=resize_mode) for picture in pictures]
            values = self.numpy_to_pt(self.pil_to_numpy(pictures))
        else:
            values = self._joined(items, name)
            if isinstance(items[0], Tensor) and values.shape[1] == self.config.vae_latent_channels:
                return values
            values = self._to_channels(values, name)
            if self.config.do_resize:
                values = self.resize(values, *self._checked_size(values, height, width, name))
        if self.config.do_normalize and not values.min() < 0:
            values = self.normalize(values)
        return self.binarize(values) if self.config.do_binarize else values

    def get_default_height_width(
        self, image: Image.Image | np.ndarray | Tensor, height: int | None = None, width: int | None = None
    ) -> tuple[int, int]:
        """(height, width) asked for, or the picture's own, cut to multiples of `vae_scale_factor`."""
        rows, columns = _size(image)
        factor = self.config.vae_scale_factor
        height, width = rows if height is None else height, columns if width is None else width
        return height - height % factor, width - width % factor

    def resize(self, image: Any, height: int, width: int, resize_mode: Literal["default", "fill", "crop"] = "default") -> Any:
        """Resize a PIL picture, a batch of arrays (batch, height, width, channels), or of tensors.

        "fill" fits the whole picture in and repeats its edges around it; "crop" fills the frame and cuts what stands over.
        """
        if isinstance(image, Image.Image):
            if resize_mode == "default":
                return image.resize((width, height), resample=RESAMPLING[self.config.resample])
            return self._framed(image, width, height, resize_mode)
        if resize_mode != "default":
            raise InputError(f"resize_mode={resize_mode!r} needs PIL pictures", found=type(image).__name__)
        if isinstance(image, Tensor):
            return F.interpolate(image, size=(height, width))
        return self.pt_to_numpy(F.interpolate(self.numpy_to_pt(image), size=(height, width)))

    def binarize(self, image: Tensor) -> Tensor:
        """0 below one half, else 1."""
        return image.clone().copy_(image >= 0.5)  # a clone keeps the layout in memory

    @staticmethod
    def convert_to_rgb(image: Image.Image) -> Image.Image:
        """Any PIL picture as RGB: turned as its EXIF says, 16 bits scaled to 8, alpha laid over white."""
        image = _eight_bits(ImageOps.exif_transpose(image))
        if _has_alpha(image):
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")

    @staticmethod
    def convert_to_grayscale(image: Image.Image) -> Image.Image:
        """Any PIL picture as gray; if its colours are all one and only its alpha draws, the alpha."""
        image = _eight_bits(ImageOps.exif_transpose(image))
        if _has_alpha(image):
            image = image.convert("RGBA")
            if all(low == high for low, high in image.convert("RGB").getextrema()):  # pyright: ignore
                return image.getchannel("A")
        return image.convert("L")

    def _opened(self, image: Image.Image, name: str) -> Image.Image:
        if image.width * image.height > MAX_PIXELS:
            raise InputError(
                f"{name} is too large", found=f"{image.width} x {image.height}", expected=f"at most {MAX_PIXELS} pixels"
            )
        try:
            image.load()
        except OSError as error:
            raise InputError(
                f"{name} cannot be decoded: {error}", remedy="the file is damaged or cut short; fetch it again"
            ) from error
        return self.convert_to_grayscale(image) if self.config.do_convert_grayscale else self.convert_to_rgb(image)

    def _joined(self, items: list[Any], name: str) -> Tensor:
        """Arrays or tensors as one float tensor (batch, channels, height, width)."""
        shapes = {tuple(item.shape) for item in items}
        if len(shapes) > 1:
            raise InputError(f"{name}: arrays of several shapes", found=sorted(shapes), expected="one shape")
        first = items[0]
        picture = isinstance(first, np.ndarray) and first.shape[-1] in (1, 3, 4)
        several_masks = self.config.do_convert_grayscale and first.ndim == 3 and len(items) == 1 and not picture
        batched = first.ndim == 4 or several_masks
        if isinstance(first, np.ndarray):
            values = np.concatenate(items) if batched else np.stack(items)
            values = torch.from_numpy(_unit_range(values))
            values = values if values.ndim == 4 else values[..., None]
            values = values.permute(0, 3, 1, 2)
        else:
            values = torch.cat(items) if batched else torch.stack(items)
            values = torch.from_numpy(_unit_range(values.numpy())) if not values.is_floating_point() else values
            values = values if values.ndim == 4 else values.unsqueeze(1)
        latents = isinstance(first, Tensor) and values.shape[1] == self.config.vae_latent_channels
        if not bool(torch.isfinite(values).all()):
            raise InputError(f"{name} holds NaN or infinity")
        if not latents and (values.min() < -1 or values.max() > 1):
            raise InputError(
                f"{name} is out of range",
                found=f"[{values.min().item():.4g}, {values.max().item():.4g}]",
                expected="floats in [0, 1], or integers in their full range",
                remedy="divide by 255, or pass uint8",
            )
        return values

    def _to_channels(self, values: Tensor, name: str) -> Tensor:
        channels = values.shape[1]
        if channels == 4:
            alpha = values[:, 3:]
            values, channels = values[:, :3] * alpha + (1 - alpha), 3
        if self.config.do_convert_grayscale:
            if channels == 3:
                weights = torch.tensor([0.299, 0.587, 0.114], dtype=values.dtype, device=values.device)
                values, channels = (values * weights[:, None, None]).sum(1, keepdim=True), 1
            if channels == 1:
                return values
        elif channels in (1, 3):
            return values.expand(-1, 3, -1, -1)
        raise InputError(
            f"{name} has {channels} channels",
            found=f"shape {tuple(values.shape)} as (batch, channels, height, width)",
            expected="1, 3 or, with alpha, 4",
        )

    def _checked_size(self, image: Any, height: int | None, width: int | None, name: str) -> tuple[int, int]:
        size = self.get_default_height_width(image, height, width)
        if 0 in size:
            factor = self.config.vae_scale_factor
            raise InputError(
                f"{name} is too small", found=f"{_size(image)} rows and columns", expected=f"at least {factor} x {factor}"
            )
        return size

    def _framed(self, image: Image.Image, width: int, height: int, mode: str) -> Image.Image:
        wide, wanted = image.width / image.height, width / height
        along_width = (wanted < wide) if mode == "fill" else (wanted > wide)  # which edge decides the size
        inner_width = width if along_width else image.width * height // image.height
        inner_height = image.height * width // image.width if along_width else height
        inner = image.resize((inner_width, inner_height), resample=RESAMPLING[self.config.resample])
        left, top = width // 2 - inner_width // 2, height // 2 - inner_height // 2
        frame = Image.new(image.mode, (width, height))
        frame.paste(inner, (left, top))
        if mode == "fill" and wanted < wide and top > 0:
            frame.paste(inner.resize((width, top), box=(0, 0, width, 0)), (0, 0))
            frame.paste(inner.resize((width, top), box=(0, inner.height, width, inner.height)), (0, top + inner_height))
        if mode == "fill" and wanted > wide and left > 0:
            frame.paste(inner.resize((left, height), box=(0, 0, 0, height)), (0, 0))
            frame.paste(inner.resize((left, height), box=(inner.width, 0, inner.width, height)), (left + inner_width, 0))
        return frame

    # ------------------------------------------------------------ out

    def postprocess(self, image: Tensor, output_type: str = "pil", do_denormalize: list[bool] | None = None) -> Any:
        """Tensors as what was asked for.

        Args:
            image: (batch, channels, height, width) in [-1, 1].
            output_type: "pil": a list of pictures; "np": (batch, height, width, channels) in [0, 1]; "pt": the same as a tensor
                (batch, channels, height, width); "latent": as it is.
            do_denormalize: Which pictures are in [-1, 1] (a blanked one is not); all, if None.

        Raises:
            InputError: Another `output_type`.
        """
        check_output_type(output_type)
        if output_type == "latent":
            return image
        flags = do_denormalize or [self.config.do_normalize] * len(image)
        image = torch.stack([self.denormalize(one) if flag else one for one, flag in zip(image, flags, strict=True)])
        if output_type == "pt":
            return image
        array = self.pt_to_numpy(image)
        return array if output_type == "np" else self.numpy_to_pil(array)

    def apply_overlay(
        self, mask: Image.Image, init_image: Image.Image, image: Image.Image, crop_coords: tuple[int, int, int, int] | None = None
    ) -> Image.Image:
        """Lay what the mask leaves black of `init_image` over `image`, which may be a crop of it."""
        keep = Image.new("RGBa", init_image.size)
        keep.paste(init_image.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask.convert("L")))
        if crop_coords is not None:
            left, top, right, bottom = crop_coords
            base = Image.new("RGBA", init_image.size)
            base.paste(self.resize(image, bottom - top, right - left, resize_mode="crop"), (left, top))
            image = base.convert("RGB")
        image = image.convert("RGBA")
        image.alpha_composite(keep.convert("RGBA"))
        return image.convert("RGB")

    # ------------------------------------------------------------ between

    @staticmethod
    def numpy_to_pil(images: np.ndarray) -> list[Image.Image]:
        """(batch, height, width, channels) in [0, 1] → pictures."""
        images = images[None] if images.ndim == 3 else images
        bytes_ = (images * 255).round().astype("uint8")
        return [Image.fromarray(one.squeeze(-1) if one.shape[-1] == 1 else one) for one in bytes_]

    @staticmethod
    def pil_to_numpy(images: list[Image.Image] | Image.Image) -> np.ndarray:
        """Pictures → (batch, height, width[, channels]) in [0, 1]."""
        images = images if isinstance(images, list) else [images]
        return np.stack([np.array(image).astype(np.float32) / 255.0 for image in images])

    @staticmethod
    def numpy_to_pt(images: np.ndarray) -> Tensor:
        """(batch, height, width[, channels]) → (batch, channels, height, width), the same memory."""
        images = images[..., None] if images.ndim == 3 else images
        return torch.from_numpy(images.transpose(0, 3, 1, 2))

    @staticmethod
    def pt_to_numpy(images: Tensor) -> np.ndarray:
        """(batch, channels, height, width) → (batch, height, width, channels), float32."""
        return images.cpu().permute(0, 2, 3, 1).float().numpy()

    @staticmethod
    def normalize(images: Any) -> Any:
        """[0, 1] → [-1, 1]."""
        return 2.0 * images - 1.0

    @staticmethod
    def denormalize(images: Tensor) -> Tensor:
        """[-1, 1] → [0, 1], cut."""
        return (images * 0.5 + 0.5).clamp(0, 1)

    @staticmethod
    def blur(image: Image.Image, blur_factor: int = 4) -> Image.Image:
        """Gaussian blur of `blur_factor` pixels."""
        return image.filter(ImageFilter.GaussianBlur(blur_factor))

    @staticmethod
    def get_crop_region(mask_image: Image.Image, width: int, height: int, pad: int = 0) -> tuple[int, int, int, int]:
        """The box around what the mask paints, `pad` pixels wider, with the aspect of `width` and `height` where it fits.

        Returns:
            (left, top, right, bottom).

        Raises:
            InputError: The mask paints nothing.
        """
        painted = np.asarray(mask_image.convert("L")) > 0
        rows, columns = np.flatnonzero(painted.any(1)), np.flatnonzero(painted.any(0))
        if not len(rows):
            raise InputError("mask_image is black: there is nothing to paint", expected="white where to paint")
        x1, x2 = max(int(columns[0]) - pad, 0), min(int(columns[-1]) + 1 + pad, mask_image.width)
        y1, y2 = max(int(rows[0]) - pad, 0), min(int(rows[-1]) + 1 + pad, mask_image.height)
        aspect = width / height
        if (x2 - x1) / (y2 - y1) > aspect:
            y1, y2 = _widened(y1, y2, (x2 - x1) / aspect, mask_image.height)
        else:
            x1, x2 = _widened(x1, x2, (y2 - y1) * aspect, mask_image.width)
        return x1, y1, x2, y2


def check_output_type(output_type: Any) -> None:
    """Raise `InputError` unless pictures can be given out as `output_type`."""
    if output_type not in OUTPUT_TYPES:
        close = nearest(str(output_type), OUTPUT_TYPES)
        raise InputError(
            f"output_type={output_type!r} is unknown",
            expected=", ".join(OUTPUT_TYPES),
            remedy=f"did you mean {close}?" if close else "",
        )


def _listed(image: Any, name: str) -> list[Any]:
    items: list[Any] = list(image) if isinstance(image, (list, tuple)) else [image]
    kinds = (Image.Image, np.ndarray, Tensor)
    kind = next((kind for kind in kinds if items and all(isinstance(item, kind) for item in items)), None)
    dimensions = {getattr(item, "ndim", 3) for item in items}
    if kind is None or not dimensions <= {2, 3, 4}:
        found = [f"{type(i).__name__}{tuple(i.shape) if hasattr(i, 'shape') else ''}" for i in items]
        raise InputError(
            f"{name} is no picture",
            found=found if isinstance(image, (list, tuple)) else found[0],
            expected="a PIL picture, an array (height, width, channels), a tensor (channels, height, width), a list of one kind",
        )
    return items


def _size(image: Any) -> tuple[int, int]:
    """(height, width) of a picture or a batch."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    return (image.shape[2], image.shape[3]) if isinstance(image, Tensor) else (image.shape[1], image.shape[2])


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode != "I" and image.mode != "F" and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image, dtype=np.float64)
    top = 65535 if image.mode != "F" else 255 if values.max(initial=0) > 1 else 1
    return Image.fromarray((values * (255 / top)).round().clip(0, 255).astype(np.uint8))


def _unit_range(values: np.ndarray) -> np.ndarray:
    """Integers and booleans in [0, 1] by the range of their type; floats as they are."""
    if values.dtype == np.bool_:
        return values.astype(np.float32)
    if np.issubdtype(values.dtype, np.unsignedinteger):
        return values.astype(np.float32) / np.float32(np.iinfo(values.dtype).max)
    if np.issubdtype(values.dtype, np.integer):
        return values.astype(np.float32) / np.float32(255.0 if values.max(initial=0) > 1 else 1.0)
    return values


def _widened(low: int, high: int, wanted: float, limit: int) -> tuple[int, int]:
    """The interval [low, high) grown about its middle to `wanted`, moved and cut to fit [0, limit)."""
    extra = int(wanted - (high - low))
    low, high = low - extra // 2, high + extra - extra // 2
    if high >= limit:
        low, high = low - (high - limit), limit
    if low < 0:
        low, high = 0, high - low
    return low, min(high, limit)
