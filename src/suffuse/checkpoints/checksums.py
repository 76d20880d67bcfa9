"""What a saved folder held when it was saved: `SHA256SUMS`, in the format of sha256sum, so that `sha256sum -c` reads it too."""

from __future__ import annotations

import concurrent.futures
import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from suffuse.errors import CorruptFileError, MissingFileError
from suffuse.files import check_inside, names_in, open_regular

NAME = "SHA256SUMS"
READ = {".safetensors", ".bin", ".json", ".txt", ".model", ".py"}
"""Suffixes of files that a load reads."""
_CHUNK = 1 << 20


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    state, buffer = hashlib.sha256(), bytearray(_CHUNK)
    with open_regular(path) as file:
        while count := file.readinto(buffer):  # pyright: ignore[reportAttributeAccessIssue]
            state.update(memoryview(buffer)[:count])
    return state.hexdigest()


def read_checksums(folder: Path) -> dict[str, str]:
    """Relative path → SHA-256, as the folder's list says; empty if it has none.

    Raises:
        CorruptFileError: The list is none.
        PathEscapeError: It names a file outside of the folder.
    """
    path = folder / NAME
    if not path.is_file():
        return {}
    sums: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        match = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if not match:
            raise CorruptFileError(f"{path}:{number}: no checksum", found=line, expected="64 hexadecimal digits and a file name")
        check_inside(folder, match[2])
        sums[match[2]] = match[1]
    return sums


def write_checksums(folder: Path, sums: Mapping[str, str]) -> None:
    """Write the list, sorted by path."""
    text = "".join(f"{value}  {name}\n" for name, value in sorted(sums.items()))
    (folder / NAME).write_text(text, encoding="utf-8", newline="\n")


def verify_folder(folder: Path) -> None:
    """Hold the files of a saved folder, or of one inside it, against the list that was written with them.

    Raises:
        MissingFileError: There is no list, or a file of it is gone.
        CorruptFileError: A file is not the one that was saved, or is not listed; every such file is named.
    """
    owner = next((place for place in (folder, folder.parent) if (place / NAME).is_file()), None)
    if owner is None:
        raise MissingFileError(
            f"{folder} has no {NAME} to verify it by", found=names_in(folder), remedy="save_pretrained writes one"
        )
    inside = folder.relative_to(owner)
    sums = {name: value for name, value in read_checksums(owner).items() if Path(name).is_relative_to(inside)}
    there = (path.relative_to(owner).as_posix() for path in folder.rglob("*") if path.is_file() and path.suffix in READ)
    strangers = sorted(name for name in there if name not in sums)
    if strangers or not sums:
        raise CorruptFileError(
            f"{owner / NAME} does not list {len(strangers)} files that would be read: {', '.join(strangers[:10])}",
            remedy="save the folder again, or remove what was put there since",
        )
    changed = [name for name, found in _digests(owner, sums) if found != sums[name]]
    if changed:
        raise CorruptFileError(
            f"{len(changed)} files of {owner} are not what was saved: {', '.join(changed[:10])}",
            remedy="take them from a copy, or save the folder again if they were changed on purpose",
        )


def _digests(folder: Path, names: Iterable[str]) -> list[tuple[str, str]]:
    names = list(names)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return list(zip(names, pool.map(lambda name: digest(folder / name), names), strict=True))
