"""The README does what it says, word for word; links in the documents lead somewhere."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny
from PIL import Image, ImageDraw
from random_checkpoints import ROOT, random_checkpoint
from safetensors.torch import save_file
from skimage import data

import suffuse

sys.path.append(str(ROOT / "tests" / "adapters"))
from factors import adapter
from image_weights import image_encoder, ip_adapter

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the checkpoints and pictures the README names, which are small."""
    monkeypatch.chdir(tmp_path)
    Path("stable-diffusion-v1-5").symlink_to(random_checkpoint())
    Path("stable-diffusion-2-depth").symlink_to(random_checkpoint(depth=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers.StableDiffusionXLPipeline(
            **tiny.stable_diffusion_xl(tmp_path / "tokenizers" / "1"), add_watermarker=False
        ).save_pretrained("stable-diffusion-xl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = suffuse.StableDiffusionPipeline.from_pretrained(random_checkpoint())
    suffuse.ControlNetModel.from_unet(pipe.unet).save_pretrained("controlnet-canny")
    # The first block of its UNet has no attention, and takes features at half the size.
    half = {"adapter_type": "full_adapter_xl", "downscale_factor": 2 * pipe.vae_scale_factor}
    widths = list(pipe.unet.config.block_out_channels)
    suffuse.T2IAdapter(channels=widths, num_res_blocks=1, **half).save_pretrained("t2iadapter-sketch")
    Path("ip-adapter").mkdir()
    peers_unet = diffusers.UNet2DConditionModel.from_pretrained(random_checkpoint(), subfolder="unet")
    save_file(ip_adapter(peers_unet), "ip-adapter/ip-adapter_sd15.safetensors")
    image_encoder().save_pretrained("ip-adapter/image_encoder")
    for seed, name in enumerate(("style", "light")):
        save_file(adapter(pipe, seed=seed), f"{name}.safetensors")
    Path("examples").symlink_to(ROOT / "examples")
    Image.fromarray(data.astronaut()[0:256, 96:352]).resize((128, 128)).save("photo.png")
    mask = Image.new("L", (128, 128))
    ImageDraw.Draw(mask).rectangle((32, 32, 80, 96), fill=255)
    mask.save("mask.png")
    return tmp_path


def test_its_python_runs(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, object] = {}
    before = set(workplace.iterdir())
    for number, block in enumerate(blocks("python"), start=1):
        exec(compile(block, f"README.md, python block {number}", "exec"), namespace)
    written = {path.name for path in set(workplace.iterdir()) - before}
    steps = {name for name in written if name.startswith("at-")}
    assert len(steps) > 20
    assert written - steps == set(re.findall(r'\.save(?:_pretrained|_single_file)?\("(.+?)"\)', README))
    for name in (name for name in written if name.endswith(".png")):
        with Image.open(name) as picture:
            assert picture.size == ((64, 64) if name == "refined.png" else (128, 128))
    message = re.sub(r"\s+", " ", capsys.readouterr().out)
    for told in re.findall(r"# (.+?) … (.+)", README)[0]:
        assert told in message


def test_the_page_of_guidance_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, namespace = (ROOT / "docs" / "guidance.md").read_text(encoding="utf-8"), dict[str, object]()
    for number, block in enumerate(blocks("python", text), start=1):
        exec(compile(block, f"guidance.md, python block {number}", "exec"), namespace)
    shown, told = runpy.run_path(str(ROOT / "examples" / "guidance_sheet.py")), dict[str, object]()
    for name, value in re.findall(r"guidance/([\w-]+)\.png.*\| `([^`]+)` \|$", text, re.MULTILINE):
        classes = {each: getattr(suffuse, each) for each in re.findall(r"\b[A-Z]\w+(?=\()", value)}
        told[name] = eval(value, classes)
    assert told == shown["WAYS"]
    strip = shown["draw"]("none")
    with Image.open(ROOT / "docs" / "guidance" / "none.png") as drawn:
        assert np.abs(np.asarray(strip).astype(int) - np.asarray(drawn)).max() <= 2
    commands = blocks("bash", text)[0].splitlines()
    for command in commands:
        result = subprocess.run(
            [Path(sys.executable).with_name("suffuse"), *shlex.split(command)[1:]], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr


def test_its_first_command_runs(workplace: Path) -> None:
    (command,) = re.findall(r"^<!-- run -->\n```bash\n(.*?)\n```$", README, re.MULTILINE | re.DOTALL)
    install, rest = command.split(" && ", 1)
    assert install == "pip install -c constraints.txt ."
    here = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    result = subprocess.run(
        ["bash", "-ec", rest], cwd=workplace, env={**os.environ, "PATH": here}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    name = result.stdout.splitlines()[-1]
    assert name.endswith(".png")
    with Image.open(name) as picture:
        assert picture.size == (64, 64)
    assert "it/s" not in result.stderr.replace("Writing model shards", ""), "a bar where nobody sees it"


def test_its_table_names_classes_that_are_there() -> None:
    table = README.split("## What is here")[1].split("##")[0]
    for name in re.findall(r"`(\w*(?:Pipeline|Model|KL|Tiny))`", table):
        assert hasattr(suffuse, name)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", link):
            continue
        name, _, heading = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), f"{link} leads nowhere"
        if heading:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, link
