"""The safetensors format: eight bytes of length, a JSON header, then the tensors one after the other.

The header is read and checked here with the standard library alone, so that a checkpoint can be looked at without torch.
Nothing that a header announces is believed before it is compared with the size of the file, and nothing of an announced
size is allocated. Format: https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suffuse.errors import CorruptFileError, SuffuseError, UnsafePickleError
from suffuse.files import open_regular, repeated

HEADER_LIMIT = 100_000_000
"""Largest header in bytes, as in the reference implementation."""

BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
"""Bits of one element. Files list tensors by this order from the back, so that each starts at a multiple of its width."""

SAVED_RUN = "suffuse_run"
"""The entry of metadata that says that a file is a saved run of a pipeline."""

_SIGNS: tuple[tuple[bytes, type[SuffuseError], str, str], ...] = (
    (b"version https://git-lfs", CorruptFileError, "is a git-lfs pointer, not the file", "run: git lfs install && git lfs pull"),
    (b"<", CorruptFileError, "is a web page, not weights", "download the file again; a login page may have been saved"),
    (b"PK\x03\x04", UnsafePickleError, "is a pickle by its content; nothing of it was run", "convert it to safetensors"),
    (b"\x80", UnsafePickleError, "is a pickle by its content; nothing of it was run", "convert it to safetensors"),
)
"""First bytes of what is often found under the name of a weights file."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor stands in a file: bytes `start` to `end`, counted from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a safetensors file holds."""

    path: Path
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    size: int


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        CorruptFileError: The file is cut, its header is no header, or tensors overlap, leave holes or do not fit.
        UnsafePickleError: It is a pickle under a wrong name.
        MissingFileError: There is no such file.
    """
    path = Path(path)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(64)
        refuse_disguised(path, first)
        length = int.from_bytes(first[:8], "little")
        if size < 8 or length > min(HEADER_LIMIT, size - 8):
            raise CorruptFileError(
                f"{path} is cut or is no safetensors file",
                found=f"{size} bytes, of which the header says it takes {length}",
                expected=f"a header of at most {HEADER_LIMIT} bytes that fits the file",
            )
        file.seek(8)
        text = file.read(length)
    entries = _parse(path, text)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "the metadata must be text by name", metadata)
    origin = 8 + length
    tensors = {name: _entry(path, name, fields, origin) for name, fields in entries.items()}
    _check_layout(path, tensors.values(), origin, size)
    return Header(path, tensors, metadata, size)


def refuse_disguised(path: Path, first: bytes) -> None:
    """Raise if the first bytes of a file say that it is something else than its name."""
    if not first:
        raise CorruptFileError(f"{path} is empty", found="0 bytes", remedy="download or save it again")
    for sign, error, what, remedy in _SIGNS:
        # A real header may be 0x3c or 0x80 bytes long: what tells is that JSON begins in the ninth byte.
        if first.lstrip().startswith(sign) and first[8:9] != b"{":
            raise error(f"{path} {what}", found=first[:40], remedy=remedy)


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            raise _damaged(path, "a name stands twice in the header", repeated(pairs))
        return made

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except UnicodeDecodeError as error:
        raise _damaged(path, "the header is not UTF-8", f"byte {error.start + 8}: {error.reason}") from None
    except ValueError as error:  # not JSON, or a number of thousands of digits
        raise _damaged(path, "the header is not JSON", error) from None
    except RecursionError:
        raise _damaged(path, "the header is not JSON", "nested too deep") from None
    if not isinstance(entries, dict):
        raise _damaged(path, "the header is no JSON object", type(entries).__name__)
    return entries


def _entry(path: Path, name: str, fields: Any, origin: int) -> TensorEntry:
    def count(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    match fields:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, end]} if all(map(count, [*shape, start, end])):
            if dtype not in BITS:
                raise _damaged(path, f"tensor {name!r} has an unknown type", dtype, f"one of {', '.join(BITS)}")
            wanted = math.prod(shape) * BITS[dtype]
            if wanted != (end - start) * 8:
                raise _damaged(path, f"tensor {name!r} does not fit its place", f"{end - start} bytes", f"{wanted / 8:.0f} bytes")
            return TensorEntry(name, dtype, tuple(shape), origin + start, origin + end)
        case _:
            raise _damaged(path, f"tensor {name!r} is not described", fields, "dtype, shape and two data_offsets")


def _check_layout(path: Path, tensors: Iterable[TensorEntry], origin: int, size: int) -> None:
    position = origin
    for entry in sorted(tensors, key=lambda entry: (entry.start, entry.end)):
        if entry.start != position:
            fault = "overlaps the tensor before it" if entry.start < position else "leaves a hole before it"
            raise _damaged(path, f"tensor {entry.name!r} {fault}", f"it starts at byte {entry.start}", f"byte {position}")
        if entry.end > size:
            raise _damaged(path, f"the file is cut inside tensor {entry.name!r}", f"{size} bytes", f"at least {entry.end} bytes")
        position = entry.end
    if position != size:
        raise _damaged(path, "bytes follow the last tensor", f"{size} bytes", f"{position} bytes")


def _damaged(path: Path, problem: str, found: Any, expected: str | None = None) -> CorruptFileError:
    remedy = "the file is damaged: download or save it again"
    return CorruptFileError(f"{path}: {problem}", found=found, expected=expected, remedy=remedy)
