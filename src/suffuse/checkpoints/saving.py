"""Weights to files: the bytes of safetensors are the same as those of the reference implementation, and at every save."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from suffuse.checkpoints.atomic import note_digest
from suffuse.checkpoints.layout import SAFETENSORS, Naming, file_name, index_names, shard_name
from suffuse.checkpoints.reading import DTYPES
from suffuse.checkpoints.safetensors_file import BITS
from suffuse.checkpoints.writing import write_pieces
from suffuse.errors import SaveError
from suffuse.files import parse_size, write_text

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Write = Callable[[dict[str, Tensor], Path], Any]
"""Writes named tensors to a file."""


def write_weights(
    tensors: Mapping[str, Tensor],
    folder: Path,
    naming: Naming,
    suffix: str = SAFETENSORS,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
    write: Write | None = None,
) -> None:
    """Write tensors as one file, or as shards with an index if they are larger than `max_shard_size`.

    Args:
        tensors: By name; a tensor that stands under two names is written under the first.
        folder: An empty or staged folder.
        naming: How the files are called.
        suffix: ".safetensors" or ".bin".
        variant: "fp16" and the like.
        max_shard_size: Bytes, or "5GB" and the like.
        write: What writes each file, in place of this module's own.

    Raises:
        SaveError: A tensor has no storage, or a type that the format does not know.
        InputError: `max_shard_size` is no size.
    """
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise SaveError(
                f"tensor {name!r} cannot be saved: it has no storage", remedy="if it is offloaded, remove_all_hooks()"
            )
    write = write or (write_safetensors if suffix == SAFETENSORS else torch.save)
    tensors, stem = _without_ties(tensors), naming.stem(suffix)
    shards = split_shards(tensors, parse_size(max_shard_size, "max_shard_size"))
    if len(shards) == 1:
        write(dict(tensors), folder / file_name(stem, suffix, variant))
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = shard_name(stem, suffix, variant, number, len(shards))
        write(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": sum(map(_size, tensors.values()))}, "weight_map": weight_map}
    write_text(folder / index_names(stem, suffix, variant)[0], json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file, tensor by tensor: no second copy of the weights is made.

    Args:
        tensors: By name.
        path: The file.
        metadata: Text by name, for the header.

    Raises:
        SaveError: A tensor has no storage, or a type that the format does not know.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES or tensor.is_meta:
            raise SaveError(f"tensor {name!r} cannot be saved", found=f"{tensor.dtype} on {tensor.device}")
    width = {dtype: position for position, dtype in enumerate(BITS)}
    order = sorted(tensors, key=lambda name: (-width[_NAMES[tensors[name].dtype]], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for name in order:
        end = position + _size(tensors[name])
        header[name] = {"dtype": _NAMES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    rows = (tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() for name in order)
    head = memoryview(len(text).to_bytes(8, "little") + text)
    note_digest(path, write_pieces(path, itertools.chain([head], (memoryview(cast(Any, row)) for row in rows))))


def split_shards(tensors: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """Fill shards in the order given, up to `limit` bytes each; a tensor that is larger stands alone."""
    shards: list[dict[str, Tensor]] = []
    current: dict[str, Tensor] = {}
    filled = 0
    for name, tensor in tensors.items():
        size = _size(tensor)
        if size > limit:
            shards.append({name: tensor})
            continue
        if filled + size > limit:
            shards.append(current)
            current, filled = {}, 0
        current[name] = tensor
        filled += size
    return [*shards, current] if current or not shards else shards


def _without_ties(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One name for each tensor: a parameter in two places is one tensor, and a file holds it once."""
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        first.setdefault(place if tensor.numel() and not tensor.is_meta else (name,), name)
    return {name: tensors[name] for name in first.values()}


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
