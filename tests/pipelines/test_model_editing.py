"""Editing what a model assumes: the matrices are those of equation 5, and what is restored is as it was, to the last bit."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import diffusers
import numpy as np
import pytest
import tiny
import torch
from tasks import align, difference, set_scheduler

import suffuse
from suffuse.diffusion.assumption_editing import aligned, edited, projections
from suffuse.errors import InputError, SuffuseError

SIZE = {"height": 64, "width": 48}


@cache
def folder() -> Path:
    path = Path(mkdtemp(prefix="suffuse-"))
    parts = tiny.stable_diffusion(path / "tokenizer")
    diffusers.StableDiffusionModelEditingPipeline(**parts, requires_safety_checker=False).save_pretrained(path / "pipeline")
    return path / "pipeline"


@cache
def pipes():
    """(the peer's pipeline, ours) from one folder."""
    made = tuple(library.StableDiffusionModelEditingPipeline.from_pretrained(folder()) for library in (diffusers, suffuse))
    for pipe in made:
        pipe.set_progress_bar_config(disable=True)
    align(made[0])
    return made


@pytest.fixture
def ours():
    set_scheduler(pipes(), "DDIMScheduler")
    yield pipes()[1]
    pipes()[1].restore_model()


def draw(pipe, **options):
    told = {"prompt": "a rose", "num_inference_steps": 3, "output_type": "pt", "return_dict": False, **SIZE}
    return pipe(**{**told, "generator": torch.Generator().manual_seed(7), **options})[0]


def weights(pipe) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in pipe.unet.state_dict().items()}


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


