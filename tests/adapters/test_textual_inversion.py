"""Learnt words: pictures equal the peer's, nothing is left when they are forgotten, and nothing changes when they are refused."""

from __future__ import annotations

import copy

import diffusers
import pytest
import safetensors.torch
import torch
from tasks import call, difference, pair, set_scheduler

import suffuse
from suffuse.diffusion.weighted_prompts import Weighted
from suffuse.errors import (
    AdapterError,
    CorruptFileError,
    MissingFileError,
    NonFiniteError,
    UnknownArgumentError,
    UnsafePickleError,
)

WIDTH = 32


def vectors(count: int | None = None, seed: int = 0, width: int = WIDTH) -> torch.Tensor:
    shape = (width,) if count is None else (count, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.5


def a1111(name: str, count: int) -> dict:
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": vectors(count)},
        "name": name,
        "step": 500,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    }


@pytest.fixture
def pipes():
    """The peer's pipeline, a copy because its unloading leaves traces, and ours."""
    peer, ours = pair("text")
    set_scheduler((peer, ours), "DDIMScheduler")
    before = state_of(ours)
    yield copy.deepcopy(peer), ours
    ours.unload_textual_inversion()
    assert unchanged(before, state_of(ours))


def state_of(pipe, tokenizer="tokenizer", text_encoder="text_encoder"):
    tokenizer, text_encoder = getattr(pipe, tokenizer), getattr(pipe, text_encoder)
    attributes = sorted(vars(text_encoder)), text_encoder.config.vocab_size, text_encoder.get_input_embeddings().num_embeddings
    weights = {name: tensor.clone() for name, tensor in text_encoder.state_dict().items()}
    return id(tokenizer._tokenizer), tokenizer._tokenizer.to_str(), len(tokenizer), attributes, weights


def unchanged(before, after):
    # Whether a tokenizer pads and cuts is what its last call asked of it, and part of its text.
    same = all(torch.equal(tensor, after[4][name]) for name, tensor in before[4].items())
    return before[0] == after[0] and before[2:4] == after[2:4] and same


def pictures_agree(pipes, prompt, **options):
    settings = {"prompt": prompt, "num_inference_steps": 2, **options}
    peer, ours = (call(pipe, "text", **settings) for pipe in pipes)
    return difference(peer, ours) == 0


GIVEN = {
    "a dictionary": ({"<cat>": vectors()}, {}),
    "another name": ({"<dog>": vectors()}, {"token": "<cat>"}),
    "a tensor": (vectors(), {"token": "<cat>"}),
    "several vectors": ({"<cat>": vectors(3)}, {}),
    "one vector in a matrix": ({"<cat>": vectors(1)}, {}),
    "A1111": (a1111("<cat>", 2), {}),
    "a list": ([{"<cat>": vectors()}, {"<dog>": vectors(2, 1)}], {}),
    "a list with names": ([vectors(), vectors(2, 1)], {"token": ["<cat>", "<dog>"]}),
    "a matrix of words": (vectors(2), {"token": ["<cat>", "<dog>"]}),
    "half precision": ({"<cat>": vectors(2).half()}, {}),
}


@pytest.mark.parametrize("name", GIVEN)
def test_every_form(pipes, name):
    given, options = GIVEN[name]
    before = call(pipes[1], "text", prompt="a <cat> on a <dog>", num_inference_steps=2)
    for pipe in pipes:
        pipe.load_textual_inversion(copy.deepcopy(given), **options)
    assert pictures_agree(pipes, "a <cat> on a <dog>")
    assert pictures_agree(pipes, ["a <cat>", "a bird"], negative_prompt=["a bird", "<cat> <cat>"])
    assert difference(call(pipes[1], "text", prompt="a <cat> on a <dog>", num_inference_steps=2), before) > 0


