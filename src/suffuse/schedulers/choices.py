"""Tables of named alternatives, from which a configuration picks one."""

from __future__ import annotations

from typing import NoReturn, TypeVar

from suffuse.errors import ConfigError, nearest

_Value = TypeVar("_Value")


class Choices(dict[str, _Value]):
    """What the values of one configuration entry stand for; asking for another value is a `ConfigError`."""

    def __init__(self, entry: str, values: dict[str, _Value]) -> None:
        super().__init__(values)
        self.entry = entry

    def check(self, value: str) -> None:
        """Raise `ConfigError` unless `value` is one of these."""
        self[value]

    def __missing__(self, value: str) -> NoReturn:
        close = nearest(str(value), self)
        raise ConfigError(
            f"{self.entry}={value!r} is not known",
            expected=", ".join(map(repr, self)),
            remedy=f"did you mean {close}?" if close else "",
        )
