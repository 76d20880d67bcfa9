"""`suffuse generate`: the pictures it writes, and what it says when it cannot."""

from __future__ import annotations

import functools
import json
import os
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from random_checkpoints import random_checkpoint
from typer.testing import CliRunner

import suffuse
from suffuse.cli.generate import SCHEDULERS
from suffuse.cli.main import app
from suffuse.cli.picture import read_settings


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: object, color: bool = False) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["generate", *map(str, arguments)], color=color)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def draw(*arguments: object, model: object = None) -> list[Path]:
    """The files of a call that must succeed, and say nothing but their names."""
    code, out, err = run("a red door", "--model", model or random_checkpoint(), "--steps", 2, "--size", "64x64", *arguments)
    assert (code, err) == (0, "")
    return [Path(line) for line in out.splitlines()]


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def left_behind() -> list[str]:
    return sorted(path.name for path in Path().rglob("*"))


# ---------------------------------------------------------------- pictures


def test_it_draws_what_the_library_draws() -> None:
    (path,) = draw("--seed", 7, "--guidance", 3, "--negative", "blue")
    pipe = suffuse.StableDiffusionPipeline.from_pretrained(random_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    options = {"negative_prompt": "blue", "num_inference_steps": 2, "guidance_scale": 3.0, "height": 64, "width": 64}
    (image,) = pipe("a red door", generator=torch.Generator().manual_seed(7), **options).images
    assert np.array_equal(pixels(path), np.asarray(image))


def test_a_run_is_kept_resumed_and_forked() -> None:
    (whole,) = draw("--seed", 7, "--save-run", "at-{step}.safetensors", "-o", "whole.png")
    assert sorted(Path().glob("at-*")) == [Path(f"at-{step}.safetensors") for step in range(3)]
    assert run("--resume", "at-1.safetensors", "-o", "again.png")[:2] == (0, "again.png\n")
    assert run("a blue door", "--resume", "at-1.safetensors", "--guidance", 9, "-o", "fork.png")[0] == 0
    assert np.array_equal(pixels(whole), pixels("again.png"))
    assert not np.array_equal(pixels(whole), pixels("fork.png"))
    made = read_settings(Path("fork.png"))
    assert (made["prompt"], made["guidance_scale"], made["seed"]) == ("a blue door", 9, 7)
    assert made["resumed"] == "at-1.safetensors, step 1"
    told = CliRunner().invoke(app, ["inspect", "at-1.safetensors"]).stdout
    assert re.search("step +1\n", told)
    assert re.search("prompt +a red door\n", told)


def test_runs_that_name_no_classes_of_ours() -> None:
    draw("--save-run", "at.safetensors")
    for name in ("pipeline", "scheduler"):
        run_ = suffuse.SavedRun.load("at.safetensors")
        setattr(run_, name, "AutoencoderKL")
        run_.save(f"{name}.safetensors")
        code, _, err = run("--resume", f"{name}.safetensors")
        assert code == 1
        assert "names no" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--resume", "none.safetensors"), "no file none.safetensors"),
        (("--resume", "at.safetensors", "--steps", 5), "--steps is that of the run"),
        (("x", "--count", 2, "--save-run", "at.safetensors"), "--save-run keeps the run of one picture"),
        ((), "there is no prompt"),
    ],
    ids=str,
)
def test_runs_that_cannot_be(arguments: tuple[object, ...], message: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert message in err


def test_brackets_weigh_where_that_is_asked_for() -> None:
    common = ("--model", random_checkpoint(), "--steps", 2, "--size", "64x64", "--seed", 7)
    for name, arguments in {"plain": (), "weighted": ("--weighted",)}.items():
        assert run("a (red:1.9) door", *common, *arguments, "-o", f"{name}.png")[0] == 0
    assert run("a red door:1 | x:0", "--weighted", *common, "-o", "blend.png")[0] == 0
    assert run("a red door", *common, "-o", "door.png")[0] == 0
    assert not np.array_equal(pixels("plain.png"), pixels("weighted.png"))
    assert np.abs(pixels("blend.png").astype(int) - pixels("door.png")).max() <= 1
    assert "has no partner" in run("a (red door", "--weighted", *common)[2]


def test_a_size_is_width_by_height() -> None:
    code, _, _ = run("x", "--model", random_checkpoint(), "--steps", 1, "--size", "96x64", "-o", "wide.png")
    assert code == 0
    assert pixels("wide.png").shape == (64, 96, 3)
    code, _, _ = run("x", "--model", random_checkpoint(), "--steps", 1, "-o", "own.png")
    assert pixels("own.png").shape == (128, 128, 3)


def test_the_seed_decides_and_one_is_drawn_if_left_out() -> None:
    draw("--seed", 7, "-o", "one.png"), draw("--seed", 7, "-o", "same.png"), draw("--seed", 8, "-o", "other.png")
    assert np.array_equal(pixels("one.png"), pixels("same.png"))
    assert not np.array_equal(pixels("one.png"), pixels("other.png"))
    (path,) = draw()
    seed = read_settings(path)["seed"]
    assert path == Path(f"a-red-door-{seed}.png")
    draw("--seed", seed, "-o", "again.png")
    assert np.array_equal(pixels(path), pixels("again.png"))


@pytest.mark.parametrize("scheduler", ["ddim", "euler-ancestral"])
def test_each_of_several_pictures_is_the_one_its_seed_gives_alone(scheduler: str) -> None:
    several = draw("--seed", 5, "--count", 3, "-o", "door.png", "--scheduler", scheduler)
    assert several == [Path("door-1.png"), Path("door-2.png"), Path("door-3.png")]
    for seed, path in enumerate(several, start=5):
        (alone,) = draw("--seed", seed, "-o", f"alone-{seed}.png", "--scheduler", scheduler)
        assert np.array_equal(pixels(path), pixels(alone))
        assert read_settings(path)["seed"] == seed


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_has_a_name(name: str) -> None:
    (path,) = draw("--scheduler", name, "--steps", 4)
    assert read_settings(path)["scheduler"] == SCHEDULERS[name]


def test_a_scheduler_may_be_called_by_its_class_or_in_words() -> None:
    for name in ("DPMSolverMultistepScheduler", "dpm-solver-multistep", "DPM Solver Multistep"):
        (path,) = draw("--scheduler", name, "-o", "door.png")
        assert read_settings(path)["scheduler"] == "DPMSolverMultistepScheduler"


@pytest.mark.parametrize(
    ("dtype", "kept"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16"), ("auto", "float32")]
)
def test_numbers_may_be_narrower(dtype: str, kept: str) -> None:
    (path,) = draw("--dtype", dtype, "--device", "cpu")
    assert read_settings(path)["dtype"] == kept


# ---------------------------------------------------------------- files


def test_names_are_free_unless_one_is_given() -> None:
    assert draw("--seed", 7) == [Path("a-red-door-7.png")]
    first = Path("a-red-door-7.png").read_bytes()
    assert draw("--seed", 7) == [Path("a-red-door-7-2.png")]
    assert draw("--seed", 7) == [Path("a-red-door-7-3.png")]
    assert Path("a-red-door-7.png").read_bytes() == first
    assert draw("--seed", 8, "--output", "a-red-door-7.png") == [Path("a-red-door-7.png")]
    assert Path("a-red-door-7.png").read_bytes() != first
    assert len(left_behind()) == 3


def test_an_output_may_be_a_file_or_a_folder_that_is_not_there_yet() -> None:
    assert draw("-o", "new/folder/door.png") == [Path("new/folder/door.png")]
    assert draw("-o", "without-suffix") == [Path("without-suffix.png")]
    assert draw("--seed", 7, "-o", "pictures/") == [Path("pictures/a-red-door-7.png")]
    assert draw("--seed", 7, "-o", "pictures") == [Path("pictures/a-red-door-7-2.png")]


def test_a_prompt_of_any_letters_names_a_file() -> None:
    for prompt, name in (
        ("Ein Türchen: rot?!", "ein-türchen-rot-3.png"),
        ("…", "picture-3.png"),
        ("x" * 60, f"{'x' * 48}-3.png"),
    ):
        code, out, _ = run(prompt, "--model", random_checkpoint(), "--steps", 1, "--size", "64x64", "--seed", 3)
        assert (code, out.strip()) == (0, name)
        assert read_settings(Path(name))["prompt"] == prompt


def test_the_settings_in_the_picture_are_whole_and_name_no_folder(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "photo.png")
    options = ("-i", tmp_path / "photo.png", "--seed", 7, "--steps", 4, "-o", "new.png", "--scheduler", "euler")
    assert run("a red door", "-m", random_checkpoint(), *options)[0] == 0
    assert read_settings(Path("new.png")) == {
        "prompt": "a red door",
        "negative_prompt": None,
        "seed": 7,
        "num_inference_steps": 4,
        "guidance_scale": 7.5,
        "strength": 0.8,
        "image": "photo.png",
        "width": 64,
        "height": 64,
        "model": "random-model",
        "pipeline": "StableDiffusionImg2ImgPipeline",
        "scheduler": "EulerDiscreteScheduler",
        "dtype": "float32",
        "device": "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu",
        "suffuse": suffuse.__version__,
    }
    assert str(tmp_path).encode() not in Path("new.png").read_bytes()


# ---------------------------------------------------------------- what is wrong

WRONG = {
    "size": (["--size", "banana"], "--size 'banana' is not understood"),
    "size of a picture": (["--size", "64x64", "-i", "photo.png"], "--size goes with a prompt alone or with --mask"),
    "scheduler": (["--scheduler", "eulr"], "did you mean 'euler'"),
    "dtype": (["--dtype", "float33"], "did you mean 'float32'"),
    "mask alone": (["--mask", "photo.png"], "--mask is given without --image"),
    "strength alone": (["--strength", "0.5"], "--strength is given without --image"),
    "no such picture": (["-i", "absent.png"], "--image: no file absent.png"),
    "folder as a picture": (["-i", "."], "--image: no file ."),
    "text as a picture": (["-i", "photo.png", "--mask", "text.png"], "--mask: text.png is no picture"),
    "half a picture": (["-i", "cut.png"], "--image: cut.png cannot be read as a picture"),
    "bomb": (["-i", "bomb.png"], "decompression bomb"),
    "other format": (["-o", "door.jpg"], "use door.png"),
    "file as a folder": (["-o", "text.png/door.png"], "text.png/door.png cannot be written"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_before_a_model_is_looked_at(case: str) -> None:
    Image.effect_noise((64, 64), 50).save("photo.png")
    Path("cut.png").write_bytes(Path("photo.png").read_bytes()[:1000])
    Path("text.png").write_text("no picture")
    Path("bomb.png").write_bytes(header_of_png(100_000, 100_000))
    before = left_behind()
    options, message = WRONG[case]
    code, out, err = run("a red door", "--model", "./absent", *options)
    assert (code, out) == (1, "")
    assert message in err
    assert left_behind() == before


def header_of_png(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">II", zlib.crc32(chunk), 0) + b"IDAT"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "100x64"], "--size: width=100 is not divisible by 8\n  to fix it: use 96 or 104"),
        (["--size", "800000x800000"], "is too large"),
        (["--device", "cude"], "--device 'cude' cannot be used"),
        (["--device", "meta"], "--device 'meta' cannot be used"),
        (["--guidance", "nan"], "guidance_scale=nan is out of range"),
        (["-i", "photo.png", "--strength", "0.1", "--steps", "3"], "strength=0.1 leaves no step"),
        (["-i", "photo.png", "--mask", "wide.png"], "mask_image has another aspect than image"),
    ],
)
def test_what_only_the_library_can_say(options: list[str], message: str) -> None:
    photo = Image.effect_noise((64, 64), 50)
    photo.save("photo.png")
    photo.resize((64, 32)).save("wide.png")
    before = left_behind()
    code, out, err = run("a red door", "--model", random_checkpoint(), *options)
    assert (code, out) == (1, "")
    assert message in err
    assert "Traceback" not in err
    assert left_behind() == before


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("./absent", [], "'./absent' is not a folder here"),
        (".", [], "no file model_index.json"),
        ({"channels": 9}, [], "is an inpainting model\n  expected: --image and --mask"),
        ({"depth": True}, [], "is a depth-to-image model\n  expected: --image, and no --mask"),
        ({"depth": True}, ["-i", "photo.png", "--mask", "photo.png"], "is a depth-to-image model"),
    ],
)
def test_a_model_that_does_not_fit_the_task(model: object, options: list[str], message: str) -> None:
    Image.new("RGB", (64, 64), "teal").save("photo.png")
    folder = random_checkpoint(**model) if isinstance(model, dict) else model
    code, out, err = run("a red door", "--model", folder, *options)
    assert (code, out) == (1, "")
    assert message in err


