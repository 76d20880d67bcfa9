"""Pictures equal the peer's bit for bit: every scheduler, task and option, on tiny real checkpoints."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tasks import TASKS, call, difference, mask, pair, picture, set_scheduler

from suffuse.public_names import PUBLIC
from suffuse.schedulers.scheduler import KarrasDiffusionSchedulers

OTHER_MODELS = {"EDMEulerScheduler"}
"""Compatible by name with models that predict something else."""
SCHEDULERS = [k.name for k in KarrasDiffusionSchedulers if k.name in PUBLIC and k.name not in OTHER_MODELS] + ["LCMScheduler"]
OF_EACH_KIND = ["DDIMScheduler", "PNDMScheduler", "HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler"]
"""Deterministic, with memory, of second order, with noise of its own, with few steps."""
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
TAKES_NO = {
    (f"{name}Scheduler", "sample")
    for name in ("PNDM", "EulerAncestralDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE")
}
"""Prediction types that the peer's scheduler has not."""


@pytest.fixture(autouse=True)
def quiet_peer():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="diffusers.*")
        warnings.filterwarnings("ignore", message=".*CPU autocast.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message="__array_wrap__ must accept")
        yield


COMBINATIONS = [
    (task, scheduler, prediction)
    for task in TASKS
    for scheduler in (SCHEDULERS if "xl" not in task else OF_EACH_KIND)
    for prediction in (PREDICTIONS if "xl" not in task else ["epsilon"])
    if (scheduler, prediction) not in TAKES_NO
]
"""The rest is the scheduler's own business: what Stable Diffusion XL does differently does not depend on it."""


@pytest.mark.filterwarnings("ignore:Should have t")  # torchsde's, of the peer's own rounding
@pytest.mark.parametrize(("task", "scheduler", "prediction"), COMBINATIONS)
def test_every_scheduler_and_prediction_type_in_every_task(task, scheduler, prediction):
    peer, ours = pair(task)
    # Its noise has a seed of its own: the peer draws one from what all calls share, we take that of the generator.
    seeded = {"noise_sampler_seed": 3} if scheduler == "DPMSolverSDEScheduler" else {}
    set_scheduler((peer, ours), scheduler, prediction_type=prediction, **seeded)
    assert difference(call(peer, task), call(ours, task)) == 0


EMBEDS = {"prompt": None, "prompt_embeds": torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(1))}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no guidance": {"guidance_scale": 1.0},
    "negative guidance scale": {"guidance_scale": -2},
    "negative prompt": {"negative_prompt": "a dog"},
    "two prompts": {"prompt": ["a cat", "a dog!"]},
    "two prompts, two negatives": {"prompt": ["a cat", "a dog!"], "negative_prompt": ["one", "another"]},
    "two pictures": {"num_images_per_prompt": 2},
    "two prompts, two pictures": {"prompt": ["a cat", "a dog!"], "num_images_per_prompt": 2},
    "a generator a picture": {"num_images_per_prompt": 2, "generator": "list"},
    "embeddings": EMBEDS,
    "both embeddings": EMBEDS | {"negative_prompt_embeds": -EMBEDS["prompt_embeds"]},
    "eta": {"eta": 0.7},
    "one step": {"num_inference_steps": 1, "strength": 1.0},
    "seven steps": {"num_inference_steps": 7},
    "latents out": {"output_type": "latent"},
    "arrays out": {"output_type": "np"},
    "pictures out": {"output_type": "pil"},
    "low strength": {"strength": 0.3},
    "full strength": {"strength": 1.0},
    "a tensor": {"image": torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))},
    "a tensor in [-1, 1]": {"image": torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3)) * 2 - 1},
    "another size": {"image": picture(40, 72)},
    "two pictures in": {"image": [picture(seed=1), picture(seed=2)], "prompt": ["a cat", "a dog!"]},
}
NEEDS = {
    "strength": tuple(task for task in TASKS if "text" not in task),
    "image": tuple(task for task in TASKS if "image" in task or task in ("depth", "xl refiner")),
}


def applies(task: str, options: dict[str, Any]) -> bool:
    return all(task in NEEDS.get(name, TASKS) or (name == "strength" and "one" in str(options)) for name in options)


def for_two_encoders(task: str, options: dict[str, Any]) -> dict[str, Any]:
    """Embeddings as wide as both text encoders make them, with the prompts' one vector each."""
    if not task.startswith("xl"):
        return options
    embeds = {name: value for name, value in options.items() if name.endswith("embeds")}
    pooled = {name.replace("prompt_embeds", "pooled_prompt_embeds"): value[:, 0] for name, value in embeds.items()}
    times = 1 if task == "xl refiner" else 2
    return options | pooled | {name: torch.cat([value] * times, dim=-1) for name, value in embeds.items()}


def with_fresh_generators(options: dict[str, Any]) -> dict[str, Any]:
    if options.get("generator") == "list":
        return options | {"generator": [torch.Generator().manual_seed(seed) for seed in (3, 4)]}
    return options


