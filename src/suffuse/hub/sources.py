"""What a name stands for: a folder here, or a repository of the hub whose files come as they are asked for."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Protocol

from suffuse.errors import InputError, MissingFileError, PathEscapeError
from suffuse.files import check_inside, local_folder
from suffuse.hub.options import HubOptions

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
"""A name on the hub: "org/name", or "name" alone."""

LOCAL = re.compile(r"[/.~\\]|[A-Za-z]:[/\\]|.*\\|[^/]*/[^/]*/|.*\.(safetensors|bin|ckpt|pth?|json|py)$", re.DOTALL)
"""What is meant as a path: it begins like one, has backslashes or more than one slash, or ends as a file does."""


class Source(Protocol):
    """Files of a checkpoint, in a folder that need not be complete."""

    @property
    def folder(self) -> Path:
        """Where the files are."""
        ...

    @property
    def commit(self) -> str | None:
        """The commit they belong to, of a repository."""
        ...

    def names(self, subfolder: str = "") -> list[str]:
        """The names of the files right inside a folder, fetched or not."""
        ...

    def size(self, name: str) -> int:
        """Bytes of a file, fetched or not; 0 if that is not known."""
        ...

    def is_cached(self, name: str) -> bool:
        """Whether a file need not be fetched."""
        ...

    def fetch(self, names: Iterable[str]) -> None:
        """See to it that files, named as paths with slashes, are in the folder."""
        ...


class LocalFolder:
    """A folder that is here: nothing needs fetching."""

    commit = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self, subfolder: str = "") -> list[str]:
        """The names of the files right inside a folder."""
        if subfolder:
            check_inside(self.folder, subfolder)
        folder = self.folder / subfolder
        return sorted(entry.name for entry in folder.iterdir() if not entry.is_dir()) if folder.is_dir() else []

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return (self.folder / name).stat().st_size

    def is_cached(self, name: str) -> bool:
        """It is here."""
        return True

    def fetch(self, names: Iterable[str]) -> None:
        """Do nothing; what is not there is told by who opens it."""


def is_local(name: object) -> bool:
    """Whether a name can only be meant as a path, or is one of a folder that is here: the hub is never asked about it."""
    return not isinstance(name, str) or os.path.isdir(name) or not name or LOCAL.match(name) is not None


@contextlib.contextmanager
def opened(
    name: str | os.PathLike[str], options: HubOptions | None = None, kind: str = "models", verify: bool = False
) -> Generator[Source]:
    """The folder or the repository of this name. All of a repository's files are those of one commit.

    Args:
        name: A path, or a name on the hub. A folder that is here goes before a repository of the same name.
        options: How to fetch.
        kind: What the hub keeps it as: "models" or "datasets".
        verify: Hold what is in the cache against the hub's hashes, and fetch again what is not right.

    Raises:
        MissingFileError: It is a path, and no folder is there.
        PathEscapeError: A name with `..` inside.
        InputError: Nothing on the hub can have this name.
        HubError: The hub did not give what was asked for.
    """
    if is_local(name):
        yield LocalFolder(local_folder(name))
        return
    check_name(str(name))
    from suffuse.hub.repository import Repository  # which imports an HTTP client

    repository = Repository(str(name), options or HubOptions(), kind, verify)
    yield repository
    repository.settle()


def check_name(name: str) -> None:
    """Raise unless `name` can be that of a repository."""
    if ".." in name:
        raise PathEscapeError("a name leads out of the hub", found=name, expected="org/name, or the path of a folder")
    if not NAME.fullmatch(name) or "--" in name or name.endswith((".", "-", ".git")):
        raise InputError(
            f"{name[:200]!r} is neither a folder here nor a name on the hub",
            expected="org/name, of letters, digits, '-', '_' and '.', or the path of a folder",
        )


@contextlib.contextmanager
def opened_subfolder(
    name: str | os.PathLike[str], subfolder: str | None, options: HubOptions | None = None, verify: bool = False
) -> Generator[tuple[Source, str]]:
    """As `opened`, with a folder inside: yields the source and the prefix of the names in it, "unet/" or "".

    Raises:
        MissingFileError: There is no such folder inside.
        PathEscapeError: It leads out.
    """
    if is_local(name):
        yield LocalFolder(local_folder(name, subfolder)), ""
        return
    with opened(name, options, verify=verify) as source:
        if subfolder:
            check_inside(source.folder, subfolder)
            if not source.names(subfolder):
                raise MissingFileError(f"{name} has no folder {subfolder!r}", found=", ".join(source.names()))
        yield source, f"{subfolder.strip('/')}/" if subfolder else ""
