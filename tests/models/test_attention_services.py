import diffusers.models.attention_processor as peers
import pytest
import torch
from model_pairs import assert_same_outputs, pair
from unet_options import cross, latent_upscaler, noise, simple

from suffuse import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from suffuse.errors import ConfigError, InputError, MissingPackageError
from suffuse.layers import attention_processors as ours_processors
from suffuse.layers.attention import Attention

NAME = "UNet2DConditionModel"
PLAIN = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor")
ADDED = ("AttnAddedKVProcessor", "AttnAddedKVProcessor2_0", "SlicedAttnAddedKVProcessor")
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


def call(**changes):
    return {"sample": noise(2, 4, 8, 8), "timestep": 3, "encoder_hidden_states": noise(2, 5, 16), **changes}


def vae_config():
    return {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize(
    ("config", "name"),
    [(config, name) for config in (cross(upcast_attention=True), latent_upscaler()) for name in PLAIN]
    + [(config, name) for config in (simple(), simple(only_cross_attention=True)) for name in ADDED],
)
def test_processors_give_what_the_peers_give(config, name, mask):
    if config.get("only_cross_attention"):
        mask = None  # the peer fails with a mask here; that ours does not is tested with the model
    ours, peer = pair(NAME, **config)
    arguments = (2,) if "Sliced" in name else ()
    ours.set_attn_processor(getattr(ours_processors, name)(*arguments))
    peer.set_attn_processor(getattr(peers, name)(*arguments))
    assert_same_outputs(ours, peer, **call(encoder_attention_mask=mask))


@pytest.mark.parametrize(("config", "names"), [(cross(), PLAIN), (simple(), ADDED)])
def test_processors_of_the_peer_run_in_our_models(config, names):
    ours, peer = pair(NAME, **config)
    for name in names:
        processor = getattr(peers, name)(*((2,) if "Sliced" in name else ()))
        ours.set_attn_processor(processor)
        peer.set_attn_processor(processor)
        assert_same_outputs(ours, peer, **call(encoder_attention_mask=MASK))


@pytest.mark.parametrize("config", [cross(), simple()])
def test_the_default_processors_equal_the_peers(config):
    ours, peer = pair(NAME, **config)
    assert ours.attn_processors.keys() == peer.attn_processors.keys()
    ours.set_default_attn_processor()
    peer.set_default_attn_processor()
    assert {type(p).__name__ for p in ours.attn_processors.values()} == {type(p).__name__ for p in peer.attn_processors.values()}
    assert_same_outputs(ours, peer, **call())


@pytest.mark.parametrize("config", [cross(), simple()])
@pytest.mark.parametrize("slice_size", ["auto", "max", 1, 2, [1, 2, 1, 2, 1, 2, 1, 2]])
def test_slices_equal_the_peers(config, slice_size):
    ours, peer = pair(NAME, **config)
    if isinstance(slice_size, list):
        slice_size = slice_size[: len(ours.attn_processors)]
    ours.set_attention_slice(slice_size)
    peer.set_attention_slice(slice_size)
    sizes = [[p.slice_size for p in model.attn_processors.values()] for model in (ours, peer)]
    assert sizes[0] == sizes[1]
    assert_same_outputs(ours, peer, **call())


@pytest.mark.parametrize("config", [cross(), simple()])
def test_without_slices_the_model_is_as_before_where_the_peer_keeps_another_processor(config):
    model = UNet2DConditionModel(**config).eval()
    before = {name: type(p) for name, p in model.attn_processors.items()}
    model.set_attention_slice("max")
    model.set_attention_slice(None)
    assert before == {name: type(p) for name, p in model.attn_processors.items()}


@pytest.mark.parametrize("slice_size", [0, 5, -1, "most", [1, 2], [9] * 8])
def test_slices_that_cannot_be_are_refused_and_change_nothing(slice_size):
    model = UNet2DConditionModel(**cross())
    before = model.attn_processors
    with pytest.raises(InputError, match="slice_size"):
        model.set_attention_slice(slice_size)
    assert model.attn_processors == before
    with pytest.raises(InputError, match="expected: 1 to 8"):
        Attention(8).set_attention_slice(9)


@pytest.mark.parametrize(("name", "config"), [(NAME, cross()), ("AutoencoderKL", vae_config())])
def test_fused_projections_equal_the_peers_and_come_apart(name, config):
    ours, peer = pair(name, **config)
    keys = ours.state_dict().keys()
    arguments = call() if name == NAME else {"sample": noise(2, 3, 8, 8)}
    before, processors = assert_same_outputs(ours, peer, **arguments), ours.attn_processors
    for model in (ours, peer):
        model.fuse_qkv_projections()
    ours.fuse_qkv_projections()
    assert ours.state_dict().keys() == peer.state_dict().keys()
    assert_same_outputs(ours, peer, **arguments)
    ours.unfuse_qkv_projections()
    ours.unfuse_qkv_projections()
    assert ours.state_dict().keys() == keys
    assert ours.attn_processors == processors
    with torch.no_grad():
        assert torch.equal(before, ours(**arguments).sample)


def test_fusing_spends_no_random_numbers():
    model = UNet2DConditionModel(**cross())
    state = torch.get_rng_state()
    model.fuse_qkv_projections()
    assert torch.equal(state, torch.get_rng_state())


def test_added_keys_cannot_be_fused():
    with pytest.raises(InputError, match="added keys and values"):
        UNet2DConditionModel(**simple()).fuse_qkv_projections()
    with pytest.raises(InputError, match="added keys and values"):
        Attention(8, added_kv_proj_dim=4).fuse_projections()


def test_the_fused_processor_needs_fused_projections():
    model = UNet2DConditionModel(**cross())
    model.set_attn_processor(ours_processors.FusedAttnProcessor2_0())
    with pytest.raises(InputError, match=r"fuse_qkv_projections\(\) before the fused one"):
        model(**call())


def test_processors_are_set_by_name():
    model = UNet2DConditionModel(**cross())
    chosen = {name: ours_processors.AttnProcessor() for name in model.attn_processors}
    model.set_attn_processor(chosen)
    assert model.attn_processors == chosen
    assert len(chosen) == len(model.attn_processors)
    with pytest.raises(InputError, match="one processor for each attention layer"):
        model.set_attn_processor({**chosen, "nowhere.processor": ours_processors.AttnProcessor()})
    assert model.attn_processors == chosen


def test_a_processor_with_weights_becomes_part_of_the_model_and_leaves_it():
    class Trained(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))

        def forward(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **options):
            assert options.get("flavour") == "sweet"
            return hidden_states * self.scale

    model = UNet2DConditionModel(**cross())
    keys = model.state_dict().keys()
    model.set_attn_processor(Trained())
    assert any(key.endswith("processor.scale") for key in model.state_dict())
    model(**call(cross_attention_kwargs={"flavour": "sweet"}))
    with pytest.raises(InputError, match="would throw away processors"):
        model.set_default_attn_processor()
    model.set_attn_processor(ours_processors.AttnProcessor2_0())
    assert model.state_dict().keys() == keys


