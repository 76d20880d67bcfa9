"""Which files of a repository a component needs: its settings, and the weights of one format and variant."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from suffuse.checkpoints.layout import (
    DIFFUSERS,
    TRANSFORMERS,
    Naming,
    choose_weights,
    nothing_there,
    numbered_folders,
    shards_in,
    variants_among,
)
from suffuse.hub.sources import Source

SETTINGS = (".json", ".txt", ".model")
"""Suffixes of configurations, vocabularies and merges."""
ONNX = (".onnx", ".pb", ".onnx_data")


class Wanted(NamedTuple):
    """What to fetch of the weights of a component."""

    naming: Naming = DIFFUSERS
    variant: str | None = None
    use_safetensors: bool | None = None


def fetch_components(source: Source, components: Mapping[str, Wanted | None], *more: str, onnx: bool = False) -> None:
    """Fetch what components need; see `fetch_settings`.

    Raises:
        MissingFileError: There are no such weights.
        HubError: They could not be fetched.
    """
    source.fetch(fetch_settings(source, components, *more, onnx=onnx))


def fetch_settings(source: Source, components: Mapping[str, Wanted | None], *more: str, onnx: bool = False) -> list[str]:
    """Fetch the small files that components need, the indexes of shards among them.

    Args:
        source: Where the files are.
        components: Folder of each component, "" for the source itself → its weights, or None where there are none.
        *more: Further files, fetched if they are there.
        onnx: ONNX models too.

    Returns:
        The large files they need besides.

    Raises:
        MissingFileError: There are no such weights.
        HubError: The files could not be fetched.
    """
    first = [name for name in more if PurePosixPath(name).name in source.names(_parent(name))]
    indexes: dict[str, str] = {}
    for folder, wanted in components.items():
        names = source.names(folder)
        suffixes = (*SETTINGS, *ONNX) if onnx else SETTINGS
        first += [_path(folder, name) for name in names if name.endswith(suffixes) and ".index." not in name]
        if wanted is None:
            continue
        choice = choose_weights(names, *wanted)
        if choice is None:
            raise nothing_there(source.folder / folder, names, *wanted)
        if choice.index:
            indexes[folder] = choice.index
        first += [_path(folder, choice.index or choice.single)]
    later = [name for name in first if _is_weights(name)]
    source.fetch(name for name in first if not _is_weights(name))
    for folder, index in indexes.items():
        later += [_path(folder, shard) for shard in shards_in(source.folder / folder / index)]
    return later


def namings_by_files(source: Source, index: Mapping[str, Any], without: Collection[str]) -> dict[str, Naming | None]:
    """The components that a model_index.json names, with how their weights are called, as told from the names of the files."""
    entries = {name: entry for name, entry in index.items() if isinstance(entry, list) and entry != [None, None]}
    wanted = {name: str(entry[-1]) for name, entry in entries.items() if not name.startswith("_") and name not in without}
    names = {
        folder: source.names(folder) for name, kind in wanted.items() for folder in numbered_folders(name, kind, source.names)
    }
    return {
        name: next((n for n in (DIFFUSERS, TRANSFORMERS) if choose_weights(files, n) or variants_among(files, n)), None)
        for name, files in names.items()
    }


def _path(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if folder else name


def _parent(name: str) -> str:
    parent = str(PurePosixPath(name).parent)
    return "" if parent == "." else parent


def _is_weights(name: str) -> bool:
    return not name.endswith(SETTINGS)
