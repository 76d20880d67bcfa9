"""Low-rank adapters leave no trace, keep threads apart, refuse what does not fit, and change nothing when they do."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors.torch
import torch
from factors import EVERY_LAYER, adapter, factors, kohya
from tasks import call, difference, folder, pair, set_scheduler
from torch import nn

import suffuse
from suffuse.errors import (
    AdapterError,
    AmbiguousCheckpointError,
    CorruptFileError,
    InputError,
    MissingFileError,
    NonFiniteError,
    UnknownArgumentError,
    UnsafePickleError,
)
from suffuse.layers.low_rank import adapters_of, scaled
from suffuse.models.adapter_services import lora_layers

QUICK = {"num_inference_steps": 2}


@pytest.fixture
def pipe():
    _, ours = pair("text")
    set_scheduler(pair("text"), "DDIMScheduler")
    yield ours
    ours.enable_lora()
    ours.unload_lora_weights()


@pytest.fixture
def large():
    _, ours = pair("xl text")
    yield ours
    ours.unload_lora_weights()


def state_of(pipe):
    """What adapters could leave behind, and what they say of themselves."""
    models = {name: m for name, m in pipe.components.items() if isinstance(m, nn.Module)}
    modules = {(name, inner): type(module) for name, model in models.items() for inner, module in model.named_modules()}
    names = {
        (name, inner): (sorted(vars(module)), sorted(module._buffers), sorted(module._parameters))
        for name, model in models.items()
        for inner, module in model.named_modules()
    }
    hooks = {
        (name, inner): len(module._forward_hooks) + len(module._forward_pre_hooks)
        for name, model in models.items()
        for inner, module in model.named_modules()
    }
    weights = {(name, key): tensor.clone() for name, model in models.items() for key, tensor in model.state_dict().items()}
    adapters = pipe.get_list_adapters(), pipe.get_active_adapters(), pipe.fused_loras
    factors = {
        (name, key): tensor.clone() for name, model in models.items() for key, tensor in model.named_buffers() if "lora" in key
    }
    return modules, names, hooks, adapters, weights, factors


def unchanged(before, after):
    same = all(torch.equal(tensor, after[n][key]) for n in (4, 5) for key, tensor in before[n].items())
    return before[:4] == after[:4] and before[4].keys() == after[4].keys() and before[5].keys() == after[5].keys() and same


# ---------------------------------------------------------------- no trace


@pytest.mark.parametrize("fused", [False, True])
def test_nothing_is_left_after_unloading(pipe, fused):
    before, picture = state_of(pipe), call(pipe, "text", **QUICK)
    pipe.load_lora_weights(adapter(pipe, where=EVERY_LAYER, seed=1), adapter_name="a")
    pipe.load_lora_weights(adapter(pipe, rank=2, seed=2), adapter_name="b")
    pipe.set_adapters(["a", "b"], [0.5, 2])
    if fused:
        pipe.fuse_lora(lora_scale=0.7)
        assert difference(call(pipe, "text", **QUICK), picture) > 0.01
        pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert unchanged(before, state_of(pipe))
    assert difference(call(pipe, "text", **QUICK), picture) == 0


def test_while_it_is_loaded_the_models_are_what_they_were(pipe, tmp_path):
    before = state_of(pipe)
    pipe.load_lora_weights(adapter(pipe, where=EVERY_LAYER))
    after = state_of(pipe)
    assert before[0] == after[0]
    assert before[4].keys() == after[4].keys()
    assert all(torch.equal(tensor, after[4][key]) for key, tensor in before[4].items())
    assert sum(after[2].values()) - sum(before[2].values()) == len(after[5]) // 2
    pipe.save_pretrained(tmp_path / "with")
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "without")
    files = sorted(path.relative_to(tmp_path / "with") for path in (tmp_path / "with").rglob("*.safetensors"))
    assert files
    assert all((tmp_path / "with" / path).read_bytes() == (tmp_path / "without" / path).read_bytes() for path in files)


def test_what_is_fused_stays_when_it_is_unloaded(pipe):
    own = suffuse.StableDiffusionPipeline.from_pipe(pipe, unet=copy.deepcopy(pipe.unet))
    own.load_lora_weights(adapter(pipe, components=("unet",)))
    expected = call(own, "text", **QUICK)
    own.fuse_lora()
    own.unload_lora_weights()
    assert own.get_list_adapters() == {}
    assert difference(call(own, "text", **QUICK), expected) < 1e-4


def test_an_adapter_beside_a_fused_one_counts(pipe):
    # In the peer a layer with a fused adapter has no other.
    pipe.load_lora_weights(adapter(pipe, seed=1), adapter_name="a")
    pipe.fuse_lora()
    fused = call(pipe, "text", **QUICK)
    pipe.load_lora_weights(adapter(pipe, seed=2), adapter_name="b")
    both = call(pipe, "text", **QUICK)
    assert difference(fused, both) > 0.01
    pipe.unfuse_lora()
    pipe.set_adapters(["a", "b"])
    assert difference(call(pipe, "text", **QUICK), both) < 1e-4


def test_copies_have_adapters_of_their_own(pipe):
    pipe.load_lora_weights(adapter(pipe), adapter_name="a")
    expected = call(pipe, "text", **QUICK)
    for unet in (copy.deepcopy(pipe.unet), pickle.loads(pickle.dumps(pipe.unet))):
        other = suffuse.StableDiffusionPipeline.from_pipe(pipe, unet=unet)
        assert difference(call(other, "text", **QUICK), expected) == 0
        unet.unload_lora()
        assert difference(call(other, "text", **QUICK), expected) > 0
    assert difference(call(pipe, "text", **QUICK), expected) == 0


def test_adapters_go_where_their_model_goes(pipe):
    unet = copy.deepcopy(pipe.unet)
    unet.load_lora_adapter(adapter(pipe), prefix="unet", adapter_name="a")
    unet.to("meta")
    assert all(tensor.is_meta for tensor in unet.lora_layers("a").values())
    half = copy.deepcopy(pipe.unet)
    half.load_lora_adapter(adapter(pipe), prefix="unet", adapter_name="a")
    half.to(torch.bfloat16)
    assert {tensor.dtype for tensor in half.lora_layers("a").values()} == {torch.bfloat16}


def test_adapters_that_were_sent_away_are_still_used(pipe):
    pipe.load_lora_weights(adapter(pipe), adapter_name="a")
    pipe.set_lora_device("a", "meta")
    assert adapters_of(pipe.unet).factors("a").popitem()[1].down.is_meta
    pipe.unload_lora_weights()
    pipe.load_lora_weights(adapter(pipe), adapter_name="a")
    expected = call(pipe, "text", **QUICK)
    pipe.set_lora_device(["a"], "cpu")
    assert difference(call(pipe, "text", **QUICK), expected) == 0


@pytest.mark.parametrize("way", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
@pytest.mark.parametrize("first", ["the adapter", "offloading"])
def test_offloaded_models_have_adapters_too(pipe, way, first):
    weights = adapter(pipe, where=EVERY_LAYER)
    pipe.load_lora_weights(weights)
    expected = call(pipe, "text", **QUICK)
    pipe.unload_lora_weights()
    own = suffuse.StableDiffusionPipeline.from_pretrained(folder("text"))
    own.set_progress_bar_config(disable=True)
    own.scheduler = pipe.scheduler
    steps = [lambda: own.load_lora_weights(weights), lambda: getattr(own, way)(device="cpu")]
    for step in steps if first == "the adapter" else reversed(steps):
        step()
    assert difference(call(own, "text", **QUICK), expected) == 0
    assert difference(call(own, "text", **QUICK), expected) == 0
    if way == "enable_sequential_cpu_offload":
        with pytest.raises(AdapterError, match="not in memory"):
            own.fuse_lora()
    own.remove_all_hooks()
    own.unload_lora_weights()
    assert own.unet.state_dict().keys() == pipe.unet.state_dict().keys()


# ---------------------------------------------------------------- one pipeline, many calls


def test_threads_with_scales_of_their_own(pipe):
    pipe.load_lora_weights(adapter(pipe, where=EVERY_LAYER))

    def run(index):
        options = {"cross_attention_kwargs": {"scale": index / 4}} if index % 3 else {}
        return call(pipe, "text", generator=torch.Generator().manual_seed(index), **options, **QUICK)

    serial = [run(index) for index in range(8)]
    with ThreadPoolExecutor(8) as threads:
        shared = list(threads.map(run, range(8)))
    assert all(difference(one, other) == 0 for one, other in zip(serial, shared, strict=True))


def test_a_call_that_fails_leaves_no_scale(pipe):
    pipe.load_lora_weights(adapter(pipe))
    expected = call(pipe, "text", **QUICK)

    def fail(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        call(pipe, "text", cross_attention_kwargs={"scale": 0.1}, callback_on_step_end=fail, **QUICK)
    with pytest.raises(InputError):
        pipe.unet(torch.zeros(1, 3, 8, 8), 1, torch.zeros(1, 77, 32), cross_attention_kwargs={"scale": 0.1})
    assert difference(call(pipe, "text", **QUICK), expected) == 0


def test_encode_prompt_takes_a_scale(pipe):
    plain = pipe.encode_prompt("a cat", torch.device("cpu"), 1, False)[0]
    pipe.load_lora_weights(adapter(pipe))
    full, none, half = (pipe.encode_prompt("a cat", torch.device("cpu"), 1, False, lora_scale=s)[0] for s in (1.0, 0.0, 0.5))
    assert torch.equal(none, plain)
    assert difference(full, plain) > difference(half, plain) > 0


def test_hot_swap_changes_numbers_only(pipe):
    pipe.load_lora_weights(adapter(pipe, seed=1), adapter_name="a")
    pipe.set_adapters("a", 0.7)
    before = state_of(pipe)
    pipe.load_lora_weights(adapter(pipe, seed=2), adapter_name="a", hotswap=True)
    after = state_of(pipe)
    assert before[:4] == after[:4]
    swapped = call(pipe, "text", **QUICK)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(adapter(pipe, seed=2), adapter_name="a")
    pipe.set_adapters("a", 0.7)
    assert difference(call(pipe, "text", **QUICK), swapped) == 0


def test_hot_swap_and_other_weights_compile_nothing_again(pipe):
    from torch._dynamo.testing import CompileCounter

    def compiled(unet):
        torch._dynamo.reset()
        counter = CompileCounter()
        return torch.compile(unet, backend=counter), counter

    unet, inputs = copy.deepcopy(pipe.unet), (torch.randn(2, 4, 8, 8), torch.tensor(10), torch.randn(2, 77, 32))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, counter = compiled(unet)
        plain(*inputs)
        graphs = counter.frame_count
        unet.load_lora_adapter(adapter(pipe, seed=1), adapter_name="a")
        fast, counter = compiled(unet)
        fast(*inputs)
        assert counter.frame_count == graphs == 1  # the whole network, with adapters as without
        weights = kohya(adapter(pipe, seed=2, components=("unet",)), alpha=1.5)
        unet.load_lora_adapter(weights, adapter_name="a", hotswap=True)
        assert torch.equal(fast(*inputs)[0], unet(*inputs)[0])
        unet.set_adapters("a", 0.3)
        assert torch.equal(fast(*inputs)[0], unet(*inputs)[0])
        with scaled(0.5):
            half = fast(*inputs)[0]
        assert torch.equal(half, unet(*inputs, cross_attention_kwargs={"scale": 0.5})[0])
        assert counter.frame_count == graphs
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_model_takes_a_scale_in_its_call(pipe):
    unet, inputs = copy.deepcopy(pipe.unet), (torch.randn(2, 4, 8, 8), torch.tensor(10), torch.randn(2, 77, 32))
    unet.load_lora_adapter(adapter(pipe, seed=1), adapter_name="a")
    torch._dynamo.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(unet, backend="eager")
        for scale in (0.5, 0.3):
            options = {"cross_attention_kwargs": {"scale": scale}}
            assert torch.equal(compiled(*inputs, **options)[0], unet(*inputs, **options)[0])
    torch._dynamo.reset()


def test_other_ranks_and_layers_can_be_swapped_in(pipe):
    pipe.load_lora_weights(adapter(pipe, where=EVERY_LAYER), adapter_name="a")
    pipe.load_lora_weights(adapter(pipe, rank=2, components=("unet",)), adapter_name="a", hotswap=True)
    swapped = call(pipe, "text", **QUICK)
    assert pipe.get_list_adapters()["unet"] == ["a"]
    pipe.unload_lora_weights()
    pipe.load_lora_weights(adapter(pipe, rank=2, components=("unet",)), adapter_name="a")
    assert difference(call(pipe, "text", **QUICK), swapped) == 0


def test_convolutions_in_three_factors_are_those_in_two(pipe):
    generator = torch.Generator().manual_seed(0)
    layer = "lora_unet_down_blocks_0_resnets_0_conv1"
    down, middle, up = (torch.randn(shape, generator=generator) for shape in ((4, 32, 1, 1), (4, 4, 3, 3), (32, 4, 1, 1)))
    three = {f"{layer}.lora_down.weight": down, f"{layer}.lora_mid.weight": middle, f"{layer}.lora_up.weight": up}
    pipe.load_lora_weights(three | {f"{layer}.alpha": torch.tensor(2.0)}, adapter_name="a")
    x = torch.randn(1, 32, 8, 8, generator=generator)
    conv = pipe.unet.down_blocks[0].resnets[0].conv1
    with torch.no_grad():
        steps = nn.functional.conv2d(nn.functional.conv2d(nn.functional.conv2d(x, down), middle, padding=1), up)
        expected = nn.Conv2d.forward(conv, x) + steps * 2 / 4
        assert difference(conv(x), expected) < 1e-3 * steps.abs().max()


# ---------------------------------------------------------------- files


def test_a_folder_with_one_file_under_any_name(pipe, tmp_path):
    safetensors.torch.save_file(adapter(pipe), tmp_path / "style.safetensors")
    pipe.load_lora_weights(tmp_path, adapter_name="a")
    (tmp_path / "more").mkdir()
    safetensors.torch.save_file(adapter(pipe), tmp_path / "more" / "style.safetensors")
    pipe.load_lora_weights(tmp_path, weight_name="more/style.safetensors", adapter_name="b")
    pipe.load_lora_weights(tmp_path, subfolder="more", adapter_name="c")
    assert pipe.get_list_adapters()["unet"] == ["a", "b", "c"]


def test_a_pickle_is_read_as_tensors_only(pipe, tmp_path):
    torch.save(adapter(pipe), tmp_path / "pytorch_lora_weights.bin")
    with pytest.warns(UserWarning, match="is a pickle"):
        pipe.load_lora_weights(tmp_path)
    assert pipe.get_active_adapters() == ["default_0"]
    with pytest.raises(MissingFileError, match="holds no file of weights"):
        pipe.load_lora_weights(tmp_path, use_safetensors=True)


def test_factors_with_names_of_components_are_written(pipe, tmp_path):
    pipe.load_lora_weights(kohya(adapter(pipe), alpha=3.0), adapter_name="a")
    layers = {f"unet.{key}": tensor for key, tensor in lora_layers(pipe.unet, "a").items()}
    layers |= {f"text_encoder.{key}": tensor for key, tensor in lora_layers(pipe.text_encoder, "a").items()}
    expected = call(pipe, "text", **QUICK)
    for safe, name in ((True, None), (False, "any.bin")):
        pipe.write_lora_layers(layers, tmp_path / str(safe), True, name, None, safe)
        with contextlib.nullcontext() if safe else pytest.warns(UserWarning, match="is a pickle"):
            pipe.load_lora_weights(tmp_path / str(safe))
        assert difference(call(pipe, "text", **QUICK), expected) == 0
    pipe.write_lora_layers(layers, tmp_path / "none", False, None, None, True)
    assert not (tmp_path / "none").exists()
    written = []
    pipe.write_lora_layers(
        layers,
        tmp_path / "own",
        True,
        "x.safetensors",
        lambda t, path: written.append(len(t)) or safetensors.torch.save_file(t, path),
        True,
    )
    assert written == [len([key for key in layers if not key.endswith(".alpha")])]
    assert (tmp_path / "own" / "x.safetensors").is_file()


def test_names_are_given(pipe):
    for _ in range(3):
        pipe.load_lora_weights(adapter(pipe))
    assert pipe.get_list_adapters()["unet"] == ["default_0", "default_1", "default_2"]
    assert pipe.unet.active_adapters() == ["default_2"]


# ---------------------------------------------------------------- refusals


def of(pipe, change):
    weights = adapter(pipe)
    change(weights)
    return weights


FIRST = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def put(**tensors):
    return lambda weights: weights.update({f"{FIRST}.{name.replace('__', '.')}": tensor for name, tensor in tensors.items()})


def square(layer):
    return {f"{layer}.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}


REFUSED = {
    "half of a pair": (lambda w: w.pop(f"{FIRST}.lora_B.weight"), AdapterError, "1 of 50 layers lack a factor"),
    "alpha alone": (put(other__alpha=torch.tensor(1.0)), AdapterError, "lack a factor"),
    "alpha of many numbers": (put(alpha=torch.ones(3)), AdapterError, "is no number"),
    "NaN": (put(lora_A__weight=torch.full((4, 64), torch.nan)), NonFiniteError, "to_q.lora_A.weight' holds NaN"),
    "infinity": (put(lora_B__weight=torch.full((64, 4), torch.inf)), NonFiniteError, "holds NaN or infinity"),
    "two ranks": (put(lora_A__weight=torch.ones(3, 64)), AdapterError, "49 of 50 layers do"),
    "rank none": (put(lora_A__weight=torch.ones(0, 64), lora_B__weight=torch.ones(64, 0)), AdapterError, "49 of 50"),
    "another width": (put(lora_A__weight=torch.ones(4, 65)), AdapterError, "49 of 50 layers do"),
    "no such layer": (lambda w: w.update(square("unet.nowhere")), AdapterError, "50 of 51 layers do"),
    "an unknown key": (lambda w: w.update({"unet.conv_in.strange": torch.ones(1)}), AdapterError, "100 of 101 keys"),
    "DoRA": (put(lora_magnitude_vector=torch.ones(64)), AdapterError, "DoRA, which is not supported"),
    "a layer twice": (put(lora_down__weight=torch.ones(4, 64)), AdapterError, "100 of 101 keys"),
    "no component": (lambda w: w.update(square("text_encoder_2.encoder.layers.0.mlp.fc1")), AdapterError, "50 of 51 layers do"),
    "nothing": (lambda w: w.clear(), AdapterError, "0 of 0 keys"),
    "no tensor": (lambda w: w.update({"unet.x.alpha": 1.0}), InputError, "something else than named tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_refused_and_changes_nothing(pipe, name):
    change, error, message = REFUSED[name]
    pipe.load_lora_weights(adapter(pipe, seed=3), adapter_name="good")
    before = state_of(pipe)
    with pytest.raises(error, match=message):
        pipe.load_lora_weights(of(pipe, change), adapter_name="bad")
    assert unchanged(before, state_of(pipe))
    with pytest.raises(error, match=message):
        pipe.load_lora_weights(of(pipe, change), adapter_name="good", hotswap=True)
    assert unchanged(before, state_of(pipe))


def test_an_adapter_of_another_model_is_told(pipe, large):
    before = state_of(pipe)
    wide = {f"unet.mid_block.attentions.0.transformer_blocks.{n}.attn2.to_k.lora_A.weight": torch.ones(4, 2048) for n in range(9)}
    wide |= {key.replace("lora_A", "lora_B"): torch.ones(1280, 4) for key in wide}
    with pytest.raises(AdapterError, match=r"0 of 9 layers do\n.*this looks like a LoRA for Stable Diffusion XL"):
        pipe.load_lora_weights(wide)
    flat = kohya(wide)
    with pytest.raises(AdapterError, match="this looks like a LoRA for Stable Diffusion XL"):
        pipe.load_lora_weights(flat)
    with pytest.raises(AdapterError, match="FLUX"):
        pipe.load_lora_weights({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 8)})
    with pytest.raises(AdapterError, match="LoKr, which is not supported"):
        pipe.load_lora_weights({"lora_unet_mid_block.lokr_w1": torch.ones(2, 2)})
    with pytest.raises(AdapterError, match="0 of 9 keys"):
        pipe.load_lora_weights({f"layer{n}": torch.ones(2) for n in range(9)})
    with pytest.raises(AdapterError, match=r"of 50 layers do"):
        large.load_lora_weights(adapter(pipe))
    assert unchanged(before, state_of(pipe))


def wrong_uses(pipe):
    weights = adapter(pipe)
    return {
        "name taken": (lambda: pipe.load_lora_weights(weights, adapter_name="a"), AdapterError, "called 'a' already"),
        "name with dots": (lambda: pipe.load_lora_weights(weights, adapter_name="a.b"), AdapterError, "is no name"),
        "swap of nothing": (lambda: pipe.load_lora_weights(weights, adapter_name="c", hotswap=True), AdapterError, "called 'c'"),
        "misspelt keyword": (lambda: pipe.load_lora_weights(weights, adapter="c"), UnknownArgumentError, "adapter_name"),
        "unknown adapter": (lambda: pipe.set_adapters(["a", "bb"]), AdapterError, "did you mean 'b'"),
        "named twice": (lambda: pipe.set_adapters(["a", "a"]), AdapterError, "named twice"),
        "too many weights": (lambda: pipe.set_adapters(["a", "b"], [1, 2, 3]), AdapterError, "3 for 2"),
        "weight of text": (lambda: pipe.set_adapters("a", "1"), AdapterError, "is no number"),
        "weight NaN": (lambda: pipe.set_adapters("a", float("nan")), AdapterError, "is no number"),
        "unknown component": (lambda: pipe.set_adapters("a", {"vae": 1}), AdapterError, "the pipeline has no vae"),
        "unknown block": (lambda: pipe.set_adapters("a", {"unet": {"left": 1}}), AdapterError, "expected: down, mid, up"),
        "no attention": (lambda: pipe.set_adapters("a", {"unet": {"down": {"block_0": 1}}}), AdapterError, "block_1"),
        "too many layers": (lambda: pipe.set_adapters("a", {"unet": {"mid": [1, 2]}}), AdapterError, "1 places"),
        "blocks of a text encoder": (lambda: pipe.set_adapters("a", {"text_encoder": {"down": 1}}), AdapterError, "no number"),
        "second of two wrong": (lambda: pipe.set_adapters(["a", "b"], [0.1, {"text_encoder": "x"}]), AdapterError, "no number"),
        "delete unknown": (lambda: pipe.delete_adapters(["a", "zz"]), AdapterError, "no adapter is called 'zz'"),
        "fuse unknown": (lambda: pipe.fuse_lora(adapter_names=["zz"]), AdapterError, "no adapter is called 'zz'"),
        "fuse into nothing": (lambda: pipe.fuse_lora(components=["vae"]), AdapterError, "the pipeline has no vae"),
        "components first": (lambda: pipe.fuse_lora(["unet"]), InputError, "components="),
        "fuse too much": (lambda: pipe.fuse_lora(lora_scale=1e39, safe_fusing=True), NonFiniteError, "NaN or infinity"),
        "device of unknown": (lambda: pipe.set_lora_device(["zz"], "cpu"), AdapterError, "no adapter is called 'zz'"),
        "scale of text": (lambda: call(pipe, "text", cross_attention_kwargs={"scale": "1"}), InputError, "is no number"),
        "fused projections": (pipe.fuse_qkv_projections, InputError, "would bypass"),
        "save nothing": (lambda: pipe.save_lora_weights("nowhere"), AdapterError, "nothing to write"),
        "alphas of no layer": (
            lambda: pipe.load_lora_into_unet(weights, {"unet.nowhere.alpha": 1.0}, pipe.unet, adapter_name="c"),
            AdapterError,
            "for no layer",
        ),
    }


@pytest.mark.parametrize("name", wrong_uses(pair("text")[1]))
def test_wrong_use_is_refused_and_changes_nothing(pipe, name):
    pipe.load_lora_weights(adapter(pipe, seed=1), adapter_name="a")
    pipe.load_lora_weights(adapter(pipe, seed=2), adapter_name="b")
    pipe.set_adapters(["a", "b"], [0.5, 0.4])
    before, active = state_of(pipe), [update.active for update in adapters_of(pipe.unet)._updates.values()]
    use, error, message = wrong_uses(pipe)[name]
    with pytest.raises(error, match=message):
        use()
    assert unchanged(before, state_of(pipe))
    assert [update.active for update in adapters_of(pipe.unet)._updates.values()] == active


FUSED = {
    "fused again": lambda pipe: pipe.fuse_lora(),
    "switched off": lambda pipe: pipe.disable_lora(),
    "deleted": lambda pipe: pipe.delete_adapters("a"),
    "deleted in the model": lambda pipe: pipe.unet.delete_adapters("a"),
    "replaced": lambda pipe: pipe.load_lora_weights(adapter(pipe, seed=1), adapter_name="a", hotswap=True),
}


@pytest.mark.parametrize("name", FUSED)
def test_what_is_fused_cannot_be(pipe, name):
    pipe.load_lora_weights(adapter(pipe), adapter_name="a")
    pipe.fuse_lora()
    before = state_of(pipe)
    with pytest.raises(AdapterError, match=r"'a' is fused\n.*unfuse_lora"):
        FUSED[name](pipe)
    assert unchanged(before, state_of(pipe))
    pipe.unfuse_lora()


def test_fusing_is_done_in_all_models_or_in_none(pipe):
    weights = adapter(pipe)
    last = max(key for key in weights if key.startswith("text_encoder") and "lora_B" in key)
    weights[last] = torch.full_like(weights[last], 1e38)
    pipe.load_lora_weights(weights)
    before = state_of(pipe)
    with pytest.raises(NonFiniteError, match="NaN or infinity in encoder"):
        pipe.fuse_lora(lora_scale=1e3, safe_fusing=True)
    assert unchanged(before, state_of(pipe))


def test_no_adapter_beside_fused_projections(pipe):
    unet = copy.deepcopy(pipe.unet)
    unet.fuse_qkv_projections()
    with pytest.raises(AdapterError, match="unfuse_qkv_projections"):
        unet.load_lora_adapter(adapter(pipe), prefix="unet")
    with pytest.raises(AdapterError, match="has no adapters"):
        unet.set_adapters("a")


class Evil:
    def __reduce__(self):
        return (print, ("run",))


BAD_FILES = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-9]), CorruptFileError),
    "empty": (lambda path: path.write_bytes(b""), CorruptFileError),
    "a pickle": (lambda path: torch.save({"x": Evil()}, path), UnsafePickleError),
    "two": (lambda path: path.with_name("other.safetensors").write_bytes(path.read_bytes()), AmbiguousCheckpointError),
    "none": (lambda path: path.unlink(), MissingFileError),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(pipe, tmp_path, name):
    spoil, error = BAD_FILES[name]
    safetensors.torch.save_file(adapter(pipe), tmp_path / "adapter.safetensors")
    before = state_of(pipe)
    with contextlib.suppress(NotImplementedError):
        spoil(tmp_path / "adapter.safetensors")
    with pytest.raises(error):
        pipe.load_lora_weights(tmp_path)
    assert unchanged(before, state_of(pipe))


def test_settings_in_a_header_that_are_none(pipe, tmp_path):
    for text in ("{", "[1]", '{"unet.lora_alpha": "x"}'):
        safetensors.torch.save_file(adapter(pipe), tmp_path / "a.safetensors", {"lora_adapter_metadata": text})
        with pytest.raises(AdapterError, match="holds no settings"):
            pipe.load_lora_weights(tmp_path)


def test_a_part_for_a_text_encoder_that_is_not_there(pipe):
    weights = adapter(pipe)
    without = suffuse.StableDiffusionPipeline.from_pipe(pipe, text_encoder=None, tokenizer=None)
    with pytest.warns(UserWarning, match="there is no text_encoder"):
        without.load_lora_weights(weights)
    assert without.get_list_adapters() == {"unet": ["default_0"]}


def test_kohya_names_without_the_configuration_of_the_unet(large):
    tensors, alphas = large.lora_state_dict(kohya(adapter(large)))
    assert {key.split(".")[0] for key in tensors} == {"unet", "text_encoder", "text_encoder_2"}
    assert set(alphas.values()) == {2.0}


def test_an_adapter_for_a_transformer(pipe):
    class Transformer(suffuse.ModelMixin):
        def __init__(self):
            super().__init__()
            self.attn1 = torch.nn.ModuleDict({"to_q": torch.nn.Linear(4, 4)})

        def forward(self, x):
            return self.attn1["to_q"](x)

    model, x = Transformer(), torch.randn(1, 4)
    before, state = model(x), {f"transformer.{key}": tensor for key, tensor in factors(model, where=r".").items()}
    suffuse.StableDiffusionPipeline.load_lora_into_transformer(state, None, model)
    assert not torch.equal(before, model(x))
    with pytest.raises(AdapterError, match="0 of 1 layers"):
        pipe.load_lora_weights(state)