# Every scheduler is run in every task above; that options and schedulers of two evaluations a step are apart, a release tries.
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", pytest.param("HeunDiscreteScheduler", marks=pytest.mark.slow)])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("task", TASKS)
def test_every_option_in_every_task(task, option, scheduler):
    options = {k: v for k, v in OPTIONS[option].items() if not ("text" in task and k == "strength")}
    if not applies(task, options):
        return
    if task == "depth" and isinstance(options.get("image"), torch.Tensor):
        options = options | {"depth_map": torch.rand(1, 40, 40, generator=torch.Generator().manual_seed(4))}
    options = for_two_encoders(task, options)
    peer, ours = pair(task)
    set_scheduler((peer, ours), scheduler)
    made = call(ours, task, **with_fresh_generators(options))
    if task == "asymmetric" and ("two" in option or "a generator" in option):
        assert len(made) > 1  # the peer decodes one picture at a time only
        return
    assert difference(call(peer, task, **with_fresh_generators(options)), made) == 0


TEXT_OPTIONS: dict[str, dict[str, Any]] = {
    "rescaled guidance": {"guidance_rescale": 0.7},
    "latents in": {"latents": torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(5)), "height": 64, "width": 64},
    "default size": {"height": None, "width": None},
    "custom timesteps": {"timesteps": [801, 601, 301, 1]},
}


@pytest.mark.parametrize("option", TEXT_OPTIONS)
def test_options_of_text_to_image(option):
    peer, ours = pair("text")
    set_scheduler((peer, ours), "DDPMScheduler")
    assert difference(*(call(pipe, "text", **TEXT_OPTIONS[option]) for pipe in (peer, ours))) == 0


INPAINT_OPTIONS: dict[str, dict[str, Any]] = {
    "cropped around the mask": {"padding_mask_crop": 4, "output_type": "pil"},
    "cropped, another aspect": {
        "padding_mask_crop": 4,
        "output_type": "pil",
        "image": picture(96, 64),
        "mask_image": mask(96, 64),
        "height": 64,
        "width": 64,
    },
    "mask tensor": {"mask_image": (torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(6)) > 0.5).float()},
    "masked latents": {"masked_image_latents": torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(8))},
    "latents in": {"latents": torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(9))},
    "latents in, less strength": {
        "latents": torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(9)),
        "strength": 0.6,
    },
    "larger than the picture": {"height": 80, "width": 80},
}


@pytest.mark.parametrize("option", INPAINT_OPTIONS)
@pytest.mark.parametrize("task", ["inpaint", "inpaint9"])
def test_options_of_inpainting(task, option):
    peer, ours = pair(task)
    set_scheduler((peer, ours), "DDIMScheduler")
    assert difference(*(call(pipe, task, **INPAINT_OPTIONS[option]) for pipe in (peer, ours))) == 0


def test_depth_is_estimated_from_what_the_picture_shows_in_whatever_form():
    # The peer hands floats in [0, 1] to an estimator that counts in bytes, which sees a black picture: here it sees the picture.
    import numpy as np

    peer, ours = pair("depth")
    image = picture(40, 72)
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1) / 255
    forms = [image, array, array.astype(np.float32) / 255, tensor, tensor * 2 - 1]
    depths = [ours.estimate_depth(form, torch.device("cpu"), torch.float32) for form in forms]
    assert all(difference(depths[0], depth) == 0 for depth in depths)
    black = peer.feature_extractor(images=[tensor], return_tensors="pt").pixel_values
    assert black.max() < -0.98


def test_a_depth_map_that_is_given():
    peer, ours = pair("depth")
    set_scheduler((peer, ours), "DDIMScheduler")
    options = {"depth_map": torch.rand(1, 40, 40, generator=torch.Generator().manual_seed(4))}
    assert difference(*(call(pipe, "depth", **options) for pipe in (peer, ours))) == 0


def test_clip_skip_takes_an_earlier_layer_through_the_final_norm():
    # The peer's own clip_skip fails with transformers 5: what it computed is written out here.
    _, ours = pair("text")
    ids = ours.tokenizer(["a cat"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        states = ours.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
        expected = ours.text_encoder.final_layer_norm(states)
        embeds, _ = ours.encode_prompt("a cat", "cpu", 1, False, clip_skip=1)
    assert difference(embeds, expected) == 0
    assert difference(call(ours, "text", clip_skip=1, guidance_scale=1), call(ours, "text")) > 0


def test_a_guidance_distilled_unet_is_told_the_scale():
    import diffusers
    import tiny

    import suffuse

    peer, ours = pair("text")
    unet = tiny.unet(time_cond_proj_dim=16)
    own = suffuse.UNet2DConditionModel.from_config(unet.config)
    own.load_state_dict(unet.state_dict())
    options = {"scheduler": diffusers.DDIMScheduler.from_config(tiny.scheduler().config), "unet": unet}
    theirs = diffusers.StableDiffusionPipeline(**peer.components | options, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    mine = suffuse.StableDiffusionPipeline.from_pipe(ours, unet=own.eval())
    mine.scheduler = suffuse.DDIMScheduler.from_config(tiny.scheduler().config)
    assert difference(call(theirs, "text"), call(mine, "text")) == 0
    assert not mine.do_classifier_free_guidance
