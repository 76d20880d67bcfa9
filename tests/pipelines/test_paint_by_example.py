"""Painting by example equals the peer's, bit for bit."""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from diffusers.pipelines.deprecated.paint_by_example.image_encoder import PaintByExampleImageEncoder as PeersEncoder
from tasks import align, difference, mask, picture, set_scheduler
from transformers import CLIPVisionConfig

import suffuse
from suffuse.errors import ConfigError, InputError
from suffuse.pipelines.paint_by_example.image_encoder import PaintByExampleImageEncoder

SIZES = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 9, "num_attention_heads": 4}


@pytest.fixture(autouse=True)
def quiet_peer():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="diffusers.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


@cache
def peers() -> tuple[Any, Path]:
    """The peer's pipeline, and where it wrote itself."""
    path = Path(mkdtemp(prefix="suffuse-"))
    torch.manual_seed(19)
    encoder = PeersEncoder(CLIPVisionConfig(**SIZES, image_size=32, patch_size=8, projection_dim=32)).eval()
    parts = {"vae": tiny.vae(), "unet": tiny.unet(9), "scheduler": tiny.scheduler(), "image_encoder": encoder}
    checked = {"safety_checker": tiny.safety_checker(), "feature_extractor": tiny.image_processor()}
    pipe = diffusers.PaintByExamplePipeline(**parts, **checked)
    pipe.save_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    return pipe, path


@cache
def pair() -> tuple[Any, Any]:
    """(the peer's pipeline, ours), loaded from what it wrote."""
    peer, path = peers()
    ours = suffuse.PaintByExamplePipeline.from_pretrained(path)
    ours.set_progress_bar_config(disable=True)
    align(peer)
    return peer, ours


def call(pipe: Any, **options: Any) -> Any:
    if options.get("generator") == "list":
        options["generator"] = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    shown = {"example_image": picture(40, 40, seed=5), "image": picture(64, 48), "mask_image": mask(64, 48)}
    settings = {**shown, "num_inference_steps": 4, "output_type": "np", "return_dict": False}
    return pipe(**{**settings, "generator": torch.Generator().manual_seed(7), **options})[0]


def same(scheduler: str = "DDIMScheduler", **options: Any) -> bool:
    set_scheduler(pair(), scheduler)
    return difference(*(call(pipe, **dict(options)) for pipe in pair())) == 0


@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "PNDMScheduler", "HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler"]
)
def test_every_kind_of_scheduler(scheduler):
    assert same(scheduler)


TWO = {"image": [picture(64, 48, seed=1), picture(64, 48, seed=2)], "mask_image": [mask(64, 48)] * 2}
EXAMPLES = {"example_image": [picture(seed=5), picture(seed=6)]}
TENSOR = torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(2)) * 2 - 1
OPTIONS: dict[str, dict[str, Any]] = {
    "no guidance": {"guidance_scale": 1.0},
    "several": {"num_images_per_prompt": 2},
    "two pictures, an example each": TWO | EXAMPLES,
    "several of two pictures": TWO | EXAMPLES | {"num_images_per_prompt": 2},
    "a generator a picture": {"num_images_per_prompt": 2, "generator": "list"},
    "latents in": {"latents": torch.randn(1, 4, 32, 24, generator=torch.Generator().manual_seed(1))},
    "latents out": {"output_type": "latent"},
    "pictures out": {"output_type": "pil"},
    "eta": {"eta": 0.5},
    "tensors": {"image": TENSOR, "mask_image": (TENSOR[:, :1] > 0).float()},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(option):
    assert same(**OPTIONS[option])


def test_a_prepared_example():
    pixels = tiny.image_processor()(images=[picture(40, 40, seed=5)], return_tensors="pt").pixel_values
    assert same(example_image=pixels)
    assert difference(call(pair()[1], example_image=pixels), call(pair()[1])) == 0


def test_one_example_is_for_all_pictures():
    """The peer's batch does not fit together then."""
    ours = pair()[1]
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    both = call(ours, **TWO, generator=generators)
    alone = call(ours, image=TWO["image"][1], generator=torch.Generator().manual_seed(2))
    assert difference(both[1:], alone) < 1e-4


def test_pictures_are_brought_to_the_size_that_is_asked_for():
    """The peer has the keywords and does not read them."""
    ours = pair()[1]
    assert call(ours, height=48, width=64).shape == (1, 48, 64, 3)


def test_what_is_kept_is_seen():
    ours = pair()[1]
    black = call(ours, mask_image=mask(64, 48).point(lambda value: 0))
    assert difference(black, call(ours)) > 0


def test_the_image_encoder_equals_the_peers():
    theirs, mine = (pipe.image_encoder for pipe in pair())
    assert [(name, value.shape) for name, value in mine.state_dict().items()] == [
        (name, value.shape) for name, value in theirs.state_dict().items()
    ]
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for one, other in zip(theirs(pixels, return_uncond_vector=True), mine(pixels, return_uncond_vector=True), strict=True):
            assert difference(one, other) == 0
    assert PaintByExampleImageEncoder(mine.config, proj_size=8).uncond_vector.shape == (1, 1, 8)


def test_what_is_written_names_the_encoder_as_the_published_checkpoint_does(tmp_path):
    """The peer writes that the encoder is its own public class, which it is not, and cannot load what it wrote."""
    _, ours = pair()
    set_scheduler(pair(), "DDIMScheduler")
    ours.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["image_encoder"] == ["paint_by_example", "PaintByExampleImageEncoder"]
    mine = suffuse.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    mine.set_progress_bar_config(disable=True)
    assert difference(call(mine), call(ours)) == 0
    theirs = PeersEncoder.from_pretrained(tmp_path / "saved" / "image_encoder")
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.image_encoder.state_dict().items())


