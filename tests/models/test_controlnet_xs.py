"""ControlNet-XS models: predictions equal the peer's, bit for bit; what does not go together is refused."""

from __future__ import annotations

import diffusers
import pytest
import tiny
import torch
from unet_options import noise

import suffuse
from suffuse.errors import ConfigError, InputError

KINDS = {
    "plain": {},
    "own time": {"learn_time_embedding": True},
    "mixed time": {"learn_time_embedding": True, "time_embedding_mix": 0.6},
    "blue first": {"conditioning_channel_order": "bgr"},
    "no heads of its own": {"num_attention_heads": None},
    "by ratio": {"block_out_channels": None, "size_ratio": 0.5},
}
SIZES = {"block_out_channels": [8, 16], "num_attention_heads": [2, 4], "conditioning_embedding_out_channels": (8, 16)}


def unet(**options):
    made = tiny.unet(layers_per_block=2, **options)
    for parameter in made.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return made


def models(folder, options):
    """The peer's and ours, of one file."""
    base = unet()
    control = tiny.controlnet_xs(base, **{"num_attention_heads": [8, 8], **options} if "size_ratio" in options else options)
    diffusers.UNetControlNetXSModel.from_unet(base, control).save_pretrained(folder / "both")
    base.save_pretrained(folder / "unet")
    control.save_pretrained(folder / "control")
    peer = diffusers.UNetControlNetXSModel.from_pretrained(folder / "both").eval()
    for parameter in peer.parameters():
        parameter.data = parameter.data.clone()
    return peer, suffuse.UNetControlNetXSModel.from_pretrained(folder / "both").eval()


def told(**options):
    return {
        "sample": noise(2, 4, 16, 16),
        "timestep": torch.tensor([3, 500]),
        "encoder_hidden_states": noise(2, 5, tiny.WIDTH),
        "controlnet_cond": noise(2, 3, 32, 32),
    } | options


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_equal_the_peers(kind, tmp_path):
    peer, ours = models(tmp_path, KINDS[kind])
    calls = [{}, {"conditioning_scale": 0.4}, {"apply_control": False}, {"attention_mask": (noise(2, 256) > 0).float()}]
    for options in calls[: 3 if kind != "plain" else 4]:
        if "attention_mask" in options:
            options = options | {"sample": noise(2, 4, 8, 8), "controlnet_cond": noise(2, 3, 16, 16)}
            options["attention_mask"] = options["attention_mask"][:, :16]
        with torch.no_grad():
            assert torch.equal(ours(**told(**options)).sample, peer(**told(**options)).sample)


@pytest.mark.parametrize("kind", ["plain", "mixed time"])
def test_both_together_have_the_weights_of_each(kind, tmp_path):
    _, ours = models(tmp_path, KINDS[kind])
    parts = (suffuse.UNet2DConditionModel, "unet"), (suffuse.ControlNetXSAdapter, "control")
    base, control = (cls.from_pretrained(tmp_path / name) for cls, name in parts)
    made = suffuse.UNetControlNetXSModel.from_unet(base, control)
    settings = [{k: v for k, v in model.config.items() if not k.startswith("_")} for model in (made, ours)]
    assert str(settings[0]) == str(settings[1])
    state = made.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
    shared = {tensor.data_ptr() for model in (base, control) for tensor in model.state_dict().values()}
    assert {tensor.data_ptr() for tensor in state.values()} <= shared


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_control_side_is_as_the_peers_and_adds_nothing(kind):
    options = SIZES | KINDS[kind]
    theirs = diffusers.ControlNetXSAdapter.from_unet(unet(), **options)
    own = suffuse.UNet2DConditionModel.from_config(unet().config)
    made = suffuse.ControlNetXSAdapter.from_unet(own, **options)
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (made, theirs)]
    assert shapes[0] == shapes[1]
    both = suffuse.UNetControlNetXSModel.from_unet(own, made).eval()
    if "learn_time_embedding" not in options:
        with torch.no_grad():
            assert torch.equal(both(**told()).sample, both(**told(apply_control=False)).sample)


def test_training_can_leave_the_unet_alone(tmp_path):
    peer, ours = models(tmp_path, KINDS["mixed time"])
    for model in (peer, ours):
        model.freeze_unet_params()
    frozen = [{name for name, value in model.named_parameters() if not value.requires_grad} for model in (peer, ours)]
    assert frozen[0] == frozen[1]


def test_what_cannot_be(tmp_path):
    _, ours = models(tmp_path, {})
    base = suffuse.UNet2DConditionModel.from_config(unet().config)
    control = suffuse.ControlNetXSAdapter.from_unet(base, **SIZES)
    with pytest.raises(InputError, match="cannot be run by itself"):
        control(noise(1, 4, 8, 8))
    with pytest.raises(InputError, match="one of the two"):
        suffuse.ControlNetXSAdapter.from_unet(base, size_ratio=0.5, block_out_channels=[8, 16])
    with pytest.raises(InputError, match="a controlnet is given, and sizes"):
        suffuse.UNetControlNetXSModel.from_unet(base, control, size_ratio=0.5)
    with pytest.raises(ConfigError, match="needs a time embedding of the control side"):
        suffuse.ControlNetXSAdapter.from_unet(base, **SIZES, time_embedding_mix=0.5)
    with pytest.raises(ConfigError, match="time_embedding_mix is out of range"):
        suffuse.UNetControlNetXSModel(time_embedding_mix=2.0)
    with pytest.raises(ConfigError, match=r"no control side fits this UNet(.|\n)*layers_per_block"):
        suffuse.UNetControlNetXSModel.from_unet(suffuse.UNet2DConditionModel.from_config(tiny.unet().config), control)
    with pytest.raises(ConfigError, match="no control side fits AttnDownBlock2D"):
        suffuse.UNetControlNetXSModel(down_block_types=("AttnDownBlock2D",) * 4)
    with pytest.raises(ConfigError, match="no control side fits addition_embed_type='image'"):
        suffuse.UNetControlNetXSModel(addition_embed_type="image")
    for options, message in (
        ({"controlnet_cond": noise(2, 3, 16, 16)}, r"controlnet_cond has the wrong shape(.|\n)*\(2, 3, 32, 32\)"),
        ({"sample": noise(2, 4, 15, 16)}, "multiples of 2"),
        ({"encoder_hidden_states": noise(1, 5, 32)}, "encoder_hidden_states have the wrong shape"),
        ({"class_labels": torch.tensor([1, 2])}, "knows no classes"),
        ({"timestep": torch.tensor([1, 2, 3])}, "3 timesteps"),
    ):
        with pytest.raises(InputError, match=message):
            ours(**told(**options))
