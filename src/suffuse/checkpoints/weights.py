"""Weights into a module and out of it.

A module is built without storage (`unfilled`), told from the headers whether the files fit it, and only then are tensors
made, read into, and put in place: nothing is allocated twice, and nothing is left without storage.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from suffuse.checkpoints.layout import WeightFiles
from suffuse.checkpoints.reading import Source, Stored, open_source
from suffuse.errors import ConfigError, InputError, LimitError, SuffuseError, WeightsMismatchError

SEED = 0
"""Seeds the initial values of tensors that were allowed to be missing."""

_EARLY_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""How autoencoders of before 2023 call the projections of attention → their names since."""


class unfilled(TorchFunctionMode):
    """Build modules whose parameters have shapes and no storage; buffers are computed as ever.

    Only `torch.empty` is diverted, which is what layers make their parameters of, and only in this thread.

    Args:
        stored: How many tensors the files hold. A configuration that asks for a million layers is stopped when there are many
            more than that.

    Raises:
        LimitError: It was stopped.
    """

    def __init__(self, stored: int) -> None:
        super().__init__()
        self.left = self.limit = 2 * stored + 200

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
            self.left -= 1
            if self.left < 0:
                raise LimitError(f"the configuration asks for more than {self.limit} tensors, far more than the files hold")
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Placement:
    """Of which type, and on which device, each tensor of a module is to be.

    Args:
        dtype: Of floating tensors; None keeps what the module was built with; integers keep theirs.
        float32: Names of modules, of which any part of a tensor's dotted name is enough, that stay float32.
        devices: Prefix of a tensor's name → device; "" stands for all others.
        mapped: Tensors that need no conversion may be pages of the file.
    """

    dtype: torch.dtype | None = None
    float32: Sequence[str] = ()
    devices: Mapping[str, torch.device] = field(default_factory=dict[str, torch.device])
    mapped: bool = False

    def empty(self, name: str, like: Tensor) -> Tensor:
        """Memory for the tensor called `name`, with the shape of `like`."""
        return torch.empty(like.shape, dtype=self.type(name, like), device=self.device(name))

    def elsewhere(self, name: str) -> bool:
        """Whether the tensor called `name` is to have no storage in the module."""
        return self.device(name).type == "meta"

    def type(self, name: str, like: Tensor) -> torch.dtype:
        """The type for the tensor called `name`, which was built as `like`."""
        if not like.dtype.is_floating_point or self.dtype is None:
            return like.dtype
        return torch.float32 if not set(self.float32).isdisjoint(name.split(".")) else self.dtype

    def device(self, name: str) -> torch.device:
        """Where the tensor called `name` goes: the longest prefix decides."""
        fitting = [prefix for prefix in self.devices if not prefix or name == prefix or name.startswith(f"{prefix}.")]
        return self.devices[max(fitting, key=len)] if fitting else torch.device("cpu")


@dataclass(frozen=True)
class Tolerance:
    """What may differ between a module and its files.

    Args:
        missing: Regular expressions of tensors that may be missing; they get the initial values of a new module, seeded,
            so that loading twice gives the same.
        shapes: Tensors of another shape get initial values instead of an error.
        unexpected: Regular expressions of tensors that may be left over without a word.
        strict: Raise when other tensors are left over, instead of one warning.
    """

    missing: Sequence[str] = ()
    shapes: bool = False
    unexpected: Sequence[str] = ()
    strict: bool = False


@dataclass
class LoadingReport:
    """What did not match, by the names that `output_loading_info` gives it."""

    missing_keys: list[str] = field(default_factory=list[str])
    unexpected_keys: list[str] = field(default_factory=list[str])
    mismatched_keys: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list[Any])
    error_msgs: list[str] = field(default_factory=list[str])


