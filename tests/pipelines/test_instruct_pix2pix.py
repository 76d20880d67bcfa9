"""Pictures edited by instruction equal the peer's, bit for bit."""

from __future__ import annotations

import copy
import sys
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
from tasks import align, difference, picture, set_scheduler

import suffuse
from suffuse.errors import ConfigError, InputError

sys.path.append(str(Path(__file__).parent.parent / "adapters"))
from image_weights import image_encoder, ip_adapter, nested

CLASSES = {"sd": "StableDiffusionInstructPix2PixPipeline", "xl": "StableDiffusionXLInstructPix2PixPipeline"}
LONE = {"sd": {"requires_safety_checker": False}, "xl": {"add_watermarker": False}}
OF_EACH_KIND = ["DDIMScheduler", "PNDMScheduler", "HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler"]
"""Deterministic, with memory, of second order, with noise of its own, with few steps."""


@pytest.fixture(autouse=True)
def quiet_peer():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="diffusers.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


@cache
def folder(kind: str) -> Path:
    """A checkpoint written by the peer."""
    path, peer = Path(mkdtemp(prefix="suffuse-")), getattr(diffusers, CLASSES[kind])
    if kind == "xl":
        parts, options = tiny.stable_diffusion_xl(path / "tokenizer", channels=8), {"add_watermarker": False}
    else:
        parts, options = tiny.stable_diffusion(path / "tokenizer"), {"requires_safety_checker": False}
        parts["unet"] = tiny.unet(8)
    peer(**parts, **options).save_pretrained(path / "pipeline")
    return path / "pipeline"


@cache
def pair(kind: str) -> tuple[Any, Any]:
    pipes = tuple(getattr(library, CLASSES[kind]).from_pretrained(folder(kind)) for library in (diffusers, suffuse))
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    align(pipes[0])
    return pipes


def call(pipe: Any, **options: Any) -> Any:
    if options.get("generator") == "list":
        options["generator"] = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    own = {"height": 64, "width": 64} if "XL" in type(pipe).__name__ else {}
    settings = {"prompt": "a cat", "image": picture(), "num_inference_steps": 4, "output_type": "np", "return_dict": False}
    return pipe(**{**settings, **own, "generator": torch.Generator().manual_seed(7), **options})[0]


def same(kind: str, scheduler: str = "DDIMScheduler", **options: Any) -> bool:
    pipes = pair(kind)
    set_scheduler(pipes, scheduler)
    made = []
    for pipe in pipes:
        result = call(pipe, **dict(options))
        # The peer's pipeline for XL returns an object with the latents, whatever was asked for.
        made.append(result)
    return difference(*made) == 0


def seeded(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scheduler", OF_EACH_KIND)
@pytest.mark.parametrize("kind", CLASSES)
def test_every_kind_of_scheduler(kind, scheduler):
    assert same(kind, scheduler)


TENSOR = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
OPTIONS: dict[str, dict[str, Any]] = {
    "no guidance": {"guidance_scale": 1.0},
    "no guidance by the picture": {"image_guidance_scale": 0.9},
    "as much of the picture as there is": {"image_guidance_scale": 1.0},
    "more of the picture": {"image_guidance_scale": 3.5, "guidance_scale": 2.0},
    "negative prompt": {"negative_prompt": "a dog"},
    "two prompts, one picture": {"prompt": ["a cat", "a dog!"]},
    "two prompts, two pictures": {"prompt": ["a cat", "a dog!"], "image": [picture(seed=1), picture(seed=2)]},
    "several": {"num_images_per_prompt": 2},
    "several of two": {"prompt": ["a cat", "a dog!"], "num_images_per_prompt": 2},
    "a generator a picture": {"num_images_per_prompt": 2, "generator": "list"},
    "latents in": {"latents": seeded(1, 4, 32, 32)},
    "latents out": {"output_type": "latent"},
    "pictures out": {"output_type": "pil"},
    "eta": {"eta": 0.7},
    "a tensor": {"image": TENSOR * 2 - 1},
    "latents for a picture": {"image": seeded(1, 4, 32, 32, seed=3)},
}
OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "a picture of another size": ("sd", {"image": picture(40, 72)}),
    "embeddings": (
        "sd",
        {"prompt": None, "prompt_embeds": seeded(1, 77, 32), "negative_prompt_embeds": seeded(1, 77, 32, seed=2)},
    ),
    "a size": ("xl", {"height": 48, "width": 80}),
    "the trained size": ("xl", {"height": None, "width": None}),
    "rescaled": ("xl", {"guidance_rescale": 0.7}),
    "a part of the way": ("xl", {"denoising_end": 0.6, "num_inference_steps": 8}),
    "sizes": ("xl", {"original_size": (512, 256), "crops_coords_top_left": (3, 4), "target_size": (128, 64)}),
    "second prompts": ("xl", {"prompt_2": "a hat", "negative_prompt": "a log"}),
}
CASES = [(kind, OPTIONS[name], name) for kind in CLASSES for name in OPTIONS] + [(*OWN[name], name) for name in OWN]


