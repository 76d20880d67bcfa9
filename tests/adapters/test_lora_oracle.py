"""Pictures with low-rank adapters equal the peer's bit for bit: dialects, layers, weights, scales, fused or not."""

from __future__ import annotations

import copy
import re

import diffusers
import pytest
import safetensors.torch
import torch
from factors import ATTENTION, EVERY_LAYER, adapter, early_diffusers, kohya, original_blocks
from tasks import TASKS, align, call, difference, pair, set_scheduler

import suffuse
from suffuse.layers.low_rank import adapters_of
from suffuse.models.adapter_services import lora_layers

pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in ("Already found a `peft_config`", "Adapter .* was active")]

TEXT = ("text", "xl text")
FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture
def pipes(request):
    """The peer's pipeline, a copy because its unloading leaves traces, and ours."""
    peer, ours = pair(request.param)
    set_scheduler((peer, ours), "DDIMScheduler")
    yield copy.deepcopy(peer), ours, request.param
    ours.unload_lora_weights()


def load(pipes, weights, name="a", **options):
    for pipe in pipes[:2]:
        pipe.load_lora_weights(dict(weights), adapter_name=name, **options)
    align(pipes[0])


def same(pipes, **options):
    options = {"num_inference_steps": 2} | options
    peer, ours, task = pipes
    return difference(call(peer, task, **options), call(ours, task, **options))


KNOWN_TO_THE_PEER = r"^(?!.*add_embedding)"
"""The peer reads this layer of kohya's dialect under the name of the original code only."""

DIALECTS = {
    "PEFT": adapter,
    "early diffusers": lambda pipe: early_diffusers(adapter(pipe)),
    "kohya": lambda pipe: kohya(adapter(pipe, where=KNOWN_TO_THE_PEER)),
    "kohya without alpha": lambda pipe: kohya(adapter(pipe), alpha=None),
    "every layer": lambda pipe: adapter(pipe, where=EVERY_LAYER),
    "the UNet only": lambda pipe: adapter(pipe, components=("unet",)),
    "the text encoder only": lambda pipe: adapter(pipe, components=("text_encoder",)),
    "half precision": lambda pipe: {key: tensor.half() for key, tensor in adapter(pipe).items()},
}


@pytest.mark.parametrize("pipes", TEXT, indirect=True)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect(pipes, dialect):
    before = call(pipes[1], pipes[2])
    load(pipes, DIALECTS[dialect](pipes[1]))
    assert same(pipes) == 0
    assert difference(before, call(pipes[1], pipes[2])) > 0.01


@pytest.mark.parametrize("pipes", ["xl text"], indirect=True)
def test_block_names_of_the_original_code(pipes):
    _, ours, task = pipes
    plain = adapter(ours, where=ATTENTION + "|resnets|samplers|conv_in|conv_out|proj_in|time_emb|add_emb", components=("unet",))
    ours.load_lora_weights(kohya(plain), adapter_name="a")
    expected = call(ours, task)
    ours.load_lora_weights(original_blocks(kohya(plain), ours.unet.config), adapter_name="b")
    assert difference(call(ours, task), expected) == 0
    translatable = original_blocks(kohya(adapter(ours, components=("unet",))), ours.unet.config)
    ours.unload_lora_weights()
    load(pipes, translatable)
    assert same(pipes) == 0


@pytest.mark.parametrize("pipes", [task for task in TASKS if task not in TEXT], indirect=True)
def test_every_task(pipes):
    load(pipes, adapter(pipes[1]))
    assert same(pipes) == 0


CALLS = {"scale": {"scale": 0.3}, "scale above one": {"scale": 1.7}, "negative": {"scale": -1.0}}


@pytest.mark.parametrize("pipes", TEXT, indirect=True)
@pytest.mark.parametrize("name", CALLS)
def test_scale_of_a_call(pipes, name):
    load(pipes, adapter(pipes[1], where=EVERY_LAYER))
    assert same(pipes, cross_attention_kwargs=CALLS[name]) == 0
    assert pipes[1].lora_scale == CALLS[name]["scale"]
    assert same(pipes) == 0
    assert pipes[1].lora_scale == 1.0


