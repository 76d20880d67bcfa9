"""Small trained models that come with the package: a first picture without a network."""

from __future__ import annotations

from pathlib import Path
from typing import overload

from suffuse.errors import InputError

FOLDER = Path(__file__).parent.parent / "shipped"
DEFAULT = "emoji"
"""What draws where no model is named."""
SETTINGS: dict[str, dict[str, float]] = {"emoji": {"num_inference_steps": 25, "guidance_scale": 3.0}}
"""What suits each model best."""


@overload
def bundled() -> list[str]: ...


@overload
def bundled(name: str) -> str: ...


def bundled(name: str | None = None) -> list[str] | str:
    """The models that come with suffuse.

        pipe = DiffusionPipeline.from_pretrained(suffuse.bundled("emoji"))

    Args:
        name: Of a model. "emoji": 64 × 64 pictures of things, animals, food and faces, in four styles on ten backgrounds.

    Returns:
        The folder of the model, an ordinary Stable Diffusion checkpoint; all names, if none is given.

    Raises:
        InputError: There is no such model.
    """
    names = sorted(path.parent.name for path in FOLDER.glob("*/model_index.json"))
    if name is None:
        return names
    if name not in names:
        raise InputError(f"no model {name!r} comes with suffuse", expected=", ".join(names))
    return str(FOLDER / name)
