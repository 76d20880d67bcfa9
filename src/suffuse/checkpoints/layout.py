"""File names of weights, and how to choose among the files of a folder.

    diffusion_pytorch_model.safetensors                           one file
    diffusion_pytorch_model.fp16.safetensors                      one file, of a variant
    diffusion_pytorch_model-00001-of-00002.safetensors            shards, with diffusion_pytorch_model.safetensors.index.json
    diffusion_pytorch_model.fp16-00001-of-00002.safetensors       shards of a variant, with ….safetensors.index.fp16.json
    diffusion_pytorch_model-00001-of-00002.fp16.safetensors       the same as older releases wrote it, ….fp16.index.json

and each of these as pickle, `.bin`. The models of transformers are called `model.safetensors` and `pytorch_model.bin`.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suffuse.checkpoints.safetensors_file import Header, read_header
from suffuse.errors import AmbiguousCheckpointError, ConfigError, InputError, MissingFileError
from suffuse.files import check_inside, names_in, read_json

SAFETENSORS, PICKLE = ".safetensors", ".bin"
NUMBERED = ("MultiControlNetModel", "MultiAdapter")
"""Classes of components that are several models, in several folders of a pipeline."""


@dataclass(frozen=True)
class Naming:
    """How the weights files of one library are called, without suffix."""

    safetensors: str
    pickle: str

    def stem(self, suffix: str) -> str:
        """The name of the files of one format."""
        return self.safetensors if suffix == SAFETENSORS else self.pickle


DIFFUSERS = Naming("diffusion_pytorch_model", "diffusion_pytorch_model")
TRANSFORMERS = Naming("model", "pytorch_model")


def numbered(name: str, index: int) -> str:
    """The folder of one of several models: controlnet, controlnet_1, controlnet_2."""
    return f"{name}_{index}" if index else name


def numbered_folders(name: str, kind: str, there: Callable[[str], Any]) -> list[str]:
    """The folders of a component of this class: its own, and of several models those after it that are there."""
    if kind not in NUMBERED:
        return [name]
    return list(itertools.takewhile(there, (numbered(name, index) for index in itertools.count())))


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold one component's weights, all of one format."""

    paths: tuple[Path, ...]
    suffix: str
    index: Path | None = None
    weight_map: dict[str, str] | None = None

    @property
    def where(self) -> Path:
        """The folder they lie in."""
        return self.paths[0].parent

    def headers(self) -> tuple[Header, ...]:
        """The headers of safetensors files; nothing else of them is read."""
        return tuple(read_header(path) for path in self.paths)


def file_name(stem: str, suffix: str, variant: str | None) -> str:
    """`diffusion_pytorch_model.fp16.safetensors`, say."""
    return f"{stem}.{variant}{suffix}" if variant else f"{stem}{suffix}"


def shard_name(stem: str, suffix: str, variant: str | None, number: int, count: int) -> str:
    """`diffusion_pytorch_model.fp16-00001-of-00002.safetensors`, say; `number` counts from 1."""
    return f"{stem}{f'.{variant}' if variant else ''}-{number:05d}-of-{count:05d}{suffix}"


def index_names(stem: str, suffix: str, variant: str | None) -> tuple[str, ...]:
    """The names a shard index may have; the first is the one to write."""
    if not variant:
        return (f"{stem}{suffix}.index.json",)
    return tuple(f"{stem}{middle}.json" for middle in (
        f"{suffix}.index.{variant}", f"{suffix}.{variant}.index", f".{variant}{suffix}.index",
    ))  # fmt: skip