WEIGHTS = {
    "a number": ["a", 0.6],
    "a number for both": [["a", "b"], 0.4],
    "two numbers": [["a", "b"], [0.7, -0.2]],
    "the other order": [["b", "a"], [0.7, 0.3]],
    "one of them": ["b", None],
    "none of it": ["a", 0.0],
    "by component": [["a", "b"], [{"unet": 0.3, "text_encoder": 0.9}, 1.0]],
    "by block": ["a", {"unet": {"down": 0.2, "mid": 0.4, "up": {"block_0": [0.6, 0.8]}}}],
    "by block, in part": [["a", "b"], [{"unet": {"mid": [0.5]}}, {"unet": {"down": {"block_1": [0.1]}, "up": 0.3}}]],
}


@pytest.mark.parametrize("pipes", TEXT, indirect=True)
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_two_adapters(pipes, name):
    load(pipes, adapter(pipes[1], rank=4, seed=1))
    load(pipes, adapter(pipes[1], rank=3, seed=2), "b")
    assert pipes[0].get_active_adapters() == pipes[1].get_active_adapters() == ["b"]
    assert pipes[0].get_list_adapters() == pipes[1].get_list_adapters()
    assert same(pipes) == 0
    for pipe in pipes[:2]:
        pipe.set_adapters(*WEIGHTS[name])
    assert pipes[0].get_active_adapters() == pipes[1].get_active_adapters()
    assert same(pipes) == 0
    assert same(pipes, cross_attention_kwargs={"scale": 0.7}) == 0


@pytest.mark.parametrize("pipes", TEXT, indirect=True)
def test_layers_beside_attention_go_with_the_attention_of_their_block(pipes):
    layers = ATTENTION + r"|blocks.\d.resnets|samplers|mid_block.resnets"
    load(pipes, adapter(pipes[1], where=layers, components=("unet",)))
    for pipe in pipes[:2]:
        pipe.set_adapters("a", {"unet": {"down": 0.2, "mid": 0.4, "up": {"block_0": [0.6, 0.8]}}})
    assert same(pipes) == 0


@pytest.mark.parametrize("pipes", TEXT, indirect=True)
def test_switched_off_on_and_deleted(pipes):
    peer, ours, task = pipes
    before = call(ours, task)
    load(pipes, adapter(ours, seed=1))
    load(pipes, adapter(ours, seed=2), "b")
    for pipe in pipes[:2]:
        pipe.disable_lora()
    assert same(pipes) == difference(call(ours, task), before) == 0
    for pipe in pipes[:2]:
        pipe.enable_lora()
    assert same(pipes) == 0
    for pipe in pipes[:2]:
        pipe.delete_adapters("b")
    assert peer.get_active_adapters() == ours.get_active_adapters() == ["a"]
    assert same(pipes) == 0
    ours.delete_adapters("a")
    assert difference(call(ours, task), before) == 0
    assert adapters_of(ours.unet) is None


@pytest.mark.parametrize("pipes", TEXT, indirect=True)
@pytest.mark.parametrize("options", [{}, {"lora_scale": 0.6}, {"safe_fusing": True}, {"adapter_names": ["b"]}], ids=str)
def test_fused(pipes, options):
    peer, ours, _ = pipes
    load(pipes, adapter(ours, where=EVERY_LAYER, seed=1))
    load(pipes, adapter(ours, where=EVERY_LAYER, seed=2), "b")
    for pipe in pipes[:2]:
        pipe.set_adapters(["a", "b"], [0.5, 0.8])
    weights = {name: tensor.clone() for name, tensor in ours.unet.state_dict().items()}
    components = [name for name in ("unet", "text_encoder", "text_encoder_2") if hasattr(ours, name)]
    for pipe in pipes[:2]:
        pipe.fuse_lora(components=components, **options)
    assert peer.num_fused_loras == ours.num_fused_loras
    if "adapter_names" in options:
        ours.set_adapters("b")  # the peer lets those that are active and not fused wait; here they count
    fused = {re.sub(r"\.base_layer", "", name): tensor for name, tensor in peer.unet.state_dict().items()}
    assert all(difference(tensor, fused[name]) == 0 for name, tensor in ours.unet.state_dict().items())
    assert same(pipes) == 0
    ours.unfuse_lora()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in ours.unet.state_dict().items())


