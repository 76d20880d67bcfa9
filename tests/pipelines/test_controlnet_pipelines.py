"""ControlNets, one and several, in every task: pictures equal the peer's bit for bit, and what cannot be meant is told."""

from __future__ import annotations

import warnings
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from tasks import ONE_NET, TWO_NETS, align, call, difference, mask, pair, picture, set_scheduler

import suffuse
from suffuse.diffusion.control import Control
from suffuse.errors import ConfigError, InputError

OF_EACH_KIND = ["DDIMScheduler", "PNDMScheduler", "HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler"]
"""Deterministic, with memory, of second order, with noise of its own, with few steps."""


@pytest.fixture(autouse=True)
def quiet_peer():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="diffusers.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def same(task: str, scheduler: str = "DDIMScheduler", **options: Any) -> bool:
    pipes = pair(task)
    set_scheduler(pipes, scheduler)
    return difference(*(call(pipe, task, **{"num_inference_steps": 2, **with_generators(options)}) for pipe in pipes)) == 0


def with_generators(options: dict[str, Any]) -> dict[str, Any]:
    if options.get("generator") == "list":
        return options | {"generator": [torch.Generator().manual_seed(seed) for seed in (3, 4)]}
    return options


def seeded(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scheduler", OF_EACH_KIND)
@pytest.mark.parametrize("task", [*ONE_NET, "controls text", "controls xl inpaint"])
def test_every_kind_of_scheduler_in_every_task(task, scheduler):
    assert same(task, scheduler, num_inference_steps=4)


OPTIONS: dict[str, dict[str, Any]] = {
    "no guidance": {"guidance_scale": 1.0},
    "guessing": {"guess_mode": True, "num_images_per_prompt": 2},
    "guessing without guidance": {"guess_mode": True, "guidance_scale": 1.0},
    "a part of the way": {"control_guidance_start": 0.2, "control_guidance_end": 0.7, "num_inference_steps": 6},
    "no say": {"controlnet_conditioning_scale": 0.0},
    "more say": {"controlnet_conditioning_scale": 1.7, "negative_prompt": "a dog"},
    "two prompts": {"prompt": ["a cat", "a dog!"], "negative_prompt": ["one", "another"], "num_images_per_prompt": 2},
    "a generator a picture": {"num_images_per_prompt": 2, "generator": "list"},
    "latents out": {"output_type": "latent"},
    "another size": {"height": 48, "width": 80},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("task", ONE_NET)
def test_options_of_one_net(task, option):
    assert same(task, "EulerDiscreteScheduler", **OPTIONS[option])


SEVERAL: dict[str, dict[str, Any]] = {
    "guessing": {"guess_mode": True, "num_images_per_prompt": 2},
    "each its scale": {"controlnet_conditioning_scale": [0.4, 1.3]},
    "each its part of the way": {
        "control_guidance_start": [0.0, 0.4],
        "control_guidance_end": [0.5, 0.9],
        "num_inference_steps": 6,
    },
    "one ends early": {"control_guidance_end": [0.3, 1.0], "num_inference_steps": 6, "guess_mode": True},
    "two prompts": {"prompt": ["a cat", "a dog!"], "num_images_per_prompt": 2},
}


@pytest.mark.parametrize("option", SEVERAL)
@pytest.mark.parametrize("task", TWO_NETS)
def test_options_of_two_nets(task, option):
    assert same(task, "EulerDiscreteScheduler", **SEVERAL[option])


def control(task: str, value: Any) -> dict[str, Any]:
    return {"image" if "text" in task else "control_image": value}


PROMPTS = {"prompt": ["a cat", "a dog!"], "num_images_per_prompt": 2}
TWO = [picture(seed=5), picture(seed=6)]
ARRAYS = np.stack([np.asarray(one, dtype=np.float32) / 255 for one in TWO])
FORMS: dict[str, Any] = {
    "a list": TWO,
    "an array": ARRAYS,
    "arrays": list(ARRAYS),
    "a tensor": torch.from_numpy(ARRAYS.transpose(0, 3, 1, 2)),
    "a tensor of one": torch.from_numpy(ARRAYS.transpose(0, 3, 1, 2))[:1],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("task", ["control text", "control xl text", "control image"])
def test_a_control_picture_for_each_prompt(task, form):
    options = {"image": [picture(seed=1), picture(seed=2)]} if "image" in task else {}
    assert same(task, **PROMPTS, **options | control(task, FORMS[form]))


@pytest.mark.parametrize("task", ["controls text", "controls xl image"])
def test_control_pictures_for_each_prompt_and_net(task):
    other = torch.from_numpy(ARRAYS.transpose(0, 3, 1, 2))
    assert same(task, **PROMPTS, **control(task, [other, picture(seed=7)]))


def test_control_pictures_of_several_nets_prompt_by_prompt():
    nested = [[picture(seed=1), picture(seed=2)], [picture(seed=3), picture(seed=4)]]
    assert same("controls text", **PROMPTS, image=nested)
    # The peer's others take them net by net only.
    _, ours = pair("controls xl text")
    by_net = [torch.from_numpy(np.stack([np.asarray(row[i]) for row in nested])).permute(0, 3, 1, 2) / 255 for i in range(2)]
    made = call(ours, "controls xl text", **PROMPTS, image=nested)
    assert difference(made, call(ours, "controls xl text", **PROMPTS, image=by_net)) == 0


LARGE = {"image": picture(96, 64), "mask_image": mask(96, 64), "padding_mask_crop": 4, "output_type": "pil"}


@pytest.mark.parametrize("task", ["control inpaint", "control xl inpaint", "control inpaint9"])
def test_a_mask_of_a_large_picture_is_painted_in_a_crop(task):
    assert same(task, **LARGE, control_image=picture(96, 64, seed=3))


def test_a_crop_is_painted_under_control_of_several_nets():
    """The peer refuses the list of control pictures."""
    one, two = "control inpaint", "controls inpaint"
    for task in (one, two):
        set_scheduler(pair(task), "DDIMScheduler")
    shown = picture(96, 64, seed=3)
    alone = call(pair(one)[1], one, **LARGE, control_image=shown)
    settings = {"control_image": [shown, shown], "controlnet_conditioning_scale": [0.5, 0.0]}
    assert difference(alone, call(pair(two)[1], two, **LARGE, **settings)) == 0


@pytest.mark.parametrize("task", ["control inpaint", "control xl inpaint"])
def test_a_picture_is_painted_at_its_own_size(task):
    own = {"image": picture(48, 80), "mask_image": mask(48, 80), "control_image": picture(48, 80, seed=3)}
    assert same(task, **own, height=None, width=None, strength=0.6)


XL: dict[str, dict[str, Any]] = {
    "a part of the whole way": {"denoising_end": 0.6, "control_guidance_end": 0.4, "num_inference_steps": 10},
    "sizes": {"original_size": (512, 256), "crops_coords_top_left": (3, 4), "target_size": (128, 64)},
    "second prompts": {"prompt_2": "a hat", "negative_prompt": "a log"},
}


@pytest.mark.parametrize("option", XL)
@pytest.mark.parametrize("task", ["control xl text", "control xl inpaint"])
def test_options_of_stable_diffusion_xl(task, option):
    assert same(task, **XL[option])


@pytest.mark.parametrize("task", ["control image", "control xl image", "control text", "control inpaint"])
def test_latents_to_begin_with(task):
    assert same(task, latents=seeded(1, 4, 32, 32))


def test_a_callback_may_drop_the_unconditional_half():
    _, ours = pair("control text")
    set_scheduler(pair("control text"), "DDIMScheduler")
    seen = []

    def change(pipe, index, timestep, tensors):
        seen.append(len(tensors["prompt_embeds"]))
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]}

    made = call(ours, "control text", callback_on_step_end=change, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert seen == [2, 1, 1, 1]
    assert bool(made.isfinite().all())


# ------------------------------------------------------------ nets that pool


def pooled(task: str, *pooling: bool) -> tuple[Any, Any]:
    """The pipelines of a task with nets of which some hand on the mean over positions."""
    options = tiny.xl_options() if "xl" in task else {}
    made = [tiny.controlnet(16 + index, **options) for index in range(len(pooling))]
    theirs, ours = (
        [library.ControlNetModel.from_config(net.config, global_pool_conditions=p) for net, p in zip(made, pooling, strict=True)]
        for library in (diffusers, suffuse)
    )
    for nets in (theirs, ours):
        for net, weights in zip(nets, made, strict=True):
            net.eval().load_state_dict(weights.state_dict())
    pipes = []
    for pipe, nets in zip(pair(task), (theirs, ours), strict=True):
        watermark = {"add_watermarker": False} if "xl" in task else {"requires_safety_checker": False}
        made = type(pipe)(**pipe.components | {"controlnet": nets if len(nets) > 1 else nets[0]}, **watermark)
        made.set_progress_bar_config(disable=True)
        pipes.append(made)
    align(pipes[0])
    return pipes[0], pipes[1]


@pytest.mark.parametrize("task", ["control text", "control image", "control inpaint", "control xl text", "control xl image"])
def test_a_net_that_pools_leaves_the_unconditional_branch_alone(task):
    set_scheduler(pair(task), "DDIMScheduler")
    peer, ours = pooled(task, True)
    assert difference(call(peer, task), call(ours, task)) == 0
    assert difference(call(ours, task), call(ours, task, guess_mode=True)) == 0


def test_a_net_that_pools_does_so_in_xl_inpainting_too():
    """The peer's pipeline for it does not ask the net."""
    task = "control xl inpaint"
    set_scheduler(pair(task), "DDIMScheduler")
    peer, ours = pooled(task, True)
    assert difference(call(peer, task), call(ours, task)) > 0
    assert difference(call(peer, task, guess_mode=True), call(ours, task)) == 0


def test_a_net_that_pools_says_nothing_of_the_nets_beside_it():
    """The peer lets the first net decide for all."""
    task = "controls text"
    set_scheduler(pair(task), "DDIMScheduler")
    peer, ours = pooled(task, False, True)
    assert difference(call(peer, task, guess_mode=True), call(ours, task, guess_mode=True)) == 0
    assert difference(call(peer, task), call(ours, task)) > 0
    first, second = ours.controlnet.nets
    turned = type(ours)(**ours.components | {"controlnet": [second, first]}, requires_safety_checker=False)
    turned.set_progress_bar_config(disable=True)
    shown = [picture(seed=4), picture(seed=3)]
    assert difference(call(ours, task), call(turned, task, image=shown)) < 1e-5


# ------------------------------------------------------------ what a step costs


def test_a_net_that_has_no_say_is_not_asked():
    _, ours = pair("controls text")
    set_scheduler(pair("controls text"), "DDIMScheduler")
    asked: list[list[int]] = [[], []]
    hooks = [
        net.register_forward_pre_hook(lambda net, given, index=index: asked[index].append(len(given[0])))
        for index, net in enumerate(ours.controlnet.nets)
    ]
    try:
        call(ours, "controls text", control_guidance_end=[0.5, 1.0], controlnet_conditioning_scale=[1.0, 0.0])
    finally:
        for hook in hooks:
            hook.remove()
    assert asked == [[2, 2], []]


# ------------------------------------------------------------ a control is a value


def test_any_pipeline_of_the_family_can_be_given_a_control():
    _, ours = pair("control text")
    set_scheduler(pair("control text"), "DDIMScheduler")

    class Shown(suffuse.StableDiffusionPipeline):
        def conditioners(self, conditioning):
            pictures = ours.prepare_image(picture(seed=3), 64, 64, 1, 1, self.device, self.dtype)
            return [*super().conditioners(conditioning), Control(ours.controlnet, pictures, self._run.scheduler)]

    plain = Shown.from_pipe(ours)
    plain.set_progress_bar_config(disable=True)
    options = {"prompt": "a cat", "height": 64, "width": 64, "num_inference_steps": 4, "output_type": "pt"}
    made = plain(**options, generator=torch.Generator().manual_seed(7)).images
    assert difference(made, call(ours, "control text")) == 0


@pytest.mark.parametrize("guess", [False, True])
def test_several_nets_in_one_model_add_what_the_peers_add(guess):
    peer, ours = (pipe.controlnet for pipe in pair("controls text"))
    given = {
        "sample": seeded(2, 4, 16, 16),
        "timestep": torch.tensor(10),
        "encoder_hidden_states": seeded(2, 77, 32),
        "controlnet_cond": [seeded(2, 3, 32, 32), seeded(2, 3, 32, 32, seed=2)],
        "conditioning_scale": [0.5, 1.5],
        "guess_mode": guess,
    }
    with torch.no_grad():
        theirs, mine = peer(**given, return_dict=False), ours(**given, return_dict=False)
        named = ours(**given)
    assert all(difference(a, b) == 0 for a, b in zip([*theirs[0], theirs[1]], [*mine[0], mine[1]], strict=True))
    assert difference(named.mid_block_res_sample, mine[1]) == 0
    with pytest.raises(InputError, match="conditioning_scale: 1 given for 2 ControlNets"):
        ours(**given | {"conditioning_scale": [1.0]})


@pytest.mark.parametrize("task", ["control text", "control inpaint"])
def test_control_pictures_are_prepared_as_the_peer_does(task):
    peer, ours = pair(task)
    name = "prepare_image" if "text" in task else "prepare_control_image"
    frame = {"image": picture(40, 72), "width": 64, "height": 48, "batch_size": 2, "num_images_per_prompt": 2}
    where = {"device": torch.device("cpu"), "dtype": torch.float32, "do_classifier_free_guidance": True}
    if "inpaint" in task:
        where |= {"crops_coords": (4, 4, 36, 28), "resize_mode": "fill"}
    for guess in (False, True):
        theirs, mine = (getattr(pipe, name)(**frame, **where, guess_mode=guess) for pipe in (peer, ours))
        assert difference(theirs, mine) == 0


# ------------------------------------------------------------ what cannot be meant

WRONG_NUMBER = "controlnet_conditioning_scale: 3 given for 2 ControlNets"
BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "no picture": ("control text", {"image": None}, "image is no picture"),
    "one picture for two nets": ("controls text", {"image": picture()}, "image does not go with 2 ControlNets"),
    "three pictures for two nets": ("controls image", {"control_image": [picture()] * 3}, "found: 3 pictures"),
    "a list of another length within": (
        "controls text",
        {"image": [[picture()] * 2, [picture()] * 3], "prompt": ["a", "b"]},
        "found: 3 pictures",
    ),
    "two pictures for one prompt": ("control text", {"image": TWO}, "image: 2 pictures given for 1 prompt"),
    "two pictures for three prompts": (
        "control xl inpaint",
        {"control_image": TWO, "prompt": ["a", "b", "c"]},
        "control_image: 2 pictures given for 3 prompts",
    ),
    "scales of another number": ("controls text", {"controlnet_conditioning_scale": [1.0] * 3}, WRONG_NUMBER),
    "two scales for one net": ("control text", {"controlnet_conditioning_scale": [1.0, 0.5]}, "2 given for 1 ControlNet"),
    "a scale that is no number": (
        "controls text",
        {"controlnet_conditioning_scale": [1.0, "much"]},
        "controlnet_conditioning_scale[1] must be a number",
    ),
    "a scale that is none at all": ("control text", {"controlnet_conditioning_scale": None}, "must be a number"),
    "an infinite scale": ("control text", {"controlnet_conditioning_scale": float("inf")}, "is out of range"),
    "starts of another number": ("controls xl text", {"control_guidance_start": [0.1]}, "control_guidance_start: 1 given for 2"),
    "a start after the end": (
        "control text",
        {"control_guidance_start": 0.5, "control_guidance_end": 0.4},
        "control_guidance_start=0.5 is not before control_guidance_end=0.4",
    ),
    "a start at the end": ("control image", {"control_guidance_start": 1.0}, "is not before control_guidance_end=1.0"),
    "an end behind the way": ("control text", {"control_guidance_end": 1.2}, "control_guidance_end=1.2 is out of range"),
    "guessing by word": ("control text", {"guess_mode": "yes"}, "guess_mode has the wrong type"),
    "pictures of two sizes": ("controls text", {"image": [picture(), picture(48, 80)]}, "image[1] does not fit"),
    "a control picture of another size": ("control image", {"control_image": picture(48, 80)}, "3 channels, 80 x 48 pixels"),
    "a control picture of another size to paint": (
        "control inpaint",
        {"control_image": picture(48, 80), "height": None, "width": None},
        "pass height=… and width=…",
    ),
    "a control picture beside the crop": (
        "control inpaint",
        {"padding_mask_crop": 4, "output_type": "pil", "control_image": picture(128, 128)},
        "padding_mask_crop needs a control_image of the size of image",
    ),
    "latents of another size": ("control image", {"latents": seeded(1, 4, 8, 8)}, "latents has the wrong shape"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_meant_is_told_before_the_generator_is_used(name):
    task, options, message = BAD[name]
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    with pytest.raises(InputError) as caught:
        call(pair(task)[1], task, **options, generator=generator)
    assert message in str(caught.value)
    assert torch.equal(before, generator.get_state())


def net(**options: Any) -> Any:
    return suffuse.ControlNetModel.from_unet(
        suffuse.UNet2DConditionModel.from_config(tiny.unet(**options).config), conditioning_embedding_out_channels=(8, 16)
    )


def test_a_net_of_another_unet_is_refused():
    _, ours = pair("control xl text")
    for other, message in (
        (net(), "cross_attention_dim 32 and 64"),
        (net(**tiny.xl_options(refiner=True)), "projection_class_embeddings_input_dim 72 and 80"),
        (net(**tiny.xl_options() | {"block_out_channels": (32, 32)}), "block_out_channels (32, 32) and [32, 64]"),
        (net(**tiny.xl_options() | {"layers_per_block": 2}), "layers_per_block 2 and 1"),
    ):
        with pytest.raises(ConfigError, match=r"controlnet/config\.json and unet/config\.json disagree") as caught:
            type(ours)(**ours.components | {"controlnet": other}, add_watermarker=False)
        assert message in str(caught.value)
    with pytest.raises(ConfigError, match=r"controlnet_1/config\.json and unet"):
        type(ours)(**ours.components | {"controlnet": [ours.controlnet, net()]}, add_watermarker=False)


def test_a_net_that_is_set_later_is_checked_by_the_call():
    task = "control text"
    kept = pair(task)[1]
    ours = type(kept)(**kept.components, requires_safety_checker=False)
    ours.controlnet = net(block_out_channels=(32, 32))
    with pytest.raises(ConfigError, match=r"block_out_channels \(32, 32\) and \[32, 64\]"):
        call(ours, task)
    with pytest.raises(ConfigError, match="the controlnet of a pipeline cannot be this"):
        ours.controlnet = [kept.controlnet]
    ours.controlnet = net().bfloat16()
    with pytest.raises(InputError, match=r"compute in two types(.|\n)*torch.bfloat16 and torch.float32"):
        call(ours, task)
    ours.controlnet = None
    with pytest.raises(InputError, match="this pipeline has no controlnet"):
        call(ours, task)


@pytest.mark.parametrize("nets", [[], ["canny"]])
def test_a_list_that_holds_no_nets_is_refused(nets):
    _, ours = pair("control text")
    with pytest.raises(ConfigError, match="MultiControlNetModel needs ControlNets"):
        type(ours)(**ours.components | {"controlnet": nets}, requires_safety_checker=False)
