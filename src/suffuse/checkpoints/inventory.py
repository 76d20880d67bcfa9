"""What a checkpoint holds, told from its configurations and headers alone: no weight is read, torch is not needed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from suffuse.checkpoints.layout import (
    DIFFUSERS,
    SAFETENSORS,
    TRANSFORMERS,
    Naming,
    WeightFiles,
    find_weights,
    has_weights,
    variants_in,
)
from suffuse.checkpoints.safetensors_file import BITS, TensorEntry, read_header
from suffuse.errors import ConfigError, MissingFileError
from suffuse.files import check_inside, names_in, read_json

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
TARGETS = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Types a model may be loaded as → bytes of one number."""


@dataclass
class Component:
    """One part of a pipeline.

    Args:
        name: Its folder, "unet" for example; the name of the file or folder looked at, if that is all there is.
        kind: Its class.
        library: Where the class comes from.
        parameters: How many numbers the weights hold; None if that cannot be told without unpickling.
        bytes: Size of the weights files.
        files: Their names, or those of what else the folder holds.
        dtypes: Type → how many numbers are of it.
        memory: Type to load as → bytes needed.
        largest: How many numbers the largest tensor holds.
    """

    name: str
    kind: str | None = None
    library: str | None = None
    parameters: int | None = 0
    bytes: int = 0
    files: list[str] = field(default_factory=list[str])
    dtypes: dict[str, int] = field(default_factory=dict[str, int])
    memory: dict[str, int] = field(default_factory=dict[str, int])
    largest: int = 0


def take_inventory(path: str | os.PathLike[str], variant: str | None = None) -> list[Component]:
    """The components of a pipeline's folder; of a model's folder or a safetensors file, the one.

    Args:
        path: A folder or a file.
        variant: Which weights to look at; None for those without a variant, or else the first there is.

    Raises:
        MissingFileError: There is nothing of the kind.
        ConfigError: A configuration is not JSON, or names no components.
        CorruptFileError: A header is damaged.
        PathEscapeError: A component leads out of the folder.
    """
    path = Path(path)
    if path.is_file():
        return [_weighed(Component(path.name), WeightFiles((path,), SAFETENSORS))]
    if (path / "model_index.json").is_file():
        index = read_json(path / "model_index.json")
        return [_component(path, name, value, variant) for name, value in index.items() if _is_component(name, value)]
    if not path.is_dir():
        raise MissingFileError(f"no file or folder {path}", found=names_in(path.parent))
    found = _find_any(path, (DIFFUSERS, TRANSFORMERS), variant)
    if found is None:
        raise MissingFileError(
            f"{path} is no checkpoint",
            found=names_in(path),
            expected="model_index.json, or weights, or the path of a .safetensors file",
        )
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    kind = config.get("_class_name") or next(iter(config.get("architectures") or []), None)
    library = "diffusers" if "_class_name" in config else "transformers" if "architectures" in config else None
    return [_weighed(Component(path.resolve().name, kind, library), found)]


def total(components: Sequence[Component]) -> Component:
    """The sum over all components."""
    dtypes, memory = Counter[str](), Counter[str]()
    for component in components:
        dtypes.update(component.dtypes)
        memory.update(component.memory)
    known = [component.parameters for component in components if component.parameters is not None]
    return Component(
        "total",
        parameters=sum(known) if len(known) == len(components) else None,
        bytes=sum(component.bytes for component in components),
        dtypes=dict(dtypes),
        memory=dict(memory),
    )


def _is_component(name: str, value: Any) -> bool:
    return not name.startswith("_") and isinstance(value, list) and value != [None, None]


def _component(root: Path, name: str, value: Any, variant: str | None) -> Component:
    check_inside(root, name)
    match value:
        case [str() | None as library, str() as kind]:
            component = Component(name, kind, library)
        case _:
            raise ConfigError(
                f"{root / 'model_index.json'}: {name} is no component", found=value, expected='["library", "Class"]'
            )
    if not (root / name).is_dir():
        raise MissingFileError(f"{root} has no folder {name!r}, which model_index.json names", found=names_in(root))
    found = _find_any(root / name, (TRANSFORMERS, DIFFUSERS) if library == "transformers" else (DIFFUSERS, TRANSFORMERS), variant)
    if found is None:
        component.files = sorted(entry.name for entry in (root / name).iterdir())
        return component
    return _weighed(component, found)


def _find_any(folder: Path, namings: Sequence[Naming], variant: str | None) -> WeightFiles | None:
    """Weights under any of the names, of the variant asked for, or of none, or of whichever there is."""
    for naming in namings:
        for choice in dict.fromkeys((variant, None, *variants_in(folder, naming))):
            if has_weights(folder, naming, choice):
                return find_weights(folder, naming, choice)
    return None


def _weighed(component: Component, files: WeightFiles) -> Component:
    component.files = [path.name for path in files.paths]
    component.bytes = sum(path.stat().st_size for path in files.paths)
    if files.suffix != SAFETENSORS:
        component.parameters = None
        return component
    tensors = [entry for path in files.paths for entry in read_header(path).tensors.values()]
    component.dtypes = _count(tensors)
    component.largest = max((entry.elements for entry in tensors), default=0)
    component.parameters = sum(component.dtypes.values())
    component.memory = {name: _memory(component.dtypes, width) for name, width in TARGETS.items()}
    return component


def _count(tensors: Sequence[TensorEntry]) -> dict[str, int]:
    counts = Counter[str]()
    for entry in tensors:
        counts[entry.dtype] += entry.elements
    return dict(counts.most_common())


def _memory(dtypes: Mapping[str, int], width: int) -> int:
    """Bytes when floats are `width` bytes wide; other numbers keep their type."""
    return sum(count * width if dtype in FLOATS else count * BITS[dtype] // 8 for dtype, count in dtypes.items())
