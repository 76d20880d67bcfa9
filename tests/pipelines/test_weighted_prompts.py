"""Prompts with weights, blends, and more tokens than the text encoder reads at once."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tasks import call, difference, pair, set_scheduler

import suffuse
from suffuse import SavedRun, Weighted
from suffuse.diffusion.prompts import encode_text
from suffuse.diffusion.weighted_prompts import BREAK, UP, parse
from suffuse.errors import InputError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("prompt", "segments"),
    [
        ("a cat", [("a cat", 1)]),
        ("a (red:1.3) apple", [("a ", 1), ("red", 1.3), (" apple", 1)]),
        ("(big)", [("big", UP)]),
        ("((big))", [("big", UP * UP)]),
        ("[small]", [("small", 1 / UP)]),
        ("(a (b:2):0.5)", [("a ", 0.5), ("b", 1.0)]),
        ("(a [b])", [("a ", UP), ("b", 1.0)]),
        (r"\(plain\) \: \| \\", [("(plain) : | \\", 1)]),
        ("at 12:30, 3:4 ratio:2", [("at 12:30, 3:4 ratio:2", 1)]),
        ("one BREAK two, Bold BREAKFAST", [("one ", 1), (BREAK, 1), (" two, Bold BREAKFAST", 1)]),
        ("HEARTBREAK hotel", [("HEARTBREAK hotel", 1)]),
        ("", []),
    ],
)
def test_what_brackets_mean(prompt, segments):
    ((parsed, share),) = parse(prompt)
    assert share == 1
    assert [text for text, _ in parsed] == [text for text, _ in segments]
    assert [weight for _, weight in parsed] == pytest.approx([weight for _, weight in segments])


def test_shares_of_a_blend_are_one_together():
    parts = parse("a cat:3 | a (dog:2) | a fox:0")
    assert [share for _, share in parts] == [0.75, 0.25, 0]
    assert parts[1][0] == [(" a ", 1), ("dog", 2), (" ", 1)]


@given(st.text("ab ()[]|:\\.1BREAK", max_size=30))
def test_any_text_is_understood_or_refused(text):
    try:
        parts = parse(text)
    except InputError:
        return
    assert sum(share for _, share in parts) == pytest.approx(1)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a (cat", r"a bracket \( has no partner"),
        ("a cat)", r"a bracket \) has no partner"),
        ("a (cat]", r"a bracket \] has no partner"),
        ("(a:1.3|b:1.2)", r"\| stands inside of brackets"),
        ("[cat:1.3]", "a weight stands where none can"),
        ("(cat:1.2.3)", "'1.2.3' is no weight"),
        ("a:1 | b:-1", "nothing together"),
    ],
)
def test_what_cannot_be_understood(prompt, message):
    _, pipe = pair("text")
    with pytest.raises(InputError, match=message):
        call(pipe, "text", prompt=Weighted(prompt))


# ---------------------------------------------------------------- pictures


@pytest.fixture(params=["text", "xl text", "inpaint", "xl image"])
def task(request):
    set_scheduler(pair(request.param), "DDIMScheduler")
    return request.param


def drawn(task, prompt, **options):
    return call(pair(task)[1], task, prompt=prompt, **options)


def test_weights_of_one_change_nothing(task):
    plain = drawn(task, "a red cat", negative_prompt="a dog")
    assert difference(drawn(task, Weighted("a (red:1) cat"), negative_prompt=Weighted("a dog")), plain) == 0
    assert difference(drawn(task, Weighted("a red cat:2 | a dog:0"), negative_prompt="a dog"), plain) < 1e-4


def test_weights_change_the_picture_and_a_plain_text_is_read_as_it_stands(task):
    plain = drawn(task, "a red cat")
    assert difference(drawn(task, Weighted("a (red:1.5) cat")), plain) > 1e-3
    assert difference(drawn(task, "a (red:1.5) cat"), drawn(task, Weighted("a (red:1.5) cat"))) > 1e-3


def test_prompts_longer_than_the_encoder_reads(task):
    long = " ".join(f"{word}," for word in ["cat", "dog", "tree", "house"] * 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = drawn(task, Weighted(long))
        assert difference(told, drawn(task, Weighted(long + " snow"))) > 0, "the end counts"
        assert difference(told, drawn(task, Weighted(long), negative_prompt="fog")) > 0
        drawn(task, "a cat", negative_prompt=Weighted(long))
        drawn(task, [Weighted(long), "a cat"], generator=None)


def test_what_weighs_nothing_is_as_if_it_were_not_said():
    _, pipe = pair("text")
    parts = pipe.tokenizer, pipe.text_encoder, CPU
    with torch.no_grad():
        empty, told, nothing = (encode_text([text], *parts) for text in ("", "a cat", Weighted("(a cat:0)")))
    rows = len(pipe.tokenizer("a cat", add_special_tokens=False).input_ids)
    assert torch.equal(nothing[:, 1 : rows + 1], empty[:, 1 : rows + 1])
    assert torch.equal(nothing[:, rows + 1 :], told[:, rows + 1 :])


def test_a_blend_is_the_mean():
    _, pipe = pair("text")
    parts = pipe.tokenizer, pipe.text_encoder, CPU
    with torch.no_grad():
        cat, dog, both = (encode_text([text], *parts) for text in ("a cat", "a dog", Weighted("a cat:3|a dog")))
    assert torch.allclose(both, 0.75 * cat + 0.25 * dog, atol=1e-6)


def test_pieces_stand_one_behind_the_other():
    _, pipe = pair("text")
    parts = pipe.tokenizer, pipe.text_encoder, CPU
    with torch.no_grad():
        one, other, both = (encode_text([text], *parts) for text in ("cat", "dog", Weighted("cat BREAK dog")))
    assert torch.allclose(both, torch.cat([one, other], dim=1), atol=1e-6)


def test_a_saved_run_keeps_them(tmp_path):
    set_scheduler(pair("text"), "DDIMScheduler")
    made = drawn("text", Weighted("a (red:1.5) cat"), save_run=tmp_path / "run.safetensors")
    assert isinstance(SavedRun.load(tmp_path / "run.safetensors").arguments["prompt"], Weighted)
    assert difference(pair("text")[1](resume=tmp_path / "run.safetensors")[0], made) == 0


def test_weighted_prompts_beside_embeddings_must_fit():
    _, pipe = pair("text")
    embeds, *_ = pipe.encode_prompt("a cat", pipe.device, 1, False)
    long = suffuse.Weighted("a (blurred:1.2) photograph " * 60)
    with pytest.raises(InputError, match=r"a weighted prompt has \d+ tokens, and the embeddings beside it \d+"):
        pipe(prompt_embeds=embeds, negative_prompt=long, num_inference_steps=1)
    with pytest.raises(InputError, match=r"a weighted prompt has \d+ tokens, and the embeddings beside it 5"):
        pipe(prompt_embeds=embeds[:, :5], negative_prompt=suffuse.Weighted("(blurred:1.2)"), num_inference_steps=1)
