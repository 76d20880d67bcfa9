"""Every error suffuse raises on purpose, in one tree.

Each is a `SuffuseError` and a builtin too, so an existing `except ValueError` or `except OSError` still catches it. The
message is one line that stands alone (what is wrong, and where) followed by what was found, what is allowed and what to do.

    SuffuseError
    ├── CorruptFileError, MissingFileError, PathEscapeError, SaveError, HubError      files      (OSError)
    ├── ConfigError, WeightsMismatchError, AmbiguousCheckpointError                   checkpoint (ValueError)
    ├── InputError, AdapterError, LimitError                                          arguments  (ValueError)
    ├── UnknownArgumentError                                                          arguments  (TypeError)
    ├── UntrustedCodeError, UnsafePickleError                                         trust      (ValueError)
    ├── NonFiniteError                                                                numbers    (ArithmeticError)
    ├── MissingPackageError                                                           extras     (ImportError)
    └── BusyError                                                                     state      (RuntimeError)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class SuffuseError(Exception):
    """What went wrong, with the parts of the message as fields.

    Args:
        problem: One line that stands alone and names the file, component or argument.
        found: What came, if showing it helps.
        expected: What is allowed.
        remedy: What to do about it.
    """

    def __init__(self, problem: str, *, found: Any = None, expected: Any = None, remedy: str = "") -> None:
        self.problem, self.found, self.expected, self.remedy = problem, found, expected, remedy
        lines = [problem]
        if found is not None:
            lines.append(f"  found: {_brief(found)}")
        if expected is not None:
            lines.append(f"  expected: {expected}")
        if remedy:
            lines.append(f"  to fix it: {remedy}")
        self.message = "\n".join(lines)
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message


class CorruptFileError(SuffuseError, OSError):
    """A file is not what its name or header says."""


class MissingFileError(SuffuseError, FileNotFoundError):
    """A file or folder that is needed is not there."""


class PathEscapeError(SuffuseError, OSError):
    """A name inside a checkpoint points outside its folder."""


class SaveError(SuffuseError, OSError):
    """Nothing was replaced: the new files could not be written whole."""


class HubError(SuffuseError, OSError):
    """The model hub did not give what was asked for."""


class ConfigError(SuffuseError, ValueError):
    """A configuration is not valid JSON, or holds a value that its class does not take."""


class WeightsMismatchError(SuffuseError, ValueError):
    """The tensors of a file are not those of the model."""


class AmbiguousCheckpointError(SuffuseError, ValueError):
    """A folder holds two answers to one question."""


class InputError(SuffuseError, ValueError):
    """An argument of a call is outside of what it may be."""


class AdapterError(SuffuseError, ValueError):
    """An adapter does not fit the pipeline; the pipeline is unchanged."""


class LimitError(SuffuseError, ValueError):
    """What was asked for is larger than a stated limit; nothing was allocated."""


class UnknownArgumentError(SuffuseError, TypeError):
    """A keyword that the function does not have."""


class UntrustedCodeError(SuffuseError, ValueError):
    """A repository wants its own code to run, and nobody said it may."""


class UnsafePickleError(SuffuseError, ValueError):
    """A pickle asks for more than tensors; nothing of it was run."""


class NonFiniteError(SuffuseError, ArithmeticError):
    """NaN or infinity where numbers are needed."""


class MissingPackageError(SuffuseError, ImportError):
    """An optional package is not installed."""


class BusyError(SuffuseError, RuntimeError):
    """Somebody else holds what is needed."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The known names closest to `name`, quoted and joined for a message; empty if none is close."""
    return ", ".join(repr(match) for match in difflib.get_close_matches(str(name), list(known), n=count, cutoff=0.5))


def unknown_argument(function: str, name: str, known: Iterable[str]) -> UnknownArgumentError:
    """The error for a keyword that `function` does not have, with the nearest right ones."""
    known = list(known)
    close = nearest(name, known)
    return UnknownArgumentError(
        f"{function}() got an unexpected keyword argument {name!r}",
        remedy=f"did you mean {close}?" if close else f"use one of {', '.join(known)}",
    )


def _brief(value: Any, limit: int = 300) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"
