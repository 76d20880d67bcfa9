"""`suffuse inspect`: what it tells, and that it reads no weights and needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import pytest
import torch
from typer.testing import CliRunner

from suffuse.checkpoints.inventory import take_inventory, total
from suffuse.cli.main import app
from suffuse.errors import ConfigError, CorruptFileError, MissingFileError, PathEscapeError


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def model(tmp_path: Path) -> Path:
    diffusers.AutoencoderKL(norm_num_groups=4, block_out_channels=[8]).half().save_pretrained(tmp_path / "vae", variant="fp16")
    return tmp_path / "vae"


def test_a_pipeline_is_told_part_by_part(tiny_folder: Path) -> None:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    counts = {name: sum(p.numel() for p in getattr(pipeline, name).parameters()) for name in ("unet", "vae", "text_encoder")}
    parts = {component.name: component for component in take_inventory(tiny_folder)}
    assert {name: parts[name].parameters for name in counts} == counts
    assert (parts["unet"].library, parts["unet"].kind) == ("diffusers", "UNet2DConditionModel")
    assert (parts["text_encoder"].library, parts["text_encoder"].kind) == ("transformers", "CLIPTextModel")
    assert parts["scheduler"].parameters == 0
    assert parts["tokenizer"].bytes == 0
    assert "safety_checker" not in parts
    whole = total(list(parts.values()))
    assert whole.parameters == sum(counts.values())
    assert whole.memory == {"float32": whole.parameters * 4, "float16": whole.parameters * 2, "bfloat16": whole.parameters * 2}
    code, text, _ = run(tiny_folder)
    assert code == 0
    assert all(name in text for name in (*parts, "total", f"{counts['unet']:,}", "F32", "as bfloat16"))


def test_json_holds_the_same(tiny_folder: Path) -> None:
    code, text, _ = run(tiny_folder, "--json")
    told = json.loads(text)
    assert code == 0
    assert [part["name"] for part in told["components"]] == [part.name for part in take_inventory(tiny_folder)]
    assert told["total"]["parameters"] == sum(part["parameters"] for part in told["components"])


def test_a_model_or_a_file_may_be_looked_at_alone(model: Path) -> None:
    (part,) = take_inventory(model)
    assert (part.name, part.kind, part.library) == ("vae", "AutoencoderKL", "diffusers")
    assert part.files == ["diffusion_pytorch_model.fp16.safetensors"]
    assert list(part.dtypes) == ["F16"]
    (alone,) = take_inventory(model / part.files[0])
    assert (alone.parameters, alone.memory) == (part.parameters, part.memory)
    assert run(model)[0] == run(model / part.files[0])[0] == 0


def test_the_weights_of_a_pickle_are_not_counted(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "diffusion_pytorch_model.bin")
    (part,) = take_inventory(tmp_path)
    assert part.parameters is None
    assert part.bytes > 0
    assert "unknown" in run(tmp_path)[1]


def test_errors_are_one_message_on_stderr(model: Path, tmp_path: Path) -> None:
    file = model / "diffusion_pytorch_model.fp16.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    for path, error, message in (
        (model, CorruptFileError, "the file is cut inside tensor"),
        (tmp_path / "absent", MissingFileError, "no file or folder"),
        (tmp_path, MissingFileError, "is no checkpoint"),
    ):
        with pytest.raises(error, match=message):
            take_inventory(path)
        code, out, err = run(path)
        assert (code, out) == (1, "")
        assert message in err
        assert "Traceback" not in err


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ({"../vae": ["diffusers", "AutoencoderKL"]}, PathEscapeError, "leads out"),
        ({"vae": ["diffusers"]}, ConfigError, "vae is no component"),
        ({"unet": ["diffusers", "UNet2DConditionModel"]}, MissingFileError, "has no folder 'unet'"),
    ],
)
def test_an_index_that_is_wrong_is_named(index: dict[str, object], error: type[Exception], message: str, model: Path) -> None:
    (model.parent / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(error, match=message):
        take_inventory(model.parent)


def test_it_takes_less_than_a_second_and_no_torch(tiny_folder: Path) -> None:
    program = (
        "import sys; from suffuse.cli.main import app\n"
        f"try: app(['inspect', {str(tiny_folder)!r}])\n"
        "finally: print([name for name in ('torch', 'transformers', 'safetensors') if name in sys.modules], file=sys.stderr)"
    )
    began = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "[]"
    assert "UNet2DConditionModel" in result.stdout
    assert time.perf_counter() - began < 3, "0.3 s where nothing else runs"
