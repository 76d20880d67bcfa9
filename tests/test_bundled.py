"""The trained model in the package: it loads in both libraries, draws what prompts say, and is as good as its figures."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from random_checkpoints import ROOT
from typer.testing import CliRunner

import suffuse
from suffuse.cli.main import app
from suffuse.cli.picture import read_settings
from suffuse.errors import InputError

SETTINGS = {"num_inference_steps": 25, "guidance_scale": 3.0}
RECIPE = ROOT / "recipes" / "emoji"


@cache
def pipeline():
    pipe = suffuse.DiffusionPipeline.from_pretrained(suffuse.bundled("emoji"), torch_dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(*prompts: str, **options) -> np.ndarray:
    return pipeline()(list(prompts), **{**SETTINGS, "seed": [7] * len(prompts), "output_type": "np", **options}).images


def rim(picture: np.ndarray) -> np.ndarray:
    return np.median(np.concatenate([picture[:6, :6], picture[:6, -6:], picture[-6:, :6], picture[-6:, -6:]]), axis=(0, 1))


def test_the_models_are_listed():
    assert suffuse.bundled() == ["emoji"]
    assert (Path(suffuse.bundled("emoji")) / "model_index.json").is_file()
    with pytest.raises(InputError, match="no model 'emojis' comes with suffuse"):
        suffuse.bundled("emojis")


def test_the_weights_are_small_and_their_origin_is_told():
    folder = Path(suffuse.bundled("emoji"))
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 40e6
    assert "Apache-2.0" in (folder / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in (folder / "README.md").read_text(encoding="utf-8")


def test_it_draws_the_same_in_both_libraries():
    made = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        for library in (diffusers, suffuse):
            pipe = library.DiffusionPipeline.from_pretrained(suffuse.bundled("emoji"), torch_dtype=torch.float32)
            pipe.set_progress_bar_config(disable=True)
            for component in pipe.components.values():
                for parameter in component.parameters() if isinstance(component, torch.nn.Module) else ():
                    parameter.data = parameter.data.clone()
            generator = torch.Generator().manual_seed(3)
            made.append(pipe("a red apple", **SETTINGS, generator=generator, output_type="np").images)
    assert np.array_equal(*made)


def test_the_command_without_a_model_draws_a_red_apple(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["generate", "a red apple", "--seed", "7"])
    assert result.exit_code == 0
    assert "the small model that comes with suffuse" in result.stderr
    path = Path(result.stdout.strip())
    assert (read_settings(path)["num_inference_steps"], read_settings(path)["guidance_scale"]) == (25, 3.0)
    with Image.open(path) as picture:
        pixels = np.asarray(picture) / 255
    assert pixels.shape == (64, 64, 3)
    red, green, blue = pixels[24:52, 20:44].mean((0, 1))
    assert red > 0.6
    assert max(green, blue) < 0.4
    assert rim(pixels).min() > 0.9, "the background is white"


COLOURS = {"red": (0.85, 0.2, 0.2), "blue": (0.1, 0.35, 0.85), "black": (0.05, 0.05, 0.05), "yellow": (1, 0.85, 0.2)}


def test_words_set_the_background():
    pictures = draw(*(f"a cat, {colour} background" for colour in COLOURS))
    for picture, wanted in zip(pictures, COLOURS.values(), strict=True):
        assert np.abs(rim(picture) - wanted).max() < 0.3


def test_nouns_guidance_and_negative_prompts_have_an_effect():
    one, other = draw("a cat", "a rocket")
    assert np.abs(one - other).mean() > 0.05
    weak, strong = draw("a red apple", guidance_scale=1.0)[0], draw("a red apple", guidance_scale=5.0)[0]
    assert np.abs(weak - strong).mean() > 0.01
    negated = draw("a cat", negative_prompt="orange")[0]
    assert np.abs(one - negated).mean() > 0.01


def test_the_sheet_in_the_readme_is_what_the_weights_draw(tmp_path):
    subprocess.run([sys.executable, "-W", "ignore", ROOT / "examples" / "emoji_sheet.py", tmp_path / "sheet.png"], check=True)
    with Image.open(tmp_path / "sheet.png") as drawn, Image.open(ROOT / "docs" / "emoji.png") as shown:
        # Bit for bit on one kind of processor; another one rounds the last bit of a sum otherwise.
        assert np.abs(np.asarray(drawn).astype(int) - np.asarray(shown)).max() <= 2


@pytest.mark.slow
def test_it_is_as_good_as_its_figures(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(RECIPE)
    spec = importlib.util.spec_from_file_location("evaluate", RECIPE / "evaluate.py")
    evaluate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(evaluate)
    stored = json.loads((RECIPE / "figures.json").read_text(encoding="utf-8"))
    figures = evaluate.evaluate(Path(suffuse.bundled("emoji")), stored.pop("concepts"), tmp_path)
    assert figures == pytest.approx(stored, abs=0.02)
