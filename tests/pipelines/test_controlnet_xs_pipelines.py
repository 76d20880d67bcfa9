"""ControlNet-XS: a UNet with a control side; pictures equal the peer's bit for bit, folders go both ways."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import diffusers
import pytest
import tiny
import torch
from tasks import align, difference, picture

import suffuse
from suffuse.diffusion.guidance import ClassifierFreeGuidance
from suffuse.errors import AdapterError, ConfigError, InputError, UnknownArgumentError
from suffuse.noise import CounterNoise

NAMES = {"text": "StableDiffusionControlNetXSPipeline", "xl text": "StableDiffusionXLControlNetXSPipeline"}


@pytest.fixture(autouse=True)
def quiet_peer():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="diffusers.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def parts(kind: str, folder: Path) -> dict[str, Any]:
    """Components of a pipeline, in the peer's classes; the UNet has no control side yet."""
    options = tiny.xl_options() | {"transformer_layers_per_block": (1, 1)} if "xl" in kind else {}
    made = tiny.stable_diffusion_xl(folder) if "xl" in kind else tiny.stable_diffusion(folder)
    unet = tiny.unet(layers_per_block=2, **options)
    return {**made, "unet": unet, "controlnet": tiny.controlnet_xs(unet)}


@cache
def pair(kind: str) -> tuple[Any, Any]:
    """(the peer's pipeline, ours), of one folder that the peer wrote."""
    folder = Path(mkdtemp(prefix="suffuse-"))
    settings = {"add_watermarker": False} if "xl" in kind else {"requires_safety_checker": False}
    getattr(diffusers, NAMES[kind])(**parts(kind, folder / "tokenizer"), **settings).save_pretrained(folder / "pipeline")
    pipes = [getattr(library, NAMES[kind]).from_pretrained(folder / "pipeline", **settings) for library in (diffusers, suffuse)]
    align(pipes[0])
    return pipes[0], pipes[1]


def call(pipe: Any, **options: Any) -> Any:
    settings = {"prompt": "a cat", "image": picture(64, 48), "num_inference_steps": 4, "output_type": "np", "return_dict": False}
    return pipe(**{**settings, "generator": torch.Generator().manual_seed(7), **options})[0]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no guidance": {"guidance_scale": 1.0},
    "less of it": {"controlnet_conditioning_scale": 0.4},
    "none of it": {"controlnet_conditioning_scale": 0.0},
    "the first half": {"control_guidance_end": 0.5},
    "the second half": {"control_guidance_start": 0.5},
    "two prompts": {"prompt": ["a cat", "a dog!"]},
    "two prompts, two controls": {"prompt": ["a cat", "a dog!"], "image": [picture(seed=1), picture(seed=2)]},
    "two pictures each": {"prompt": ["a cat", "dog"], "image": [picture(seed=1), picture(seed=2)], "num_images_per_prompt": 2},
    "another size": {"height": 80, "width": 64},
    "a tensor": {"image": torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))},
    "negative prompt": {"negative_prompt": "a dog"},
    "eta": {"eta": 0.7},
    "latents in": {"latents": torch.randn(1, 4, 32, 24, generator=torch.Generator().manual_seed(5))},
    "latents out": {"output_type": "latent"},
    "tensors out": {"output_type": "pt"},
}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("option", OPTIONS)
def test_pictures_equal_the_peers(kind, option):
    peer, ours = pair(kind)
    assert difference(call(peer, **OPTIONS[option]), call(ours, **OPTIONS[option])) == 0


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "PNDMScheduler"])
@pytest.mark.parametrize("kind", NAMES)
def test_other_schedulers(kind, scheduler):
    pipes = [type(pipe)(**pipe.components) for pipe in pair(kind)] if "xl" in kind else pair(kind)
    before = [pipe.scheduler for pipe in pipes]
    for pipe, library in zip(pipes, (diffusers, suffuse), strict=True):
        pipe.scheduler = getattr(library, scheduler).from_config(tiny.scheduler().config)
    options = {"control_guidance_start": 0.2, "control_guidance_end": 0.9}
    made = [call(pipe, **options) for pipe in pipes]
    for pipe, scheduler in zip(pipes, before, strict=True):
        pipe.scheduler = scheduler
    assert difference(*made) == 0


@pytest.mark.parametrize("kind", NAMES)
def test_a_unet_and_a_control_side_become_one(kind, tmp_path):
    made = parts(kind, tmp_path / "tokenizer")
    for name in ("unet", "controlnet"):
        made[name].save_pretrained(tmp_path / name)
    own = {"unet": suffuse.UNet2DConditionModel, "controlnet": suffuse.ControlNetXSAdapter}
    loaded = {name: cls.from_pretrained(tmp_path / name) for name, cls in own.items()}
    ours = type(pair(kind)[1])(
        **pair(kind)[1].components | loaded, **({} if "xl" in kind else {"requires_safety_checker": False})
    )
    assert isinstance(ours.unet, suffuse.UNetControlNetXSModel)
    assert ours.unet.base_conv_in.weight.data_ptr() == loaded["unet"].conv_in.weight.data_ptr()
    assert difference(call(ours), call(pair(kind)[0])) == 0