FILES = {
    "learned_embeds.safetensors": lambda path: safetensors.torch.save_file({"<cat>": vectors(2)}, path),
    "learned_embeds.bin": lambda path: torch.save({"<cat>": vectors(2)}, path),
    "cat.pt": lambda path: torch.save(a1111("<cat>", 2), path),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore:.*is a pickle")
def test_every_kind_of_file(pipes, name, tmp_path):
    FILES[name](tmp_path / name)
    peer, ours = pipes
    peer.load_textual_inversion(str(tmp_path), weight_name=name)
    ours.load_textual_inversion(tmp_path)
    assert pictures_agree(pipes, "a <cat>")
    ours.unload_textual_inversion()
    ours.load_textual_inversion(tmp_path / name)
    assert pictures_agree(pipes, "a <cat>")
    ours.unload_textual_inversion()
    ours.load_textual_inversion(str(tmp_path), weight_name=name)
    assert pictures_agree(pipes, "a <cat>")


def test_prompts_are_spelt_out(pipes):
    for pipe in pipes:
        pipe.load_textual_inversion({"<cat>": vectors(3)})
        pipe.load_textual_inversion({"<dog>": vectors()})
    prompts = ["a <cat>, a <dog>", "<cat><cat>", "nothing"]
    assert pipes[1].maybe_convert_prompt(prompts, pipes[1].tokenizer) == pipes[0].maybe_convert_prompt(
        prompts, pipes[0].tokenizer
    )
    assert pipes[1].maybe_convert_prompt("a <cat>", pipes[1].tokenizer) == "a <cat> <cat>_1 <cat>_2"


def test_a_part_of_a_word_stays_one(pipes):
    # The peer writes the word out inside of its own parts.
    _, ours = pipes
    ours.load_textual_inversion({"<cat>": vectors(3)})
    assert ours.maybe_convert_prompt("<cat>_1 <cat>", ours.tokenizer) == "<cat>_1 <cat> <cat>_1 <cat>_2"


def test_words_of_several_vectors_in_weighted_prompts(pipes):
    _, ours = pipes
    ours.load_textual_inversion({"<cat>": vectors(3)})
    ours.load_textual_inversion({"<dog>": vectors()})

    def read(text):
        return ours.encode_prompt(Weighted(text), torch.device("cpu"), 1, False)[0]

    assert read("<cat> " * 40).shape[1] == 2 * ours.tokenizer.model_max_length
    assert difference(read("a (<cat>:1.3)"), read("a (<dog>:1.3)")) > 0


def test_words_are_forgotten_one_by_one(pipes):
    peer, ours = pipes
    before = state_of(ours)
    for pipe in pipes:
        pipe.load_textual_inversion([{"<cat>": vectors(2)}, {"<dog>": vectors(seed=1)}, {"<eel>": vectors(2, 2)}])
    for pipe, tokens in ((peer, ["<dog>"]), (ours, "<dog>")):
        pipe.unload_textual_inversion(tokens)
    assert pictures_agree(pipes, "a <cat> on a <dog> and <eel>")
    ours.unload_textual_inversion("<cat>")
    assert ours.tokenizer.convert_tokens_to_ids("<eel>_1") == before[2] + 1
    assert torch.equal(ours.text_encoder.get_input_embeddings().weight[-2:], vectors(2, 2))
    ours.unload_textual_inversion(["<eel>"])
    assert unchanged(before, state_of(ours))


def test_what_is_saved_knows_the_words(pipes, tmp_path):
    _, ours = pipes
    ours.load_textual_inversion({"<cat>": vectors(2)})
    ours.save_pretrained(tmp_path)
    expected = call(ours, "text", prompt="a <cat>", num_inference_steps=2)
    loaded = type(ours).from_pretrained(tmp_path)
    peer = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    for pipe in (loaded, peer):
        pipe.set_progress_bar_config(disable=True)
        assert difference(call(pipe, "text", prompt="a <cat>", num_inference_steps=2), expected) < 1e-6


def test_no_random_number_is_spent(pipes):
    state = torch.random.get_rng_state()
    pipes[1].load_textual_inversion({"<cat>": vectors(2)})
    assert torch.equal(torch.random.get_rng_state(), state)


def test_both_text_encoders():
    peer, ours = pair("xl text")
    set_scheduler((peer, ours), "DDIMScheduler")
    peer = copy.deepcopy(peer)
    names = [("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")]
    settings = {"prompt": "a <cat>", "negative_prompt": "a <cat>", "num_inference_steps": 2}
    call(ours, "xl text", **settings)  # transformers sets attributes in the first call
    before = [state_of(ours, *parts) for parts in names]
    for pipe in (peer, ours):
        for number, (tokenizer, text_encoder) in enumerate(names):
            parts = {"tokenizer": getattr(pipe, tokenizer), "text_encoder": getattr(pipe, text_encoder)}
            pipe.load_textual_inversion(vectors(2, number), token="<cat>", **parts)
    assert difference(call(peer, "xl text", **settings), call(ours, "xl text", **settings)) == 0
    for tokenizer, text_encoder in names:
        ours.unload_textual_inversion(tokenizer=getattr(ours, tokenizer), text_encoder=getattr(ours, text_encoder))
    assert all(unchanged(state, state_of(ours, *parts)) for state, parts in zip(before, names, strict=True))


def test_files_for_both_text_encoders_of_xl(tmp_path):
    _, ours = pair("text")
    safetensors.torch.save_file({"clip_l": vectors(2), "clip_g": vectors(2, width=48)}, tmp_path / "xl.safetensors")
    ours.load_textual_inversion(tmp_path / "xl.safetensors", token="<cat>")
    assert torch.equal(ours.text_encoder.get_input_embeddings().weight[-2:], vectors(2))
    ours.unload_textual_inversion()


def test_a_table_with_more_rows_than_tokens_gets_them_back():
    _, ours = pair("text")
    own = type(ours).from_pipe(ours, text_encoder=copy.deepcopy(ours.text_encoder), tokenizer=copy.deepcopy(ours.tokenizer))
    own.text_encoder.resize_token_embeddings(len(own.tokenizer) + 2)
    before = state_of(own)
    for count, rows in ((1, 2), (2, 2), (3, 3)):
        own.load_textual_inversion(vectors(count), token="<cat>")
        assert own.text_encoder.get_input_embeddings().num_embeddings == len(ours.tokenizer) + rows
        own.unload_textual_inversion()
        assert unchanged(before, state_of(own))


REFUSED = {
    "width": (lambda pipe: pipe.load_textual_inversion({"<cat>": vectors(2, width=48)}), AdapterError, r"\(2, 48\)"),
    "no vectors": (lambda pipe: pipe.load_textual_inversion({"<cat>": vectors(0)}), AdapterError, "does not fit"),
    "whole numbers": (lambda pipe: pipe.load_textual_inversion({"<cat>": vectors().long()}), AdapterError, "torch.int64"),
    "NaN": (lambda pipe: pipe.load_textual_inversion({"<cat>": vectors() * torch.nan}), NonFiniteError, "'<cat>' holds NaN"),
    "known": (lambda pipe: pipe.load_textual_inversion({"a": vectors()}), AdapterError, "'a' is a token already"),
    "loaded": (lambda pipe: pipe.load_textual_inversion({"<old>": vectors()}), AdapterError, "'<old>' is a token already"),
    "loaded, of two": (
        lambda pipe: pipe.load_textual_inversion([{"<new>": vectors()}, {"<old>": vectors()}]),
        AdapterError,
        "is a token already",
    ),
    "twice": (lambda pipe: pipe.load_textual_inversion([{"<cat>": vectors()}] * 2), AdapterError, "named twice"),
    "no name": (lambda pipe: pipe.load_textual_inversion(vectors()), AdapterError, "does not say what its word is"),
    "empty name": (lambda pipe: pipe.load_textual_inversion({"": vectors()}), AdapterError, "does not say"),
    "A1111 without a name": (
        lambda pipe: pipe.load_textual_inversion({"string_to_param": {"*": vectors()}, "name": None}),
        AdapterError,
        "does not say",
    ),
    "many keys": (
        lambda pipe: pipe.load_textual_inversion({"a": vectors(), "b": vectors()}),
        AdapterError,
        "holds no learnt word",
    ),
    "no tensor": (lambda pipe: pipe.load_textual_inversion({"<cat>": [1.0]}), CorruptFileError, "something else than vectors"),
    "nothing": (lambda pipe: pipe.load_textual_inversion({}), AdapterError, "holds no learnt word"),
    "names": (lambda pipe: pipe.load_textual_inversion([vectors(), vectors()], token=["<cat>"]), AdapterError, "1 for 2"),
    "a matrix of words": (lambda pipe: pipe.load_textual_inversion(vectors(3), token=["<a>", "<b>"]), AdapterError, "2 for 3"),
    "unknown": (lambda pipe: pipe.unload_textual_inversion(["<old>", "<cat>"]), AdapterError, "no word '<cat>' was loaded"),
    "keyword": (lambda pipe: pipe.load_textual_inversion(vectors(), tokens="<cat>"), UnknownArgumentError, "tokens"),
    "no file": (lambda pipe: pipe.load_textual_inversion("./nowhere"), MissingFileError, "nowhere"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_refused_and_changes_nothing(pipes, name):
    use, error, message = REFUSED[name]
    _, ours = pipes
    ours.load_textual_inversion({"<old>": vectors(2)})
    before = state_of(ours)
    with pytest.raises(error, match=message):
        use(ours)
    assert unchanged(before, state_of(ours))


class Evil:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.filterwarnings("ignore:.*is a pickle")
def test_bad_files(pipes, tmp_path):
    torch.save({"<cat>": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UnsafePickleError, match="more than tensors"):
        pipes[1].load_textual_inversion(tmp_path / "evil.pt")
    torch.save({"<cat>": vectors()}, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:300])
    with pytest.raises(CorruptFileError):
        pipes[1].load_textual_inversion(tmp_path / "cut.pt")


def test_without_a_text_encoder():
    _, ours = pair("text")
    without = type(ours).from_pipe(ours, text_encoder=None, tokenizer=None)
    with pytest.raises(AdapterError, match="need a tokenizer and a text encoder"):
        without.load_textual_inversion(vectors(), token="<cat>")


def test_a_vector_too_large_for_the_encoder_is_refused(pipes):
    pipe = suffuse.StableDiffusionPipeline(**copy.deepcopy(pipes[1].components), requires_safety_checker=False)
    pipe.text_encoder.half()
    with pytest.raises(NonFiniteError, match="<cat>"):
        pipe.load_textual_inversion({"<cat>": vectors() * 1e6})
