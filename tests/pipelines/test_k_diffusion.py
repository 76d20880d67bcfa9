"""Samplers of k-diffusion: held against what is known exactly of Gaussian data, and against our own solvers on the same levels.

The peer of the tests has these pipelines no more; that of 0.26.3 hands its UNet to the package k-diffusion.
"""

from __future__ import annotations

import itertools
import json
import math
from functools import cache
from typing import Any

import pytest
import torch
from tasks import difference, folder, picture
from test_composition import SWITCHES, net, parts
from torch import Tensor

import suffuse
from suffuse.diffusion.k_samplers import SAMPLERS, Place
from suffuse.errors import InputError

PLAIN, XL = "StableDiffusionKDiffusionPipeline", "StableDiffusionXLKDiffusionPipeline"
ORDERS = {"sample_euler": 1, "sample_heun": 2, "sample_dpm_2": 2, "sample_lms": 2, "sample_dpmpp_2m": 2}
"""Samplers that draw nothing → the order of their error: multistep ones begin with a step of Euler, which leaves its mark."""
DRAWING = [name for name in SAMPLERS if name not in ORDERS]


# ---------------------------------------------------------------- the samplers


def of_gaussians(x: Tensor, sigma: Tensor) -> Tensor:
    """D(x; sigma) of data that is normal, of mean 0 and deviation 1."""
    return x / (1 + sigma**2)


def walk(name: str, x: Tensor, sigmas: Tensor, noise: Any = None, denoise: Any = of_gaussians) -> Tensor:
    sample, remembers = SAMPLERS[name]
    past: list[Tensor] = []
    for i in range(len(sigmas) - 1):
        x, kept = sample(denoise, x, Place(sigmas, i, past, noise))
        past = [*past, kept][-remembers:] if remembers else []
    return x


def levels(count: int, high: float = 4.0, low: float = 0.5) -> Tensor:
    return torch.logspace(math.log10(high), math.log10(low), count + 1, dtype=torch.float64)


@pytest.mark.parametrize("name", ORDERS)
def test_the_error_falls_as_fast_as_the_order_says(name):
    exact = math.sqrt((1 + 0.5**2) / (1 + 4.0**2))
    errors = [abs(walk(name, torch.ones((), dtype=torch.float64), levels(count)).item() - exact) for count in (40, 80)]
    assert errors[1] < 0.02
    assert math.log2(errors[0] / errors[1]) > ORDERS[name] - 0.2


@pytest.mark.parametrize("name", DRAWING)
def test_what_is_drawn_is_spread_as_it_must_be(name):
    """Linear as all is, the variance at the end is the sum of the squares of what each draw, and the beginning, becomes."""
    draws = 400 if name == "sample_dpmpp_sde" else 200
    # Walked side by side: one in which each draw is 1 and all else 0, and last the one that begins with 1.
    each, drawn = torch.eye(draws + 1, dtype=torch.float64), itertools.count()
    becomes = walk(name, each[-1], levels(200), lambda *_: each[next(drawn)])
    variance = becomes[-1] ** 2 * (1 + 4.0**2) + (becomes[:-1] ** 2).sum()
    assert abs(variance / (1 + 0.5**2) - 1) < 0.03


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_end_is_what_the_denoiser_believes_in(name):
    """At the last level, 0, the sample is clean and finite, and nothing is drawn any more."""
    clean = torch.randn(2, 4, generator=torch.Generator().manual_seed(1)).double()
    sigmas = torch.cat([levels(6), torch.zeros(1)])
    ones = torch.ones(2, 4).double()
    made = walk(name, clean + sigmas[0] * ones, sigmas, lambda *_: 0.5 * ones, lambda x, sigma: clean)
    assert difference(made, clean) < 0.3 if name == "sample_lms" else difference(made, clean) < 1e-9


# ---------------------------------------------------------------- the pipelines


@cache
def pair(xl: bool) -> tuple[Any, Any]:
    """(text to image, the same with samplers), of the same components."""
    plain = getattr(suffuse, "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline").from_pretrained(
        folder("xl text" if xl else "text")
    )
    sampled = getattr(suffuse, XL if xl else PLAIN).from_pipe(plain)
    for pipe in (plain, sampled):
        pipe.set_progress_bar_config(disable=True)
    return plain, sampled


def call(pipe: Any, **options: Any) -> Any:
    settings = {"prompt": "a cat", "height": 64, "width": 48, "num_inference_steps": 5, "output_type": "np"}
    return pipe(**{**settings, "generator": torch.Generator().manual_seed(7), "return_dict": False, **options})[0]


