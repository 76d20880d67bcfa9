"""Files: found only where they may be, opened only if they are files, read only if they are JSON, written whole or not at all."""

from __future__ import annotations

import functools
import json
import os
import re
import secrets
import stat
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

from suffuse.errors import ConfigError, InputError, MissingFileError, PathEscapeError

JSON_BYTES, JSON_DEPTH = 16 * 2**20, 64
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, unless it is a pipe, a device or a folder, which could block for ever or never end.

    Raises:
        MissingFileError: There is no such file, or it is not a regular one.
    """
    try:
        # Asked before opening: to open a pipe would wait for its other end.
        if stat.S_ISREG(os.stat(path).st_mode):
            return open(path, "rb", buffering=0)
    except PermissionError:
        raise
    except OSError as error:
        raise MissingFileError(f"no file {path}: {error.strerror}", found=names_in(path.parent)) from None
    raise MissingFileError(f"{path} is not a regular file", remedy="give a file, not a folder, pipe or device")


def names_in(folder: Path, limit: int = 20) -> str:
    """What a folder holds, in words for a message."""
    if not folder.is_dir():
        return f"the folder {folder} does not exist either"
    names = sorted(entry.name for entry in folder.iterdir())
    shown = ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
    return f"in {folder}: {shown or 'nothing'}"


def check_inside(folder: Path, name: str) -> None:
    """Refuse a name that leads out of `folder` on any system, before anything is opened.

    Raises:
        PathEscapeError: It does.
    """
    windows = PureWindowsPath(name)
    if not name or "\0" in name or windows.drive or windows.root or PurePosixPath(name).is_absolute() or ".." in windows.parts:
        raise PathEscapeError(f"{folder}: a name leads out of the folder", found=name, expected="the name of a file inside it")


def local_folder(name: str | os.PathLike[str], subfolder: str | None = None) -> Path:
    """The folder that a name and a subfolder stand for.

    Raises:
        InputError: One of them is no path.
        MissingFileError: There is no such folder.
        PathEscapeError: `subfolder` leads out of it.
    """
    if not isinstance(name, (str, os.PathLike)) or not isinstance(subfolder, str | None):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError("a folder needs a path", found=(name, subfolder), expected="text or a Path; subfolder: text or None")
    if not os.path.isdir(name):  # which says False, and raises nothing, where there can be no such name
        what = "is a file, not a folder" if os.path.exists(name) else "is not a folder here"
        raise MissingFileError(f"{str(name)[:200]!r} {what}", remedy="give the path of a folder that save_pretrained wrote")
    folder = Path(name)
    if not subfolder:
        return folder
    check_inside(folder, subfolder)
    if not (folder / subfolder).is_dir():
        raise MissingFileError(f"{folder} has no folder {subfolder!r}", found=names_in(folder))
    return folder / subfolder


def read_json(path: Path, limit: int = JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object, refusing what could not be one of ours.

    Raises:
        MissingFileError: The file is not there, or is none; the message lists what is.
        ConfigError: Not UTF-8, not JSON, no object, a key twice, nested deeper than 64 levels, larger than `limit` bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ConfigError(f"{path} is too large for JSON", found=f"{size} bytes", expected=f"at most {limit}")
        data = file.read(size)
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=functools.partial(_without_duplicates, path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text", found=f"byte {error.start}: {error.reason}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from None
    except RecursionError:
        raise _too_deep(path) from None
    except ConfigError:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds no JSON object", found=type(value).__name__, expected='an object: {"name": value, …}')
    _check_depth(path, value)
    return value


def write_text(path: Path, text: str) -> None:
    """Write a text file so that `path` holds the old text or the new, whatever happens."""
    staged = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(staged, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


def repeated(pairs: Iterable[tuple[str, Any]]) -> list[str]:
    """The names that stand more than once among (name, value) pairs."""
    return sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)


def _without_duplicates(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ConfigError(f"{path}: a key stands twice", found=repeated(pairs))
    return made


def _check_depth(path: Path, value: Any) -> None:
    level = [value]
    for _ in range(JSON_DEPTH):
        inner = [item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer)]
        level = [item for item in inner if isinstance(item, (dict, list))]
        if not level:
            return
    raise _too_deep(path)


def _too_deep(path: Path) -> ConfigError:
    return ConfigError(f"{path} is nested too deep", expected=f"at most {JSON_DEPTH} levels")


def parse_size(size: int | str, name: str) -> int:
    """Bytes of "10GB" (10^9), "5GiB" (2^30) and the like; `name` is whose size it is, for the message.

    Raises:
        InputError: It is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B)", size.strip().upper()) if isinstance(size, str) else None
    count = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else size
    if not isinstance(count, int) or isinstance(count, bool) or count <= 0:
        raise InputError(f"{name} is no size", found=size, expected='bytes, or "10GB", "500MB", "2GiB"')
    return count
