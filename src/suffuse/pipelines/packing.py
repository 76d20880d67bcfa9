"""Values as JSON beside tensors: what a saved run keeps of the arguments of a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from suffuse.diffusion.weighted_prompts import Weighted
from suffuse.errors import InputError
from suffuse.noise import CounterNoise


@dataclass
class Packed:
    """A value that is packed already."""

    told: Any
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class _Kind:
    """How values of a type become tensors: the tensor, what must be known besides, and the way back."""

    type: type
    tensor: Callable[[Any], Tensor]
    detail: Callable[[Any], Any]
    value: Callable[[Tensor, Any], Any]


def _picture(octets: Tensor, detail: Any) -> Image.Image:
    mode, width, height = detail
    return Image.frombytes(mode, (width, height), octets.numpy().tobytes())


def _plain(picture: Image.Image) -> Image.Image:
    """The picture the right way up, without a palette; what is transparent stays so."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "PA" or "transparency" in picture.info:
        return picture.convert("RGBA")
    return picture.convert("RGB") if picture.mode == "P" else picture


def _generator(state: Tensor, device: str) -> torch.Generator:
    try:
        generator = torch.Generator(device)
    except RuntimeError as error:
        raise InputError(
            f"the run draws its noise on {device!r}", found=str(error).split("\n")[0], remedy="pass generator= or seed="
        ) from None
    generator.set_state(state)
    return generator


_KINDS: dict[str, _Kind] = {
    # The layout in memory decides the last bit of what is computed with a tensor.
    "tensor": _Kind(
        Tensor,
        lambda tensor: tensor.detach().cpu(),
        lambda tensor: (
            tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
        ),
        lambda tensor, last: tensor.to(memory_format=torch.channels_last) if last else tensor.clone(),
    ),
    "array": _Kind(
        np.ndarray,
        lambda array: torch.from_numpy(np.ascontiguousarray(array)),
        lambda array: None,
        lambda tensor, _: tensor.clone().numpy(),
    ),
    "picture": _Kind(
        Image.Image,
        lambda picture: torch.frombuffer(bytearray(_plain(picture).tobytes()), dtype=torch.uint8),
        lambda picture: [_plain(picture).mode, *_plain(picture).size],
        _picture,
    ),
    "generator": _Kind(
        torch.Generator, lambda generator: generator.get_state(), lambda generator: str(generator.device), _generator
    ),
}


def packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON; its tensors go to `tensors`, and an object with one entry stands for each.

    Raises:
        InputError: It is of a kind that no file can hold.
    """
    if isinstance(value, Weighted):
        return {"weighted": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, tuple):
        return {"tuple": packed([*value], name, tensors)}
    if isinstance(value, list):
        return [packed(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
    if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
        return {"pairs": packed([[*pair] for pair in value.items()], name, tensors)}
    if isinstance(value, dict):
        return {"entries": {key: packed(item, f"{name}.{key}", tensors) for key, item in value.items()}}
    if isinstance(value, Packed):
        tensors.update(value.tensors)
        return value.told
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, CounterNoise):
        return {"noise": [value.seed, value.image]}
    tag = next((tag for tag, kind in _KINDS.items() if isinstance(value, kind.type)), None)
    if tag is None:
        raise InputError(
            f"{name.removeprefix('arguments.')} cannot be saved with the run",
            found=type(value).__name__,
            remedy="leave out save_run",
        )
    tensors[name] = _KINDS[tag].tensor(value)
    return {tag: [name, _KINDS[tag].detail(value)]}


def unpacked(told: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that was packed."""
    if isinstance(told, list):
        return [unpacked(item, tensors) for item in told]
    if not isinstance(told, dict):
        return told
    ((tag, content),) = told.items()
    if tag == "entries":
        return {key: unpacked(item, tensors) for key, item in content.items()}
    if tag == "pairs":
        return dict(unpacked(content, tensors))
    if tag == "weighted":
        return Weighted(content)
    if tag == "tuple":
        return tuple(unpacked(content, tensors))
    if tag == "noise":
        return CounterNoise(*content)
    name, detail = content
    return _KINDS[tag].value(tensors[name], detail)
