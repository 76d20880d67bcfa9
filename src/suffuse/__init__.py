"""suffuse runs diffusion models: the checkpoints and names of diffusers, in a house of few parts that compose.

Names are imported when first used, so `import suffuse` costs nothing; `suffuse.public_names` lists them.
"""

from __future__ import annotations

from typing import Any

from suffuse.errors import nearest
from suffuse.public_names import PUBLIC, resolve
from suffuse.version import __version__ as __version__


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        close = nearest(name, PUBLIC) if not name.startswith("_") else ""
        raise AttributeError(f"module 'suffuse' has no attribute {name!r}" + (f"; did you mean {close}?" if close else ""))
    value = globals()[name] = resolve(name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])
