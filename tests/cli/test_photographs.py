"""`suffuse generate` on photographs: redrawn, painted in part, redrawn with their depth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from random_checkpoints import random_checkpoint
from skimage import data
from typer.testing import CliRunner

from suffuse.cli.main import app
from suffuse.cli.picture import read_settings


@pytest.fixture(autouse=True)
def _photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A face, a cat, the cat lying on its side as cameras write it, and a mask for each."""
    monkeypatch.chdir(tmp_path)
    face = Image.fromarray(data.astronaut()[0:256, 96:352]).resize((128, 128))
    cat = Image.fromarray(data.chelsea()[40:192, 60:260]).resize((100, 76))
    face.save("face.png")
    cat.save("cat.jpg", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6
    cat.transpose(Image.Transpose.ROTATE_90).save("lying.jpg", quality=95, exif=exif)
    for picture, name in ((face, "face"), (cat, "cat")):
        mask = Image.new("L", picture.size)
        mask.paste(255, (picture.width // 4, picture.height // 4, picture.width // 2, picture.height // 2))
        mask.save(f"{name}-mask.png")


def draw(*arguments: object, model: Path | None = None) -> np.ndarray:
    options = ["--model", model or random_checkpoint(), "--steps", 4, "--seed", 7, "-o", "new.png"]
    result = CliRunner().invoke(app, ["generate", "a marble statue", *map(str, [*options, *arguments])])
    assert (result.exit_code, result.stderr) == (0, "")
    return pixels("new.png")


def pixels(name: str, size: tuple[int, int] | None = None) -> np.ndarray:
    with Image.open(name) as picture:
        return np.asarray(picture.resize(size or picture.size)).astype(int)


@pytest.mark.parametrize(("name", "shape"), [("face.png", (128, 128, 3)), ("cat.jpg", (72, 96, 3)), ("lying.jpg", (72, 96, 3))])
@pytest.mark.parametrize("depth", [False, True], ids=["plain", "depth"])
def test_a_photograph_is_redrawn_in_its_own_size(name: str, shape: tuple[int, ...], depth: bool) -> None:
    new = draw("-i", name, model=random_checkpoint(depth=depth))
    assert new.shape == shape
    assert new.std() > 1, "not one flat colour"
    assert read_settings(Path("new.png"))["strength"] == 0.8


def test_depth_decides_what_is_drawn() -> None:
    Image.fromarray(pixels("face.png")[::-1].astype(np.uint8)).save("turned.png")
    model = random_checkpoint(depth=True)
    # A strength of 1 takes nothing of the colours, only of the depth.
    one, other = (draw("-i", name, "--strength", 1, model=model) for name in ("face.png", "turned.png"))
    assert not np.array_equal(one, other)


def test_strength_is_how_far_to_go() -> None:
    same, near, far = (draw("-i", "face.png", "--strength", strength, "--steps", 10) for strength in (0, 0.2, 0.9))
    assert np.array_equal(same, pixels("face.png"))
    assert not np.array_equal(near, far)


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize(("name", "shape"), [("face.png", (128, 128, 3)), ("cat.jpg", (72, 96, 3)), ("lying.jpg", (72, 96, 3))])
def test_a_photograph_is_painted_where_the_mask_is_white(channels: int, name: str, shape: tuple[int, ...]) -> None:
    mask = "face-mask.png" if name == "face.png" else "cat-mask.png"
    new = draw("-i", name, "--mask", mask, model=random_checkpoint(channels))
    assert new.shape == shape
    old = pixels(name if name != "lying.jpg" else "cat.jpg", shape[1::-1])
    assert (np.abs(new - old)[pixels(mask, shape[1::-1]) > 127] > 8).mean() > 0.5
    assert read_settings(Path("new.png"))["mask_image"] == mask


def test_the_rest_of_the_photograph_stays() -> None:
    one, other = (draw("-i", "face.png", "--mask", "face-mask.png", "--seed", seed, "--strength", 0.9) for seed in (1, 2))
    white = pixels("face-mask.png") > 127
    change = np.abs(one - other).mean(-1)
    far = np.zeros_like(white)
    far[:, 80:] = far[80:] = True
    assert change[white].mean() > 4 * change[far].mean()


def test_a_painted_photograph_may_have_another_size() -> None:
    assert draw("-i", "face.png", "--mask", "face-mask.png", "--size", "64x64").shape == (64, 64, 3)
