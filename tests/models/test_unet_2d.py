import inspect

import pytest
import torch
from model_pairs import assert_same_outputs, pair
from unet_options import noise

from suffuse import UNet2DModel
from suffuse.errors import ConfigError, InputError
from suffuse.models import unet_2d as module

NAME = "UNet2DModel"


def plain(**changes):
    return {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
        **changes,
    }


OPTIONS = {
    "ddpm": (plain(), {}),
    "one channel, centred": (plain(in_channels=1, out_channels=1, center_input_sample=True), {"sample": noise(2, 1, 8, 8)}),
    "ncsn++": (
        plain(
            block_out_channels=(32, 32),
            down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
            up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
            time_embedding_type="fourier",
            freq_shift=0,
            mid_block_scale_factor=1.4142,
            attn_norm_num_groups=16,
            layers_per_block=2,
        ),
        {"timestep": torch.tensor([0.5, 12.0])},
    ),
    "ncsn++, skips first": (
        plain(
            block_out_channels=(32, 64),
            down_block_types=("AttnSkipDownBlock2D", "SkipDownBlock2D"),
            up_block_types=("SkipUpBlock2D", "AttnSkipUpBlock2D"),
        ),
        {},
    ),
    "resnet resampling": (
        plain(
            downsample_type="resnet",
            upsample_type="resnet",
            down_block_types=("AttnDownBlock2D",) * 2,
            up_block_types=("AttnUpBlock2D",) * 2,
        ),
        {},
    ),
    "resnet blocks": (
        plain(down_block_types=("ResnetDownsampleBlock2D",) * 2, up_block_types=("ResnetUpsampleBlock2D",) * 2),
        {},
    ),
    "k blocks": (plain(down_block_types=("KDownBlock2D",) * 2, up_block_types=("KUpBlock2D",) * 2, layers_per_block=3), {}),
    "scale and shift": (plain(resnet_time_scale_shift="scale_shift", flip_sin_to_cos=False), {}),
    "no attention in the middle": (plain(add_attention=False), {}),
    "no middle": (plain(mid_block_type=None), {}),
    "one head": (plain(attention_head_dim=None), {}),
    "learned": (plain(time_embedding_type="learned", num_train_timesteps=50), {}),
    "embedding table": (plain(num_class_embeds=10), {"class_labels": torch.tensor([3, 7])}),
    "class timestep": (plain(class_embed_type="timestep"), {"class_labels": torch.tensor([3, 7])}),
    "class identity": (plain(class_embed_type="identity"), {"class_labels": noise(2, 128)}),
    "others": (plain(act_fn="gelu", norm_eps=1e-6, dropout=0.1, downsample_padding=1, time_embedding_dim=96), {}),
    "asymmetric padding": (plain(downsample_padding=0), {}),
}


def call(name):
    return {"sample": noise(2, 3, 8, 8), "timestep": 7, **OPTIONS[name][1]}


@pytest.mark.parametrize("name", OPTIONS)
def test_outputs_equal_the_peers(name):
    ours, peer = pair(NAME, **OPTIONS[name][0])
    assert_same_outputs(ours, peer, **call(name))


@pytest.mark.parametrize("name", ["ddpm", "resnet resampling", "scale and shift"])
def test_outputs_equal_the_peers_in_bfloat16(name):
    ours, peer = pair(NAME, torch.bfloat16, **OPTIONS[name][0])
    assert_same_outputs(ours, peer, noise(2, 3, 8, 8).bfloat16(), 7)


def test_the_table_of_options_covers_every_block_and_every_option():
    configs = [config for config, _ in OPTIONS.values()]
    used = {block for c in configs for key in ("down_block_types", "up_block_types") for block in c[key]}
    assert used == {*module.UNCONDITIONAL_DOWN_BLOCKS, *module.UNCONDITIONAL_UP_BLOCKS}
    options = set(inspect.signature(UNet2DModel.__init__).parameters) - {"self"}
    assert options == {key for config in configs for key in config}


@pytest.mark.parametrize("name", OPTIONS)
def test_can_be_built_on_meta_and_filled(name):
    with torch.device("meta"):
        empty = UNet2DModel(**OPTIONS[name][0])
    full = UNet2DModel(**OPTIONS[name][0]).eval()
    empty.load_state_dict(full.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(empty.eval()(**call(name)).sample, full(**call(name)).sample)


@pytest.mark.parametrize("name", ["ddpm", "ncsn++"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    model = UNet2DModel(**OPTIONS[name][0]).eval()

    def gradients():
        model.zero_grad()
        model(**call(name)).sample.square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain_ones = gradients()
    model.enable_gradient_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(plain_ones, gradients(), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}, "no block type 'CrossAttnDownBlock2D'"),
        ({"up_block_types": ("UpBlok2D", "UpBlock2D")}, "did you mean 'UpBlock2D'"),
        ({"block_out_channels": (32,)}, "block_out_channels needs one entry for each"),
        ({"time_embedding_type": "learned"}, "needs num_train_timesteps"),
        ({"norm_num_groups": 5}, "do not divide into 5 groups"),
        ({"attention_head_dim": 1000}, "cannot be split into heads"),
        ({"downsample_type": "pool"}, "downsample_type has the wrong type"),
        ({"out_channels": -1}, "out_channels must be at least 1"),
    ],
)
def test_a_configuration_that_makes_no_network_is_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        UNet2DModel(**plain(**changes))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ({}, {"sample": noise(2, 4, 8, 8)}, "expected: (batch, 3, height, width)"),
        ({}, {"timestep": torch.tensor([1, 2, 3])}, "found: 3 timesteps"),
        ({}, {"class_labels": torch.tensor([1, 2])}, "this UNet is not conditioned on classes"),
        ({"num_class_embeds": 3}, {}, "this UNet is conditioned on classes"),
    ],
)
def test_a_call_that_does_not_fit_is_refused(config, changes, message):
    with pytest.raises(InputError) as caught:
        UNet2DModel(**plain(**config))(**{"sample": noise(2, 3, 8, 8), "timestep": 3, **changes})
    assert message in str(caught.value)