OPTIONS = {
    "plain": {},
    "no guidance": {"guidance_scale": 1.0},
    "several": {"prompt": ["a cat", "a dog"], "num_images_per_prompt": 2, "negative_prompt": ["rain", "snow"]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_pictures_equal_the_peers(ours, name):
    assert difference(*(draw(pipe, **OPTIONS[name]) for pipe in pipes())) == 0


# ---------------------------------------------------------------- the edit

SOURCE, DESTINATION = "a rose", "a blue rose"
PAIRS = [
    (SOURCE, DESTINATION),
    *((f"{start}{SOURCE}", f"{start}{DESTINATION}") for start in ("A photo of ", "An image of ", "A picture of ")),
]


def reference(weight: torch.Tensor, lamb: float) -> np.ndarray:
    """Equation 5, word by word. The peer looks for layers by a name that is no more, and edits nothing."""
    peer, old = pipes()[0], weight.double().numpy()
    numerator, denominator = lamb * old, lamb * np.eye(old.shape[1])
    for said, meant in PAIRS:
        texts = [peer.encode_prompt(text, "cpu", 1, False)[0][0].detach().double().numpy() for text in (said, meant)]
        letters = [peer.tokenizer(text).input_ids for text in (said, meant)]
        place, places = 0, []
        for token in letters[0]:
            while letters[1][place] != token:
                place += 1
            places.append(place)
            place += 1
        places = ([*places, *range(place, 77)] + [76] * 77)[:77]
        for position in range(77):
            context, value = texts[0][position], old @ texts[1][places[position]]
            numerator = numerator + np.outer(value, context)
            denominator = denominator + np.outer(context, context)
    return numerator @ np.linalg.inv(denominator)


@pytest.mark.parametrize("lamb", [0.1, 1.0])
def test_matrices_are_those_of_the_equation(ours, lamb):
    before = weights(ours)
    ours.edit_model(SOURCE, DESTINATION, lamb=lamb)
    names = [name for name in before if "attn2.to_k" in name or "attn2.to_v" in name]
    assert len(names) >= 4
    for name, now in ours.unet.state_dict().items():
        if name in names:
            assert np.abs(now.numpy() - reference(before[name], lamb)).max() < 1e-3
            assert difference(now, before[name]) > 1e-3
        else:
            assert torch.equal(now, before[name]), name


def test_pictures_change_and_come_back(ours):
    plain, before = draw(ours), weights(ours)
    parameters = [layer.weight for layer in projections(ours.unet)]
    ours.edit_model(SOURCE, DESTINATION)
    assert difference(draw(ours), plain) > 1e-4
    ours.restore_model()
    assert equal(weights(ours), before)
    assert all(layer.weight is parameter for layer, parameter in zip(projections(ours.unet), parameters, strict=True))
    assert difference(draw(ours), plain) == 0


def test_edits_begin_anew_or_add_up(ours):
    ours.edit_model(SOURCE, DESTINATION)
    once = weights(ours)
    ours.edit_model("a cat", "a red cat")
    other = weights(ours)
    ours.edit_model(SOURCE, DESTINATION)
    assert equal(weights(ours), once)
    ours.edit_model("a cat", "a red cat", restart_params=False)
    assert not equal(weights(ours), other)
    ours.restore_model()
    ours.edit_model(SOURCE, DESTINATION)
    assert equal(weights(ours), once)


def test_values_alone(ours):
    pipe = suffuse.StableDiffusionModelEditingPipeline.from_pipe(ours, with_to_k=False, with_augs=[])
    before = weights(pipe)
    pipe.edit_model(SOURCE, DESTINATION)
    changed = {name for name, value in weights(pipe).items() if not torch.equal(value, before[name])}
    pipe.restore_model()
    assert changed == {name for name in before if "attn2.to_v.weight" in name}


def test_settings_are_saved(tmp_path, ours):
    pipe = suffuse.StableDiffusionModelEditingPipeline.from_pipe(ours, with_to_k=False, with_augs=["A drawing of "])
    pipe.save_pretrained(tmp_path)
    again = suffuse.StableDiffusionModelEditingPipeline.from_pretrained(tmp_path)
    assert (again.config.with_to_k, again.config.with_augs) == (False, ["A drawing of "])
    assert diffusers.StableDiffusionModelEditingPipeline.from_pretrained(tmp_path).with_augs == ["A drawing of "]


def test_a_pipeline_that_shares_the_unet_draws_with_it(ours):
    plain = suffuse.StableDiffusionPipeline.from_pipe(ours, image_encoder=None)
    plain.set_progress_bar_config(disable=True)
    before = draw(plain)
    ours.edit_model(SOURCE, DESTINATION)
    assert difference(draw(plain), draw(ours)) == 0
    ours.restore_model()
    assert difference(draw(plain), before) == 0


def test_half_precision_stays_half(ours):
    pipe = copy.deepcopy(ours).to(dtype=torch.bfloat16)
    pipe.edit_model(SOURCE, DESTINATION)
    assert {layer.weight.dtype for layer in projections(pipe.unet)} == {torch.bfloat16}


def test_little_strength_maps_words_exactly():
    generator = torch.Generator().manual_seed(0)
    weight, source, wanted = (torch.randn(*shape, generator=generator) for shape in ((8, 16), (4, 16), (4, 16)))
    made = edited(weight, source, wanted, 1e-4)
    assert difference(source @ made.T, wanted @ weight.T) < 1e-2
    assert difference(edited(weight, source, wanted, 1e6), weight) < 1e-3


def test_words_are_found_in_order():
    assert aligned([1, 5, 7, 2], [1, 5, 6, 7, 2, 2], 8) == [0, 1, 3, 4, 5, 6, 7, 7]


# ---------------------------------------------------------------- what is wrong

BAD = {
    "a word left out": ((SOURCE, "a blue tulip"), {}, "destination_prompt leaves out a word of source_prompt"),
    "no text": ((7, DESTINATION), {}, "source_prompt has the wrong type"),
    "two destinations": ((SOURCE, ["a", "b"]), {}, "destination_prompt has the wrong type"),
    "no strength": ((SOURCE, DESTINATION), {"lamb": 0}, "lamb=0 is out of range"),
    "a strength without end": ((SOURCE, DESTINATION), {"lamb": float("inf")}, "lamb=inf is out of range"),
}


@pytest.mark.filterwarnings("ignore:prompt .* has .* tokens")
@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_refused_and_the_model_as_it_was(ours, name):
    prompts, options, message = BAD[name]
    before = weights(ours)
    with pytest.raises(SuffuseError, match=message):
        ours.edit_model(*prompts, **options)
    assert equal(weights(ours), before)


@pytest.mark.filterwarnings("ignore:prompt .* has .* tokens")
def test_prompts_that_are_too_long_are_refused(ours):
    with pytest.raises(InputError, match=r"a prompt is too long(.|\n)*at most 77"):
        ours.edit_model("a " * 100, "a " * 101)


def test_joined_projections_are_refused(ours):
    ours.unet.fuse_qkv_projections()
    try:
        with pytest.raises(InputError, match=r"joined into one projection(.|\n)*unfuse_qkv_projections"):
            ours.edit_model(SOURCE, DESTINATION)
    finally:
        ours.unet.unfuse_qkv_projections()