def find_weights(
    folder: Path, naming: Naming = DIFFUSERS, variant: str | None = None, use_safetensors: bool | None = None
) -> WeightFiles:
    """The weights files of a folder. Shards go before a single file, safetensors before pickles.

    Args:
        folder: Where one component lies.
        naming: How its library calls the files.
        variant: "fp16" and the like; None for the files without one.
        use_safetensors: True: nothing else; False: only `.bin`; None: safetensors, and `.bin` where there are none.

    Raises:
        MissingFileError: There are no such files, or the index names one that is not there.
        AmbiguousCheckpointError: An index and a single file of one format hold different tensors.
        PathEscapeError: The index names a file outside of the folder.
        ConfigError: The index is not one.
    """
    if not folder.is_dir():
        raise MissingFileError(f"no folder {folder}", found=names_in(folder.parent))
    names = _names(folder)
    choice = choose_weights(names, naming, variant, use_safetensors)
    if choice is None:
        raise nothing_there(folder, names, naming, variant, use_safetensors)
    if choice.index is None:
        return WeightFiles((folder / choice.single,), choice.suffix)
    shards = _read_index(folder / choice.index, choice.suffix)
    if choice.single:
        _check_agreement(shards, folder / choice.single)
    return shards


@dataclass(frozen=True)
class Choice:
    """Which files of a folder hold the weights of one format: an index goes before a single file."""

    suffix: str
    index: str | None
    single: str


def choose_weights(
    names: Collection[str], naming: Naming = DIFFUSERS, variant: str | None = None, use_safetensors: bool | None = None
) -> Choice | None:
    """The rule of `find_weights`, on the names of a folder's files, here or elsewhere; None if there are no weights."""
    check_variant(variant)
    for suffix in _suffixes(use_safetensors):
        stem = naming.stem(suffix)
        index = next((name for name in index_names(stem, suffix, variant) if name in names), None)
        single = file_name(stem, suffix, variant)
        if index or single in names:
            return Choice(suffix, index, single if single in names else "")
    return None


def shards_in(index: Path) -> list[str]:
    """The names of the files that a shard index names, without asking whether they are there.

    Raises:
        PathEscapeError: The index names a file outside of its folder.
        ConfigError: The index is not one.
    """
    return sorted(set(_weight_map(index).values()))


def has_weights(folder: Path, naming: Naming = DIFFUSERS, variant: str | None = None) -> bool:
    """Whether a folder has weights, of any format, by these names."""
    return choose_weights(_names(folder), naming, variant) is not None


def variants_in(folder: Path, naming: Naming = DIFFUSERS) -> list[str]:
    """The variants of which a folder holds weights, in alphabetical order."""
    return variants_among(_names(folder), naming)


def variants_among(names: Iterable[str], naming: Naming = DIFFUSERS) -> list[str]:
    """The variants of the weights among the names of files, in alphabetical order."""
    found: set[str] = set()
    for suffix in (SAFETENSORS, PICKLE):
        stem, end = re.escape(naming.stem(suffix)), re.escape(suffix)
        pattern = re.compile(rf"{stem}(?:-\d{{5}}-of-\d{{5}})?\.([^.]+?)(?:-\d{{5}}-of-\d{{5}})?{end}")
        found |= {match[1] for match in map(pattern.fullmatch, names) if match}
    return sorted(found)


def component_variants(
    root: str | Path, components: Mapping[str, tuple[Naming, Iterable[str]]], variant: str | None
) -> dict[str, str | None]:
    """Which variant to load of each component: the one asked for where it is there, none elsewhere, with one warning.

    Args:
        root: Of what pipeline, for messages.
        components: Name of each component that has weights → (how its library calls the files, the names of its files).
        variant: What was asked for.

    Raises:
        MissingFileError: No component has this variant.
    """
    if variant is None:
        return dict.fromkeys(components)
    check_variant(variant)
    there = {name: variants_among(names, naming) for name, (naming, names) in components.items()}
    without = [name for name, variants in there.items() if variant not in variants]
    if len(without) == len(components):
        raise MissingFileError(
            f"no component of {root} has weights of variant {variant!r}",
            found={name: variants or "no variant" for name, variants in there.items()},
            remedy="leave variant out, or name one of those found",
        )
    if without:
        warnings.warn(
            f"{', '.join(without)} in {root} have no weights of variant {variant!r}: the files without a variant are used",
            stacklevel=3,
        )
    return {name: None if name in without else variant for name in components}


