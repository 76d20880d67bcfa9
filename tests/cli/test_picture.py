"""Pictures that say how they were made, and `suffuse inspect` of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from suffuse.cli.main import app
from suffuse.cli.picture import check_writable, destination, read_settings, write_picture
from suffuse.errors import ConfigError, CorruptFileError, InputError, SaveError

SETTINGS = {"prompt": "ein Türchen, 红色的门 🚪", "seed": 7, "negative_prompt": None, "strength": 0.8}


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    write_picture(Image.effect_noise((64, 64), 50), tmp_path / "door.png", SETTINGS)
    return tmp_path / "door.png"


def test_a_picture_tells_its_settings(picture: Path) -> None:
    assert read_settings(picture) == SETTINGS
    code, out, err = run(picture)
    assert (code, err) == (0, "")
    assert out.splitlines() == ["prompt           ein Türchen, 红色的门 🚪", "seed             7", "strength         0.8"]


def test_the_settings_as_json(picture: Path) -> None:
    code, out, _ = run(picture, "--json")
    assert code == 0
    assert json.loads(out) == {"path": str(picture), "settings": SETTINGS}


def test_a_picture_is_known_by_its_bytes_and_not_its_name(picture: Path) -> None:
    assert run(picture.rename(picture.with_suffix(".bin")), "--json")[0] == 0


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_picture_without_settings_is_said_to_have_none(tmp_path: Path, options: list[str]) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    code, out, err = run(tmp_path / "plain.png", *options)
    assert (code, out) == (1, "")
    assert "plain.png carries no settings" in err


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_settings_that_are_no_object_are_refused(tmp_path: Path, text: str) -> None:
    information = PngInfo()
    information.add_text("suffuse", text)
    Image.new("RGB", (8, 8)).save(tmp_path / "odd.png", pnginfo=information)
    with pytest.raises(ConfigError, match="the settings are no JSON object"):
        read_settings(tmp_path / "odd.png")


@pytest.mark.parametrize("length", [8, 20, 40])
def test_a_picture_that_is_cut_short_is_said_to_be(picture: Path, length: int) -> None:
    picture.write_bytes(picture.read_bytes()[:length])
    with pytest.raises((CorruptFileError, InputError), match=r"cannot be read as a PNG|carries no settings"):
        read_settings(picture)
    assert run(picture)[0] == 1


def test_a_picture_is_written_whole_or_not_at_all(picture: Path, tmp_path: Path) -> None:
    before = picture.read_bytes()
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_picture(Image.new("RGB", (8, 8)), picture, {"prompt": object()})
    with pytest.raises(SaveError, match="cannot be written"):
        write_picture(Image.new("CMYK", (8, 8)), picture, SETTINGS)
    with pytest.raises(SaveError, match=r"cannot be written[^$]*name another place"):
        write_picture(Image.new("RGB", (8, 8)), picture / "inside.png", SETTINGS)
    assert picture.read_bytes() == before
    assert list(tmp_path.iterdir()) == [picture]


def test_a_place_is_tried_before_it_is_needed(picture: Path, tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "folder" / "door.png")
    with pytest.raises(SaveError, match="cannot be written"):
        check_writable(picture / "inside.png")
    assert list(tmp_path.iterdir()) == [picture]


def test_only_png_is_written() -> None:
    with pytest.raises(InputError, match=r"use a\.b\.png"):
        destination("a.b.jpeg", "x", 1)
    assert destination("a.PNG", "x", 1) == Path("a.PNG")
