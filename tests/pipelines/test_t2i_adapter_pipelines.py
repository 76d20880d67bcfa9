"""Pictures drawn with T2I-Adapters equal the peer's, bit for bit."""

from __future__ import annotations

import warnings
from functools import cache

import diffusers
import pytest
import tiny
import torch
from tasks import align, difference, folder, picture, set_scheduler

import suffuse
from suffuse.errors import ConfigError, InputError

KIND = {"text": "full", "xl text": "xl"}
"""Which adapter fits: the first block of a UNet for XL has no attention, and takes features after it halved."""
BLOCKS = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
CLASSES = {"text": "StableDiffusionAdapterPipeline", "xl text": "StableDiffusionXLAdapterPipeline"}
ADAPTERS = {
    "full": {"channels": [32, 64], "downscale_factor": 2},
    "light": {"channels": [32, 64], "downscale_factor": 2, "adapter_type": "light_adapter"},
    "xl": {"channels": [32, 64], "downscale_factor": 4, "adapter_type": "full_adapter_xl"},
    "gray": {"channels": [32, 64], "downscale_factor": 2, "in_channels": 1},
}
SETTINGS = {"prompt": "a cat", "num_inference_steps": 4, "output_type": "np", "return_dict": False}


@pytest.fixture(autouse=True)
def quiet_peer():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="diffusers.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def adapter(kind: str, seed: int) -> diffusers.T2IAdapter:
    torch.manual_seed(seed)
    return diffusers.T2IAdapter(num_res_blocks=1, **ADAPTERS[kind]).eval()


@cache
def pair(task: str, *kinds: str):
    """(the peer's pipeline, ours) with these adapters."""
    made = []
    for library in (diffusers, suffuse):
        own = []
        for seed, kind in enumerate(kinds):
            theirs = adapter(kind, seed)
            mine = getattr(library, "T2IAdapter")(num_res_blocks=1, **ADAPTERS[kind]).eval()  # noqa: B009
            mine.load_state_dict(theirs.state_dict())
            own.append(mine)
        joined = own[0] if len(own) == 1 else library.MultiAdapter(own)
        pipe = getattr(library, CLASSES[task]).from_pretrained(folder(task), adapter=joined)
        if task == "text":
            unet = tiny.unet(**BLOCKS)
            pipe.unet = library.UNet2DConditionModel.from_config(unet.config).eval()
            pipe.unet.load_state_dict(unet.state_dict())
        pipe.set_progress_bar_config(disable=True)
        made.append(pipe)
    align(made[0])
    return tuple(made)


def call(pipe, **options):
    return pipe(**{**SETTINGS, "image": picture(), "generator": torch.Generator().manual_seed(7), **options})[0]


def same(pipes, **options):
    """Whether latents are equal, and pictures but for the last bit: here the peer multiplies by 1 / scaling_factor before it
    decodes, where its other pipelines divide.
    """
    latents = [call(pipe, **options, output_type="latent") for pipe in pipes]
    return difference(*latents) == 0 and difference(*(call(pipe, **options) for pipe in pipes)) < 1e-5


OPTIONS = {
    "plain": {},
    "no guidance": {"guidance_scale": 1.0},
    "scaled": {"adapter_conditioning_scale": 0.4},
    "negative": {"negative_prompt": "a dog"},
    "several": {"num_images_per_prompt": 2},
    "size": {"height": 48, "width": 64},
    "picture of another size": {"image": picture(73, 57)},
    "as tensor": {"image": torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))},
    "two prompts, two pictures": {"prompt": ["a cat", "a dog"], "image": [picture(seed=1), picture(seed=2)]},
}


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "HeunDiscreteScheduler", "PNDMScheduler"])
@pytest.mark.parametrize("task", CLASSES)
def test_schedulers_of_each_kind(task, scheduler):
    pipes = pair(task, KIND[task])
    set_scheduler(pipes, scheduler)
    assert same(pipes)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("task", CLASSES)
def test_every_option(task, option):
    pipes = pair(task, KIND[task])
    set_scheduler(pipes, "DDIMScheduler")
    assert same(pipes, **OPTIONS[option])


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "HeunDiscreteScheduler", "PNDMScheduler"])
def test_features_in_the_first_part_of_the_steps(scheduler):
    pipes = pair("xl text", "xl")
    set_scheduler(pipes, scheduler)
    made = [call(pipe, adapter_conditioning_factor=0.5) for pipe in pipes]
    assert difference(*made) == 0
    assert difference(made[1], call(pipes[1])) > 0


