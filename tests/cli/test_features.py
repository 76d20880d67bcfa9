"""`suffuse generate` with adapters and control: each option counts, and stands in the settings of the PNG."""

from __future__ import annotations

import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from random_checkpoints import random_checkpoint
from safetensors.torch import save_file
from typer.testing import CliRunner

import suffuse
from suffuse.cli.main import app
from suffuse.cli.picture import read_settings

sys.path.append(str(Path(__file__).parent.parent / "adapters"))
from factors import adapter
from image_weights import image_encoder, ip_adapter


def peers_unet():
    """Whose layers of attention are numbered as files number them."""
    return diffusers.UNet2DConditionModel.from_pretrained(random_checkpoint(), subfolder="unet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with an adapter of each kind for the random checkpoint, and pictures."""
    path = tmp_path_factory.mktemp("features")
    pipe = suffuse.DiffusionPipeline.from_pretrained(random_checkpoint())
    save_file(adapter(pipe, components=("unet",)), path / "ink.safetensors")
    save_file({"<cat>": torch.randn(pipe.text_encoder.config.hidden_size)}, path / "cat.safetensors")
    net = suffuse.ControlNetModel.from_unet(pipe.unet)
    torch.manual_seed(1)
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter.data, std=0.1)
    net.save_pretrained(path / "net")
    (path / "pictures").mkdir()
    save_file(ip_adapter(peers_unet()), path / "pictures" / "ip.safetensors")
    image_encoder().save_pretrained(path / "pictures" / "image_encoder")
    widths = list(pipe.unet.config.block_out_channels)
    # The first block of its UNet has no attention, and takes features at half the size.
    half = {"adapter_type": "full_adapter_xl", "downscale_factor": 2 * pipe.vae_scale_factor}
    suffuse.T2IAdapter(channels=widths, num_res_blocks=1, **half).save_pretrained(path / "t2i")
    for name, color in (("red", (255, 0, 0)), ("noise", None)):
        pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels if color is None else np.full_like(pixels, color)).save(path / f"{name}.png")
    return path


def run(folder: Path, *arguments: object) -> tuple[int, str, str]:
    words = ["a red door", "-m", random_checkpoint(), "--steps", 2, "--size", "64x64", "--seed", 7, "-o", f"{folder}/out.png"]
    result = CliRunner().invoke(app, ["generate", *map(str, [*words, *arguments])])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


