"""Python that comes with a checkpoint: run by one function, and only if the caller said so.

What is to run is a file and those of its folder that it imports relatively (`from .blocks import Block`). They are read once;
what was read is hashed, held against the caller's word, and run: a file that changes in between changes nothing. It becomes a
package of a private name. `sys.path` is not changed, and a module of one's own that lies on it needs the caller's word as well.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from suffuse.errors import ConfigError, InputError, MissingPackageError, UntrustedCodeError
from suffuse.files import open_regular

SOURCE_BYTES = 4 * 2**20
PREFIX = "_suffuse_foreign_"


@dataclass(frozen=True)
class Trust:
    """Whose code may run.

    Attributes:
        remote_code: True for all of it.
        code: "sha256:…" of what may run, or several: anything else may not, whatever `remote_code` says.
    """

    remote_code: bool = False
    code: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.remote_code not in (True, False):
            raise InputError("trust_remote_code has the wrong value", found=self.remote_code, expected="True or False")
        if not isinstance(self.code, str | Sequence | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError("trust_code has the wrong value", found=self.code, expected='"sha256:…", or a list of such')
        for pin in self.pins:
            if not (isinstance(pin, str) and pin.startswith("sha256:") and len(pin) == 71):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise InputError("trust_code has the wrong value", found=pin, expected='"sha256:" and 64 hexadecimal digits')

    @property
    def pins(self) -> tuple[str, ...]:
        """The hashes, if there are any."""
        return () if self.code is None else (self.code,) if isinstance(self.code, str) else tuple(self.code)

    def covers(self, digest: str) -> bool:
        """Whether code of this hash may run."""
        return digest in self.pins if self.code is not None else self.remote_code


def load_foreign_class(path: Path, name: str | None, base: type[Any], trust: Trust) -> type[Any]:
    """A class that a Python file defines. This is the only place where code of a checkpoint is run.

    Args:
        path: The file.
        name: The class; None for the only one that is a `base`.
        base: What the class must be.
        trust: The caller's word.

    Raises:
        UntrustedCodeError: `trust` does not cover the file; nothing of it was run.
        MissingPackageError: It imports a package that is not installed.
        ConfigError: It cannot be run, or does not define the class.
    """
    sources = _sources(path)
    digest = _digest(sources)
    if not trust.covers(digest):
        pinned = f'trust_code="{digest}"'
        raise UntrustedCodeError(
            f"{path} holds Python code that would be run",
            found=f"{digest} ({', '.join(sources)})",
            expected=f"one of {', '.join(trust.pins)}" if trust.pins else None,
            remedy=f"read it first; then {pinned} runs exactly this, or trust_remote_code=True whatever is there",
        )
    # The same text under another name is another module.
    identity = hashlib.sha256(f"{digest} {' '.join(sources)}".encode()).hexdigest()[:16]
    module = _run(path, sources, f"{PREFIX}{identity}")
    own = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type) and value.__module__.startswith(module.__package__ or PREFIX) and issubclass(value, base)
    }
    found = [own[name]] if name in own else list(own.values()) if name is None else []
    if len(found) != 1:
        raise ConfigError(
            f"{path} does not define {f'a {base.__name__} {name!r}' if name else f'one {base.__name__}'}", found=sorted(own)
        )
    return found[0]


def module_on_path(name: str) -> Path | None:
    """The file of a module of one's own on `sys.path`: no package, and nothing of Python itself. Nothing is imported."""
    if not name.isidentifier() or name in sys.stdlib_module_names:
        return None
    spec = importlib.machinery.PathFinder.find_spec(name)
    origin = Path(spec.origin) if spec is not None and spec.origin else None
    return origin if origin is not None and origin.suffix == ".py" and origin.name != "__init__.py" else None


def foreign_sources(kind: type[Any]) -> dict[str, bytes] | None:
    """The files that a class was loaded from, its own first; None if it is no foreign class."""
    package = kind.__module__.split(".")[0]
    finder = next((finder for finder in sys.meta_path if isinstance(finder, _Finder) and finder.package == package), None)
    return None if finder is None else dict(finder.sources)


def write_sources(kind: type[Any], folder: Path, stem: str | None = None) -> None:
    """Write the code of a foreign class beside what is saved of it, its own file as STEM.py; nothing for other classes."""
    for position, (name, source) in enumerate((foreign_sources(kind) or {}).items()):
        (folder / (f"{stem}.py" if stem and position == 0 else name)).write_bytes(source)


def _sources(path: Path) -> dict[str, bytes]:
    """The file and, by name, those it imports from its folder, directly or not."""
    found: dict[str, bytes] = {}
    waiting = [path.name]
    while waiting:
        name = waiting.pop(0)
        if name in found:
            continue
        with open_regular(path.parent / name) as file:
            found[name] = file.read(SOURCE_BYTES + 1)
        if len(found[name]) > SOURCE_BYTES:
            raise ConfigError(f"{path.parent / name} is too large for code", expected=f"at most {SOURCE_BYTES} bytes")
        waiting += [f"{stem}.py" for stem in _imported(path.parent / name, found[name]) if (path.parent / f"{stem}.py").is_file()]
    return found


def _imported(path: Path, source: bytes) -> list[str]:
    """The modules of its own folder that a file imports."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{path} is not Python: {error}") from None
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    return [stem for node in nodes for stem in ([node.module] if node.module else [alias.name for alias in node.names])]


def _digest(sources: dict[str, bytes]) -> str:
    """Of one file its own hash; of several that of the lines which `sha256sum` prints for them in order of name."""
    digests = {name: hashlib.sha256(sources[name]).hexdigest() for name in sorted(sources)}
    if len(digests) == 1:
        return f"sha256:{next(iter(digests.values()))}"
    lines = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and runs the modules of one foreign package, from what was read."""

    def __init__(self, package: str, folder: Path, sources: dict[str, bytes]) -> None:
        self.package, self.folder, self.sources = package, folder, sources

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """The module, if it is of this package."""
        package, _, stem = fullname.partition(".")
        if package != self.package or (stem and f"{stem}.py" not in self.sources):
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=not stem)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module; the package itself holds nothing."""
        stem = module.__name__.partition(".")[2]
        if stem:
            module.__file__ = str(self.folder / f"{stem}.py")
            exec(compile(self.sources[f"{stem}.py"], module.__file__, "exec"), module.__dict__)


def _run(path: Path, sources: dict[str, bytes], package: str) -> ModuleType:
    name = f"{package}.{path.stem}"
    if name not in sys.modules:
        if not any(isinstance(finder, _Finder) and finder.package == package for finder in sys.meta_path):
            sys.meta_path.append(_Finder(package, path.parent, sources))
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if str(error.name).startswith(PREFIX):
                raise ConfigError(f"{path}: only files right beside it can be imported: {error}") from error
            raise MissingPackageError(
                f"{path} needs the package {error.name!r}, which is not installed", remedy=f"pip install {error.name}"
            ) from error
        except (Exception, SystemExit) as error:
            raise ConfigError(f"{path} could not be run: {type(error).__name__}: {error}") from error
    return sys.modules[name]
