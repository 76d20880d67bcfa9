"""Whatever holds pictures, made plain: checked, decoded, and brought to the range [0, 1].

PIL pictures become 8-bit RGB, or what a mask is painted in; arrays and tensors become one tensor (batch, channels, height,
width). What is no picture is refused with the reason, before it costs memory or time.
"""

from __future__ import annotations

from contextlib import suppress
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from suffuse.errors import InputError

MAX_PIXELS = 64 * 10**6
"""Larger pictures are refused before they are decoded."""

SLACK = 1 / 255
"""How far floats may stand over the end of their range: resizing with a sharp kernel overshoots a little."""

KINDS = (Image.Image, np.ndarray, Tensor)
FLOATS = ("float16", "bfloat16", "float32", "float64")
INTEGERS = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
RANGES = {torch.bool: 1, torch.uint16: 65535}
"""What white is in integers; 255 in all others."""


def listed(image: Any, name: str) -> list[Any]:
    """One picture or several as a list of one kind.

    Raises:
        InputError: Something else; an empty list; kinds mixed.
    """
    several = isinstance(image, (list, tuple))
    items: list[Any] = list(image) if several else [image]
    kind = next((kind for kind in KINDS if items and isinstance(items[0], kind)), None)
    if kind is None or not all(isinstance(item, kind) and getattr(item, "ndim", 3) in (2, 3, 4) for item in items):
        found = [f"{type(item).__name__}{tuple(getattr(item, 'shape', ()))}".replace("()", "") for item in islice(items, 8)]
        raise InputError(
            f"{name} is no picture",
            found=f"[{', '.join(found)}]" if several else found[0],
            expected="a PIL picture, an array (height, width, channels), a tensor (channels, height, width), a list of one kind",
            remedy="open files with PIL.Image.open",
        )
    return items


def flattened(image: Any) -> list[Any]:
    """Pictures out of lists of lists of them."""
    return [item for each in image for item in flattened(each)] if isinstance(image, (list, tuple)) else [image]


def edges(image: Any, name: str) -> tuple[int, int]:
    """(height, width) of the first of the pictures, turned as its EXIF says.

    Raises:
        InputError: It is no picture, or one of a size that cannot be meant.
    """
    first = listed(image, name)[0]
    if isinstance(first, Image.Image):
        first = opened(first, name)
        return first.height, first.width
    channels_last = isinstance(first, np.ndarray) and (first.ndim == 4 or (first.ndim == 3 and first.shape[-1] <= 4))
    height, width = first.shape[-3:-1] if channels_last else first.shape[-2:]
    check_edges(height, width, name)
    return height, width


def check_edges(height: int, width: int, name: str) -> None:
    """Raise `InputError` unless a picture of this size can be meant."""
    if min(height, width) < 2 or height * width > MAX_PIXELS:
        raise InputError(
            f"{name} is too {'small' if min(height, width) < 2 else 'large'}",
            found=f"{width} x {height} pixels",
            expected=f"at least 2 x 2, at most {MAX_PIXELS} pixels in all",
        )


# ---------------------------------------------------------------- PIL


def opened(image: Image.Image, name: str = "image") -> Image.Image:
    """A PIL picture decoded, turned as its EXIF says, with 8 bits a channel.

    Raises:
        InputError: Too large or too small; damaged; outside the range of its mode.
    """
    check_edges(image.height, image.width, name)
    try:
        image.load()
    except Exception as error:  # the decoders of Pillow raise whatever they stumble over
        raise InputError(
            f"{name} cannot be decoded: {error}", remedy="the file is damaged, cut short or closed; open it again"
        ) from error
    with suppress(Exception):  # what EXIF says of the picture may be damaged when the picture is not
        image = ImageOps.exif_transpose(image)
    wide = image.mode in ("I", "F") or image.mode.startswith("I;16")
    return _eight_bits(image, name) if wide else image


