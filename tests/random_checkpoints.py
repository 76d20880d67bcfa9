"""The checkpoints that examples/random_checkpoint.py writes, each made once."""

from __future__ import annotations

import runpy
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

ROOT = Path(__file__).parent.parent


@cache
def random_checkpoint(channels: int = 4, depth: bool = False) -> Path:
    folder = Path(mkdtemp(prefix="suffuse-"), "random-model")
    runpy.run_path(str(ROOT / "examples" / "random_checkpoint.py"))["make"](folder, channels, depth)
    return folder
