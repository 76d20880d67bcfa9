"""What Stable Diffusion XL has beside Stable Diffusion: a second prompt, sizes, scores, a part of the way, float32 to decode."""

from __future__ import annotations

import copy
import json
import sys
import types
import warnings
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from tasks import align, call, difference, folder, mask, pair, picture, set_scheduler

import suffuse
from suffuse.errors import ConfigError, InputError, MissingPackageError
from suffuse.pipelines.stable_diffusion_xl import watermark

TASKS = ["xl text", "xl image", "xl refiner", "xl inpaint", "xl inpaint9"]


@pytest.fixture(autouse=True)
def quiet_peer():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="diffusers.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def same(task: str, scheduler: str = "DDIMScheduler", **options: Any) -> bool:
    pipes = pair(task)
    set_scheduler(pipes, scheduler)
    return difference(*(call(pipe, task, **options) for pipe in pipes)) == 0


def seeded(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


OPTIONS: dict[str, dict[str, Any]] = {
    "a second prompt": {"prompt_2": "a hat"},
    "second prompts": {"prompt": ["a", "b"], "prompt_2": ["c", "d"]},
    "an empty second prompt": {"prompt_2": ""},
    "a second negative": {"negative_prompt": "a dog", "negative_prompt_2": "a log"},
    "an empty negative": {"negative_prompt": ""},
    "a vector of its own": {"pooled_prompt_embeds": seeded(1, 32)},
    "fewer layers": {"clip_skip": 1, "negative_prompt": "x"},
    "rescaled guidance": {"guidance_rescale": 0.7},
    "sizes": {"original_size": (512, 256), "crops_coords_top_left": (10, 20), "target_size": (128, 64)},
    "negative sizes": {"negative_original_size": (32, 16), "negative_target_size": (8, 24)},
    "sizes and negative sizes": {
        "original_size": (512, 256),
        "crops_coords_top_left": (3, 4),
        "negative_original_size": (32, 16),
        "negative_crops_coords_top_left": (3, 4),
        "negative_target_size": (8, 24),
    },
    "part of the way": {"denoising_end": 0.6, "num_inference_steps": 6},
    "the whole way": {"denoising_end": 1.0},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("task", ["xl text", "xl refiner", "xl inpaint"])
def test_options_of_every_task(task, option):
    assert same(task, **OPTIONS[option])


@pytest.mark.parametrize(
    "scheduler", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler"]
)
@pytest.mark.parametrize("task", TASKS)
def test_a_part_of_the_way_with_every_kind_of_solver(task, scheduler):
    assert same(task, scheduler, denoising_end=0.6, num_inference_steps=7)


LEFT = {"image": seeded(1, 4, 32, 32), "denoising_start": 0.6, "num_inference_steps": 7}


@pytest.mark.parametrize("end", [None, 0.85])
@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("task", ["xl image", "xl refiner", "xl inpaint"])
def test_the_rest_of_the_way(task, scheduler, end):
    assert same(task, scheduler, **LEFT, denoising_end=end)


@pytest.mark.parametrize("task", ["xl image", "xl inpaint", "xl inpaint9"])
def test_the_rest_of_the_way_from_a_picture(task):
    options = LEFT | {"image": picture(), "strength": 0.9}
    assert same(task, **options, num_images_per_prompt=2)


def test_two_pipelines_go_the_whole_way_together():
    _, base = pair("xl text")
    _, second = pair("xl image")
    set_scheduler(pair("xl text"), "DDIMScheduler")
    set_scheduler(pair("xl image"), "DDIMScheduler")
    size = {"height": 64, "width": 64, "num_inference_steps": 8, "prompt": "a cat"}
    whole = call(base, "xl text", **size)
    half = call(base, "xl text", **size, denoising_end=0.5, output_type="latent")
    options = {"prompt": "a cat", "image": half, "denoising_start": 0.5, "num_inference_steps": 8}
    assert difference(whole, call(second, "xl image", **options)) == 0


@pytest.mark.parametrize("task", ["xl image", "xl refiner"])
def test_latents_instead_of_a_noised_picture(task):
    assert same(task, latents=seeded(1, 4, 32, 32))


@pytest.mark.parametrize("scores", [{}, {"aesthetic_score": 9.5, "negative_aesthetic_score": 0.5}])
@pytest.mark.parametrize("sizes", [{}, {"crops_coords_top_left": (5, 6)}, {"negative_crops_coords_top_left": (7, 8)}])
def test_a_refiner_is_told_how_much_people_like_it(scores, sizes):
    assert same("xl refiner", **scores, **sizes)


def test_without_a_negative_prompt_embeddings_are_zero_only_if_they_are_to_be():
    peer, ours = (pipe.__class__(**pipe.components, force_zeros_for_empty_prompt=False) for pipe in pair("xl text"))
    for pipe in (peer, ours):
        pipe.set_progress_bar_config(disable=True)
    made = call(ours, "xl text")
    assert difference(call(peer, "xl text"), made) == 0
    assert difference(made, call(pair("xl text")[1], "xl text")) > 0


def test_embeddings_made_before_draw_the_same_picture():
    _, ours = pair("xl text")
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    with torch.no_grad():
        made = dict(zip(names, ours.encode_prompt("a cat", negative_prompt="a dog"), strict=True))
    assert difference(call(ours, "xl text", negative_prompt="a dog"), call(ours, "xl text", prompt=None, **made)) == 0
    peer = pair("xl text")[0]
    with torch.no_grad():
        theirs = peer.encode_prompt("a cat", negative_prompt="a dog", device="cpu")
    assert all(difference(one, other) == 0 for one, other in zip(made.values(), theirs, strict=True))


@pytest.mark.parametrize("task", TASKS)
def test_callbacks_see_every_tensor_that_is_declared(task):
    seen = []

    def look(pipe, index, timestep, tensors):
        seen[-1].append({name: None if tensor is None else tensor.clone() for name, tensor in tensors.items()})
        assert pipe.denoising_end == 0.9
        return {}

    peer, ours = pair(task)
    names = ours._callback_tensor_inputs
    shown = [name for name in names if name in peer._callback_tensor_inputs]
    for pipe, asked in ((peer, shown), (ours, names)):
        seen.append([])
        options = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": asked, "denoising_end": 0.9}
        call(pipe, task, **options, negative_prompt="a dog")
    for theirs, mine in zip(*seen, strict=True):
        assert all(difference(theirs[name], mine[name]) == 0 for name in shown)
        assert set(mine) == set(names)


def test_a_callback_may_drop_the_unconditional_half():
    options = {"callback_on_step_end_tensor_inputs": ["prompt_embeds", "add_text_embeds", "add_time_ids"]}
    made = []
    for pipe in pair("xl text"):

        def change(pipe, index, timestep, tensors):
            if index != 1:
                return tensors
            pipe._guidance_scale = 0.0
            return {name: tensor.chunk(2)[-1] for name, tensor in tensors.items()}

        made.append(call(pipe, "xl text", **options | {"callback_on_step_end": change}))
    assert difference(*made) == 0


# ------------------------------------------------------------ where the peer is another


def test_negative_sizes_of_several_pictures_stay_with_the_negative_prompts():
    """The peer hands every other picture the other's sizes: each of ours is what it is alone."""
    _, ours = pair("xl text")
    sizes = {"negative_original_size": (512, 16), "negative_target_size": (8, 24)}
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    together = call(ours, "xl text", **sizes, num_images_per_prompt=2, generator=generators)
    alone = [call(ours, "xl text", **sizes, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    assert difference(together, torch.cat(alone)) < 1e-5


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("xl text", {"negative_prompt_2": "a log"}),
        ("xl text", {"negative_original_size": (512, 16)}),
        ("xl image", {"negative_crops_coords_top_left": (30, 40)}),
    ],
)
def test_nothing_that_is_given_is_passed_over(task, options):
    peer, ours = pair(task)
    assert difference(call(peer, task), call(peer, task, **options)) == 0
    assert difference(call(ours, task), call(ours, task, **options)) > 0


# ------------------------------------------------------------ precision


def test_a_half_precision_autoencoder_is_lent_float32_and_stays_as_it_is():
    wide = tiny.vae()
    own = suffuse.AutoencoderKL.from_config(wide.config)
    own.load_state_dict(wide.state_dict())
    half = own.half().eval()
    _, ours = pair("xl inpaint")
    pipe = suffuse.StableDiffusionXLInpaintPipeline.from_pipe(ours, vae=half)
    rounded = suffuse.AutoencoderKL.from_config(wide.config)
    rounded.load_state_dict({name: tensor.float() for name, tensor in half.state_dict().items()})
    reference = suffuse.StableDiffusionXLInpaintPipeline.from_pipe(ours, vae=rounded.eval())
    assert half.config.force_upcast
    assert difference(call(pipe, "xl inpaint"), call(reference, "xl inpaint")) == 0
    assert half.dtype == torch.float16
    image = {"image": picture(), "strength": 0.5}
    one, other = (suffuse.StableDiffusionXLImg2ImgPipeline.from_pipe(whole) for whole in (pipe, reference))
    assert difference(call(one, "xl image", **image), call(other, "xl image", **image)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("task", ["xl text", "xl refiner", "xl inpaint9"])
def test_half_precision_equals_the_peers(task, dtype):
    pipes = [type(pipe).from_pretrained(folder(task), torch_dtype=dtype) for pipe in pair(task)]
    align(pipes[0])
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    assert difference(*(call(pipe, task).float() for pipe in pipes)) == 0
    assert pipes[1].vae.dtype == dtype


def test_an_autoencoder_may_say_how_latents_are_spread():
    vae = diffusers.AutoencoderKL.from_config(
        tiny.vae().config, latents_mean=[-0.1, 0.2, 0.3, -0.4], latents_std=[1.5, 0.5, 0.8, 2.0]
    )
    vae.load_state_dict(tiny.vae().state_dict())
    own = suffuse.AutoencoderKL.from_config(vae.config)
    own.load_state_dict(vae.state_dict())
    peer, ours = (
        library.StableDiffusionXLImg2ImgPipeline.from_pipe(pipe, vae=model.eval())
        for library, pipe, model in zip((diffusers, suffuse), pair("xl image"), (vae, own), strict=True)
    )
    for pipe in (peer, ours):
        pipe.set_progress_bar_config(disable=True)
    assert difference(call(peer, "xl image"), call(ours, "xl image")) == 0


# ------------------------------------------------------------ the watermark


def test_a_watermark_that_is_asked_for_and_cannot_be_written_is_told(monkeypatch):
    _, ours = pair("xl text")
    monkeypatch.setattr(watermark, "PACKAGE", "a_package_that_nobody_has")
    assert type(ours)(**ours.components).watermark is None
    with pytest.raises(MissingPackageError, match="pip install invisible-watermark, or pass add_watermarker=False"):
        type(ours)(**ours.components, add_watermarker=True)


def test_the_watermark_is_written_into_the_picture(monkeypatch):
    class WatermarkEncoder:
        def set_watermark(self, kind, bits):
            self.kind, self.bits = kind, bits

        def encode(self, image, method):
            assert method == "dwtDct"
            return np.clip(image + np.array([1.0, 2.0, 3.0]), 0, 255)

    monkeypatch.setitem(sys.modules, "imwatermark", types.SimpleNamespace(WatermarkEncoder=WatermarkEncoder))
    monkeypatch.setattr(watermark, "is_available", lambda: True)
    marker = watermark.StableDiffusionXLWatermarker()
    assert marker.encoder.kind == "bits"
    assert "".join(map(str, marker.encoder.bits)) == "101100111110110010010000011110111011000110011110"
    image = torch.zeros(2, 3, 256, 256)
    marked = (marker.apply_watermark(image)[0, :, 0, 0] / 2 + 0.5) * 255 - 127.5
    torch.testing.assert_close(marked.float(), torch.tensor([3.0, 2.0, 1.0]), atol=1e-3, rtol=0)
    assert marker.apply_watermark(image[..., :128]).shape[-1] == 128


# ------------------------------------------------------------ what cannot be meant

BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "embeddings alone": ("xl text", {"prompt": None, "prompt_embeds": seeded(1, 77, 64)}, "without pooled_prompt_embeds"),
    "two of the second": (
        "xl text",
        {"prompt": None, "prompt_2": "x", "prompt_embeds": seeded(1, 77, 64), "pooled_prompt_embeds": seeded(1, 32)},
        "prompt_2 and prompt_embeds are both given",
    ),
    "second prompts of another number": ("xl text", {"prompt_2": ["a", "b"]}, "prompt_2 has 2 entries for 1 prompts"),
    "embeddings of another width": (
        "xl text",
        {"prompt": None, "prompt_embeds": seeded(1, 77, 32), "pooled_prompt_embeds": seeded(1, 32)},
        "expected: (1, 77, 64)",
    ),
    "a vector of another width": ("xl text", {"pooled_prompt_embeds": seeded(1, 16)}, "pooled_prompt_embeds has the wrong shape"),
    "a size that is one number": ("xl text", {"original_size": 512}, "original_size must be two whole numbers"),
    "a size of nothing": ("xl text", {"target_size": (0, 8)}, "target_size=0 is out of range"),
    "no part": ("xl text", {"denoising_end": 0.0}, "denoising_end=0 is no part of the way"),
    "more than the way": ("xl image", {"denoising_start": 1.5}, "denoising_start=1.5 is out of range"),
    "an end before the start": ("xl image", {"denoising_start": 0.8, "denoising_end": 0.4}, "is not before denoising_end=0.4"),
    "too few steps for the part": ("xl text", {"denoising_end": 0.01, "num_inference_steps": 2}, "use more num_inference_steps"),
    "latents and a start": ("xl inpaint", {"denoising_start": 0.5, "latents": seeded(1, 4, 32, 32)}, "latents are both given"),
    "latents of another size": ("xl image", {"latents": seeded(1, 4, 8, 8)}, "latents has the wrong shape"),
    "too many layers to skip": ("xl text", {"clip_skip": 3}, "clip_skip=3 leaves no layer"),
    "a score that is no number": ("xl refiner", {"aesthetic_score": "good"}, "aesthetic_score must be a number"),
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


def test_a_text_encoder_that_is_needed_and_not_there_is_told():
    _, ours = pair("xl text")
    bare = suffuse.StableDiffusionXLPipeline(**ours.components | dict.fromkeys(("text_encoder_2", "tokenizer_2")))
    with pytest.raises(InputError, match="no text_encoder_2 and no tokenizer_2"):
        call(bare, "xl text")


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("xl refiner", {"requires_aesthetics_score": False}, "pass requires_aesthetics_score=True"),
        ("xl image", {"requires_aesthetics_score": True}, "pass requires_aesthetics_score=False"),
        ("xl image", {"requires_aesthetics_score": "yes"}, "requires_aesthetics_score has the wrong type"),
    ],
)
def test_a_unet_that_is_told_other_numbers_is_refused(task, options, message):
    _, ours = pair(task)
    with pytest.raises(ConfigError) as caught:
        type(ours)(**ours.components, **options)
    assert message in str(caught.value)


def test_a_unet_of_stable_diffusion_is_refused():
    _, ours = pair("xl text")
    with pytest.raises(ConfigError, match=r"cross_attention_dim=32(.|\n)*hidden_size=64"):
        type(ours)(**ours.components | {"unet": pair("text")[1].unet})
    plain = suffuse.UNet2DConditionModel.from_config(pair("text")[1].unet.config, cross_attention_dim=64)
    with pytest.raises(ConfigError, match="this is no UNet of Stable Diffusion XL"):
        type(ours)(**ours.components | {"unet": plain})


@pytest.mark.parametrize("task", TASKS)
def test_what_we_save_the_peer_loads(task, tmp_path):
    peer, ours = pair(task)
    type(ours).from_pretrained(folder(task)).save_pretrained(tmp_path)
    written, wanted = (json.loads((path / "model_index.json").read_text()) for path in (tmp_path, folder(task)))
    assert written | {"_diffusers_version": ""} == wanted | {"_diffusers_version": ""}
    again = type(peer).from_pretrained(tmp_path, add_watermarker=False)
    again.set_progress_bar_config(disable=True)
    again.scheduler = peer.scheduler
    assert difference(call(peer, task), call(again, task)) < 1e-5


def test_a_mask_of_a_large_picture_is_painted_in_a_crop():
    options = {"padding_mask_crop": 4, "output_type": "pil", "image": picture(96, 64), "mask_image": mask(96, 64)}
    assert same("xl inpaint", **options)


@pytest.mark.parametrize("way", [None, "enable_model_cpu_offload", "enable_sequential_cpu_offload"])
@pytest.mark.parametrize("tiled", [False, True])
def test_float32_is_lent_wherever_the_autoencoder_waits(way, tiled):
    _, ours = pair("xl image")
    half = suffuse.AutoencoderKL.from_config(tiny.vae().config)
    half.load_state_dict(tiny.vae().state_dict())
    wide = copy.deepcopy(half.half()).float()
    pipes = [type(ours)(**ours.components | {"vae": vae.eval()}) for vae in (half, wide)]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        if tiled:
            pipe.enable_vae_tiling()
    expected = call(pipes[1], "xl image")
    try:
        if way is not None:
            getattr(pipes[0], way)(device="cpu")
        assert difference(call(pipes[0], "xl image"), expected) <= 1e-5
    finally:
        pipes[0].remove_all_hooks()
    assert half.dtype == torch.float16


# ------------------------------------------------------------ Turbo


@pytest.mark.parametrize(
    ("task", "options"),
    [("xl text", {"num_inference_steps": 1}), ("xl text", {"num_inference_steps": 4}), ("xl image", {"num_inference_steps": 2})],
)
def test_turbo_needs_no_guidance_and_few_steps(task, options):
    pipes = pair(task)
    set_scheduler(pipes, "EulerAncestralDiscreteScheduler", timestep_spacing="trailing")
    asked = options | {"guidance_scale": 0.0} | ({"strength": 0.5} if task == "xl image" else {})
    assert difference(*(call(pipe, task, **asked) for pipe in pipes)) == 0
    set_scheduler(pipes, "DDIMScheduler")
