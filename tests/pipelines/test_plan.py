"""What is planned is what is taken: tensors alive at the worst moment of a call, against the prediction from the files alone."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import weakref

import pytest
import torch
from tasks import call, folder, mask, pair, picture, set_scheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

import suffuse
from suffuse.cli.main import app
from suffuse.errors import ConfigError, InputError, LimitError
from suffuse.memory.estimate import decoder_activations, unet_activations
from suffuse.memory.plan import Request, plan, survey, switches, ways_to_fit

PLANNED = ["text", "image", "inpaint", "inpaint9"]


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, and the most that ever were; those of `modules` count from the start."""

    def __init__(self, *modules: torch.nn.Module) -> None:
        super().__init__()
        self.known: dict[int, int] = {}
        self.now = 0
        for tensor in (t for module in modules for t in (*module.parameters(), *module.buffers())):
            self.count(tensor)
        self.peak = self.now

    def count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self.forget, storage._cdata)

    def forget(self, key: int) -> None:
        self.now -= self.known.pop(key, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf)
        self.peak = max(self.peak, self.now)
        return result


def arguments(task: str, height: int, width: int) -> dict:
    given = {"image": picture(height, width), "mask_image": mask(height, width)} if task != "text" else {}
    names = {"text": ("height", "width"), "image": ("image",)}.get(task, ("image", "mask_image", "height", "width"))
    return {name: {**given, "height": height, "width": width}[name] for name in names}


@pytest.mark.parametrize(("height", "width"), [(64, 64), (128, 96)])
@pytest.mark.parametrize("task", PLANNED)
def test_the_peak_of_a_call_is_predicted(task, height, width):
    _, ours = pair(task)
    set_scheduler(pair(task), "DDIMScheduler")
    call(ours, task)  # tables that are kept from call to call are there
    with Alive(ours.unet, ours.vae, ours.text_encoder) as alive:
        ours("a cat", **arguments(task, height, width), num_inference_steps=2, output_type="pt")
    predicted = plan(survey(folder(task)), Request(height, width)).peak
    assert predicted == pytest.approx(alive.peak, rel=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [16, 32])
def test_models_of_the_shape_of_stable_diffusion_are_predicted(size, dtype):
    kind = getattr(torch, dtype)
    options = {"block_out_channels": (64, 128, 256, 256), "cross_attention_dim": 768, "sample_size": 64}
    unet = suffuse.UNet2DConditionModel(**options).to(kind).eval()
    with torch.no_grad(), Alive(unet) as alive:
        weights = alive.peak
        unet(torch.zeros(2, 4, size, size, dtype=kind), 3, torch.zeros(2, 77, 768, dtype=kind))
    assert kind.itemsize * unet_activations(unet.config, 2, size, size) == pytest.approx(alive.peak - weights, rel=0.1)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = suffuse.AutoencoderKL(block_out_channels=(32, 64, 128, 128), layers_per_block=2, **blocks).to(kind).eval()
    with torch.no_grad(), Alive(vae) as alive:
        weights = alive.peak
        vae.decode(torch.zeros(1, 4, size, size, dtype=kind))
    assert kind.itemsize * decoder_activations(vae.config, 1, size, size) == pytest.approx(alive.peak - weights, rel=0.1)


def test_tiles_and_slices_are_predicted():
    vae = suffuse.AutoencoderKL.from_config(pair("text")[1].vae.config, sample_size=32)
    vae.enable_tiling()
    vae.enable_slicing()
    with torch.no_grad(), Alive(vae) as alive:
        weights = alive.peak
        vae.decode(torch.zeros(2, 4, 48, 48))
    whole = 4 * decoder_activations(vae.config, 2, 48, 48)
    assert alive.peak - weights < whole / 2


def test_every_way_takes_less_than_the_one_before():
    plans = list(ways_to_fit(survey(folder("text")), Request(256, 256, batch=2)))
    assert [made.peak for made in plans] == sorted((made.peak for made in plans), reverse=True)
    assert switches(plans[0].request) == []
    assert switches(plans[-1].request)[-1] == "pipe.enable_sequential_cpu_offload()"


def test_weights_are_those_of_the_files(tmp_path):
    made = plan(survey(folder("text")), Request(dtype="float32"))
    _, ours = pair("text")
    models = (ours.unet, ours.vae, ours.text_encoder)
    assert made.weights == pytest.approx(sum(p.nbytes for model in models for p in model.parameters()), rel=0.01)
    copied = shutil.copytree(folder("text"), tmp_path / "model")
    (copied / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(InputError, match="no UNet and autoencoder to plan for"):
        plan(survey(copied), Request())
    with pytest.raises(InputError, match="none that can be planned for"):
        plan(survey(folder("text")), Request(dtype="int8"))


def test_planning_reads_no_weights_and_needs_no_torch(tmp_path):
    copied = shutil.copytree(folder("text"), tmp_path / "model")
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    size = weights.stat().st_size
    os.truncate(weights, header)
    os.truncate(weights, size)  # zeros, where the numbers were
    code = (
        "import sys; from suffuse.memory.plan import *; print(plan(survey(sys.argv[1]), Request()).peak, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, copied], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(plan(survey(folder("text")), Request()).peak), "False"]


def test_the_command_says_what_to_switch_on():
    run = CliRunner().invoke
    told = run(app, ["plan", str(folder("text")), "--size", "256x256", "--vram", "45MB", "--ram", "1GB"])
    assert told.exit_code == 0, told.output
    assert "The least that makes it fit:\n    torch_dtype=torch.bfloat16" in told.output
    fits = json.loads(run(app, ["plan", str(folder("text")), "--json"]).output)["plans"]
    assert fits[0]["fits"] is True
    assert fits[0]["switches"] == []
    for options, says in (
        (["--size", "big"], "--size is no size"),
        (["--ram", "lots"], "--ram is no size"),
        (["--dtype", "int8"], "none that can be planned for"),
    ):
        refused = run(app, ["plan", str(folder("text")), *options])
        assert refused.exit_code == 1
        assert says in refused.output


def test_no_advice_is_given_that_changes_nothing():
    for request in (Request(batch=2), Request(512, 512, batch=2), Request(512, 512)):
        plans = list(ways_to_fit(survey(folder("text")), request))
        for before, after in itertools.pairwise(plans):
            for name in ("slicing", "tiling"):
                if getattr(after.request, name) and not getattr(before.request, name):
                    without = plan(survey(folder("text")), dataclasses.replace(after.request, **{name: False}))
                    assert after.peak < without.peak


@pytest.mark.parametrize(
    ("entries", "error"),
    [
        ({"block_out_channels": []}, ConfigError),
        ({"block_out_channels": "x"}, ConfigError),
        ({"down_block_types": 5}, ConfigError),
        ({"layers_per_block": 10**7}, LimitError),
        ({"layers_per_block": "2"}, ConfigError),
    ],
)
def test_a_configuration_that_describes_nothing_is_told(entries, error, tmp_path):
    copied = shutil.copytree(folder("text"), tmp_path / "model")
    path = copied / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    with pytest.raises(error, match=r"unet/config\.json"):
        plan(survey(copied), Request())


@pytest.mark.parametrize("options", [{"batch": 0}, {"height": -8}, {"width": "64"}, {"batch": True}])
def test_what_cannot_be_drawn_cannot_be_planned(options):
    with pytest.raises(InputError, match="has the wrong value"):
        Request(**options)
