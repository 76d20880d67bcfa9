import copy

import pytest
import torch
from model_pairs import pair
from unet_options import CROSS, TOKENS, cross, noise

import suffuse
from suffuse.errors import ConfigError, InputError
from suffuse.models.unet_2d_encoder import FIXED

NAME = "ControlNetModel"
XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}


def small(**changes):
    """A configuration with a conditioning embedding that halves once."""
    kept = cross(**{"conditioning_embedding_out_channels": (8, 16), **changes})
    return {name: value for name, value in kept.items() if name not in ("sample_size", "up_block_types")}


def arguments(**changes):
    given = {"sample": noise(2, 4, 8, 8), "timestep": 7, "encoder_hidden_states": noise(2, TOKENS, CROSS)}
    return {**given, "controlnet_cond": noise(2, 3, 16, 16), **changes}


# name → changes of the configuration, changes of the call
OPTIONS = {
    "stable diffusion 1": ({}, {}),
    "stable diffusion 2": ({"use_linear_projection": True, "upcast_attention": True, "attention_head_dim": (2, 4)}, {}),
    "stable diffusion xl": (XL, {"added_cond_kwargs": {"text_embeds": noise(2, 32), "time_ids": noise(2, 6)}}),
    "eighths": ({"conditioning_embedding_out_channels": (8, 8, 16, 32)}, {"controlnet_cond": noise(2, 3, 64, 64)}),
    "one picture for all": ({}, {"controlnet_cond": noise(1, 3, 16, 16)}),
    "blue first": ({"controlnet_conditioning_channel_order": "bgr"}, {}),
    "four channels": (
        {"conditioning_channels": 4, "in_channels": 5},
        {"controlnet_cond": noise(2, 4, 16, 16), "sample": noise(2, 5, 8, 8)},
    ),
    "scaled": ({}, {"conditioning_scale": 0.3}),
    "guessing": ({}, {"guess_mode": True, "conditioning_scale": 0.7}),
    "pooled": ({"global_pool_conditions": True}, {"conditioning_scale": 0.7}),
    "pooled, guessing": ({"global_pool_conditions": True}, {"guess_mode": True}),
    "plain middle": ({"mid_block_type": "UNetMidBlock2D", "mid_block_scale_factor": 1.4142}, {}),
    "two layers": ({"layers_per_block": 2, "only_cross_attention": (True, False)}, {}),
    "only cross-attention": ({"only_cross_attention": True}, {}),
    "heads by their own name": ({"num_attention_heads": (2, 4), "attention_head_dim": 8}, {}),
    "attention without context": ({"down_block_types": ("AttnDownBlock2D",) * 2, "attention_head_dim": (4, 8)}, {}),
    "simple cross-attention": ({"down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")}, {}),
    "embedding table": ({"num_class_embeds": 10}, {"class_labels": torch.tensor([3, 7])}),
    "class timestep": ({"class_embed_type": "timestep"}, {"class_labels": torch.tensor([3, 7])}),
    "class identity": ({"class_embed_type": "identity"}, {"class_labels": noise(2, 128)}),
    "class projection": (
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 12},
        {"class_labels": noise(2, 12)},
    ),
    "added text": ({"addition_embed_type": "text", "addition_embed_type_num_heads": 4}, {}),
    "sines first": ({"flip_sin_to_cos": False, "freq_shift": 1}, {}),
    "scale and shift": ({"resnet_time_scale_shift": "scale_shift", "act_fn": "gelu", "norm_eps": 1e-3}, {}),
    "masked positions": (
        {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "mid_block_type": "UNetMidBlock2D"},
        {"attention_mask": torch.cat([torch.ones(2, 40), torch.zeros(2, 24)], dim=1)},
    ),
    "timestep each": ({}, {"timestep": torch.tensor([10, 900])}),
    "not divisible": ({}, {"sample": noise(2, 4, 9, 13), "controlnet_cond": noise(2, 3, 18, 26)}),
}


def both(ours, peer, **given):
    with torch.no_grad():
        one, other = ours(**given), peer(**given)
    return [*one.down_block_res_samples, one.mid_block_res_sample], [*other.down_block_res_samples, other.mid_block_res_sample]


@pytest.mark.parametrize("name", OPTIONS)
def test_outputs_equal_the_peers(name):
    config, call = OPTIONS[name]
    got, want = both(*pair(NAME, **small(**config)), **arguments(**call))
    assert len(got) == len(want)
    assert all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(a.any() for a in got)


def test_outputs_equal_the_peers_in_bfloat16():
    half = {name: value.bfloat16() if torch.is_tensor(value) else value for name, value in arguments().items()}
    got, want = both(*pair(NAME, torch.bfloat16, **small()), **half)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_tuple_is_the_output_without_its_names():
    ours, peer = pair(NAME, **small())
    with torch.no_grad():
        (down, middle), named = ours(**arguments(), return_dict=False), peer(**arguments())
    assert torch.equal(middle, named.mid_block_res_sample)
    assert all(torch.equal(a, b) for a, b in zip(down, named.down_block_res_samples, strict=True))