def load_weights(
    build: Callable[[], nn.Module],
    files: WeightFiles | Source,
    *,
    dtype: torch.dtype | str | None = None,
    float32: Sequence[str] = (),
    devices: Callable[[nn.Module, torch.dtype], Mapping[str, torch.device]] | None = None,
    mapped: bool = False,
    tolerance: Tolerance | None = None,
    spill: Callable[[str, Tensor], None] | None = None,
) -> tuple[Any, LoadingReport]:
    """A module, in evaluation mode, with the weights of `files`.

    Args:
        build: Makes the module.
        files: Where the weights are, or what reads them.
        dtype: Of floating tensors: a type, its name, "auto" for the type in the files, or None for float32.
        float32: Names of modules whose tensors stay float32 whatever `dtype` says.
        devices: Given the module, still without storage, and the type of its weights: prefix of a tensor's name → device; ""
            stands for all others. The CPU, if None.
        mapped: Leave tensors that need no conversion as pages of the file: quick to load, but the file must not change.
        tolerance: What may differ; nothing but tensors left over, if None.
        spill: Takes each tensor, by name, that goes to the device "meta": the module gets none of it.

    Raises:
        WeightsMismatchError: Tensors are missing, left over (`strict`), or have another shape or kind of number.
        NonFiniteError: A tensor holds NaN or infinity.
        CorruptFileError: A file is damaged.
        UnsafePickleError: A pickle asks for more than tensors.
        ConfigError: No module can be built as the configuration says.
        LimitError: The configuration asks for sizes that no tensor can have, or for many more tensors than there are.
        InputError: `dtype` is no floating type.
    """
    source = open_source(files) if isinstance(files, WeightFiles) else files
    with unfilled(len(source.tensors)):
        try:
            module = build()
        except SuffuseError:
            raise
        except Exception as error:  # layers raise whatever they stumble over
            kind = LimitError if isinstance(error, (RuntimeError, MemoryError, OverflowError)) else ConfigError
            raise kind(f"{source.where}: no module can be built as its configuration says: {error}") from error
    wanted: dict[str, Tensor] = module.state_dict(keep_vars=True)
    names = _match(wanted, source.tensors)
    report = _compare(module, wanted, names, source, tolerance or Tolerance())
    kind = parse_dtype(dtype, source) or torch.float32
    place = Placement(kind, float32, devices(module, kind) if devices is not None else {}, mapped)
    absent = {*report.missing_keys, *(name for name, _, _ in report.mismatched_keys)}
    there = {name: stored for name, stored in names.items() if name not in absent}
    _fill(module, wanted, {name: stored for name, stored in there.items() if not place.elsewhere(name)}, source, place)
    for name in [name for name in wanted if name in there and place.elsewhere(name)]:
        tensor = torch.empty(wanted[name].shape, dtype=place.type(name, wanted[name]))
        source.fill({there[name]: tensor})
        if spill is not None:
            spill(name, tensor)
    _initialise(module, build, absent, place)
    # Buffers that no file holds were computed while building.
    _replace(
        module, lambda name, old: old if isinstance(old, nn.Parameter) or place.elsewhere(name) else old.to(place.device(name))
    )
    return module.eval(), report


def parse_dtype(dtype: torch.dtype | str | None, source: Source | None = None) -> torch.dtype | None:
    """The floating type that `dtype` stands for: a type, its name, or "auto", the first floating type of `source`.

    Raises:
        InputError: It is none.
    """
    if dtype == "auto":
        return next((t.dtype for t in source.tensors.values() if t.dtype.is_floating_point), None) if source else None
    if dtype is None:
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise InputError(
            "torch_dtype is no floating point type",
            found=dtype,
            expected='torch.float16, "float16", …, "auto" or None for float32',
        )
    return found


