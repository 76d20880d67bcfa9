"""Single files, opened: what they hold, and each component's tensors under its own names."""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suffuse.checkpoints.layout import PICKLE, SAFETENSORS, WeightFiles
from suffuse.checkpoints.reading import Source, open_source
from suffuse.checkpoints.weights import first_names
from suffuse.conversion.architecture import LEFT_OUT, Architecture, Part, recognise
from suffuse.conversion.renamed_source import RenamedSource
from suffuse.errors import ConfigError, InputError, MissingFileError, MissingPackageError
from suffuse.files import names_in
from suffuse.hub.options import HubOptions
from suffuse.hub.sources import opened

LINK = re.compile(
    r"(?:https://(?:huggingface\.co|hf\.co|www\.huggingface\.co)/)?"
    r"(?P<name>[^/:]+/[^/]+)/(?:blob|resolve)/(?P<revision>[^/]+)/(?P<file>[^?]+)(?:\?.*)?"
)
"""The address of a file on the hub."""

_SUFFIXES = {".safetensors": SAFETENSORS, ".ckpt": PICKLE, ".pt": PICKLE, ".pth": PICKLE, ".bin": PICKLE}


@dataclass(frozen=True)
class SingleFile:
    """A single file, with what it holds."""

    path: Path
    source: Source
    architecture: Architecture

    def part(self, name: str) -> Part:
        """The component of that name.

        Raises:
            ConfigError: The file does not hold it.
        """
        if name in self.architecture.parts:
            return self.architecture.parts[name]
        raise ConfigError(f"{self.path} holds no {name}", found=f"{self.architecture.name}: {', '.join(self.architecture.parts)}")

    def tensors(self, part: Part, averaged: bool = False) -> RenamedSource:
        """The tensors of a component, under the names of its model; the running averages of them, if asked so."""
        return RenamedSource(self.source, part, averaged)


def fetched(link: str | os.PathLike[str], hub: HubOptions | None = None) -> str | os.PathLike[str]:
    """The path of a single file: itself, or that of a file of a repository, which is fetched.

    Args:
        link: A path; or "https://huggingface.co/org/name/blob/main/file.safetensors", with or without the address before.
        hub: How to fetch; a revision in the link goes before its own.

    Raises:
        HubError, MissingFileError: The hub did not give it.
    """
    match = LINK.fullmatch(str(link))
    if match is None or os.path.exists(str(link)):
        return link
    options = dataclasses.replace(hub or HubOptions(), revision=match["revision"])
    with opened(match["name"], options) as source:
        source.fetch([match["file"]])
        return source.folder / match["file"]


def open_single_file(
    path: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    prediction_type: str | None = None,
    upcast_attention: bool | None = None,
    original: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    strict: bool = False,
) -> SingleFile:
    """Open a single file; of safetensors only the header is read.

    Args:
        path: A .safetensors file, or a pickle (.ckpt, .pt, .pth, .bin), of which only tensors are read.
        image_size: What the model was trained on.
        prediction_type: "epsilon" or "v_prediction".
        upcast_attention: Compute attention scores in float32.
        original: The original configuration: the path of a YAML file, or what it holds.
        strict: Raise on tensors that belong to no component, instead of one warning.

    Raises:
        MissingFileError: There is no such file.
        ConfigError: It is of no architecture that is known.
        InputError: An option has a wrong value.
        CorruptFileError, UnsafePickleError: The file is damaged, or asks for more than tensors.
    """
    try:
        path = Path(path)
    except TypeError:
        raise InputError("a single file needs a path", found=path, expected="text or a Path") from None
    if image_size is not None and (isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 8):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError("image_size has the wrong value", found=image_size, expected="pixels, 512 for example")
    if upcast_attention not in (True, False, None):
        raise InputError("upcast_attention has the wrong value", found=upcast_attention, expected="True, False or None")
    if not isinstance(original, (str, os.PathLike, Mapping, type(None))):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(
            "original_config_file has the wrong type", found=original, expected="the path of a YAML file, or a mapping"
        )
    suffix = _SUFFIXES.get(path.suffix.lower())
    if suffix is None:
        raise InputError(
            f"{path} has no suffix of a single file", expected=", ".join(_SUFFIXES), remedy="from_pretrained loads folders"
        )
    if not path.is_file():
        raise MissingFileError(f"no file {path}", found=names_in(path.parent))
    if prediction_type not in (None, "epsilon", "v_prediction", "sample"):
        raise InputError(
            "prediction_type has the wrong value", found=prediction_type, expected='"epsilon", "v_prediction" or "sample"'
        )
    source = open_source(WeightFiles((path,), suffix))
    source.where = path
    architecture = recognise(
        source.tensors,
        image_size=image_size,
        prediction_type=prediction_type,
        upcast_attention=upcast_attention,
        original=original if original is None or isinstance(original, Mapping) else _yaml(Path(original)),
    )
    prefixes = tuple(part.prefix for part in architecture.parts.values())
    strangers = [name for name in source.tensors if not name.startswith(prefixes) and not LEFT_OUT.match(name)]
    if strangers and strict:
        raise ConfigError(f"{path}: {len(strangers)} tensors belong to nothing that is known: {first_names(strangers)}")
    if strangers:
        warnings.warn(f"{path}: {len(strangers)} tensors belong to nothing that is known: {first_names(strangers)}", stacklevel=3)
    return SingleFile(path, source, architecture)


def _yaml(path: Path) -> Mapping[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise MissingPackageError("reading an original configuration needs PyYAML", remedy="pip install pyyaml") from error
    if not path.is_file():
        raise MissingFileError(f"no file {path}", found=names_in(path.parent))
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no YAML: {error}") from None
    if not isinstance(loaded, Mapping):
        raise ConfigError(f"{path} holds no mapping", found=type(loaded).__name__)
    return loaded