@pytest.mark.parametrize("kind", NAMES)
def test_the_peer_loads_our_folders(kind, tmp_path):
    peer, ours = pair(kind)
    ours.save_pretrained(tmp_path)
    again = getattr(diffusers, NAMES[kind]).from_pretrained(tmp_path)
    align(again)
    if "xl" in kind:
        again.watermark = None
    assert difference(call(again), call(peer)) == 0
    assert type(suffuse.DiffusionPipeline.from_pretrained(tmp_path)) is type(ours)


@pytest.mark.parametrize("kind", NAMES)
def test_a_run_goes_on_and_each_picture_has_its_noise(kind, tmp_path):
    _, ours = pair(kind)
    made = call(ours, generator=None, seed=3, save_run=tmp_path / "{step}.safetensors", num_images_per_prompt=2)
    for file in sorted(tmp_path.iterdir()):
        assert difference(ours(resume=file)[0], made) == 0, file.name
    assert difference(made[1:], call(ours, generator=CounterNoise(3, 1))) < 1e-4


@pytest.mark.parametrize("kind", NAMES)
def test_guidance_is_a_value(kind):
    _, ours = pair(kind)
    assert difference(call(ours, guidance=ClassifierFreeGuidance(3.0)), call(ours, guidance_scale=3.0)) == 0


def test_freeu_equals_the_peers():
    peer, ours = pair("text")
    for pipe in (peer, ours):
        pipe.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    made = [call(pipe) for pipe in (peer, ours)]
    for pipe in (peer, ours):
        pipe.unet.disable_freeu()
    assert difference(*made) == 0
    assert difference(made[0], call(peer)) > 0


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no picture": ({"image": None}, InputError, "image"),
    "pictures for other prompts": ({"image": [picture()] * 3}, InputError, "image: 3 pictures given for 1 prompt"),
    "no part of the way": ({"control_guidance_start": 0.6, "control_guidance_end": 0.5}, InputError, "is not before"),
    "scales for other sides": ({"controlnet_conditioning_scale": [1.0, 2.0]}, InputError, "2 given for 1 control side"),
    "a picture in gray": ({"image": torch.rand(1, 2, 64, 64)}, InputError, "image"),
    "a ControlNet besides": ({"control_image": picture()}, UnknownArgumentError, "control_image"),
    "no such keyword": ({"guess_mode": True}, UnknownArgumentError, "guess_mode"),
    "attention": ({"cross_attention_kwargs": {"scal": 1}}, UnknownArgumentError, "scal"),
    "no prompt": ({"prompt": None}, InputError, "prompt and prompt_embeds are both missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case):
    options, error, message = BAD[case]
    generator = torch.Generator().manual_seed(7)
    before = generator.get_state()
    with pytest.raises(error, match=message):
        call(pair("text")[1], generator=generator, **options)
    assert torch.equal(generator.get_state(), before)


def test_from_a_pipeline_without_a_control_side():
    _, ours = pair("text")
    parts = {name: value for name, value in ours.components.items() if name != "controlnet"}
    parts["unet"] = suffuse.UNet2DConditionModel.from_config(tiny.unet(layers_per_block=2).config)
    plain = suffuse.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    made = suffuse.StableDiffusionControlNetXSPipeline.from_pipe(plain, controlnet=ours.controlnet)
    assert isinstance(made.unet, suffuse.UNetControlNetXSModel)
    assert call(made, num_inference_steps=1).shape == (1, 64, 48, 3)
    assert isinstance(plain.unet, suffuse.UNet2DConditionModel)


def test_a_lora_of_a_plain_unet_is_refused_and_changes_nothing():
    _, ours = pair("text")
    before, layer = call(ours), "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = {f"{layer}.lora_A.weight": torch.ones(4, 64), f"{layer}.lora_B.weight": torch.ones(64, 4)}
    with pytest.raises(AdapterError, match="0 of 1 layers do"):
        ours.load_lora_weights(factors)
    assert difference(call(ours), before) == 0


def test_a_callback_changes_the_way():
    _, ours = pair("text")
    told = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}

    def forget(pipe, index, timestep, tensors):
        return {"prompt_embeds": torch.zeros_like(tensors["prompt_embeds"])}

    assert difference(call(ours, callback_on_step_end=forget, **told), call(ours)) > 0
    assert difference(call(ours, callback_on_step_end=lambda *_: None, **told), call(ours)) == 0


def test_a_control_side_of_another_unet_is_refused():
    _, ours = pair("text")
    other = suffuse.ControlNetXSAdapter.from_unet(
        suffuse.UNet2DConditionModel.from_config(tiny.unet(layers_per_block=2, block_out_channels=(32, 32)).config),
        block_out_channels=[8, 16],
        num_attention_heads=[2, 4],
    )
    unet = suffuse.UNet2DConditionModel.from_config(tiny.unet(layers_per_block=2).config)
    with pytest.raises(ConfigError, match=r"made for another UNet(.|\n)*tensors do not fit"):
        type(ours)(**ours.components | {"unet": unet, "controlnet": other}, requires_safety_checker=False)