@pytest.mark.parametrize(("kind", "options", "name"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_every_option(kind, options, name):
    assert same(kind, **options)


def test_latents_of_the_picture_at_the_scale_of_those_denoised():
    peer, ours = pair("xl")
    options = {"is_cosxl_edit": True, "add_watermarker": False}
    set_scheduler(pair("xl"), "EulerDiscreteScheduler")
    others = [type(pipe)(**pipe.components, **options) for pipe in (peer, ours)]
    for pipe in others:
        pipe.set_progress_bar_config(disable=True)
    made = [call(pipe) for pipe in others]
    assert difference(*made) == 0
    assert difference(made[1], call(ours)) > 0


def test_the_setting_is_saved(tmp_path):
    ours = pair("xl")[1]
    other = type(ours)(**ours.components, is_cosxl_edit=True, add_watermarker=False)
    other.save_pretrained(tmp_path / "saved")
    for library in (diffusers, suffuse):
        loaded = getattr(library, CLASSES["xl"]).from_pretrained(tmp_path / "saved")
        assert loaded.is_cosxl_edit if library is diffusers else loaded.config.is_cosxl_edit


@pytest.mark.parametrize("kind", CLASSES)
def test_what_is_written_the_peer_reads(kind, tmp_path):
    ours = pair(kind)[1]
    set_scheduler(pair(kind), "DDIMScheduler")
    ours.save_pretrained(tmp_path / "saved")
    theirs, mine = (library.DiffusionPipeline.from_pretrained(tmp_path / "saved") for library in (diffusers, suffuse))
    assert type(mine) is type(ours)
    align(theirs)
    for pipe in (theirs, mine):
        pipe.set_progress_bar_config(disable=True)
    assert difference(call(theirs), call(mine)) == 0


def test_callbacks_see_what_the_peers_do():
    set_scheduler(pair("sd"), "DDIMScheduler")
    seen: list[list[tuple[int, ...]]] = []

    def run(pipe):
        shapes: list[tuple[int, ...]] = []

        def change(pipe, index, timestep, tensors):
            shapes.extend(tuple(value.shape) for value in tensors.values())
            return {name: value * 0.9 for name, value in tensors.items()}

        made = call(pipe, callback_on_step_end=change, callback_on_step_end_tensor_inputs=["prompt_embeds", "image_latents"])
        seen.append(shapes)
        return made

    assert difference(*(run(pipe) for pipe in pair("sd"))) == 0
    assert seen[0] == seen[1]
    assert seen[0][:2] == [(3, 77, 32), (3, 4, 32, 32)]


@pytest.mark.parametrize("kind", CLASSES)
def test_guidance_may_end_on_the_way(kind):
    _, ours = pair(kind)
    set_scheduler(pair(kind), "DDIMScheduler")
    asked: list[int] = []
    hook = ours.unet.register_forward_pre_hook(lambda net, given: asked.append(len(given[0])))

    def change(pipe, index, timestep, tensors):
        pipe._guidance_scale = 1.0

    try:
        made = call(ours, callback_on_step_end=change)
    finally:
        hook.remove()
    assert asked == [3, 1, 1, 1]
    assert np.isfinite(made).all()
    assert ours.image_guidance_scale == 1.5


@pytest.mark.parametrize("kind", CLASSES)
def test_a_run_goes_on_and_is_forked(kind, tmp_path):
    ours = pair(kind)[1]
    set_scheduler(pair(kind), "EulerAncestralDiscreteScheduler")
    made = call(ours, save_run=tmp_path / "{step}.safetensors")
    assert difference(ours(resume=tmp_path / "2.safetensors")[0], made) == 0
    assert difference(ours(resume=tmp_path / "2.safetensors", image_guidance_scale=4.0)[0], made) > 0


@pytest.mark.parametrize("kind", CLASSES)
def test_a_seed_draws_each_picture_as_it_would_alone(kind):
    ours = pair(kind)[1]
    set_scheduler(pair(kind), "DDIMScheduler")
    both = call(ours, generator=None, seed=[5, 6], num_images_per_prompt=2)
    assert difference(both[1:], call(ours, generator=None, seed=6)) < 1e-4


def test_weights_of_half_precision():
    half = suffuse.DiffusionPipeline.from_pretrained(folder("sd"), torch_dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert np.isfinite(call(half)).all()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no picture": ({"image": None}, "image is no picture"),
    "more pictures than prompts": ({"image": [picture()] * 2}, "image: 2 given for 1 pictures"),
    "pictures that do not divide": ({"image": [picture()] * 2, "prompt": ["a", "b", "c"]}, "image: 2 given for 3 pictures"),
    "a scale that is no number": ({"image_guidance_scale": "much"}, "image_guidance_scale must be a number"),
    "latents of another shape": ({"latents": seeded(1, 4, 8, 8)}, "latents has the wrong shape"),
    "generators of another number": ({"generator": "list"}, "generator: 2 given for 1 pictures"),
    "a picture to take after": ({"ip_adapter_image": picture()}, "IP-Adapter"),
}


@pytest.mark.parametrize("name", BAD)
def test_is_told_and_draws_nothing(name):
    options, message = BAD[name]
    set_scheduler(pair("sd"), "DDIMScheduler")
    generator = torch.Generator().manual_seed(7)
    state = generator.get_state()
    with pytest.raises(InputError, match=message):
        call(pair("sd")[1], **{"generator": generator} | options)
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_unet_of_another_task_is_refused(kind):
    options = tiny.xl_options() if kind == "xl" else {}
    other = suffuse.UNet2DConditionModel.from_config(tiny.unet(4, **options).config)
    with pytest.raises(ConfigError, match=r"in_channels=4(.|\n)*expected: 8"):
        type(pair(kind)[1])(**pair(kind)[1].components | {"unet": other})


@pytest.mark.parametrize("kind", CLASSES)
def test_the_scheduler_is_taken_as_it_is(kind):
    made = [library.DDIMScheduler(clip_sample=True, steps_offset=0) for library in (diffusers, suffuse)]
    pipes = [
        type(pipe)(**pipe.components | {"scheduler": scheduler}, **LONE[kind])
        for pipe, scheduler in zip(pair(kind), made, strict=True)
    ]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    assert pipes[1].scheduler is made[1]
    assert difference(*(call(pipe) for pipe in pipes)) == 0


def test_a_controlnet_and_an_adapter_come_along():
    ours = pair("sd")[1]
    set_scheduler(pair("sd"), "DDIMScheduler")
    net = suffuse.ControlNetModel.from_config(tiny.controlnet().config).eval()
    net.load_state_dict(tiny.controlnet().state_dict())
    plain, none = call(ours), call(ours, controlnet=net, control_image=picture(seed=3), controlnet_conditioning_scale=0.0)
    assert difference(plain, none) == 0
    assert difference(plain, call(ours, controlnet=net, control_image=picture(seed=3))) > 0
    with pytest.raises(InputError, match="control_image is given and no controlnet"):
        call(ours, control_image=picture())


@pytest.mark.parametrize("kind", ["plain", "plus"])
def test_a_picture_to_take_after(kind):
    peer, ours = pipes = pair("sd")
    set_scheduler(pipes, "DDIMScheduler")
    weights = ip_adapter(peer.unet, kind)
    for pipe in pipes:
        pipe.register_modules(image_encoder=copy.deepcopy(image_encoder()))
    peer.load_ip_adapter(nested(weights), "", "")
    ours.load_ip_adapter(weights, "", "")
    align(peer)
    try:
        made = [call(pipe, ip_adapter_image=picture(40, 50, seed=9)) for pipe in pipes]
        alone = [call(pipe, ip_adapter_image=picture(40, 50, seed=9), guidance_scale=1.0) for pipe in pipes]
    finally:
        for pipe in pipes:
            pipe.unload_ip_adapter()
            pipe.register_modules(image_encoder=None)
    assert difference(*alone) == 0
    assert difference(*made) == 0
    assert difference(made[1], call(ours)) > 0