def _match(wanted: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> dict[str, str]:
    """Name in the module → name in the file: the same, or that of an early release."""
    names = {name: name for name in stored}
    for name in stored:
        parts = re.fullmatch(r"(.+)\.(query|key|value|proj_attn)\.(weight|bias)", name)
        if parts and name not in wanted:
            current = f"{parts[1]}.{_EARLY_ATTENTION[parts[2]]}.{parts[3]}"
            if current in wanted and current not in stored:
                del names[name]
                names[current] = name
    return names


def _compare(
    module: nn.Module, wanted: Mapping[str, Tensor], names: Mapping[str, str], source: Source, tolerance: Tolerance
) -> LoadingReport:
    """Hold the files against the module; raise or warn about what differs."""
    what, folder = type(module).__name__, source.where
    tied = {id(wanted[name]) for name in names.keys() & wanted.keys()}
    missing = [name for name, tensor in wanted.items() if name not in names and id(tensor) not in tied]
    unexpected = [name for name in names if name not in wanted and not matches(tolerance.unexpected, name)]
    pairs = {name: (source.tensors[names[name]], tensor) for name, tensor in wanted.items() if name in names}
    kinds = [n for n, (stored, tensor) in pairs.items() if _kind(stored.dtype) != _kind(tensor.dtype)]
    shapes = [n for n, (stored, tensor) in pairs.items() if stored.shape != tuple(tensor.shape)]
    refused = [name for name in missing if not matches(tolerance.missing, name)]
    if refused:
        raise WeightsMismatchError(
            f"{len(refused)} of the {len(wanted)} tensors of {what} are missing in {folder}: {first_names(refused)}",
            found=f"{len(names)} tensors" + (f", of which {what} does not know {first_names(unexpected)}" if unexpected else ""),
            remedy="check that the folder and the class belong together; allow_missing=[regular expressions] accepts it",
        )
    if kinds or (shapes and not tolerance.shapes):
        wrong = sorted({*kinds, *shapes})
        found = "; ".join(f"{n}: {_describe(pairs[n][0])}, wanted {_describe(pairs[n][1])}" for n in wrong[:10])
        raise WeightsMismatchError(
            f"{len(wrong)} tensors in {folder} do not fit {what}: {found}",
            remedy="check config.json; ignore_mismatched_sizes=True gives tensors of another shape initial values",
        )
    if unexpected and tolerance.strict:
        raise WeightsMismatchError(f"{len(unexpected)} tensors in {folder} are unknown to {what}: {first_names(unexpected)}")
    for verb, left in (("does not know and ignores", unexpected), ("has with initial values only", [*missing, *shapes])):
        if left:
            warnings.warn(f"{what} {verb} {len(left)} tensors of {folder}: {first_names(left)}", stacklevel=4)
    return LoadingReport(missing, unexpected, [(n, pairs[n][0].shape, tuple(pairs[n][1].shape)) for n in shapes])


def _fill(module: nn.Module, wanted: Mapping[str, Tensor], names: Mapping[str, str], source: Source, place: Placement) -> None:
    """Read every tensor into memory of its own, and put it wherever the module holds it."""
    first: dict[int, str] = {}
    for name, old in wanted.items():
        if name in names:
            first.setdefault(id(old), name)
    here = {names[n]: place.type(n, wanted[n]) for n in first.values() if place.mapped and place.device(n).type == "cpu"}
    pages = source.mapped(here)
    fresh = {name: place.empty(name, wanted[name]) for name in first.values() if names[name] not in pages}
    source.fill({names[name]: tensor for name, tensor in fresh.items()})
    made = {name: fresh[name] if name in fresh else pages[names[name]] for name in first.values()}
    replaced = {id(wanted[name]): _like(wanted[name], tensor) for name, tensor in made.items()}
    _replace(module, lambda _, old: replaced.get(id(old), old))


def _initialise(module: nn.Module, build: Callable[[], nn.Module], absent: Collection[str], place: Placement) -> None:
    """Give what no file holds, and what is still without storage, the values of a new module."""
    if not absent and not any(tensor.is_meta and not place.elsewhere(name) for name, tensor in _tensors(module)):
        return
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(SEED)
        fresh = dict(_tensors(build()))
    made: dict[int, Tensor] = {}

    def initial(name: str, old: Tensor) -> Tensor:
        if ((old.is_meta and not place.elsewhere(name)) or name in absent) and id(old) not in made:
            made[id(old)] = _like(old, place.empty(name, old).copy_(fresh[name].detach()))
        return made.get(id(old), old)

    _replace(module, initial)


def _like(old: Tensor, value: Tensor) -> Tensor:
    return nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Every parameter and buffer, tied ones under each of their names."""
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def _replace(module: nn.Module, change: Callable[[str, Tensor], Tensor]) -> None:
    for prefix, owner in module.named_modules():
        for slots in (owner._parameters, owner._buffers):
            for name, old in slots.items():
                if old is not None:
                    slots[name] = change(f"{prefix}.{name}" if prefix else name, old)  # pyright: ignore[reportArgumentType]


def _kind(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "truth"
    return "complex" if dtype.is_complex else "float" if dtype.is_floating_point else "integer"


def _describe(tensor: Stored | Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def matches(patterns: Sequence[str], name: str) -> bool:
    """Whether any of the regular expressions is found in `name`."""
    return any(re.search(pattern, name) for pattern in patterns)


def first_names(names: Sequence[str], count: int = 10) -> str:
    """The first of many names, and how many more there are, for a message."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
