"""`suffuse generate` with other guidance: each option counts, stands in the settings of the PNG, and is refused if it is none."""

from __future__ import annotations

import re

import pytest
from PIL import Image
from random_checkpoints import random_checkpoint
from typer.testing import CliRunner

import suffuse
from suffuse.cli import guiding
from suffuse.cli.main import app
from suffuse.cli.picture import read_settings


def run(folder, *arguments: object) -> tuple[int, str]:
    words = ["a red door", "-m", random_checkpoint(), "--steps", 4, "--size", "64x64", "--seed", 7, "-o", f"{folder}/out.png"]
    result = CliRunner().invoke(app, ["generate", *map(str, [*words, *arguments])])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stderr


ASKED = {
    "projected": ["--guide", "projected:parallel=0,momentum=-0.5,longest=3"],
    "unattended": ["--guide", "unattended:worse_scale=2"],
    "safe": ["--guide", "safe:concept=harm,warmup=1"],
    "edited": ["--edit", "a hat:7", "--edit", "-snow"],
    "in part": ["--guide-part", "0.25-0.5"],
    "both": ["--guide", "zero-star:still=0", "--guide-part", "0-0.5"],
}


@pytest.mark.parametrize("name", ASKED)
def test_other_guidance_changes_the_picture_and_is_told(tmp_path, name):
    pictures = []
    for options in ([], ASKED[name]):
        code, said = run(tmp_path, "--scheduler", "ddim", *options)
        assert code == 0, said
        with Image.open(tmp_path / "out.png") as picture:
            pictures.append(picture.tobytes())
    assert pictures[0] != pictures[1]
    settings = read_settings(tmp_path / "out.png")
    option, value = ASKED[name][:2]
    assert value in (settings[option[2:].replace("-", "_")], *settings.get("edit", ()))


def test_every_way_can_be_made():
    call = {"guidance_scale": 5.0, "num_inference_steps": 20}
    made = {way: guiding.guided({"guide": way, "edit": None, "guide_part": None}, call)["guidance"] for way in guiding.WAYS}
    assert all(guidance.scale == 5.0 and isinstance(guidance, suffuse.Guidance) for guidance in made.values())
    assert isinstance(made["skipped"].worsening, suffuse.Skipped)


REFUSED = {
    "unknown way": (["--guide", "projcted"], r"--guide 'projcted' is unknown(.|\n)*did you mean 'projected'"),
    "unknown setting": (["--guide", "projected:momentun=1"], r"has no setting 'momentun'(.|\n)*did you mean 'momentum'"),
    "no number": (["--guide", "unattended:worse_scale=much"], "worse_scale='much' is no number"),
    "no setting": (["--guide", "projected:momentum"], "is not understood"),
    "two guidances": (["--guide", "plain", "--edit", "a hat"], "--guide and --edit are both given"),
    "no concept": (["--edit", "-"], "--edit '-' is not understood"),
    "no scale": (["--edit", "green:1.2.3"], "--edit 'green:1.2.3' is not understood"),
    "a scale below 0": (["--edit", "green:-3"], r"--edit 'green:-3' is not understood(.|\n)*write -CONCEPT"),
    "a colon and nothing": (["--edit", "green:"], "--edit 'green:' is not understood"),
    "no number for a scale": (["--edit", "green:nan"], "--edit 'green:nan' is not understood"),
    "safe from nothing": (["--guide", "safe:concept="], "SafeGuidance.concept is empty"),
    "a setting twice": (["--guide", "safe:warmup=1,warmup=2"], "warmup is given twice"),
    "two guidances for a run": (
        ["--resume", "a.run", "--guide", "plain", "--edit", "a hat"],
        "--guide and --edit are both given",
    ),
    "no guidance for a run": (["--resume", "a.run", "--guide", "projcted"], "--guide 'projcted' is unknown"),
    "no part": (["--guide-part", "0.8-0.2"], "--guide-part '0.8-0.2' is not understood"),
    "no parts": (["--guide-part", "..-1"], "is not understood"),
    "edits without guidance": (["--edit", "a hat", "--guidance", "1"], "concepts are given, and scale=1.0 guides nothing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_guidance_is_told(tmp_path, name):

    options, message = REFUSED[name]
    code, said = run(tmp_path, *options)
    assert code != 0
    assert re.search(message, said.replace("│", "")), said
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("text", "edit"),
    [
        ("green", ("green", 5.0, False)),
        ("-green : 3", ("green", 3.0, True)),
        ("+green:.5", ("green", 0.5, False)),
        ("style: noir", ("style: noir", 5.0, False)),
        ("at 3:30:7", ("at 3:30", 7.0, False)),
    ],
)
def test_edits_are_words_and_a_scale(text, edit):
    assert guiding._edits([text]) == [edit]
