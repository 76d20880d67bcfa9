import copy
import inspect
import pickle
import threading

import pytest
import torch
from model_pairs import assert_same_outputs, pair
from unet_options import OPTIONS, call, cross, latent_upscaler, noise, simple

from suffuse import UNet2DConditionModel
from suffuse.errors import ConfigError, InputError, UnknownArgumentError
from suffuse.models import unet_2d_condition, unet_2d_encoder

NAME = "UNet2DConditionModel"


@pytest.fixture
def peers_dual_transformer(monkeypatch):
    """The peer's blocks call its dual transformer with a mask that it does not take: let it be left out."""
    from diffusers.models.transformers.dual_transformer_2d import DualTransformer2DModel

    forward = DualTransformer2DModel.forward
    monkeypatch.setattr(
        DualTransformer2DModel, "forward", lambda *args, encoder_attention_mask=None, **kwargs: forward(*args, **kwargs)
    )


@pytest.mark.usefixtures("peers_dual_transformer")
@pytest.mark.parametrize("name", OPTIONS)
def test_outputs_equal_the_peers(name):
    ours, peer = pair(NAME, **OPTIONS[name][0])
    with torch.no_grad():
        assert (ours(**call(name)).sample - peer(**call(name)).sample).abs().max() == 0


@pytest.mark.parametrize("name", ["stable diffusion 1", "stable diffusion xl", "deepfloyd", "latent upscaler"])
def test_outputs_equal_the_peers_in_bfloat16(name):
    ours, peer = pair(NAME, torch.bfloat16, **OPTIONS[name][0])
    half = torch.utils._pytree.tree_map(lambda x: x.bfloat16() if torch.is_tensor(x) and x.is_floating_point() else x, call(name))
    assert_same_outputs(ours, peer, **half)


def test_the_table_of_options_covers_every_block_and_every_option():
    configs = [config for config, _ in OPTIONS.values()]
    used = {block for c in configs for key in ("down_block_types", "up_block_types") for block in c[key]}
    used |= {c.get("mid_block_type", "UNetMidBlock2DCrossAttn") for c in configs}
    blocks = [unet_2d_encoder.CONDITIONAL_DOWN_BLOCKS, unet_2d_condition.CONDITIONAL_UP_BLOCKS, unet_2d_encoder.MID_BLOCKS]
    known = [*(name for table in blocks for name in table), None]
    assert set(known) <= used
    options = set(inspect.signature(UNet2DConditionModel.__init__).parameters) - {"self", "num_attention_heads"}
    assert options == {key for config in configs for key in config}
    for table, key in (
        (unet_2d_encoder.CLASS_EMBEDDINGS, "class_embed_type"),
        (unet_2d_encoder.ADDED_EMBEDDINGS, "addition_embed_type"),
        (unet_2d_encoder.CONTEXT_PROJECTIONS, "encoder_hid_dim_type"),
    ):
        assert set(table) <= {config.get(key) for config in configs}


@pytest.mark.parametrize("name", OPTIONS)
def test_can_be_built_on_meta_and_filled(name):
    config = OPTIONS[name][0]
    with torch.device("meta"):
        empty = UNet2DConditionModel(**config)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    assert not [key for key, _ in empty.named_buffers()]
    full = UNet2DConditionModel(**config).eval()
    empty.load_state_dict(full.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(empty.eval()(**call(name)).sample, full(**call(name)).sample)


@pytest.mark.parametrize("name", ["stable diffusion 1", "deepfloyd", "latent upscaler", "grounded"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    model = UNet2DConditionModel(**OPTIONS[name][0])

    def gradients():
        model.zero_grad()
        model(**call(name)).sample.square().sum().backward()
        return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    calls = []

    def counting(layer, *args, **kwargs):
        calls.append(layer)
        return torch.utils.checkpoint.checkpoint(layer, *args, use_reentrant=False, **kwargs)

    assert not model.is_gradient_checkpointing
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    again = gradients()
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[key], again[key]) for key in plain)
    model.enable_gradient_checkpointing(counting)
    gradients()
    recomputed = len(calls)
    assert recomputed
    with torch.no_grad():
        model(**call(name))
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing
    gradients()
    assert len(calls) == recomputed


@pytest.mark.parametrize("blocks", ["CrossAttn", ""])
@pytest.mark.parametrize("size", [8, 12])
def test_freeu_equals_the_peers_and_leaves_nothing(blocks, size):
    config = cross(down_block_types=(f"{blocks}DownBlock2D",) * 2, up_block_types=(f"{blocks}UpBlock2D",) * 2)
    ours, peer = pair(NAME, **config)
    arguments = {"sample": noise(2, 4, size, size), "timestep": 3, "encoder_hidden_states": noise(2, 5, 16)}
    before = assert_same_outputs(ours, peer, **arguments)
    for model in (ours, peer):
        model.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert not torch.equal(before, assert_same_outputs(ours, peer, **arguments))
    ours.disable_freeu()
    with torch.no_grad():
        assert torch.equal(before, ours(**arguments).sample)


def test_threads_share_one_model():
    model = UNet2DConditionModel(**cross()).eval()
    samples = [noise(2, 4, 8, 8) + i for i in range(4)]
    context = noise(2, 5, 16)
    with torch.no_grad():
        alone = [model(sample, 5, context).sample for sample in samples]
        got = [None] * len(samples)

        def run(index):
            with torch.no_grad():
                for _ in range(5):
                    got[index] = model(samples[index], 5, context).sample

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(samples))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, got, strict=True))


