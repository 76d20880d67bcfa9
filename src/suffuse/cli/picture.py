"""PNG files that say how they were made: where they go, how they are written, what settings they carry."""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suffuse.errors import ConfigError, CorruptFileError, InputError, SaveError

if TYPE_CHECKING:
    from PIL import Image

CHUNK = "suffuse"
"""Keyword of the text chunk that holds the settings, as JSON."""
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def is_png(path: Path) -> bool:
    """Whether a file begins as a PNG does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(SIGNATURE)) == SIGNATURE


def destination(output: str | None, prompt: str, seed: int, index: int = 0, count: int = 1) -> Path:
    """The file for picture `index` of `count`.

    Args:
        output: A file, which may exist and is then replaced, or a folder; None for the current folder.
        prompt: In a folder, pictures are named after prompt and seed, by a name that is free.
        seed: The seed of this picture.
        index: Which picture this is, from 0.
        count: How many there are; each of several gets its number at the end of a name that was given.

    Raises:
        InputError: The name is that of another format.
    """
    if output is None or output.endswith(("/", os.sep)) or Path(output).is_dir():
        slug = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:48].strip("-") or "picture"
        return _free(Path(output or ""), f"{slug}-{seed}")
    path = Path(output)
    if path.suffix.lower() not in ("", ".png"):
        raise InputError(f"--output {output}: pictures are written as PNG", remedy=f"use {path.with_suffix('.png')}")
    path = path if path.suffix else path.with_suffix(".png")
    return path if count == 1 else path.with_stem(f"{path.stem}-{index + 1}")


def check_writable(path: Path) -> None:
    """Raise `SaveError` if no file can be made at `path`; nothing is left there."""
    try:
        folder = next(folder for folder in path.parents if folder.exists())
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _not_written(path, error) from None


def write_picture(picture: Image.Image, path: Path, settings: dict[str, Any]) -> None:
    """Write a PNG that carries `settings`; the file is whole or not there.

    Raises:
        SaveError: It could not be written.
    """
    from PIL.PngImagePlugin import PngInfo

    information = PngInfo()
    information.add_text(CHUNK, json.dumps(settings, ensure_ascii=False))
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            picture.save(staged, format="PNG", pnginfo=information)
            staged.replace(path)
        finally:
            staged.unlink(missing_ok=True)
    except OSError as error:
        raise _not_written(path, error) from error


def read_settings(path: Path) -> dict[str, Any]:
    """The settings a PNG carries; its pixels are not decoded.

    Raises:
        InputError: It carries none.
        CorruptFileError: It is damaged.
        ConfigError: What it carries is not a JSON object.
    """
    from PIL import Image

    try:
        with Image.open(path) as picture:
            text = picture.info.get(CHUNK)
    except (OSError, SyntaxError, ValueError) as error:
        raise CorruptFileError(f"{path} cannot be read as a PNG", found=str(error)) from None
    if text is None:
        raise InputError(f"{path} carries no settings", expected="a picture that `suffuse generate` wrote, not edited since")
    try:
        settings = json.loads(text)
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: the settings are no JSON object", found=text)
    return settings


def _free(folder: Path, stem: str) -> Path:
    path, number = folder / f"{stem}.png", 1
    while os.path.lexists(path):
        number += 1
        path = folder / f"{stem}-{number}.png"
    return path


def _not_written(path: Path, error: OSError) -> SaveError:
    return SaveError(f"{path} cannot be written", found=error.strerror or str(error), remedy="name another place with --output")


def opened(option: str, path: Path) -> Image.Image:
    """The picture, the right way up."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.is_file():
        raise InputError(f"{option}: no file {path}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            picture = Image.open(io.BytesIO(path.read_bytes()))
            ImageOps.exif_transpose(picture, in_place=True)
            return picture
        except UnidentifiedImageError:
            raise InputError(f"{option}: {path} is no picture, or a damaged one", expected="PNG, JPEG, WebP, …") from None
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise InputError(f"{option}: {path} cannot be read as a picture", found=str(error)) from None
