"""Pictures to tensors and back.

Whatever holds a picture (PIL in any mode, NumPy, torch, lists of them) becomes a float tensor (batch, channels, height, width);
what is no picture is refused with the reason, and nothing is guessed: a fourth channel of a PIL picture or an array is alpha,
only a torch tensor of floats can hold latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch.nn import functional as F

from suffuse.configuration import ConfigMixin, register_to_config
from suffuse.errors import InputError, LimitError, NonFiniteError, nearest
from suffuse.processing import pixels
from suffuse.processing.pixels import MAX_PIXELS, SLACK

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
RESIZE_MODES = ("default", "fill", "crop")
RESAMPLING = {
    "linear": Image.Resampling.BILINEAR,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}

ImageInput: TypeAlias = "Image.Image | np.ndarray | Tensor | Sequence[Image.Image | np.ndarray | Tensor]"
"""What may be given as a picture, or as several."""

Box: TypeAlias = "tuple[int, int, int, int]"
"""(left, top, right, bottom) in pixels."""

ResizeMode: TypeAlias = Literal["default", "fill", "crop"]


class Frame(NamedTuple):
    """The rectangle that a call fills, and how pictures are brought into it: `preprocess(image, *frame)`.

    Attributes:
        height: Rows of what is made.
        width: Columns.
        resize_mode: "fill" and "crop" keep the aspect of PIL pictures.
        crops_coords: Of PIL pictures, what to cut out first.
    """

    height: int
    width: int
    resize_mode: ResizeMode = "default"
    crops_coords: Box | None = None


class VaeImageProcessor(ConfigMixin):
    """Pictures in and out of an autoencoder.

    Args:
        do_resize: Bring pictures to the height and width asked for, or down to a multiple of `vae_scale_factor`.
        vae_scale_factor: Pixels along an edge of what one latent stands for.
        resample: How PIL pictures are resized: "nearest", "bilinear" (or "linear"), "bicubic" or "lanczos".
        do_normalize: From [0, 1] to [-1, 1].
        do_binarize: To 0 below one half, else 1.
        do_convert_rgb: Kept for its name; pictures always become RGB unless they become gray.
        do_convert_grayscale: To one channel.
        vae_latent_channels: A tensor of floats with this many channels holds latents, and is passed through.
        reducing_gap: Shrink PIL pictures in two passes, the first cheap and down to this many times the size wanted.
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
        reducing_gap: int | None = None,
    ) -> None:
        if do_convert_rgb and do_convert_grayscale:
            raise InputError("do_convert_rgb and do_convert_grayscale exclude each other", remedy="set one of them to False")
        if resample not in RESAMPLING:
            raise InputError(f"resample={resample!r} is unknown", expected=", ".join(RESAMPLING))
        for name, value in (("vae_scale_factor", vae_scale_factor), ("reducing_gap", reducing_gap)):
            if value is not None and value < 1:
                raise InputError(f"{name}={value} is out of range", expected="1 or more")

    # ------------------------------------------------------------ in

    def preprocess(
        self,
        image: ImageInput | None,
        height: int | None = None,
        width: int | None = None,
        resize_mode: ResizeMode = "default",
        crops_coords: Box | None = None,
        name: str = "image",
    ) -> Tensor:
        """Pictures as one float tensor.

        Args:
            image: PIL pictures (any mode; alpha is laid over white), arrays (height, width, channels), tensors (channels, height,
                width), batches of them, or lists. Floats in [0, 1], or [-1, 1] in arrays and tensors; integers up to 255, or
                65535 in uint16. Masks may be two-dimensional, and integers of 0 and 1.
            height: Rows wanted; those of the picture, cut to a multiple of `vae_scale_factor`, if None.
            width: Columns wanted, likewise.
            resize_mode: "fill" and "crop" keep the aspect of PIL pictures.
            crops_coords: (left, top, right, bottom) to cut out of PIL pictures first.
            name: The argument's name, for errors.

        Returns:
            (batch, channels, height, width), in [-1, 1] if `do_normalize`, else [0, 1]; latents as they came.

        Raises:
            InputError: No picture, a broken one, one of a size or range that cannot be meant.
            LimitError: A size is asked for that is larger than any picture may be.
        """
        items = pixels.listed(image, name)
        if isinstance(items[0], Image.Image):
            values = self._from_pil(items, (height, width), resize_mode, crops_coords, name)
        else:
            if crops_coords is not None:
                raise InputError("crops_coords needs PIL pictures", found=type(items[0]).__name__)
            stacked_masks = self.config.do_convert_grayscale and not isinstance(image, (list, tuple)) and _is_stack(image)
            values = pixels.joined(items, name, stacked_masks)
            latents = isinstance(items[0], Tensor) and values.shape[1] == self.config.vae_latent_channels
            if latents and values.is_floating_point():
                pixels.check_finite(values, name)
                return values
            values = pixels.unit_range(values, name, labels=self.config.do_binarize)
            values = (pixels.grays if self.config.do_convert_grayscale else pixels.colors)(values, name)
            if self.config.do_resize:
                values = self.resize(values, *self._target(values, height, width, name), resize_mode=resize_mode)
        if self.config.do_normalize and not values.min() < -SLACK:  # else they are in [-1, 1] already
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

    def resize(self, image: Any, height: int, width: int, resize_mode: ResizeMode = "default") -> Any:
        """Resize a PIL picture, a batch of arrays (batch, height, width, channels), or of tensors.

        "fill" fits the whole picture in and repeats its edges around it; "crop" fills the frame and cuts what stands over.
        """
        if resize_mode not in RESIZE_MODES:
            raise InputError(f"resize_mode={resize_mode!r} is unknown", expected=", ".join(RESIZE_MODES))
        if isinstance(image, Image.Image):
            if resize_mode == "default":
                return image.resize((width, height), RESAMPLING[self.config.resample], reducing_gap=self.config.reducing_gap)
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
        return pixels.over_white(pixels.opened(image))

    @staticmethod
    def convert_to_grayscale(image: Image.Image) -> Image.Image:
        """Any PIL picture as gray; if its colors are all one and only its alpha draws, the alpha."""
        return pixels.painted(pixels.opened(image)).convert("L")

    def _from_pil(
        self, items: list[Image.Image], size: tuple[int | None, int | None], mode: Any, box: Box | None, name: str
    ) -> Tensor:
        gray, resized = self.config.do_convert_grayscale, self.config.do_resize
        plain = pixels.painted if gray else pixels.over_white
        pictures = [plain(pixels.opened(item, name)) for item in items]
        if box is not None:
            pictures = [picture.crop(_checked_box(box, picture, name)) for picture in pictures]
        sizes = {picture.size for picture in pictures}
        if len(sizes) > 1 and (None in size or not resized):
            raise InputError(f"{name}: pictures of several sizes", found=sorted(sizes), expected="one size, or height and width")
        if resized:
            height, width = self._target(pictures[0], *size, name)
            pictures = [self.resize(picture, height, width, mode) for picture in pictures]
        pictures = [picture.convert("L") for picture in pictures] if gray else pictures
        return self.numpy_to_pt(self.pil_to_numpy(pictures))

    def _target(self, image: Any, height: Any, width: Any, name: str) -> tuple[int, int]:
        """What `get_default_height_width` says, checked."""
        factor = self.config.vae_scale_factor
        for argument, value in (("height", height), ("width", width)):
            if value is not None and not (isinstance(value, Integral) and int(value) >= factor):
                raise InputError(f"{argument}={value!r} is no size", expected=f"a whole number, at least {factor}")
        rows, columns = self.get_default_height_width(image, height, width)
        if 0 in (rows, columns):
            found = " x ".join(map(str, reversed(_size(image))))
            raise InputError(f"{name} is too small", found=f"{found} pixels", expected=f"at least {factor} x {factor}")
        if rows * columns > MAX_PIXELS:
            raise LimitError("height and width are too large", found=(rows, columns), expected=f"at most {MAX_PIXELS} pixels")
        return rows, columns

    def _framed(self, image: Image.Image, width: int, height: int, mode: str) -> Image.Image:
        own, wanted = image.width / image.height, width / height
        along_width = (wanted < own) if mode == "fill" else (wanted > own)  # which edge decides the size
        inner_width = width if along_width else max(image.width * height // image.height, 1)
        inner_height = max(image.height * width // image.width, 1) if along_width else height
        if inner_width * inner_height > MAX_PIXELS:
            raise InputError(f"a picture of {image.width} x {image.height} is too narrow to fill {width} x {height}")
        inner = image.resize((inner_width, inner_height), RESAMPLING[self.config.resample])
        left, top = width // 2 - inner_width // 2, height // 2 - inner_height // 2
        frame = Image.new(image.mode, (width, height))
        frame.paste(inner, (left, top))
        if mode == "fill":
            # A resized box without extent repeats the edge it lies on.
            if wanted < own and top > 0:
                for edge, start in ((0, 0), (inner_height, top + inner_height)):
                    frame.paste(inner.resize((width, top), box=(0, edge, width, edge)), (0, start))
            if wanted > own and left > 0:
                for edge, start in ((0, 0), (inner_width, left + inner_width)):
                    frame.paste(inner.resize((left, height), box=(edge, 0, edge, height)), (start, 0))
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
            InputError: Another `output_type`; no such tensor; flags for another number of pictures.
        """
        check_output_type(output_type)
        if not isinstance(image, Tensor) or image.ndim != 4:  # pyright: ignore[reportUnnecessaryIsInstance]
            found = f"{type(image).__name__}{tuple(getattr(image, 'shape', ()))}"
            raise InputError("only tensors can be postprocessed", found=found, expected="(batch, channels, height, width)")
        if output_type == "latent":
            return image
        if do_denormalize is None:
            image = self.denormalize(image) if self.config.do_normalize else image
        elif len(do_denormalize) != len(image):
            raise InputError(f"do_denormalize has {len(do_denormalize)} entries for {len(image)} pictures")
        else:
            image = torch.stack([self.denormalize(one) if flag else one for one, flag in zip(image, do_denormalize, strict=True)])
        if output_type == "pt":
            return image
        array = self.pt_to_numpy(image)
        return array if output_type == "np" else self.numpy_to_pil(array)

    def apply_overlay(
        self, mask: Image.Image, init_image: Image.Image, image: Image.Image, crop_coords: Box | None = None
    ) -> Image.Image:
        """Lay what the mask leaves black of `init_image` over `image`, which may be a crop of it.

        The result is of the size of `init_image` if `image` is a crop, else of `image`.
        """
        init_image, mask = self.convert_to_rgb(init_image), self.convert_to_grayscale(mask)
        size = image.size if crop_coords is None else init_image.size
        init_image, mask = (self.resize(one, size[1], size[0]) for one in (init_image, mask))
        keep = Image.new("RGBa", size)
        keep.paste(init_image.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask))
        if crop_coords is not None:
            left, top, right, bottom = _checked_box(crop_coords, init_image, "init_image")
            base = Image.new("RGB", size)
            base.paste(self.resize(image, bottom - top, right - left, resize_mode="crop"), (left, top))
            image = base
        image = image.convert("RGBA")
        image.alpha_composite(keep.convert("RGBA"))
        return image.convert("RGB")

    # ------------------------------------------------------------ between

    @staticmethod
    def numpy_to_pil(images: np.ndarray) -> list[Image.Image]:
        """([batch, ]height, width, channels) in [0, 1], cut, → pictures.

        Raises:
            InputError: Another shape, or no floats.
            NonFiniteError: NaN or infinity, which would become a black picture.
        """
        if images.ndim not in (3, 4) or images.shape[-1] not in (1, 3, 4) or images.dtype.kind != "f":
            raise InputError(
                "an array does not hold pictures",
                found=f"{images.dtype} {images.shape}",
                expected="floats in [0, 1] of shape (batch, height, width, 1, 3 or 4)",
            )
        if not np.isfinite(images).all():
            raise NonFiniteError("pictures hold NaN or infinity")
        images = images[None] if images.ndim == 3 else images
        bytes_ = (images.clip(0, 1) * 255).round().astype(np.uint8)
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
        return images.detach().cpu().permute(0, 2, 3, 1).float().numpy()

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
    def get_crop_region(mask_image: Image.Image, width: int, height: int, pad: int = 0) -> Box:
        """The box around what the mask paints, `pad` pixels wider, with the aspect of `width` and `height` where it fits.

        Returns:
            (left, top, right, bottom).

        Raises:
            InputError: The mask paints nothing; a negative size or `pad`.
        """
        if min(width, height) < 1 or pad < 0:
            raise InputError(f"no region of {width} x {height} with pad={pad}", expected="positive sizes, pad of 0 or more")
        painted = np.asarray(VaeImageProcessor.convert_to_grayscale(mask_image)) > 0
        rows, columns = np.flatnonzero(painted.any(1)), np.flatnonzero(painted.any(0))
        if not len(rows):
            raise InputError("mask_image is black: there is nothing to paint", expected="white where to paint")
        bottom, right = painted.shape
        x1, x2 = max(int(columns[0]) - pad, 0), min(int(columns[-1]) + 1 + pad, right)
        y1, y2 = max(int(rows[0]) - pad, 0), min(int(rows[-1]) + 1 + pad, bottom)
        aspect = width / height
        if (x2 - x1) / (y2 - y1) > aspect:
            y1, y2 = _widened(y1, y2, (x2 - x1) / aspect, bottom)
        else:
            x1, x2 = _widened(x1, x2, (y2 - y1) * aspect, right)
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


def _size(image: Any) -> tuple[int, int]:
    """(height, width) of a picture or a batch."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    return (image.shape[2], image.shape[3]) if isinstance(image, Tensor) else (image.shape[1], image.shape[2])


def _is_stack(masks: Any) -> bool:
    """Whether three dimensions are (batch, height, width): an array whose last can only be channels is one picture."""
    return masks.ndim == 3 and not (isinstance(masks, np.ndarray) and masks.shape[-1] <= 4)


def _checked_box(box: Any, image: Image.Image, name: str) -> Box:
    """`box` if it lies within the picture and is not empty."""
    whole = isinstance(box, (list, tuple)) and len(box) == 4 and all(isinstance(edge, Integral) for edge in box)
    if not (whole and 0 <= box[0] < box[2] <= image.width and 0 <= box[1] < box[3] <= image.height):
        raise InputError(
            f"crops_coords={box!r} is no part of {name}",
            expected=f"(left, top, right, bottom) within {image.width} x {image.height}",
        )
    left, top, right, bottom = box
    return left, top, right, bottom


def _widened(low: int, high: int, wanted: float, limit: int) -> tuple[int, int]:
    """The interval [low, high) grown about its middle to `wanted`, moved and cut to fit [0, limit)."""
    extra = int(wanted - (high - low))
    low, high = low - extra // 2, high + extra - extra // 2
    if high >= limit:
        low, high = low - (high - limit), limit
    if low < 0:
        low, high = 0, high - low
    return low, min(high, limit)