@pytest.mark.parametrize("model", [UNet2DConditionModel(**simple()), AutoencoderKL(**vae_config())])
def test_xformers_is_optional_and_the_message_says_it_is_not_needed(model):
    before = model.attn_processors
    with pytest.raises(MissingPackageError, match="scaled_dot_product_attention, which is already in use"):
        model.enable_xformers_memory_efficient_attention()
    assert model.attn_processors == before
    model.disable_xformers_memory_efficient_attention()
    assert {type(p) for p in before.values()} == {type(p) for p in model.attn_processors.values()}


def test_xformers_gets_what_it_needs(monkeypatch):
    def attention(query, key, value, attn_bias=None, op=None, scale=None):
        scores = query @ key.transpose(1, 2) * scale
        return (scores if attn_bias is None else scores + attn_bias).softmax(-1) @ value

    kernels = type("kernels", (), {"memory_efficient_attention": staticmethod(attention)})
    monkeypatch.setattr(ours_processors.importlib, "import_module", lambda name: kernels)
    for config in (cross(), simple()):
        model = UNet2DConditionModel(**config).eval()
        with torch.no_grad():
            want = model(**call(encoder_attention_mask=MASK)).sample
            model.enable_xformers_memory_efficient_attention()
            torch.testing.assert_close(model(**call(encoder_attention_mask=MASK)).sample, want)


def test_attention_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="no added_kv_proj_dim has no keys"):
        Attention(8, only_cross_attention=True)
    with pytest.raises(ConfigError, match="cannot be split into heads"):
        Attention(8, heads=0)


def test_unconditional_models_have_the_services_too():
    model = UNet2DModel(
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    with torch.no_grad():
        want = model(noise(1, 3, 8, 8), 3).sample
        model.set_attention_slice("max")
        torch.testing.assert_close(model(noise(1, 3, 8, 8), 3).sample, want)