def test_the_encoder_of_the_published_checkpoint_has_other_names(tmp_path):
    """Earlier releases of transformers put a level more between the encoder and its vision model."""
    from safetensors.torch import load_file, save_file

    _, ours = pair()
    ours.image_encoder.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {
        name.replace("model.", "model.vision_model.") if name.startswith("model.") else name: t for name, t in tensors.items()
    }
    assert renamed.keys() != ours.image_encoder.state_dict().keys()
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    from suffuse.checkpoints.transformers_models import load_transformers_model

    loaded = load_transformers_model(PaintByExampleImageEncoder, tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in ours.image_encoder.state_dict().items())


def test_a_run_goes_on(tmp_path):
    ours = pair()[1]
    set_scheduler(pair(), "EulerAncestralDiscreteScheduler")
    made = call(ours, save_run=tmp_path / "{step}.safetensors")
    assert difference(ours(resume=tmp_path / "2.safetensors")[0], made) == 0


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no example": ({"example_image": None}, "example_image is no picture"),
    "no picture": ({"image": None}, "image is no picture"),
    "no mask": ({"mask_image": None}, "mask_image is no picture"),
    "a mask of another aspect": ({"mask_image": mask(64, 128)}, "mask_image has another aspect"),
    "three examples": ({"example_image": [picture()] * 3}, "example_image: 3 pictures given for 1"),
    "a text": ({"negative_prompt": "a dog"}, "negative_prompt is given and this model is told no text"),
    "two masks for three pictures": (
        {"image": [picture(64, 48)] * 3, "mask_image": [mask(64, 48)] * 2},
        "mask_image: 2 given for 3 pictures",
    ),
    "latents of another shape": ({"latents": torch.zeros(1, 4, 8, 8)}, "latents has the wrong shape"),
}


@pytest.mark.parametrize("name", BAD)
def test_is_told_and_draws_nothing(name):
    options, message = BAD[name]
    generator = torch.Generator().manual_seed(7)
    state = generator.get_state()
    with pytest.raises(InputError, match=message):
        call(pair()[1], **{"generator": generator} | options)
    assert torch.equal(generator.get_state(), state)


def test_a_unet_of_another_task_is_refused():
    ours = pair()[1]
    other = suffuse.UNet2DConditionModel.from_config(tiny.unet(4).config)
    with pytest.raises(ConfigError, match=r"in_channels=4(.|\n)*expected: 9"):
        type(ours)(**ours.components | {"unet": other})


def test_without_a_checker_nothing_is_said():
    ours = pair()[1]
    made = type(ours)(**ours.components | {"safety_checker": None})
    made.set_progress_bar_config(disable=True)
    assert np.isfinite(call(made)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision(dtype, tmp_path):
    ours = pair()[1]
    set_scheduler(pair(), "DDIMScheduler")
    ours.save_pretrained(tmp_path / "saved")
    half = suffuse.DiffusionPipeline.from_pretrained(tmp_path / "saved", torch_dtype=dtype)
    half.set_progress_bar_config(disable=True)
    assert difference(call(half), call(ours)) < 0.1
