"""Latent consistency models: pictures in few steps equal the peer's, bit for bit."""

from __future__ import annotations

from functools import cache

import diffusers
import pytest
import tiny
import torch
from tasks import align, difference, picture

import suffuse
from suffuse.errors import InputError

CLASSES = {"text": "LatentConsistencyModelPipeline", "image": "LatentConsistencyModelImg2ImgPipeline"}
CALLS = {"text": {"height": 64, "width": 48}, "image": {"image": picture()}}


@cache
def folder(task: str, tmp) -> str:
    parts = tiny.stable_diffusion(tmp / "tokenizer")
    parts["unet"] = tiny.unet(time_cond_proj_dim=32)
    parts["scheduler"] = diffusers.LCMScheduler(beta_start=0.00085, beta_end=0.012, steps_offset=1)
    getattr(diffusers, CLASSES[task])(**parts, requires_safety_checker=False).save_pretrained(tmp / task)
    return str(tmp / task)


@pytest.fixture(scope="module", params=CLASSES)
def pipes(request, tmp_path_factory):
    path = folder(request.param, tmp_path_factory.mktemp("lcm"))
    # The peer's image to image does not write whether it needs a safety checker.
    unchecked = {"safety_checker": None, "requires_safety_checker": False}
    made = [getattr(library, CLASSES[request.param]).from_pretrained(path, **unchecked) for library in (diffusers, suffuse)]
    for pipe in made:
        pipe.set_progress_bar_config(disable=True)
    align(made[0])
    return request.param, *made


def call(task, pipe, **options):
    settings = {"prompt": "a cat", "output_type": "pt", "return_dict": False, **CALLS[task]}
    return pipe(**settings | {"generator": torch.Generator().manual_seed(7)} | options)[0]


OPTIONS = {
    "plain": {},
    "one step": {"num_inference_steps": 1},
    "eight steps of 25": {"num_inference_steps": 8, "original_inference_steps": 25},
    "timesteps": {"timesteps": [999, 759, 499, 259]},
    "another scale": {"guidance_scale": 2.0},
    "several": {"prompt": ["a cat", "a dog"], "num_images_per_prompt": 2},
    "latents": {"output_type": "latent"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_pictures_equal_the_peers(pipes, name):
    task, peer, ours = pipes
    assert difference(*(call(task, pipe, **OPTIONS[name]) for pipe in (peer, ours))) == 0


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_a_part_of_the_way(pipes, strength):
    task, peer, ours = pipes
    if task == "image":
        assert difference(*(call(task, pipe, strength=strength) for pipe in (peer, ours))) == 0


def test_callbacks_see_what_the_peers_see(pipes):
    task, *both = pipes
    names = ["latents", "denoised", "prompt_embeds", "w_embedding"]
    seen = [[], []]
    results = []
    for pipe, log in zip(both, seen, strict=True):

        def look(pipe, index, timestep, tensors, log=log):
            log.append({name: tensor.clone() for name, tensor in tensors.items()})
            return {"w_embedding": tensors["w_embedding"] * 0.5} if index == 1 else {}

        results.append(call(task, pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names))
    assert difference(*results) == 0
    for theirs, mine in zip(*seen, strict=True):
        assert all(difference(theirs[name], mine[name]) == 0 for name in names)


def test_runs_are_kept_and_resumed(pipes, tmp_path):
    task, _, ours = pipes
    whole = call(task, ours, generator=None, seed=3, save_run=str(tmp_path / "{step}.run"))
    assert difference(whole, ours(resume=tmp_path / "2.run")[0]) == 0


def test_what_is_wrong_is_told(pipes):
    task, _, ours = pipes
    with pytest.raises(InputError, match=r"num_inference_steps=60 is more than the 50 timesteps|num_inference_steps=60 is more"):
        call(task, ours, num_inference_steps=60)
    with pytest.raises(InputError, match="original_inference_steps=0 is out of range"):
        call(task, ours, original_inference_steps=0)
    other = type(ours).from_pipe(ours, scheduler=suffuse.DDIMScheduler(beta_start=0.00085, beta_end=0.012))
    with pytest.raises(InputError, match="DDIMScheduler takes no original_inference_steps"):
        call(task, other, original_inference_steps=20)
    assert bool(torch.isfinite(call(task, other, num_inference_steps=8)).all())
