"""The prior of unCLIP: equal to the peer's, bit for bit."""

from __future__ import annotations

import pytest
import torch
from model_pairs import assert_same_outputs, pair
from unet_options import noise

import suffuse
from suffuse.errors import ConfigError, InputError

SIZES = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "embedding_dim": 32, "num_embeddings": 7}
VECTORS = {"hidden_states": noise(2, 32), "timestep": torch.tensor([3, 500]), "proj_embedding": noise(2, 32)}
TEXT = {"encoder_hidden_states": noise(2, 7, 32)}
MASK = {"attention_mask": torch.arange(7)[None] < torch.tensor([[3], [7]])}
KINDS = {
    "as in Karlo": ({}, TEXT | MASK),
    "without a mask": ({}, TEXT),
    "one timestep": ({}, TEXT | MASK | {"timestep": 7}),
    "one timestep as a tensor": ({}, TEXT | {"timestep": torch.tensor(7)}),
    "norms": ({"norm_in_type": "layer", "embedding_proj_norm_type": "layer"}, TEXT | MASK),
    "other widths": (
        {"time_embed_dim": 40, "embedding_proj_dim": 20, "clip_embed_dim": 24},
        TEXT | {"proj_embedding": noise(2, 20)},
    ),
    "another act": ({"time_embed_act_fn": "gelu"}, TEXT),
    "no learned token": ({"added_emb_type": None, "additional_embeddings": 3}, TEXT),
    "no text": ({"encoder_hid_proj_type": None, "num_embeddings": 1, "additional_embeddings": 3}, {}),
    "tokens, and places for them alone": (
        {"encoder_hid_proj_type": None, "added_emb_type": None, "additional_embeddings": 0},
        {"hidden_states": noise(2, 7, 32)},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_equal_the_peers(kind):
    options, told = KINDS[kind]
    ours, peer = pair("PriorTransformer", **SIZES | options)
    assert_same_outputs(ours, peer, **VECTORS | told)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    ours, peer = pair("PriorTransformer", dtype, **SIZES)
    told = VECTORS | TEXT | MASK
    told = {name: value.to(dtype) if value.is_floating_point() else value for name, value in told.items()}
    assert_same_outputs(ours, peer, **told)


def test_vectors_are_brought_back():
    ours, peer = pair("PriorTransformer", **SIZES)
    with torch.no_grad():
        assert torch.equal(*(model.post_process_latents(VECTORS["hidden_states"]) for model in (ours, peer)))


def test_recomputing_changes_no_gradient():
    ours, _ = pair("PriorTransformer", **SIZES)
    ours.train()
    gradients = []
    for recompute in (False, True):
        ours.zero_grad()
        ours.enable_gradient_checkpointing() if recompute else ours.disable_gradient_checkpointing()
        ours(**VECTORS, **TEXT)[0].sum().backward()
        gradients.append([parameter.grad.clone() for parameter in ours.parameters() if parameter.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_in_type": "group"}, "no such norm_in_type"),
        ({"embedding_proj_norm_type": "group"}, "no such embedding_proj_norm_type"),
        ({"encoder_hid_proj_type": "mlp"}, "no such encoder_hid_proj_type"),
        ({"added_emb_type": "other"}, "no such added_emb_type"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
    ],
)
def test_what_is_not_built(options, message):
    with pytest.raises(ConfigError, match=message):
        suffuse.PriorTransformer(**SIZES | options)


def test_what_is_not_taken():
    ours = suffuse.PriorTransformer(**SIZES)
    with pytest.raises(InputError, match="reads the tokens of a text"):
        ours(**VECTORS)
    with pytest.raises(InputError, match=r"other places than tokens(.|\n)*8 tokens(.|\n)*11"):
        ours(**VECTORS, encoder_hidden_states=noise(2, 4, 32))