def superseded(naming: Naming, variant: str | None) -> re.Pattern[str]:
    """Matches the names of all weights files and indexes that saving this variant replaces, whatever their format."""
    shard, dot = r"(-\d{5}-of-\d{5})?", rf"\.{re.escape(variant)}" if variant else ""
    names: list[str] = []
    for suffix in (SAFETENSORS, PICKLE):
        stem, end = re.escape(naming.stem(suffix)), re.escape(suffix)
        names += [rf"{stem}{dot}{shard}{end}", rf"{stem}{shard}{dot}{end}"]
        names += [re.escape(name) for name in index_names(naming.stem(suffix), suffix, variant)]
    return re.compile("|".join(names))


def _suffixes(use_safetensors: bool | None) -> tuple[str, ...]:
    if use_safetensors not in (True, False, None):
        raise InputError("use_safetensors has the wrong value", found=use_safetensors, expected="True, False or None")
    return {True: (SAFETENSORS,), False: (PICKLE,), None: (SAFETENSORS, PICKLE)}[use_safetensors]


def _read_index(path: Path, suffix: str) -> WeightFiles:
    weight_map = _weight_map(path)
    names = sorted(set(weight_map.values()))
    for name in names:
        if not name.endswith(suffix):
            raise ConfigError(f"{path} names a file of another format", found=name, expected=f"a name that ends in {suffix}")
    absent = [name for name in names if not (path.parent / name).exists()]
    if absent:
        raise MissingFileError(
            f"{path} names {len(absent)} files that are not there: {', '.join(absent[:10])}",
            found=names_in(path.parent),
            remedy="download or save the checkpoint again",
        )
    return WeightFiles(tuple(path.parent / name for name in names), suffix, path, weight_map)


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise ConfigError(f"{path} is no shard index", found=weight_map, expected='"weight_map": {tensor name: file name}')
    for name in weight_map.values():
        check_inside(path.parent, name)
    return weight_map


def _check_agreement(shards: WeightFiles, single: Path) -> None:
    """Two ways to read one thing are fine only if they give the same tensors."""
    if shards.suffix == SAFETENSORS:
        whole = read_header(single)
        parts = {name: (header.path, entry) for header in shards.headers() for name, entry in header.tensors.items()}
        if parts.keys() == whole.tensors.keys() and all(
            (entry.dtype, entry.shape) == (part.dtype, part.shape)
            and _same_bytes((single, entry.start, entry.end), (path, part.start, part.end))
            for (path, part), entry in ((parts[name], entry) for name, entry in whole.tensors.items())
        ):
            return
    raise AmbiguousCheckpointError(
        f"{single.parent} holds two different sets of weights",
        found=f"{single.name} and {shards.index.name if shards.index else ''}",
        remedy="remove the one that is out of date",
    )


def _same_bytes(one: tuple[Path, int, int], other: tuple[Path, int, int]) -> bool:
    return all(a == b for a, b in zip(_chunks(*one), _chunks(*other), strict=True))


def _chunks(path: Path, start: int, end: int, size: int = 1 << 20) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        for position in range(start, end, size):
            yield file.read(min(size, end - position))


def nothing_there(
    folder: str | Path, names: Collection[str], naming: Naming, variant: str | None, use_safetensors: bool | None = None
) -> MissingFileError:
    """The error for a folder, here or elsewhere, without the weights that were asked for; `names` are those of its files."""
    hints = [f"variant={other!r}" for other in variants_among(names, naming) if other != variant]
    hints += ["no variant"] if variant else []
    expected = " or ".join(file_name(naming.stem(suffix), suffix, variant) for suffix in _suffixes(use_safetensors))
    remedy = f"try {', '.join(hints)}" if hints else "check the folder, or save the checkpoint again"
    what = f" of variant {variant!r}" if variant else ""
    found = f"in {folder}: {', '.join(sorted(names)[:20]) or 'nothing'}"
    return MissingFileError(f"no weights{what} in {folder}", found=found, expected=expected, remedy=remedy)


def check_variant(variant: str | None) -> None:
    """Raise `InputError` unless a variant can be part of a file's name."""
    name: Any = variant
    if name is not None and not (isinstance(name, str) and re.fullmatch(r"[\w-]+", name)):
        raise InputError("variant is no name", found=variant, expected='letters, digits, "_" and "-", "fp16" for example')


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
