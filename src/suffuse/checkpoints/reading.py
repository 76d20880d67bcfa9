"""Tensors from files into fresh memory.

Bytes go by plain reads straight to where they stay: unless mapping is asked for, no page of the file stays mapped, so
nothing that happens to the file afterwards can change or crash a model. Neighbours are read in one call, two threads share
a file, and what was read is looked through for NaN and infinity (0.09 s per GiB, where `torch.isfinite` takes 1.05 s).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import mmap
import os
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from suffuse.checkpoints.layout import SAFETENSORS, WeightFiles
from suffuse.checkpoints.safetensors_file import TensorEntry, refuse_disguised
from suffuse.errors import CorruptFileError, NonFiniteError, UnsafePickleError
from suffuse.files import open_regular

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16, "I32": torch.int32,
    "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
"""Types of the safetensors format that torch has."""

_NOT_FINITE: dict[torch.dtype, tuple[Any, int, int]] = {
    torch.float8_e4m3fn: (np.uint8, 0x7F, 0x7F),
    torch.float8_e5m2: (np.uint8, 0x7F, 0x7C),
    torch.float16: (np.uint16, 0x7FFF, 0x7C00),
    torch.bfloat16: (np.uint16, 0x7FFF, 0x7F80),
    torch.float32: (np.uint32, 0x7FFFFFFF, 0x7F800000),
    torch.float64: (np.uint64, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
}
"""Float type → unsigned integer of the same bits, the mask that drops the sign, the first value that is not a number."""

_RUN, _RUN_TENSORS = 64 << 20, 256
_CHUNK = 1 << 20
_LOOK = 1 << 18


@dataclass(frozen=True)
class Stored:
    """What a file says of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    path: Path