def in_eight_bits(image: Any, name: str) -> list[Image.Image]:
    """Pictures of any kind as PIL pictures in RGB; floats are rounded.

    Raises:
        InputError: One is no picture, or of a size or range that cannot be meant.
    """
    made: list[Image.Image] = []
    for item in listed(image, name):
        if isinstance(item, Image.Image):
            made.append(over_white(opened(item, name)))
            continue
        values = colors(unit_range(joined([item], name), name), name).cpu().float()
        values = (values + 1) / 2 if values.min() < -SLACK else values
        pixels = (values.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        made += [Image.fromarray(picture) for picture in pixels]
    return made


def over_white(image: Image.Image) -> Image.Image:
    """An 8-bit picture of any mode as RGB, laid over white where it is transparent."""
    if image.has_transparency_data:
        image = _rgba(image)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def painted(image: Image.Image) -> Image.Image:
    """What an 8-bit mask of any mode is painted in: its alpha if that alone varies, else its colors, grays or bits."""
    if image.has_transparency_data:
        image = _rgba(image)
        colors, alpha = image.convert("RGB"), image.getchannel("A")
        return alpha if _flat(colors) and not _flat(alpha) else colors
    return image if image.mode in ("1", "L", "RGB") else image.convert("RGB")


def _rgba(image: Image.Image) -> Image.Image:
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def _flat(image: Image.Image) -> bool:
    return all(low == high for low, high in (image.getchannel(band).getextrema() for band in image.getbands()))  # pyright: ignore


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    white = {"I": (255, 65535), "F": (1, 255)}.get(image.mode, (65535,))
    if not 0 <= low <= high <= white[-1]:  # false for NaN too
        raise InputError(
            f"{name} is out of range", found=f"[{low:g}, {high:g}] in mode {image.mode}", expected=f"[0, {white[-1]}]"
        )
    top = next(top for top in white if high <= top)
    return Image.fromarray((values * (255.0 / top)).round().astype(np.uint8))


# ---------------------------------------------------------------- arrays and tensors


def joined(items: list[Any], name: str, stacked_masks: bool = False) -> Tensor:
    """Arrays or tensors as one tensor (batch, channels, height, width) of their own type, in memory of its own.

    Args:
        items: All arrays (height, width[, channels]), all tensors ([channels, ]height, width), or batches of them.
        name: The argument's name, for errors.
        stacked_masks: Three dimensions are (batch, height, width).

    Raises:
        InputError: Different shapes or types; too small or too large; numbers that are no colors.
    """
    alike = {(str(item.dtype), str(getattr(item, "device", "")), item.ndim, tuple(item.shape[-3:])) for item in items}
    if len(alike) > 1:
        raise InputError(
            f"{name}: pictures of several shapes or types",
            found=", ".join(sorted(f"{dtype} {shape}" for dtype, _, _, shape in alike)),
            expected="one shape, one type",
        )
    first = items[0]
    dtype = first.dtype.name if isinstance(first, np.ndarray) else str(first.dtype).removeprefix("torch.")
    if (
        dtype not in ("bool", *INTEGERS, *FLOATS)
        or getattr(first, "layout", torch.strided) != torch.strided
        or getattr(first, "is_meta", False)
    ):
        raise InputError(
            f"{name} holds no plain numbers",
            found=f"{type(first).__name__} of {dtype}",
            expected="floats, integers or booleans in memory",
        )
    channels_last = isinstance(first, np.ndarray) and first.ndim > 2 and not (stacked_masks and first.ndim == 3)
    height, width = first.shape[-3:-1] if channels_last else first.shape[-2:]
    check_edges(height, width, name)
    if isinstance(first, np.ndarray):
        arrays = [np.asarray(item) for item in items]
        arrays = [array[..., None] for array in arrays] if stacked_masks and first.ndim == 3 else arrays
        array = np.concatenate(arrays) if arrays[0].ndim == 4 else np.stack(arrays)
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        values = torch.from_numpy(array if array.ndim == 4 else array[..., None]).permute(0, 3, 1, 2)
    else:
        tensors = [item.unsqueeze(1) for item in items] if stacked_masks and first.ndim == 3 else items
        values = torch.cat(tensors) if tensors[0].ndim == 4 else torch.stack(tensors)
        values = values if values.ndim == 4 else values.unsqueeze(1)
    if not len(values):
        raise InputError(f"{name} is an empty batch", found=tuple(first.shape))
    return values


def unit_range(values: Tensor, name: str, labels: bool = False) -> Tensor:
    """Floats in [0, 1] or [-1, 1] as they are; integers scaled to [0, 1] by what white is in their type.

    Args:
        values: Any shape.
        name: The argument's name, for errors.
        labels: Integers that are all 0 or 1 stay.

    Raises:
        InputError: NaN or infinity; out of range.
    """
    floating = values.is_floating_point()
    numbers = values if floating else values.to(torch.float32)
    check_finite(numbers, name)
    low, high, white = numbers.min().item(), numbers.max().item(), RANGES.get(values.dtype, 255)
    if low < -1 - SLACK or high > 1 + SLACK if floating else low < 0 or high > white:
        raise InputError(
            f"{name} is out of range",
            found=f"[{low:.4g}, {high:.4g}] in {str(values.dtype).removeprefix('torch.')}",
            expected="floats in [0, 1] or [-1, 1]; integers from 0 to 255; uint16 from 0 to 65535",
            remedy="divide by the largest value, or pass uint8",
        )
    return numbers if floating or (labels and high <= 1) else numbers / white


def check_finite(values: Tensor, name: str) -> None:
    """Raise `InputError` if there is NaN or infinity."""
    if not bool(torch.isfinite(values).all()):
        raise InputError(f"{name} holds NaN or infinity")


def colors(values: Tensor, name: str) -> Tensor:
    """(batch, 1, 3 or 4 channels, height, width) as (batch, 3, height, width), laid over white where alpha says.

    Raises:
        InputError: Another number of channels; alpha with pictures in [-1, 1].
    """
    _check_channels(values, name)
    if values.shape[1] == 4:
        alpha = values[:, 3:]
        values = values[:, :3] * alpha + (1 - alpha)
    return values.repeat(1, 3, 1, 1) if values.shape[1] == 1 else values


def grays(values: Tensor, name: str) -> Tensor:
    """(batch, 1, 3 or 4 channels, height, width) as (batch, 1, height, width): alpha if that alone varies, else the luma.

    Weights of ITU-R BT.601, as PIL has them.

    Raises:
        InputError: Another number of channels; alpha with pictures in [-1, 1].
    """
    _check_channels(values, name)
    if values.shape[1] == 4:
        varies = (values != values[..., :1, :1]).any(0).flatten(1).any(1).tolist()
        values = values[:, 3:] if varies == [False, False, False, True] else values[:, :3]
    weights = torch.tensor([[0.299], [0.587], [0.114]], dtype=values.dtype, device=values.device)[..., None]
    return (values * weights).sum(1, keepdim=True) if values.shape[1] == 3 else values


def _check_channels(values: Tensor, name: str) -> None:
    channels = values.shape[1]
    if channels not in (1, 3, 4):
        raise InputError(
            f"{name} has {channels} channels",
            found=f"shape {tuple(values.shape)} as (batch, channels, height, width)",
            expected="1, 3 or, with alpha, 4",
            remedy="channels come last in arrays, before height and width in tensors",
        )
    if channels == 4 and values.min() < 0:
        raise InputError(f"{name} has an alpha channel and negative values", expected="values in [0, 1] with alpha")