@pytest.mark.parametrize("pipes", TEXT, indirect=True)
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_what_is_saved_loads_in_the_peer_and_the_reverse(pipes, alpha, tmp_path):
    peer, ours, task = pipes
    ours.load_lora_weights(kohya(adapter(ours), alpha=alpha), adapter_name="a")
    expected = call(ours, task)
    models = {name: getattr(ours, name) for name in ("unet", "text_encoder", "text_encoder_2") if hasattr(ours, name)}
    ours.save_lora_weights(tmp_path / "ours", **{f"{name}_lora_layers": lora_layers(m, "a") for name, m in models.items()})
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["pytorch_lora_weights.safetensors"]
    peer.load_lora_weights(tmp_path / "ours", weight_name="pytorch_lora_weights.safetensors", adapter_name="a")
    align(peer)
    assert difference(call(peer, task), expected) == 0
    tensors = {f"{name}_lora_layers": {k: t for k, t in lora_layers(m, "a").items() if "lora" in k} for name, m in models.items()}
    metadata = {}
    if alpha is not None:
        settings = {"r": 4, "lora_alpha": 3, "target_modules": ["to_q"]}
        metadata = {f"{name}_lora_adapter_metadata": settings for name in models}
    peer.save_lora_weights(tmp_path / "peer", **tensors, **metadata)
    ours.unload_lora_weights()
    ours.load_lora_weights(tmp_path / "peer")
    assert difference(call(ours, task), expected) == 0


def test_settings_of_peft_by_layer(tmp_path):
    _, ours = pair("text")
    weights = adapter(ours, components=("unet",))
    names = [key.removeprefix("unet.").removesuffix(".lora_A.weight") for key in weights if key.endswith("lora_A.weight")]
    alphas = {f"unet.{name}.alpha": 1.0 + index for index, name in enumerate(names)}
    ours.load_lora_into_unet(weights, alphas, ours.unet, adapter_name="a")
    expected = call(ours, "text")
    ours.save_lora_weights(tmp_path, unet_lora_layers=ours.unet.lora_layers("a"))
    ours.unload_lora_weights()
    ours.load_lora_weights(tmp_path)
    assert difference(call(ours, "text"), expected) == 0
    ours.unload_lora_weights()
    unet = copy.deepcopy(pair("text")[0].unet)
    header = suffuse.checkpoints.safetensors_file.read_header(tmp_path / "pytorch_lora_weights.safetensors")
    assert set(header.metadata) == {"format", "lora_adapter_metadata"}
    peer = diffusers.StableDiffusionPipeline.from_pipe(pair("text")[0], unet=unet, requires_safety_checker=False)
    peer.set_progress_bar_config(disable=True)
    peer.load_lora_weights(str(tmp_path), weight_name="pytorch_lora_weights.safetensors")
    align(peer)
    assert difference(call(peer, "text"), expected) == 0


@pytest.mark.parametrize("pipes", ["xl text"], indirect=True)
def test_the_tensors_of_a_file_go_into_the_peers_models(pipes, tmp_path):
    peer, ours, task = pipes
    safetensors.torch.save_file(original_blocks(kohya(adapter(ours)), ours.unet.config), tmp_path / "any name.safetensors")
    tensors, alphas = ours.lora_state_dict(tmp_path / "any name.safetensors", unet_config=ours.unet.config)
    ours.load_lora_weights(tmp_path / "any name.safetensors")
    peer.load_lora_into_unet(tensors, alphas, peer.unet)
    for name in ("text_encoder", "text_encoder_2"):
        peer.load_lora_into_text_encoder(tensors, alphas, getattr(peer, name), prefix=name)
    align(peer)
    assert same(pipes) == 0
    expected = call(ours, task)
    ours.unload_lora_weights()
    ours.load_lora_into_unet(tensors, alphas, ours.unet)
    for name in ("text_encoder", "text_encoder_2"):
        ours.load_lora_into_text_encoder(tensors, alphas, getattr(ours, name), prefix=name)
    assert difference(call(ours, task), expected) == 0