OPTIONS = {
    "lora": (["--lora", "{}/ink.safetensors:0.5"], {"lora": ["ink.safetensors:0.5"]}),
    "two loras": (
        ["--lora", "{}/ink.safetensors:0.5", "--lora", "{}/ink.safetensors"],
        {"lora": ["ink.safetensors:0.5", "ink.safetensors"]},
    ),
    "a control": (
        ["--controlnet", "{}/net", "--control", "{}/noise.png", "--control-scale", 0.5],
        {"controlnet": ["net"], "control": ["noise.png"], "control_scale": [0.5]},
    ),
    "two controls": (
        ["--controlnet", "{}/net", "--control", "{}/noise.png", "--controlnet", "{}/net", "--control", "{}/red.png"],
        {"controlnet": ["net", "net"], "control": ["noise.png", "red.png"]},
    ),
    "a picture to take after": (
        ["--ip-adapter", "{}/pictures/ip.safetensors", "--ip-image", "{}/noise.png", "--ip-scale", 0.7],
        {"ip_adapter": ["ip.safetensors"], "ip_image": ["noise.png"], "ip_scale": [0.7]},
    ),
    "an adapter": (
        ["--t2i-adapter", "{}/t2i", "--adapter-image", "{}/noise.png"],
        {"t2i_adapter": "t2i", "adapter_image": "noise.png"},
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_counts_and_is_told(folder, name):
    given, told = OPTIONS[name]
    pictures = []
    for arguments in ([], [str(word).format(folder) for word in given]):
        code, _, err = run(folder, *arguments)
        assert (code, err) == (0, "")
        pictures.append(np.asarray(Image.open(folder / "out.png")))
    assert np.abs(pictures[0].astype(int) - pictures[1]).max() > 0
    settings = read_settings(folder / "out.png")
    assert {key: settings[key] for key in told} == told


def test_a_learnt_word_counts(folder):
    pictures = []
    for arguments in ([], ["--embedding", folder / "cat.safetensors"]):
        words = ["a <cat>", "-m", random_checkpoint(), "--steps", 2, "--size", "64x64", "--seed", 7, "-o", f"{folder}/out.png"]
        assert CliRunner().invoke(app, ["generate", *map(str, [*words, *arguments])]).exit_code == 0
        pictures.append(np.asarray(Image.open(folder / "out.png")))
    assert np.abs(pictures[0].astype(int) - pictures[1]).max() > 0


def test_a_run_goes_on_with_what_was_added(folder, tmp_path):
    given = ["--lora", folder / "ink.safetensors", "--controlnet", folder / "net"]
    code, *_ = run(folder, *given, "--control", folder / "noise.png", "--save-run", tmp_path / "at-{step}.safetensors")
    assert code == 0
    whole = np.asarray(Image.open(folder / "out.png"))
    resumed = ["--resume", tmp_path / "at-1.safetensors", "-o", folder / "again.png", *given]
    result = CliRunner().invoke(app, ["generate", *map(str, resumed)])
    assert result.exit_code == 0, result.output
    assert np.array_equal(whole, np.asarray(Image.open(folder / "again.png")))


WRONG = {
    "a net without a picture": (["--controlnet", "net"], "--controlnet is given without --control"),
    "a picture without a net": (["--control", "x.png"], "--control is given without --controlnet"),
    "a scale of nothing": (["--control-scale", 1], "--control-scale is given without --control"),
    "two nets, one picture": (
        ["--controlnet", "net", "--controlnet", "net", "--control", "x.png"],
        "--controlnet and --control are not one for each",
    ),
    "no such picture": (["--t2i-adapter", "t2i", "--adapter-image", "x.png"], "--adapter-image: no file x.png"),
    "an IP-Adapter without a picture": (["--ip-adapter", "x.safetensors"], "--ip-adapter is given without --ip-image"),
    "a box without words": (["--box", "=0,0,1,1"], "is not understood"),
    "a box of three numbers": (["--box", "a dog=0,0,1"], 'as in "a dog=0,0.5,0.4,1"'),
    "a box for a model that is not told": (["--box", "a dog=0,0,1,1"], "no gated attention"),
    "no such LoRA": (["--lora", "nothing.safetensors:0.3"], "nothing.safetensors"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told(folder, name):
    given, message = WRONG[name]
    code, out, err = run(folder, *given)
    assert code == 2 or code == 1
    assert out == ""
    assert message in " ".join(err.split())


def test_a_model_of_another_family_is_what_it_was_saved_as(folder, tmp_path):
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    words = ["generate", "-m", str(tmp_path / "ddpm"), "--steps", "2", "--seed", "3", "-o", str(tmp_path / "out.png")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "out.png") as made:
        assert made.size == (16, 16)
    assert read_settings(tmp_path / "out.png")["pipeline"] == "DDPMPipeline"
    result = CliRunner().invoke(app, [*words, "--guidance", "3"])
    assert result.exit_code == 1
    assert "DDPMPipeline takes no guidance_scale" in result.stderr


def test_a_run_goes_on_at_its_own_scale(folder, tmp_path):
    given = ["--controlnet", folder / "net"]
    shown = ["--control", folder / "noise.png", "--control-scale", 0.3]
    assert run(folder, *given, *shown, "--save-run", tmp_path / "at-{step}.safetensors")[0] == 0
    with Image.open(folder / "out.png") as whole:
        resumed = ["--resume", tmp_path / "at-1.safetensors", "-o", folder / "again.png", *given]
        assert CliRunner().invoke(app, ["generate", *map(str, resumed)]).exit_code == 0
        with Image.open(folder / "again.png") as again:
            assert np.array_equal(np.asarray(whole), np.asarray(again))
    refused = CliRunner().invoke(app, ["generate", *map(str, [*resumed, "--control", folder / "red.png"])])
    assert refused.exit_code == 1
    assert "--control is that of the run" in refused.stderr
