"""What a value may be: checks by name, and classes that refuse wrong values of their fields when they are made."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from suffuse.errors import InputError

Check = Callable[[str, Any], None]
"""Raises `InputError`, which begins with the name, unless the value is allowed."""


def whole(low: float = -math.inf, high: float | None = None) -> Check:
    """A whole number of at least `low`, and at most `high`."""
    least = f" of at least {low}" if low > -math.inf else ""
    allowed = f"a whole number{least}" + (f" and at most {high}" if high not in (None, math.inf) else "")

    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise InputError(f"{name} must be a whole number", found=shown(value), expected=allowed)
        if value < low or (high is not None and value > high):
            raise InputError(f"{name}={value} is out of range", expected=allowed)

    return check


def number(low: float = -math.inf, high: float = math.inf) -> Check:
    """A finite number in [low, high]."""
    least = f"a number of at least {low:g}" if high == math.inf else f"a number in [{low:g}, {high:g}]"
    allowed = "a finite number" if (low, high) == (-math.inf, math.inf) else least

    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
            raise InputError(f"{name} must be a number", found=shown(value), expected=allowed)
        if not low <= value <= high or not _finite(value):
            raise InputError(f"{name}={value} is out of range", expected=allowed)

    return check


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the largest float
        return False


def optional(check: Check) -> Check:
    """None, or what `check` allows."""
    return lambda name, value: None if value is None else check(name, value)


def is_a(*kinds: type, spelled: str) -> Check:
    """An instance of one of `kinds`."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, kinds):
            raise InputError(f"{name} has the wrong type", found=shown(value), expected=spelled)

    return check


def texts(name: str, value: Any) -> None:
    """None, a text, or a list of at least one text; every text encodable as UTF-8."""
    if value is None:
        return
    items = cast(list[Any], value) if isinstance(value, list) else [value]
    if not items:
        raise InputError(f"{name} is an empty list", expected="a text, or a list of at least one")
    for index, item in enumerate(items):
        where = f"{name}[{index}]" if isinstance(value, list) else name
        if not isinstance(item, str):
            raise InputError(f"{where} is no text", found=shown(item), expected="a text, or a list of texts")
        try:
            item.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where} is no valid Unicode", found=f"a lone surrogate at character {error.start}") from None


def tensor(*, dimensions: int, kind: str = "floating point") -> Check:
    """None, or a tensor with so many dimensions and finite values in memory: "floating point" numbers, or any "real" ones."""

    def check(name: str, value: Any) -> None:
        if value is None:
            return
        is_a(Tensor, spelled="a torch.Tensor")(name, value)
        stored = value.layout is torch.strided and not value.is_meta and value.numel() > 0
        fitting = not value.is_complex() if kind == "real" else value.is_floating_point()
        finite = stored and bool(torch.isfinite(value).all())
        if value.ndim != dimensions or not fitting or not finite:
            place = "" if finite else ", not finite" if stored else f", {value.layout} on {value.device}"
            raise InputError(
                f"{name} has the wrong shape or values",
                found=f"{tuple(value.shape)} of {value.dtype}{place}",
                expected=f"finite {kind} numbers in memory, {dimensions} dimensions, none of them 0",
            )

    return check


def shown(value: Any) -> str:
    """A value and its type, for a message."""
    return f"{value!r} ({type(value).__name__})" if not isinstance(value, Tensor) else f"a tensor {tuple(value.shape)}"


# ---------------------------------------------------------------- fields


def told(name: str, value: Any) -> None:
    """A text that says something, a list in which some may say nothing, or what a text encoder makes of one, (tokens, width)."""
    if isinstance(value, Tensor):
        tensor(dimensions=2)(name, value)
        return
    if value is None:
        raise InputError(f"{name} is no text", found="None", expected="a text, a list of texts, or an embedding (tokens, width)")
    texts(name, value)
    if value == "":
        raise InputError(f"{name} is empty", found=shown(value), expected="words, 'a hat' for example")


KINDS: Mapping[str, Callable[[float, float], Check]] = {
    "float": number,
    "int": whole,
    "int | None": lambda low, high: optional(whole(low, high)),
    "bool": lambda low, high: is_a(bool, spelled="True or False"),
    "str": lambda low, high: is_a(str, spelled="a text"),
    "Text": lambda low, high: told,
    "nn.Module": lambda low, high: is_a(nn.Module, spelled="a model, a torch.nn.Module"),
}
"""Annotation of a field → what it may be, in a range; fields with other annotations their class checks."""


class Checked:
    """A dataclass whose fields are what their annotations say, or it is not made.

    Class attributes:
        limits: Closed ranges of fields that are numbers; a class adds to those of its bases.
    """

    limits: ClassVar[Mapping[str, tuple[float, float]]] = {}

    def __post_init__(self) -> None:
        """Refuse what it may not be."""
        self.check_values(type(self).__name__)

    def check_values(self, name: str) -> None:
        """Raise `InputError`, which begins with `name`, unless each field is what it may be now."""
        limits = ChainMap(*(vars(kind).get("limits", {}) for kind in type(self).__mro__))
        for field in fields(self) if is_dataclass(self) else ():
            check = KINDS.get(str(getattr(field.type, "__name__", field.type)))
            if check is not None:
                check(*limits.get(field.name, (-math.inf, math.inf)))(f"{name}.{field.name}", getattr(self, field.name))