def test_a_call_changes_neither_its_arguments_nor_the_model():
    name = "t2i adapter, xl"
    model = UNet2DConditionModel(**OPTIONS[name][0]).eval()
    arguments = call(name)
    kept = copy.deepcopy(arguments)
    attributes = {key: dict(m.__dict__) for key, m in model.named_modules()}
    model(**arguments)
    assert len(arguments["down_intrablock_additional_residuals"]) == 3
    for key, value in kept.items():
        for a, b in zip(*(torch.utils._pytree.tree_leaves(x) for x in (value, arguments[key])), strict=True):
            assert torch.equal(a, b) if torch.is_tensor(a) else a == b
    assert attributes == {key: dict(m.__dict__) for key, m in model.named_modules()}


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("config", [cross(), simple(), latent_upscaler()])
def test_can_be_copied_and_pickled(copies, config):
    model = UNet2DConditionModel(**config).eval()
    arguments = {"sample": noise(2, 4, 8, 8), "timestep": 3, "encoder_hidden_states": noise(2, 5, 16)}
    with torch.no_grad():
        assert torch.equal(model(**arguments).sample, copies(model)(**arguments).sample)


def test_image_tokens_of_an_adapter_go_to_the_processors_with_the_text():
    model = UNet2DConditionModel(**cross()).eval()
    seen = []

    def processor(attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        seen.append(encoder_hidden_states)
        return hidden_states

    model.set_attn_processor(processor)
    model.encoder_hid_proj = torch.nn.Linear(6, 16)
    model.register_to_config(encoder_hid_dim_type="ip_image_proj")
    context, images = noise(2, 5, 16), noise(2, 3, 6)
    model(noise(2, 4, 8, 8), 3, context, added_cond_kwargs={"image_embeds": images})
    text, tokens = next(pair for pair in seen if pair is not None)
    assert torch.equal(text, context)
    assert torch.equal(tokens, model.encoder_hid_proj(images))
    with pytest.raises(InputError, match="needs image_embeds in added_cond_kwargs"):
        model(noise(2, 4, 8, 8), 3, context)


def test_scale_is_for_adapters_and_changes_nothing_here():
    model = UNet2DConditionModel(**cross()).eval()
    arguments = {"sample": noise(2, 4, 8, 8), "timestep": 3, "encoder_hidden_states": noise(2, 5, 16)}
    with torch.no_grad():
        assert torch.equal(model(**arguments).sample, model(**arguments, cross_attention_kwargs={"scale": 0.5}).sample)


def test_a_mask_works_where_the_peer_fails_with_added_keys_only():
    model = UNet2DConditionModel(**simple(only_cross_attention=True)).eval()
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 2)
    context = noise(2, 5, 16)
    with torch.no_grad():
        masked = model(noise(2, 4, 8, 8), 3, context, encoder_attention_mask=mask).sample
        short = model(noise(2, 4, 8, 8), 3, context[:, :3]).sample
    torch.testing.assert_close(masked, short)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_block_types": ("CrossAtnDownBlock2D", "DownBlock2D")}, "did you mean 'CrossAttnDownBlock2D'"),
        ({"up_block_types": ("UpBlock2D", "SkipUpBlock2D")}, "no block type 'SkipUpBlock2D' for this network"),
        ({"mid_block_type": "UNetMidBlock"}, "no block type 'UNetMidBlock'"),
        ({"up_block_types": ("UpBlock2D",)}, "up_block_types needs one entry for each of down_block_types"),
        ({"block_out_channels": (32,)}, "block_out_channels needs one entry for each"),
        ({"layers_per_block": (1, 2, 3)}, "layers_per_block needs one entry for each"),
        ({"attention_head_dim": (4,)}, "attention_head_dim needs one entry for each"),
        ({"cross_attention_dim": (4,)}, "cross_attention_dim needs one entry for each"),
        ({"only_cross_attention": (True,)}, "only_cross_attention needs one entry for each"),
        ({"transformer_layers_per_block": (1,)}, "transformer_layers_per_block needs one entry for each"),
        ({"transformer_layers_per_block": ((1,), (2,))}, "give reverse_transformer_layers_per_block"),
        (
            {"transformer_layers_per_block": ((1,), (1,)), "reverse_transformer_layers_per_block": ((1, 1), (1,))},
            "a block has more layers than its entry",
        ),
        (dict.fromkeys(("down_block_types", "up_block_types", "block_out_channels"), ()), "down_block_types is empty"),
        ({"reverse_transformer_layers_per_block": (1,)}, "reverse_transformer_layers_per_block needs one entry"),
        ({"num_attention_heads": 4}, "num_attention_heads is not to be used"),
        ({"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type='text_proj' needs encoder_hid_dim"),
        ({"encoder_hid_dim_type": "text_prj", "encoder_hid_dim": 3}, "did you mean 'text_proj'"),
        ({"class_embed_type": "projection"}, "needs projection_class_embeddings_input_dim"),
        ({"class_embed_type": "project"}, "class_embed_type='project' is not known"),
        ({"addition_embed_type": "text_time"}, "needs addition_time_embed_dim and projection_class"),
        ({"addition_embed_type": "image"}, "addition_embed_type='image' needs encoder_hid_dim"),
        ({"norm_num_groups": 7}, "32 channels do not divide into 7 groups"),
        ({"block_out_channels": (32, -64)}, "block_out_channels must be at least 1"),
        ({"in_channels": 0}, "in_channels must be at least 1"),
        ({"layers_per_block": 0}, "layers_per_block must be at least 1"),
        ({"attention_head_dim": 100}, "cannot have that many heads"),
        ({"attention_type": "gate"}, "attention_type has the wrong type"),
        ({"resnet_time_scale_shift": "shift"}, "resnet_time_scale_shift has the wrong type"),
        ({"time_embedding_type": "fourier", "time_embedding_dim": 33}, "the fourier time embedding is odd"),
        ({"act_fn": "sily"}, "no activation function 'sily'"),
        ({"cross_attention_norm": "norm"}, "cross_attention_norm has the wrong type"),
    ],
)
def test_a_configuration_that_makes_no_network_is_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        UNet2DConditionModel(**cross(**changes))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ({}, {"sample": noise(2, 3, 8, 8)}, "expected: (batch, 4, height, width)"),
        ({}, {"encoder_hidden_states": noise(1, 5, 16)}, "expected: (2, tokens, 16)"),
        ({}, {"encoder_hidden_states": noise(2, 5, 12)}, "encoder_hidden_states have the wrong shape"),
        ({}, {"timestep": torch.tensor([1, 2, 3])}, "found: 3 timesteps"),
        ({}, {"encoder_attention_mask": torch.ones(2, 4)}, "an attention mask is not as long as what it masks"),
        ({}, {"cross_attention_kwargs": {"gligen": {}}}, "cannot be grounded in boxes"),
        ({"num_class_embeds": 3}, {}, "this network is conditioned on classes"),
        (OPTIONS["stable diffusion xl"][0], {}, "needs text_embeds and time_ids in added_cond_kwargs"),
        (
            OPTIONS["stable diffusion xl"][0],
            {"added_cond_kwargs": {"text_embeds": noise(2, 32), "time_ids": noise(2, 5)}},
            "expected: 80 in all",
        ),
        (OPTIONS["kandinsky 2.2"][0], {}, "needs image_embeds in added_cond_kwargs"),
        (
            {"attention_type": "gated"},
            {"cross_attention_kwargs": {"gligen": {"boxes": noise(2, 1, 4), "masks": noise(2, 1)}}},
            "the features of grounded objects are missing",
        ),
        ({"dual_cross_attention": True}, {}, "needs the tokens of two conditions"),
        (
            {},
            {"down_block_additional_residuals": [noise(2, 32, 8, 8)], "mid_block_additional_residual": noise(2, 64, 4, 4)},
            "one for each skip connection",
        ),
        (
            {"up_block_types": ("ResnetUpsampleBlock2D",) * 2},
            {"sample": noise(2, 4, 9, 9)},
            "heights and widths that halve evenly",
        ),
    ],
)
def test_a_call_that_does_not_fit_is_refused(config, changes, message):
    model = UNet2DConditionModel(**cross(**config))
    arguments = {"sample": noise(2, 4, 8, 8), "timestep": 3, "encoder_hidden_states": noise(2, 5, 16), **changes}
    with pytest.raises(InputError) as caught:
        model(**arguments)
    assert message in str(caught.value)


def test_a_misspelt_option_of_the_processors_is_refused():
    model = UNet2DConditionModel(**cross())
    with pytest.raises(UnknownArgumentError, match="did you mean 'scale'"):
        model(noise(2, 4, 8, 8), 3, noise(2, 5, 16), cross_attention_kwargs={"scal": 1.0})