@pytest.mark.parametrize("kind", ["light", "gray"])
def test_every_kind_of_adapter(kind):
    pipes = pair("text", kind)
    set_scheduler(pipes, "DDIMScheduler")
    gray = kind == "gray"
    images = {"image": picture(mode="L" if gray else "RGB")}
    # The strides of one gray channel say nothing about its layout, and what they say decides the last bit.
    assert difference(*(call(pipe, **images) for pipe in pipes)) < 1e-4 if gray else same(pipes, **images)
    assert same(pipes, image=torch.rand(1, 1 if gray else 3, 64, 64, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("task", CLASSES)
def test_two_adapters(task):
    pipes = pair(task, KIND[task], KIND[task])
    set_scheduler(pipes, "DDIMScheduler")
    images = {"image": [picture(seed=1), picture(seed=2)], "adapter_conditioning_scale": [0.7, 0.4]}
    assert same(pipes, **images)


def test_each_picture_goes_with_its_prompt():
    pipes = pair("text", "full")
    set_scheduler(pipes, "DDIMScheduler")
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3, 4)]
    both = call(
        pipes[1],
        prompt=["a cat", "a dog"],
        image=[picture(seed=1), picture(seed=2)],
        num_images_per_prompt=2,
        generator=generators,
    )
    dog = call(pipes[1], prompt="a dog", image=picture(seed=2), generator=torch.Generator().manual_seed(3))
    assert difference(both[2:3], dog) < 1e-4


def test_a_pipeline_is_saved_with_its_adapter(tmp_path):
    pipes = pair("text", "full")
    set_scheduler(pipes, "DDIMScheduler")
    pipes[1].save_pretrained(tmp_path / "saved")
    theirs = diffusers.StableDiffusionAdapterPipeline.from_pretrained(tmp_path / "saved")
    theirs.set_progress_bar_config(disable=True)
    align(theirs)
    ours = suffuse.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert type(ours) is suffuse.StableDiffusionAdapterPipeline
    wanted = call(pipes[1])
    assert same((theirs, ours))
    assert difference(call(ours), wanted) == 0


def test_a_pipeline_is_saved_with_two_adapters(tmp_path):
    pipe = pair("text", "full", "full")[1]
    set_scheduler(pair("text", "full", "full"), "DDIMScheduler")
    pipe.save_pretrained(tmp_path / "saved")
    assert {"adapter", "adapter_1"} <= {path.name for path in (tmp_path / "saved").iterdir()}
    ours = suffuse.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    images = {"image": [picture(seed=1), picture(seed=2)]}
    assert difference(call(ours, **images), call(pipe, **images)) == 0
    peers = diffusers.MultiAdapter.from_pretrained(str(tmp_path / "saved" / "adapter"))
    assert all(torch.equal(value, pipe.adapter.state_dict()[name]) for name, value in peers.state_dict().items())


def test_a_run_goes_on(tmp_path):
    pipe = pair("xl text", "xl")[1]
    set_scheduler(pair("xl text", "xl"), "DDIMScheduler")
    made = call(pipe, adapter_conditioning_factor=0.5, save_run=tmp_path / "{step}.safetensors")
    for step in (1, 3):
        assert difference(pipe(resume=tmp_path / f"{step}.safetensors")[0], made) == 0


def test_what_cannot_be():
    one, two = pair("text", "full")[1], pair("text", "full", "full")[1]
    with pytest.raises(InputError, match="image does not go with 2 adapters"):
        call(two, image=picture())
    with pytest.raises(InputError, match="adapter_conditioning_scale: 3 given for 2 adapters"):
        call(two, image=[picture()] * 2, adapter_conditioning_scale=[1, 2, 3])
    with pytest.raises(InputError, match="adapter_conditioning_factor=2 is out of range"):
        call(pair("xl text", "xl")[1], adapter_conditioning_factor=2)
    with pytest.raises(InputError, match="image: 3 given for 1 prompts"):
        call(one, image=[picture()] * 3)
    with pytest.raises(ConfigError, match="disagree"):
        suffuse.StableDiffusionAdapterPipeline(
            **{**one.components, "adapter": suffuse.T2IAdapter()}, requires_safety_checker=False
        )


def test_an_adapter_for_another_autoencoder_is_refused():
    pipe = pair("text", "full")[1]
    wrong = suffuse.T2IAdapter(num_res_blocks=1, channels=[32, 64], downscale_factor=4).eval()
    with pytest.raises(InputError, match=r"features of other sizes(.|\n)*\(16, 16\) for the block 0, which has \(32, 32\)"):
        suffuse.StableDiffusionAdapterPipeline.from_pipe(pipe, adapter=wrong)("a cat", image=picture())
