"""Transformers over patches: equal to the peer's, bit for bit, under both names."""

from __future__ import annotations

import pytest
import tiny
import torch
from model_pairs import assert_same_outputs, pair
from unet_options import noise

import suffuse
from suffuse.errors import ConfigError, InputError

KINDS = {
    "plain": {},
    "variance": {"out_channels": 8},
    "patches of 4": {"patch_size": 4},
    "affine": {"norm_elementwise_affine": True},
    "no biases": {"attention_bias": False},
    "exact": {"activation_fn": "gelu"},
    "gated": {"activation_fn": "geglu"},
}
TOLD = {"timestep": torch.tensor([3, 500]), "class_labels": torch.tensor([0, 1000])}


@pytest.mark.parametrize("name", ["Transformer2DModel", "DiTTransformer2DModel"])
@pytest.mark.parametrize("kind", KINDS)
def test_predictions_equal_the_peers(name, kind):
    ours, peer = pair(name, **tiny.DIT | KINDS[kind])
    assert_same_outputs(ours, peer, noise(2, 4, 16, 16), **TOLD)


@pytest.mark.parametrize("size", [8, 24])
def test_another_size(size):
    ours, peer = pair("DiTTransformer2DModel", **tiny.DIT)
    assert_same_outputs(ours, peer, noise(2, 4, size, size), **TOLD)


def test_what_is_not_square():
    # The peer lays patches out as a square whatever came; here the prediction has the shape of the sample.
    ours, _ = pair("DiTTransformer2DModel", **tiny.DIT)
    with torch.no_grad():
        assert ours(noise(2, 4, 8, 32), **TOLD).sample.shape == (2, 4, 8, 32)


def test_recomputing_changes_no_gradient():
    ours, _ = pair("DiTTransformer2DModel", **tiny.DIT)
    ours.train()
    gradients = []
    for recompute in (False, True):
        ours.zero_grad()
        ours.enable_gradient_checkpointing() if recompute else ours.disable_gradient_checkpointing()
        ours(noise(2, 4, 16, 16), **TOLD).sample.sum().backward()
        gradients.append([parameter.grad.clone() for parameter in ours.parameters() if parameter.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


BAD = {
    "no patches": ({"patch_size": None}, "for patches and classes only"),
    "other norms": ({"norm_type": "layer_norm"}, r"for patches and classes only(.|\n)*ada_norm_zero"),
    "no classes": ({"num_embeds_ada_norm": None}, "the number of classes"),
    "context": ({"cross_attention_dim": 8}, "cross_attention_dim"),
    "codes": ({"num_vector_embeds": 8}, "num_vector_embeds"),
    "widths that do not divide": ({"num_attention_heads": 1, "attention_head_dim": 6}, "a multiple of 4"),
    "no channels": ({"in_channels": None}, "in_channels"),
    "another activation": ({"activation_fn": "tanh"}, "no feed-forward layer has activation_fn='tanh'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_built(case):
    options, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        suffuse.Transformer2DModel(**tiny.DIT | options)


def test_what_is_not_taken():
    ours = suffuse.Transformer2DModel(**tiny.DIT)
    sample = noise(2, 4, 16, 16)
    for options, message in (
        ({"timestep": None}, "needs a timestep and a class"),
        ({"class_labels": None}, "needs a timestep and a class"),
        ({"class_labels": torch.tensor([1])}, "1 given for 2 samples"),
        ({"hidden_states": noise(2, 4, 15, 16)}, "multiples of 2"),
        ({"hidden_states": noise(2, 3, 16, 16)}, r"\(batch, 4, height, width\)"),
        ({"encoder_hidden_states": noise(2, 5, 16)}, "attends to nothing but its own patches"),
    ):
        with pytest.raises(InputError, match=message):
            ours(**{"hidden_states": sample, **TOLD, **options})