@pytest.mark.parametrize("pipes", ["text"], indirect=True)
def test_a_text_encoder_has_no_adapter_left_that_is_not_active(pipes):
    # The peer leaves the adapter before active in the text encoder, where the new one has no part for it.
    load(pipes, adapter(pipes[1], seed=1))
    load(pipes, adapter(pipes[1], seed=2, components=("unet",)), "b")
    assert same(pipes) > 0
    for pipe in pipes[:2]:
        pipe.set_adapters("b")
    assert same(pipes) == 0


@pytest.mark.parametrize("pipes", ["text"], indirect=True)
def test_fusing_with_a_scale_does_not_change_the_scale_afterwards(pipes):
    # The peer multiplies the scales of its layers for good.
    load(pipes, adapter(pipes[1]))
    expected = call(pipes[1], "text")
    for pipe in pipes[:2]:
        pipe.fuse_lora(components=["unet", "text_encoder"], lora_scale=0.5)
        pipe.unfuse_lora()
    assert difference(call(pipes[1], "text"), expected) == 0
    assert difference(call(pipes[0], "text"), expected) > 0


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_the_adapter_of_a_model_alone(alpha, tmp_path):
    _, ours = pair("text")
    unet = copy.deepcopy(ours.unet)
    unet.load_lora_adapter(kohya(adapter(ours, components=("unet",)), alpha=alpha), adapter_name="a")
    inputs = torch.randn(1, 4, 8, 8), torch.tensor(10), torch.randn(1, 77, 32)
    with torch.no_grad():
        expected = unet(*inputs)[0]
        unet.save_lora_adapter(tmp_path / "one", "a")
        unet.save_attn_procs(tmp_path / "two")
        assert (tmp_path / "one" / FILE).read_bytes() == (tmp_path / "two" / FILE).read_bytes()
        unet.unload_lora()
        unet.load_attn_procs(tmp_path / "two")
        assert difference(unet(*inputs)[0], expected) == 0
        peer = copy.deepcopy(pair("text")[0].unet)
        peer.load_lora_adapter(tmp_path / "one", prefix=None, weight_name=FILE, use_safetensors=True)
        peer.save_lora_adapter(tmp_path / "peer", adapter_name="default_0")
        unet.load_lora_adapter(tmp_path / "peer", adapter_name="b")
        assert difference(unet(*inputs)[0], expected) == 0
        for parameter in peer.parameters():
            parameter.data = parameter.data.clone()
        assert difference(peer(*inputs)[0], expected) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.float16], ids=str)
def test_half_precision(dtype, stored):
    theirs, mine = (copy.deepcopy(pipe.unet).to(dtype) for pipe in pair("text"))
    weights = {
        key: tensor.to(stored) for key, tensor in adapter(pair("text")[1], components=("unet",), where=EVERY_LAYER).items()
    }
    for unet in (theirs, mine):
        unet.load_lora_adapter(dict(weights), prefix="unet", adapter_name="a")
        unet.set_adapters("a", 0.3)
    for parameter in theirs.parameters():
        parameter.data = parameter.data.clone()
    inputs = torch.randn(1, 4, 8, 8, dtype=dtype), torch.tensor(10), torch.randn(1, 77, 32, dtype=dtype)
    with torch.no_grad():
        assert difference(*(unet(*inputs, cross_attention_kwargs={"scale": 0.7})[0] for unet in (theirs, mine))) == 0