class Source(Protocol):
    """The tensors of a component, wherever they lie."""

    where: Path
    """The folder or the file, for messages."""

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """What is there, by name."""
        ...

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        """Write the tensors of these names over the given ones, converted to their type and device."""
        ...

    def mapped(self, types: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        """Those of the tensors that can be had as pages of the file, because they are of the wanted type in it."""
        ...


def open_source(files: WeightFiles) -> Source:
    """The source of tensors that fits the format of the files."""
    return SafetensorsSource(files) if files.suffix == SAFETENSORS else PickleSource(files)


class SafetensorsSource:
    """Tensors of one or more safetensors files; only the headers are read until `fill`.

    Raises:
        CorruptFileError: A header is wrong, a tensor stands in two files, or its type is none of torch's.
    """

    def __init__(self, files: WeightFiles) -> None:
        self.where = files.where
        self.tensors: dict[str, Stored] = {}
        self._entries: dict[Path, dict[str, TensorEntry]] = {}
        for header in files.headers():
            twice = header.tensors.keys() & self.tensors.keys()
            if twice:
                raise CorruptFileError(f"{header.path}: tensors of another shard again", found=sorted(twice)[:10])
            self._entries[header.path] = dict(header.tensors)
            self.tensors |= {
                name: Stored(entry.shape, _dtype(header.path, entry), header.path) for name, entry in header.tensors.items()
            }

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        """Read the bytes; see `Source.fill`.

        Raises:
            NonFiniteError: A tensor holds NaN or infinity, or does after the conversion.
            CorruptFileError: The file changed since its header was read.
        """
        for path, entries in self._entries.items():
            jobs = [(entry, targets[name]) for name, entry in entries.items() if name in targets]
            _read(path, sorted(jobs, key=lambda job: job[0].start))

    def mapped(self, types: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        """Map the files; see `Source.mapped`. Pages that are written to are copied first, the files never change.

        Raises:
            NonFiniteError: A tensor holds NaN or infinity.
        """
        made: dict[str, Tensor] = {}
        for path, entries in self._entries.items():
            with open_regular(path) as file:
                pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            for name, entry in entries.items():
                if types.get(name) == DTYPES[entry.dtype] and entry.elements:
                    flat = torch.frombuffer(pages, dtype=types[name], count=entry.elements, offset=entry.start)
                    check_finite(path, name, flat)
                    made[name] = flat.view(entry.shape)
        return made


class PickleSource:
    """Tensors of `.bin` files, read by torch with nothing allowed but tensors.

    Raises:
        UnsafePickleError: A file asks for more than tensors; nothing of it was run.
        CorruptFileError: A file is cut, or holds something else than named tensors.
    """

    def __init__(self, files: WeightFiles) -> None:
        self.where = files.where
        warnings.warn(
            f"{files.paths[0]} is a pickle: read as tensors only; save_pretrained writes safetensors, which load faster",
            stacklevel=5,
        )
        self._loaded: dict[str, tuple[Path, Tensor]] = {}
        for path in files.paths:
            self._loaded |= {name: (path, tensor) for name, tensor in load_pickle(path).items()}
        self.tensors: dict[str, Stored] = {n: Stored(tuple(t.shape), t.dtype, p) for n, (p, t) in self._loaded.items()}

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        """Copy the tensors, and let go of each once it is copied; see `Source.fill`."""
        for name, target in targets.items():
            path, tensor = self._loaded.pop(name)
            target.copy_(tensor)
            check_finite(path, name, target)

    def mapped(self, types: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        """None: a pickle is in memory already; see `Source.mapped`."""
        return {}


def load_plain(path: Path) -> Any:
    """What a pickle holds: tensors, numbers, texts, and lists and dictionaries of them.

    Raises:
        UnsafePickleError: It asks for more; nothing of it was run.
        CorruptFileError: It is cut, or no pickle.
    """
    with open_regular(path) as file:
        first = file.read(64)
        if not first.startswith((b"PK\x03\x04", b"\x80")):
            refuse_disguised(path, first)
        file.seek(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            if zipfile.is_zipfile(path) or first.startswith(b"\x80"):
                raise UnsafePickleError(
                    f"{path} asks for more than tensors; nothing of it was run",
                    found=", ".join(_asked_for(path)) or "operations that no file of tensors has",
                    remedy="get the weights as safetensors from someone you trust",
                ) from None
            raise CorruptFileError(f"{path} is no file of weights", found=first[:40]) from None
        except (RuntimeError, EOFError, ValueError, KeyError, IndexError, UnicodeDecodeError, zipfile.BadZipFile) as error:
            raise CorruptFileError(f"{path} cannot be read", found=str(error).splitlines()[0]) from None


def load_pickle(path: Path) -> dict[str, Tensor]:
    """The named tensors of a pickle; see `PickleSource`."""
    loaded = load_plain(path)
    # Training writes more than weights: they stand under this name then, beside what is no tensor.
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = {name: value for name, value in {**loaded, **loaded["state_dict"]}.items() if isinstance(value, Tensor)}
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise CorruptFileError(f"{path} holds something else than named tensors", found=type(loaded).__name__)
    return loaded


def finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite, told from the bits of the exponent; integers always are."""
    if tensor.dtype not in _NOT_FINITE or tensor.numel() == 0:
        return True
    unsigned, mask, first = _NOT_FINITE[tensor.dtype]
    bits: Any = _octets(tensor.cpu()).numpy().view(unsigned)
    scratch = np.empty(min(len(bits), _LOOK // bits.itemsize), unsigned)
    for begin in range(0, len(bits), len(scratch)):
        part = bits[begin : begin + len(scratch)]
        if np.bitwise_and(part, unsigned(mask), out=scratch[: len(part)]).max() >= first:
            return False
    return True


def check_finite(path: Path, name: str, tensor: Tensor) -> None:
    """Raise unless `finite(tensor)`.

    Raises:
        NonFiniteError: With the name of the tensor and of the file or folder it comes from.
    """
    if not finite(tensor):
        raise NonFiniteError(
            f"{path}: tensor {name!r} holds NaN or infinity as {str(tensor.dtype).removeprefix('torch.')}",
            remedy="the weights are damaged, or too large for this type: try torch_dtype=torch.float32",
        )


def _dtype(path: Path, entry: TensorEntry) -> torch.dtype:
    if entry.dtype not in DTYPES:
        raise CorruptFileError(f"{path}: torch has no type for tensor {entry.name!r}", found=entry.dtype)
    return DTYPES[entry.dtype]


def _octets(tensor: Tensor) -> Tensor:
    """The same memory, as a row of bytes."""
    return tensor.detach().reshape(-1).view(torch.uint8)


_Job = tuple[TensorEntry, Tensor]


def _asked_for(path: Path) -> list[str]:
    """The functions and classes, other than torch's own, that a pickle names; it is read through, and nothing of it is run."""
    named: dict[str, None] = {}
    strings: list[str] = []
    try:
        with zipfile.ZipFile(path) if zipfile.is_zipfile(path) else contextlib.nullcontext() as archive:
            inner = next((name for name in archive.namelist() if name.endswith(".pkl")), "") if archive else ""
            with archive.open(inner) if archive else open_regular(path) as file:
                for operation, argument, _ in pickletools.genops(file):
                    if isinstance(argument, str):
                        strings.append(argument)
                    if operation.name in ("GLOBAL", "STACK_GLOBAL", "INST"):
                        named[" ".join(strings[-2:]) if argument is None else str(argument)] = None
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile):
        pass  # what was read so far says enough
    return [name.replace(" ", ".") for name in named if not name.startswith(("torch", "collections"))][:10]


def _read(path: Path, jobs: Sequence[_Job]) -> None:
    """Fill the targets of `jobs`, which are in the order of the file."""
    with open_regular(path) as file:
        before = os.fstat(file.fileno())
        runs = list(_runs(jobs))
        with concurrent.futures.ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
            tasks = [pool.submit(_read_run, path, file.fileno(), run) for run in runs]
            try:
                for task in tasks:
                    task.result()
            finally:
                pool.shutdown(cancel_futures=True)
        after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise CorruptFileError(f"{path} changed while it was read", remedy="load it again when its writer is done")


def _direct(job: _Job) -> bool:
    """Whether the bytes of the file can be read into the target as they are."""
    entry, target = job
    return target.dtype == DTYPES[entry.dtype] and target.device.type == "cpu" and target.is_contiguous()


def _runs(jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
    """Cut `jobs` where the bytes do not follow on each other, where a run grows long, and around each conversion."""
    run: list[_Job] = []
    for job in jobs:
        if run and not (
            _direct(job)
            and _direct(run[-1])
            and run[-1][0].end == job[0].start
            and len(run) < _RUN_TENSORS
            and job[0].end - run[0][0].start <= _RUN
        ):
            yield run
            run = []
        run.append(job)
    if run:
        yield run


def _read_run(path: Path, descriptor: int, run: Sequence[_Job]) -> None:
    if _direct(run[0]):
        _scatter(path, descriptor, [_octets(target) for _, target in run], run[0][0].start)
        for entry, target in run:
            check_finite(path, entry.name, target)
    else:
        _convert(path, descriptor, *run[0])


def _convert(path: Path, descriptor: int, entry: TensorEntry, target: Tensor) -> None:
    """Read by pieces, each converted to the type and the device of the target while it is in the cache."""
    scratch = torch.empty(_CHUNK, dtype=torch.uint8)
    dtype, flat = DTYPES[entry.dtype], target.detach().reshape(-1)
    for start in range(entry.start, entry.end, _CHUNK):
        octets = scratch[: min(_CHUNK, entry.end - start)]
        _scatter(path, descriptor, [octets], start)
        first = (start - entry.start) // dtype.itemsize
        part = flat[first : first + len(octets) // dtype.itemsize]
        # Looked at after the conversion, which may overflow, and on this side of the way to another device.
        values = octets.view(dtype).to(part.dtype) if part.device.type != "cpu" else part.copy_(octets.view(dtype))
        check_finite(path, entry.name, values)
        if values is not part:
            part.copy_(values)


def _scatter(path: Path, descriptor: int, octets: Sequence[Tensor], start: int) -> None:
    """Read what stands from `start` on, spread over the rows of bytes."""
    views = [memoryview(cast(Any, row.numpy())) for row in octets if len(row)]
    while views:
        count = _read_at(descriptor, views, start)
        if count == 0:
            raise CorruptFileError(f"{path} became shorter while it was read", found=f"{start} bytes")
        start += count
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if count:
            views[0] = views[0][count:]


if hasattr(os, "preadv"):

    def _read_at(descriptor: int, views: Sequence[memoryview], start: int) -> int:
        return os.preadv(descriptor, views, start)

else:
    # Windows has neither preadv nor pread: threads must take turns at the one position of the file.
    import threading

    _turn = threading.Lock()

    def _read_at(descriptor: int, views: Sequence[memoryview], start: int) -> int:
        with _turn:
            os.lseek(descriptor, start, os.SEEK_SET)
            data = os.read(descriptor, len(views[0]))
        views[0][: len(data)] = data
        return len(data)