def test_errors_are_red() -> None:
    assert run("x", "--model", "./absent", color=True)[2].startswith("\x1b[31m'./absent' is not a folder here")


@pytest.mark.parametrize(
    ("options", "message"), [(["--stesp", "3"], "--steps"), (["--steps", "0"], "--steps"), (["--seed", "-1"], "--seed")]
)
def test_a_mistyped_option_is_told_the_right_one(options: list[str], message: str) -> None:
    code, out, err = run("x", "--model", "./absent", *options)
    assert (code, out) == (2, "")
    assert message in err.split("Error: ")[1]


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line() -> None:
    shutil.copytree(random_checkpoint(), "old")
    path = Path("old", "scheduler", "scheduler_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"steps_offset": 0}))
    code, _, err = run("x", "--model", "old", "--steps", 1, "--size", "64x64")
    assert code == 0
    (line,) = err.splitlines()
    assert line.startswith("warning: DDIMScheduler: set to steps_offset=1")
    assert ".py" not in line


# ---------------------------------------------------------------- a process of its own


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [(["--help"], "WIDTHxHEIGHT"), (["x", "-m", "./absent", "--mask", "m.png"], "--mask is given without --image")],
)
def test_help_and_mistakes_do_not_wait_for_torch(arguments: list[str], shown: str) -> None:
    program = (
        "import sys; from suffuse.cli.main import app\n"
        f"try: app(['generate', *{arguments!r}])\n"
        "finally: print([name for name in ('torch', 'transformers', 'PIL') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert shown in result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


def test_help_shows_an_example_on_a_line_of_its_own() -> None:
    _, out, _ = run("--help")
    assert '    suffuse generate "a lighthouse at dawn" -m stable-diffusion-v1-5 --seed 7\n' in out


@pytest.mark.skipif(os.name == "nt", reason="there is no pseudo-terminal")
def test_a_terminal_sees_progress_and_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    import fcntl
    import termios

    mine, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 100, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    arguments = ["generate", "x", "--model", str(random_checkpoint()), "--steps", "900", "--size", "256x256", "-o", "new/x.png"]
    program = [sys.executable, "-c", "from suffuse.cli.main import app; app()", *arguments]
    heeded = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    with subprocess.Popen(
        program, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=theirs, preexec_fn=heeded
    ) as process:
        seen = b""
        while not re.search(rb" [1-9]\d*/900 ", seen) and select.select([mine], [], [], 60)[0]:
            seen += os.read(mine, 4096)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    while select.select([mine], [], [], 0)[0]:
        seen += os.read(mine, 4096)
    assert b"/900 " in seen
    assert b" 900/900 " not in seen
    assert b"Traceback" not in seen
    assert (process.returncode, out) == (130, b"")
    assert left_behind() == []
    os.close(theirs)
    os.close(mine)
