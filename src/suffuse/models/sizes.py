"""Checks of the sizes in a model's configuration, before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from suffuse.errors import ConfigError, LimitError

Value = TypeVar("Value")

LARGEST = 100_000
"""More channels, layers or rows of a sample than any model has."""


def require_positive(owner: str, **values: Any) -> None:
    """Raise unless every number is at least 1, and at most `LARGEST`; lists are looked into, and `None` is no number.

    Raises:
        ConfigError: One is less than 1.
        LimitError: One is larger than any model's; nothing was built.
    """
    for name, value in values.items():
        if any(number < 1 for number in _numbers(value)):
            raise ConfigError(f"{owner}: {name} must be at least 1", found=value)
        if any(number > LARGEST for number in _numbers(value)):
            raise LimitError(f"{owner}: {name} is too large", found=value, expected=f"at most {LARGEST}")


def require_length(owner: str, count: int, of: str, **values: Sequence[Any]) -> None:
    """Raise `ConfigError` unless every list has `count` entries, one or more: one for each of `of`."""
    if count < 1:
        raise ConfigError(f"{owner}: {of} is empty", expected="at least one block")
    for name, value in values.items():
        if len(value) != count:
            raise ConfigError(
                f"{owner}: {name} needs one entry for each of {of}",
                found=f"{len(value)} entries: {list(value)}",
                expected=f"{count} entries",
            )


def per_block(owner: str, name: str, value: Value | Sequence[Value], count: int) -> list[Value]:
    """One value for each of `count` blocks, from one for all or from a list.

    Raises:
        ConfigError: The list has another length.
    """
    if not isinstance(value, (list, tuple)):
        return [value] * count  # pyright: ignore[reportReturnType]
    require_length(owner, count, "down_block_types", **{name: value})
    return list(value)


def _numbers(value: Any) -> list[float]:
    if isinstance(value, (list, tuple)):
        return [number for item in value for number in _numbers(item)]
    return [] if value is None else [value]