@pytest.mark.parametrize("changes", [{}, XL, {"num_class_embeds": 3}], ids=["1", "xl", "classes"])
@pytest.mark.parametrize("load", [True, False])
def test_from_unet_copies_what_the_peer_copies(changes, load):
    ours, peer = pair("UNet2DConditionModel", **cross(**{"up_block_types": ("CrossAttnUpBlock2D",) * 2, **changes}))
    options = {"conditioning_embedding_out_channels": (8, 16), "load_weights_from_unet": load, "conditioning_channels": 5}
    made = suffuse.ControlNetModel.from_unet(ours, "bgr", **options)
    theirs = type(pair(NAME, **small())[1]).from_unet(peer, "bgr", **options)
    settings, wanted = ({k: v for k, v in m.config.items() if k[0] != "_"} for m in (made, theirs))
    assert settings == wanted
    state, unet = made.state_dict(), ours.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    copied = state.keys() & unet.keys()
    assert all(torch.equal(state[name], unet[name]) for name in copied) is load
    if load:
        assert all(torch.equal(state[name], value) for name, value in theirs.state_dict().items() if name in copied)
    fresh = {
        name for name in state if name.startswith(("controlnet_down", "controlnet_mid", "controlnet_cond_embedding.conv_out"))
    }
    assert not any(state[name].any() for name in fresh)


def test_a_new_controlnet_adds_nothing():
    unet = suffuse.UNet2DConditionModel(**cross()).eval()
    made = suffuse.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16)).eval()
    given = arguments()
    with torch.no_grad():
        down, middle = made(**given, return_dict=False)
        del given["controlnet_cond"]
        plain = unet(**given).sample
        controlled = unet(**given, down_block_additional_residuals=down, mid_block_additional_residual=middle).sample
    assert torch.equal(plain, controlled)


def test_from_unet_refuses_what_a_controlnet_cannot_be():
    unet = suffuse.UNet2DConditionModel(**cross(resnet_skip_time_act=True, time_cond_proj_dim=4, dropout=0.1))
    with pytest.raises(ConfigError, match="resnet_skip_time_act=True, time_cond_proj_dim=4") as caught:
        suffuse.ControlNetModel.from_unet(unet)
    assert "dropout" not in str(caught.value)
    assert set(FIXED) == set(FIXED) & set(unet.config)


def test_text_is_projected_where_the_peer_builds_a_projection_and_forgets_it():
    ours, peer = pair(NAME, **small(encoder_hid_dim=CROSS))
    given = arguments()
    projected = {**given, "encoder_hidden_states": ours.encoder_hid_proj(given["encoder_hidden_states"])}
    got, want = both(ours, peer, **given)
    assert not torch.equal(got[-1], want[-1])
    with torch.no_grad():
        assert torch.equal(got[-1], peer(**projected).mid_block_res_sample)
    unet = suffuse.UNet2DConditionModel(**cross(encoder_hid_dim=24))
    made = suffuse.ControlNetModel.from_unet(unet)
    assert torch.equal(made.encoder_hid_proj.weight, unet.encoder_hid_proj.weight)


def test_can_be_built_on_meta_and_recomputes_activations():
    with torch.device("meta"):
        empty = suffuse.ControlNetModel(**small())
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    model, _ = pair(NAME, **small())

    def gradients():
        model.zero_grad()
        model(**arguments()).mid_block_res_sample.square().sum().backward()
        return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.enable_gradient_checkpointing()
    again = gradients()
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[key], again[key]) for key in plain)


def test_a_call_changes_neither_its_arguments_nor_the_model():
    model, _ = pair(NAME, **small(controlnet_conditioning_channel_order="bgr"))
    given = arguments()
    kept = copy.deepcopy(given)
    attributes = {key: dict(m.__dict__) for key, m in model.named_modules()}
    model(**given)
    assert all(torch.equal(a, given[key]) for key, a in kept.items() if torch.is_tensor(a))
    assert attributes == {key: dict(m.__dict__) for key, m in model.named_modules()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_block_types": ("CrossAtnDownBlock2D", "DownBlock2D")}, "did you mean 'CrossAttnDownBlock2D'"),
        ({"block_out_channels": (32,)}, "block_out_channels needs one entry for each"),
        ({"num_attention_heads": (1,)}, "num_attention_heads needs one entry for each"),
        ({"conditioning_embedding_out_channels": ()}, "conditioning_embedding_out_channels is empty"),
        ({"conditioning_embedding_out_channels": (8, 0)}, "conditioning_embedding_out_channels must be at least 1"),
        ({"conditioning_channels": 0}, "conditioning_channels must be at least 1"),
        ({"controlnet_conditioning_channel_order": "rbg"}, "controlnet_conditioning_channel_order has the wrong type"),
        ({"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type='text_proj' needs encoder_hid_dim"),
    ],
)
def test_a_configuration_that_makes_no_network_is_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        suffuse.ControlNetModel(**small(**changes))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ({}, {"sample": noise(2, 3, 8, 8)}, "expected: (batch, 4, height, width)"),
        ({}, {"controlnet_cond": noise(2, 3, 8, 8)}, "expected: (2, 3, 16, 16)"),
        ({}, {"controlnet_cond": noise(2, 1, 16, 16)}, "controlnet_cond has the wrong shape"),
        ({}, {"controlnet_cond": noise(3, 3, 16, 16)}, "expected: (2, 3, 16, 16)"),
        ({}, {"encoder_hidden_states": noise(2, 5, 12)}, "encoder_hidden_states have the wrong shape"),
        ({"num_class_embeds": 3}, {}, "this network is conditioned on classes"),
        (XL, {}, "needs text_embeds and time_ids in added_cond_kwargs"),
        ({}, {"cross_attention_kwargs": {"gligen": {}}}, "cannot be grounded in boxes"),
    ],
)
def test_a_call_that_does_not_fit_is_refused(config, changes, message):
    with pytest.raises(InputError) as caught:
        suffuse.ControlNetModel(**small(**config))(**arguments(**changes))
    assert message in str(caught.value)