SAME = {
    "sample_euler": "EulerDiscreteScheduler",
    "sample_heun": "HeunDiscreteScheduler",
    "sample_dpm_2": "KDPM2DiscreteScheduler",
    "sample_lms": "LMSDiscreteScheduler",
}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("xl", [False, True])
@pytest.mark.parametrize("name", SAME)
def test_pictures_are_those_of_our_own_solvers(name, xl, prediction):
    plain, sampled = pair(xl)
    before = plain.scheduler, sampled.scheduler
    config = {"timestep_spacing": "linspace", "prediction_type": prediction}
    plain.scheduler, sampled.scheduler = (
        getattr(suffuse, kind).from_config(before[1].config, **config) for kind in (SAME[name], "LMSDiscreteScheduler")
    )
    sampled.set_scheduler(name)
    try:
        assert difference(call(plain), call(sampled)) < 1e-4
    finally:
        plain.scheduler, sampled.scheduler = before


@pytest.mark.parametrize("xl", [False, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws(name, xl):
    sampled = pair(xl)[1]
    sampled.set_scheduler(name)
    made = call(sampled, num_images_per_prompt=2)
    assert made.shape == (2, 64, 48, 3)
    assert difference(made, call(sampled, num_images_per_prompt=2)) == 0


def test_the_levels_of_karras_reach_over_all_of_training():
    sampled = pair(False)[1]
    call(sampled, use_karras_sigmas=True)
    sigmas, bars = sampled.scheduler.sigmas, sampled.scheduler.alphas_cumprod
    ends = ((1 - bars[[-1, 0]]) / bars[[-1, 0]]) ** 0.5
    assert torch.allclose(sigmas[[0, -2]], ends)
    assert sigmas[-1] == 0
    roots = sigmas[:-1] ** (1 / 7)
    assert torch.allclose(roots.diff(), (roots[-1] - roots[0]) / 4, atol=1e-5)


def test_the_noise_on_the_way_has_a_seed_of_its_own():
    sampled = pair(False)[1]
    sampled.set_scheduler("sample_euler_ancestral")
    made = call(sampled, noise_sampler_seed=3)
    assert difference(made, call(sampled, noise_sampler_seed=3)) == 0
    assert difference(made, call(sampled, noise_sampler_seed=4)) > 0
    both = call(sampled, noise_sampler_seed=[3, 4], seed=[5, 6], generator=None, num_images_per_prompt=2)
    assert difference(both[1:], call(sampled, noise_sampler_seed=[4], seed=6, generator=None)) < 1e-4


@pytest.mark.parametrize("name", ["sample_lms", "sample_dpmpp_3m_sde", "sample_dpm_2_ancestral"])
def test_a_run_goes_on_with_its_own_sampler(name, tmp_path):
    sampled = pair(False)[1]
    sampled.set_scheduler(name)
    made = call(sampled, save_run=tmp_path / "{step}.safetensors", use_karras_sigmas=True)
    sampled.set_scheduler("sample_euler")
    assert difference(sampled(resume=tmp_path / "3.safetensors")[0], made) == 0


def test_callbacks_see_every_step_and_may_end_the_run():
    sampled, heard = pair(False)[1], []
    sampled.set_scheduler("sample_heun")

    def listen(pipe, step, timestep, tensors):
        heard.append((step, float(timestep), tensors["latents"].shape))
        pipe._interrupt = step == 2

    call(sampled, callback_on_step_end=listen, callback=lambda step, timestep, latents: heard.append(step))
    assert [entry if isinstance(entry, int) else entry[0] for entry in heard] == [0, 0, 1, 1, 2, 2]


def test_what_is_written_names_the_class(tmp_path):
    sampled = pair(False)[1]
    sampled.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["_class_name"] == PLAIN
    assert index["scheduler"] == ["diffusers", "LMSDiscreteScheduler"]
    again = suffuse.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    sampled.set_scheduler("sample_dpmpp_2m")
    assert difference(call(again), call(sampled)) == 0


# ---------------------------------------------------------------- features


@cache
def composed(xl: bool) -> tuple[Any, Any]:
    """(text to image, the same with samplers), of components that take every feature."""
    given = parts(xl)
    plain = getattr(suffuse, "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline")(**given)
    config = {"timestep_spacing": "linspace"}
    plain.scheduler = suffuse.EulerDiscreteScheduler.from_config(given["scheduler"].config, **config)
    sampled = getattr(suffuse, XL if xl else PLAIN).from_pipe(plain)
    sampled.set_scheduler("sample_euler")
    for pipe in (plain, sampled):
        pipe.set_progress_bar_config(disable=True)
    return plain, sampled


TAKEN = ["ControlNet", "T2I-Adapter", "IP-Adapter", "IP-Adapter embeddings", "GLIGEN", "guidance"]


def with_feature(pipe: Any, name: str | None, **options: Any) -> Any:
    given = {"prompt": "a cat", "height": 64, "width": 64, "num_inference_steps": 4, "output_type": "np", **options}
    undo = SWITCHES[name](pipe, given) if name is not None else None
    try:
        return pipe(**given, generator=torch.Generator().manual_seed(7)).images
    finally:
        if undo is not None:
            undo()


@pytest.mark.parametrize("xl", [False, True], ids=["", "XL"])
@pytest.mark.parametrize("name", TAKEN)
def test_features_are_those_of_our_own_solvers(name, xl):
    """Equal but for rounding: the way is the same, and a feature sees the same of each step."""
    plain, sampled = composed(xl)
    if xl and name == "GLIGEN":  # whose text encoder makes no vectors that its UNet takes
        with pytest.raises(InputError, match="no gated attention"):
            with_feature(sampled, name)
        return
    made = with_feature(sampled, name)
    assert difference(made, with_feature(plain, name)) < 1e-4
    assert difference(made, with_feature(sampled, None)) > 1e-3


@pytest.mark.parametrize("xl", [False, True], ids=["", "XL"])
def test_a_control_acts_in_its_steps_however_often_each_asks(xl):
    _, sampled = composed(xl)
    sampled.set_scheduler("sample_heun")
    try:
        given = {"controlnet": net(xl), "control_image": picture(seed=3)}
        whole, early, late = (
            with_feature(sampled, None, **given, control_guidance_start=start, control_guidance_end=end)
            for start, end in ((0.0, 1.0), (0.0, 0.5), (0.5, 1.0))
        )
    finally:
        sampled.set_scheduler("sample_euler")
    assert min(difference(one, other) for one, other in itertools.combinations((whole, early, late), 2)) > 1e-4


@pytest.mark.parametrize("name", [["sample_heun"], None, 3])
def test_what_is_no_name_is_no_sampler(name):
    with pytest.raises(InputError, match="there is no sampler"):
        composed(False)[1].set_scheduler(name)


@pytest.mark.parametrize("xl", [False, True], ids=["", "XL"])
def test_what_sees_pictures_is_saved_and_loaded(xl, tmp_path):
    _, sampled = composed(xl)
    sampled.save_pretrained(tmp_path / "saved")
    again = suffuse.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    again.set_scheduler("sample_euler")
    assert difference(with_feature(again, "IP-Adapter"), with_feature(sampled, "IP-Adapter")) == 0
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    for name in ("image_encoder", *(["feature_extractor"] if xl else [])):
        del index[name]
    (tmp_path / "saved" / "model_index.json").write_text(json.dumps(index))
    without = suffuse.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert without.image_encoder is None


# ---------------------------------------------------------------- what cannot be


def test_without_guidance_the_prompt_alone_is_asked():
    # The pipelines of 0.26.3 refuse this.
    sampled = pair(False)[1]
    assert difference(call(sampled, guidance_scale=1.0), call(sampled)) > 0


def test_an_unknown_sampler_is_told():
    sampled = pair(False)[1]
    with pytest.raises(InputError, match=r"there is no sampler 'sample_heunn'(.|\n)*did you mean 'sample_heun'"):
        sampled.set_scheduler("sample_heunn")
    assert sampled.sampler in SAMPLERS


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"prompt": None}, "prompt and prompt_embeds are both missing"),
    "no seed": ({"noise_sampler_seed": 1.5}, "noise_sampler_seed must be a whole number"),
    "seeds for others": ({"noise_sampler_seed": [1, 2]}, "noise_sampler_seed: 2 given for 1 pictures"),
    "no levels": ({"use_karras_sigmas": "yes"}, "use_karras_sigmas has the wrong type"),
    "latents of another shape": ({"latents": torch.zeros(1, 4, 8, 8)}, "latents has the wrong shape"),
}


@pytest.mark.parametrize("xl", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_is_told_and_draws_nothing(name, xl):
    options, message = BAD[name]
    generator = torch.Generator().manual_seed(7)
    state = generator.get_state()
    with pytest.raises(InputError, match=message):
        call(pair(xl)[1], **{"generator": generator} | options)
    assert torch.equal(generator.get_state(), state)


def test_a_scheduler_of_another_kind_is_refused():
    sampled = pair(False)[1]
    before = sampled.scheduler
    sampled.scheduler = suffuse.DDIMScheduler.from_config(before.config)
    try:
        with pytest.raises(InputError, match=r"noise levels from an LMSDiscreteScheduler(.|\n)*DDIMScheduler"):
            call(sampled)
    finally:
        sampled.scheduler = before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision(dtype, tmp_path):
    sampled = pair(False)[1]
    sampled.save_pretrained(tmp_path / "saved")
    half = suffuse.DiffusionPipeline.from_pretrained(tmp_path / "saved", torch_dtype=dtype)
    half.set_progress_bar_config(disable=True)
    for name in ("sample_dpmpp_2m", "sample_lms"):
        for pipe in (half, sampled):
            pipe.set_scheduler(name)
        assert difference(call(half), call(sampled)) < 0.1
