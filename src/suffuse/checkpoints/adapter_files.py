"""Adapters in files: which file of a folder or a repository is meant, and what reads it.

Adapters are passed around as single files under any name, so a name is a file, a folder, a repository, or tensors in memory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from suffuse.checkpoints.layout import PICKLE, SAFETENSORS, WeightFiles
from suffuse.checkpoints.reading import Source, Stored, check_finite, open_source
from suffuse.checkpoints.safetensors_file import read_header
from suffuse.errors import AmbiguousCheckpointError, InputError, MissingFileError
from suffuse.hub.options import HubOptions
from suffuse.hub.sources import opened_subfolder

PICKLES = (PICKLE, ".pt", ".pth", ".ckpt")
NOT_ADAPTERS = ("scheduler", "optimizer", "checkpoint")
"""What the names of other files of a training hold."""

IN_MEMORY = Path("the dictionary that was passed")


@dataclass(frozen=True)
class Choice:
    """Which file is meant.

    Args:
        weight_name: Its name, if it is known.
        subfolder: Of the folder or the repository.
        use_safetensors: True refuses pickles, False takes nothing else, None prefers safetensors.
        usual: Names without suffix that go before others.
    """

    weight_name: str | None = None
    subfolder: str | None = None
    use_safetensors: bool | None = None
    usual: Sequence[str] = ()

    def of(self, names: Sequence[str], where: str) -> str:
        """The name of the file among those of a folder.

        Raises:
            MissingFileError: There is none.
            AmbiguousCheckpointError: There are several.
        """
        if self.weight_name is not None:
            if self.weight_name not in names:
                raise MissingFileError(f"{where} has no file {self.weight_name!r}", found=", ".join(names) or "nothing")
            return self.weight_name
        for suffixes in self._suffixes():
            fitting = [name for name in names if name.endswith(suffixes) and not any(other in name for other in NOT_ADAPTERS)]
            fitting = [name for name in fitting if name.removesuffix(Path(name).suffix) in self.usual] or fitting
            if len(fitting) > 1:
                raise AmbiguousCheckpointError(
                    f"{where} holds {len(fitting)} files of weights", found=", ".join(fitting[:20]), remedy="pass weight_name=…"
                )
            if fitting:
                return fitting[0]
        raise MissingFileError(f"{where} holds no file of weights", found=", ".join(names[:20]) or "nothing")

    def _suffixes(self) -> list[tuple[str, ...]]:
        wanted: list[tuple[str, ...]] = [(SAFETENSORS,), PICKLES]
        return wanted if self.use_safetensors is None else wanted[:1] if self.use_safetensors else wanted[1:]


class HeldTensors:
    """Tensors in memory, as a source; what is read from them is a copy.

    Args:
        tensors: By name.
        where: Where they are from, for messages.
    """

    def __init__(self, tensors: Mapping[str, Tensor], where: Path = IN_MEMORY) -> None:
        for name, tensor in tensors.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise InputError(
                    f"{where} holds something else than named tensors",
                    found=f"{name!r}: {type(tensor).__name__}",
                    expected="text → torch.Tensor",
                )
        self._held, self.where = tensors, where
        self.tensors = {name: Stored(tuple(tensor.shape), tensor.dtype, where) for name, tensor in tensors.items()}

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        """Copy; see `Source.fill`."""
        for name, target in targets.items():
            target.copy_(self._held[name].detach())
            check_finite(self.where, name, target)

    def mapped(self, types: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        """None; see `Source.mapped`."""
        return {}


def find_adapter(name: str | os.PathLike[str], choice: Choice, options: HubOptions) -> Path:
    """The file of an adapter; fetched, if it is a repository's.

    Raises:
        MissingFileError: There is no such file.
        AmbiguousCheckpointError: A folder holds several, and none has the usual name.
        InputError: `weight_name` is no name of a file, or `use_safetensors` and the file disagree.
        HubError: The hub did not give what was asked for.
    """
    if os.path.isfile(name):
        return _of_kind(Path(name), choice)
    with opened_subfolder(name, choice.subfolder, options) as (source, prefix):
        inside, _, last = (choice.weight_name or "").rpartition("/")
        folder = prefix + (f"{inside}/" if inside else "")
        names = source.names(folder.rstrip("/")) if folder else source.names()
        chosen = Choice(last or None, None, choice.use_safetensors, choice.usual).of(names, str(name))
        source.fetch([folder + chosen])
        return _of_kind(source.folder / folder / chosen, choice)


def open_adapter(path: Path) -> tuple[Source, Mapping[str, str]]:
    """What reads a file of weights, and the texts its header carries."""
    if path.suffix == SAFETENSORS:
        return open_source(WeightFiles((path,), SAFETENSORS)), read_header(path).metadata
    return open_source(WeightFiles((path,), PICKLE)), {}


def _of_kind(path: Path, choice: Choice) -> Path:
    if choice.use_safetensors is not None and choice.use_safetensors != (path.suffix == SAFETENSORS):
        raise InputError(
            f"use_safetensors={choice.use_safetensors} and the file is {path.name}", remedy="leave use_safetensors out"
        )
    return path
