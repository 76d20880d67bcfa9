"""IP-Adapters leave no trace, keep threads apart, refuse what does not fit, and change nothing when they do."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
from factors import adapter as low_rank
from image_weights import FEATURES, image_encoder, ip_adapter, nested
from PIL import Image
from tasks import call, difference, folder, pair, picture, set_scheduler
from torch import nn

import suffuse
from suffuse.diffusion.image_prompts import rows
from suffuse.errors import (
    AdapterError,
    CorruptFileError,
    InputError,
    MissingFileError,
    NonFiniteError,
    UnknownArgumentError,
    UnsafePickleError,
    WeightsMismatchError,
)
from suffuse.layers.attention_processors import AttnProcessor
from suffuse.models.image_adapter import image_adapters_of

QUICK = {"num_inference_steps": 2}
SHOWN = {"ip_adapter_image": picture(seed=9), **QUICK}


@pytest.fixture
def pipe():
    _, ours = pair("text")
    set_scheduler(pair("text"), "DDIMScheduler")
    ours.register_modules(image_encoder=image_encoder(), feature_extractor=tiny.image_processor())
    yield ours
    ours.unload_ip_adapter()
    ours.unload_lora_weights()
    ours.register_modules(image_encoder=None, feature_extractor=None)


@pytest.fixture
def bare():
    """A pipeline of its own, without image encoder."""
    made = suffuse.StableDiffusionPipeline.from_pretrained(folder("text"))
    made.set_progress_bar_config(disable=True)
    return made


def weights(pipe, *args, **options):
    return ip_adapter(pair("text")[0].unet, *args, **options)


def state_of(pipe):
    """What adapters could leave behind."""
    models = {name: model for name, model in pipe.components.items() if isinstance(model, nn.Module)}
    inside = {(name, inner): module for name, model in models.items() for inner, module in model.named_modules()}
    modules = {
        place: (type(module), sorted(vars(module)), len(module._forward_pre_hooks), len(module._forward_hooks))
        for place, module in inside.items()
    }
    tensors = {
        (*place, name): tensor.clone()
        for place, module in inside.items()
        for name, tensor in module._buffers.items() | module._parameters.items()
        if tensor is not None
    }
    configs = {
        name: dict(model.config) if isinstance(model.config, dict) else model.config.to_dict() for name, model in models.items()
    }
    return (
        modules,
        dict(pipe.config),
        configs,
        sorted(vars(pipe)),
        {name: id(part) for name, part in pipe.components.items()},
        tensors,
    )


def unchanged(before, after):
    same = before[-1].keys() == after[-1].keys() and all(
        torch.equal(tensor, after[-1][name]) for name, tensor in before[-1].items()
    )
    return before[:-1] == after[:-1] and same


# ---------------------------------------------------------------- no trace


@pytest.mark.parametrize("rank", [0, 4])
def test_nothing_is_left_after_unloading(bare, tmp_path, rank):
    safetensors.torch.save_file(weights(bare, rank=rank), tmp_path / "adapter.safetensors")
    image_encoder().save_pretrained(tmp_path / "image_encoder")
    drawn, before = call(bare, "text", **QUICK), state_of(bare)
    bare.load_ip_adapter(tmp_path, weight_name="adapter.safetensors")
    bare.set_ip_adapter_scale(0.4)
    assert difference(call(bare, "text", **SHOWN), drawn) > 0.01
    assert bare.config["image_encoder"] == ("transformers", "CLIPVisionModelWithProjection")
    assert bare.image_encoder.dtype == bare.unet.dtype
    bare.unload_ip_adapter()
    assert unchanged(before, state_of(bare))
    assert difference(call(bare, "text", **QUICK), drawn) == 0
    bare.unload_ip_adapter()


def test_while_it_is_loaded_the_models_are_what_they_were(pipe, tmp_path):
    before = state_of(pipe)
    pipe.load_ip_adapter(weights(pipe))
    call(pipe, "text", **SHOWN)
    after = state_of(pipe)
    assert after[-1].keys() == before[-1].keys()
    assert {place for place, own in after[0].items() if own != before[0][place]} == {("unet", "")}  # it knows its adapters
    assert after[1:3] == before[1:3]
    pipe.save_pretrained(tmp_path / "with")
    pipe.unload_ip_adapter()
    pipe.save_pretrained(tmp_path / "without")
    files = sorted(path.relative_to(tmp_path / "with") for path in (tmp_path / "with").rglob("*.*"))
    assert all((tmp_path / "with" / path).read_bytes() == (tmp_path / "without" / path).read_bytes() for path in files)


def test_an_image_encoder_that_was_there_stays(pipe):
    encoder, processor = pipe.image_encoder, pipe.feature_extractor
    pipe.load_ip_adapter(weights(pipe))
    pipe.unload_ip_adapter()
    assert (pipe.image_encoder, pipe.feature_extractor) == (encoder, processor)


def test_an_adapter_takes_the_place_of_those_before(pipe):
    pipe.load_ip_adapter(weights(pipe, seed=1))
    expected = call(pipe, "text", **SHOWN)
    pipe.load_ip_adapter([weights(pipe, seed=2), weights(pipe, "plus", seed=3)])
    pipe.set_ip_adapter_scale([0.5, {"up": 1.0}])
    pipe.load_ip_adapter(weights(pipe, seed=1))
    assert difference(call(pipe, "text", **SHOWN), expected) == 0


def test_pipelines_that_share_a_unet_share_its_adapters(pipe):
    pipe.load_ip_adapter(weights(pipe))
    other = suffuse.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    plain = {"image": picture(), "strength": 1.0, "prompt": "a cat", "output_type": "pt"}
    shown = other(**plain, **SHOWN, generator=torch.Generator().manual_seed(1))[0]
    other.set_ip_adapter_scale(0.0)
    assert difference(shown, other(**plain, **SHOWN, generator=torch.Generator().manual_seed(1))[0]) > 0.01
    other.unload_ip_adapter()
    with pytest.raises(InputError, match="no IP-Adapter is loaded"):
        call(pipe, "text", **SHOWN)


def test_copies_have_adapters_of_their_own(pipe):
    pipe.load_ip_adapter(weights(pipe, "plus"))
    expected = call(pipe, "text", **SHOWN)
    for unet in (copy.deepcopy(pipe.unet), pickle.loads(pickle.dumps(pipe.unet))):
        other = suffuse.StableDiffusionPipeline.from_pipe(pipe, unet=unet)
        assert difference(call(other, "text", **SHOWN), expected) == 0
        other.unload_ip_adapter()
    assert difference(call(pipe, "text", **SHOWN), expected) == 0


def test_weights_take_the_bytes_of_their_file(pipe):
    tensors = {name: tensor.half() for name, tensor in weights(pipe, "plus").items()}
    pipe.load_ip_adapter(tensors)
    held = image_adapters_of(pipe.unet).adapters[0].tensors
    assert sum(t.nbytes for t in held.values()) == sum(t.nbytes for t in tensors.values())
    half = call(pipe, "text", **SHOWN)
    pipe.load_ip_adapter({name: tensor.float() for name, tensor in tensors.items()})
    assert difference(call(pipe, "text", **SHOWN), half) == 0


# ---------------------------------------------------------------- beside other features


@pytest.mark.parametrize("way", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
@pytest.mark.parametrize("first", ["the adapter", "offloading"])
def test_offloaded_models_look_at_pictures_too(bare, tmp_path, way, first):
    safetensors.torch.save_file(weights(bare, "plus"), tmp_path / "adapter.safetensors")
    image_encoder().save_pretrained(tmp_path / "image_encoder")
    steps = [lambda: bare.load_ip_adapter(tmp_path, weight_name="adapter.safetensors"), lambda: getattr(bare, way)(device="cpu")]
    steps[0]()
    expected = call(bare, "text", **SHOWN)
    bare.unload_ip_adapter()
    for step in steps if first == "the adapter" else reversed(steps):
        step()
    assert difference(call(bare, "text", **SHOWN), expected) == 0
    assert difference(call(bare, "text", **SHOWN), expected) == 0


@pytest.mark.parametrize("way", ["enable_attention_slicing", "fuse_qkv_projections", "formula"])
def test_other_ways_of_attention_look_at_pictures_too(bare, pipe, way):
    bare.register_modules(image_encoder=image_encoder(), feature_extractor=tiny.image_processor())
    bare.load_ip_adapter(weights(bare))
    expected = call(bare, "text", **SHOWN)
    if way == "formula":
        bare.unet.set_attn_processor(AttnProcessor())
    else:
        getattr(bare, way)()
    made = call(bare, "text", **SHOWN)
    assert difference(made, expected) < 1e-3
    bare.set_ip_adapter_scale(0.0)
    assert difference(made, call(bare, "text", **SHOWN)) > 0.01


def test_a_processor_that_does_not_know_pictures_is_refused(bare):
    def simple(attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return hidden_states

    bare.load_ip_adapter(weights(bare), image_encoder_folder=None)
    bare.unet.set_attn_processor(simple)
    with pytest.raises(InputError, match=r"processor of .*attn2 does not know pictures(.|\n)*image_prompts"):
        call(bare, "text", ip_adapter_image_embeds=[torch.zeros(2, 1, FEATURES)], **QUICK)


def test_fused_low_rank_adapters(pipe):
    pipe.load_lora_weights(low_rank(pipe, components=("unet",)))
    pipe.load_ip_adapter(weights(pipe))
    expected = call(pipe, "text", **SHOWN)
    pipe.fuse_lora()
    assert difference(call(pipe, "text", **SHOWN), expected) < 1e-3
    pipe.unfuse_lora()


def test_a_low_rank_adapter_that_comes_along_leaves_others_active(pipe):
    pipe.load_lora_weights(low_rank(pipe, components=("unet",)), adapter_name="style")
    pipe.load_ip_adapter(weights(pipe, "face", rank=2))
    assert pipe.get_active_adapters() == ["style", "faceid_0"]
    pipe.unload_ip_adapter()
    assert pipe.get_active_adapters() == ["style"]


def test_a_compiled_model_looks_at_pictures_too(pipe):
    pipe.load_ip_adapter(weights(pipe))
    expected = call(pipe, "text", **SHOWN)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = suffuse.StableDiffusionPipeline.from_pipe(pipe)
        other.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
        assert difference(call(other, "text", **SHOWN), expected) == 0
    torch._dynamo.reset()


def test_a_unet_by_itself_looks_at_pictures_too():
    peer, ours = tiny.unet(), suffuse.UNet2DConditionModel.from_config(tiny.unet().config).eval()
    ours.load_state_dict(peer.state_dict())
    host = suffuse.StableDiffusionPipeline.from_pretrained(folder("text"), unet=ours)
    host.load_ip_adapter(ip_adapter(peer), image_encoder_folder=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer._load_ip_adapter_weights([nested(ip_adapter(peer))])
    for parameter in peer.parameters():
        parameter.data = parameter.data.clone()
    inputs = torch.randn(2, 4, 8, 8), torch.tensor(10), torch.randn(2, 77, 32)
    added = {"image_embeds": [torch.randn(2, 1, FEATURES)]}
    with torch.no_grad():
        assert difference(*(unet(*inputs, added_cond_kwargs=added)[0] for unet in (peer, ours))) == 0


def test_a_unet_that_the_peer_saved_with_an_adapter_is_loaded_without(tmp_path):
    peer = tiny.unet()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer._load_ip_adapter_weights([nested(ip_adapter(peer))])
    peer.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="to_k_ip"):
        ours = suffuse.UNet2DConditionModel.from_pretrained(tmp_path)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor(10), torch.randn(2, 77, 32)
    with torch.no_grad():
        assert difference(ours(*inputs)[0], tiny.unet()(*inputs)[0]) < 1e-5


# ---------------------------------------------------------------- one pipeline, many calls


def test_threads_with_scales_of_their_own(pipe):
    pipe.load_ip_adapter(weights(pipe))

    def run(index):
        options = {"ip_adapter_scale": index / 4} if index % 3 else {}
        return call(pipe, "text", generator=torch.Generator().manual_seed(index), **options, **SHOWN)

    serial = [run(index) for index in range(8)]
    with ThreadPoolExecutor(8) as threads:
        shared = list(threads.map(run, range(8)))
    assert all(difference(one, other) == 0 for one, other in zip(serial, shared, strict=True))


@pytest.mark.parametrize("scale", [0.3, {"up": 1.0}, [0.3]])
def test_the_scale_of_a_call_belongs_to_it(pipe, scale):
    pipe.load_ip_adapter(weights(pipe))
    usual = call(pipe, "text", **SHOWN)
    own = call(pipe, "text", ip_adapter_scale=scale, **SHOWN)
    assert difference(call(pipe, "text", **SHOWN), usual) == 0
    pipe.set_ip_adapter_scale(scale)
    assert difference(call(pipe, "text", **SHOWN), own) == 0


def test_without_any_of_it_no_picture_is_needed(pipe):
    plain = call(pipe, "text", **QUICK)
    pipe.load_ip_adapter(weights(pipe))
    pipe.set_ip_adapter_scale(0)
    assert difference(call(pipe, "text", **QUICK), plain) == 0
    assert difference(call(pipe, "text", **SHOWN), plain) == 0


def test_a_run_with_a_picture_is_saved_and_goes_on(pipe, tmp_path):
    pipe.load_ip_adapter(weights(pipe))
    made = call(pipe, "text", **SHOWN, save_run=tmp_path / "{step}.safetensors")
    assert difference(pipe(resume=tmp_path / "1.safetensors")[0], made) == 0


def test_branches_may_be_asked_for_one_by_one():
    embeds = torch.randn(2, 3, FEATURES)
    joined = rows(embeds, 2, ("uncond", "cond", "perturbed"))
    assert torch.equal(joined, torch.cat([rows(embeds, 2, (branch,)) for branch in ("uncond", "cond", "cond")]))
    assert torch.equal(rows(embeds, 1, ("cond",)), embeds[1:])
    assert torch.equal(rows(embeds, 1, ("uncond",)), embeds[:1])


# ---------------------------------------------------------------- calls that are refused


REFUSED = {
    "no picture": ({}, r"an IP-Adapter is loaded, and no picture is given(.|\n)*ip_adapter_image or ip_adapter_image_embeds"),
    "two for one adapter": (
        {"ip_adapter_image": [picture(), picture()]},
        r"2 given for 1 IP-Adapter\n(.|\n)*\[\[first, second\]\]",
    ),
    "a path": ({"ip_adapter_image": "https://example.org/cat.png"}, r"holds no pictures(.|\n)*str"),
    "an empty list": ({"ip_adapter_image": [[]]}, "holds no pictures"),
    "an array that is none": ({"ip_adapter_image": np.zeros(3)}, "holds no pictures"),
    "a tensor of another size": ({"ip_adapter_image": torch.rand(1, 3, 64, 64)}, r"wrong shape(.|\n)*\(pictures, 3, 32, 32\)"),
    "both": ({**SHOWN, "ip_adapter_image_embeds": [torch.zeros(2, 1, FEATURES)]}, "cannot work together"),
    "embeddings of another width": (
        {"ip_adapter_image_embeds": [torch.zeros(2, 1, 7)]},
        rf"does not fit the IP-Adapter(.|\n)*{FEATURES}",
    ),
    "hidden states for plain": ({"ip_adapter_image_embeds": [torch.zeros(2, 1, 9, FEATURES)]}, "does not fit the IP-Adapter"),
    "one row": (
        {"ip_adapter_image_embeds": [torch.zeros(1, 1, FEATURES)]},
        r"must have two rows(.|\n)*prepare_ip_adapter_image_embeds",
    ),
    "NaN": ({"ip_adapter_image_embeds": [torch.full((2, 1, FEATURES), torch.nan)]}, "finite numbers"),
    "too many embeddings": ({"ip_adapter_image_embeds": [torch.zeros(2, 1, FEATURES)] * 2}, "2 given for 1 IP-Adapter"),
    "two scales": ({**SHOWN, "ip_adapter_scale": [1, 2]}, "one scale for each IP-Adapter"),
    "an unknown block": ({**SHOWN, "ip_adapter_scale": {"up": {"block_9": 1}}}, "there is no attention in up.block_9"),
    "scales without masks": ({**SHOWN, "ip_adapter_scale": [[1, 2]]}, "needs a mask for each"),
    "masks for two": ({**SHOWN, "cross_attention_kwargs": {"ip_adapter_masks": [None, None]}}, "2 given for 1 IP-Adapters"),
    "a mask without dimensions": (
        {**SHOWN, "cross_attention_kwargs": {"ip_adapter_masks": [torch.ones(64, 64)]}},
        r"\(1, 1, height, width\)",
    ),
    "an unknown keyword": ({**SHOWN, "cross_attention_kwargs": {"ip_adapter_mask": 1}}, "cross_attention_kwargs"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_a_call_refuses(pipe, reason):
    options, message = REFUSED[reason]
    pipe.load_ip_adapter(weights(pipe))
    generator = torch.Generator().manual_seed(1)
    state = generator.get_state()
    with pytest.raises((InputError, AdapterError, UnknownArgumentError), match=message):
        call(pipe, "text", generator=generator, **options)
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("name", ["ip_adapter_image", "ip_adapter_image_embeds"])
def test_pictures_without_an_adapter_are_refused(pipe, name):
    value = {"ip_adapter_image": picture(), "ip_adapter_image_embeds": [torch.zeros(2, 1, FEATURES)], "ip_adapter_scale": 1.0}[
        name
    ]
    with pytest.raises(InputError, match=rf"{name} is given and no IP-Adapter is loaded(.|\n)*load_ip_adapter"):
        call(pipe, "text", **{name: value})


def test_a_pipeline_that_takes_no_pictures_says_so(pipe):
    pipe.load_ip_adapter(weights(pipe))
    torch.manual_seed(0)
    adapter = suffuse.T2IAdapter(channels=[32, 64], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter_xl")
    other = suffuse.StableDiffusionAdapterPipeline.from_pipe(pipe, adapter=adapter)
    with pytest.raises(InputError, match=r"no picture is given(.|\n)*(unload_ip_adapter|ip_adapter_image)"):
        other("a cat", image=picture(), **QUICK)


def test_without_image_encoder_embeddings_are_asked_for(bare):
    bare.load_ip_adapter(weights(bare), image_encoder_folder=None)
    with pytest.raises(InputError, match=r"no image encoder(.|\n)*ip_adapter_image_embeds"):
        call(bare, "text", **SHOWN)


def test_an_image_encoder_of_another_width_is_refused(pipe):
    tensors = weights(pipe)
    tensors["image_proj.proj.weight"] = torch.randn(4 * tiny.WIDTH, 40)
    pipe.load_ip_adapter(tensors)
    with pytest.raises(InputError, match=r"does not fit the IP-Adapter(.|\n)*40(.|\n)*image encoder"):
        call(pipe, "text", **SHOWN)


def test_scales_without_an_adapter_are_refused(pipe):
    with pytest.raises(AdapterError, match="no IP-Adapter is loaded"):
        pipe.set_ip_adapter_scale(1.0)


@pytest.mark.parametrize("scale", [float("nan"), "much", [1.0, 2.0], {"side": 1.0}, {"up": {"block_0": [1.0] * 9}}])
def test_scales_that_are_none_are_refused(pipe, scale):
    pipe.load_ip_adapter(weights(pipe))
    with pytest.raises(AdapterError):
        pipe.set_ip_adapter_scale(scale)
    assert image_adapters_of(pipe.unet).scales == [1.0]


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"ip_adapter_scale": [1.0, 2.0]}, "one scale for each IP-Adapter"),
        ({"ip_adapter_scale": "much"}, "is no number"),
        ({"ip_adapter_scale": [[0.2, 0.4]]}, "a scale for each picture of an adapter needs a mask for each"),
        ({"ip_adapter_image": [picture(), picture()]}, "ip_adapter_image: 2 given for 1 IP-Adapter"),
        ({"ip_adapter_image": None, "ip_adapter_image_embeds": [torch.zeros(2, 1, 40)]}, "does not fit the IP-Adapter"),
        ({"ip_adapter_image": None, "ip_adapter_image_embeds": [torch.full((2, 1, FEATURES), torch.nan)]}, "finite numbers"),
        ({"cross_attention_kwargs": {"ip_adapter_masks": [torch.ones(1, 2, 8, 8)]}}, "one of ip_adapter_masks does not fit"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused_before_prompts_are_read(pipe, monkeypatch, told, message):
    pipe.load_ip_adapter(weights(pipe))
    monkeypatch.setattr(type(pipe), "encode_prompt", lambda *_, **__: pytest.fail("a prompt was read"))
    with pytest.raises((InputError, AdapterError), match=message):
        call(pipe, "text", **{**SHOWN, **told})


@pytest.mark.parametrize("source", [None, 3, [None], [{}, None]], ids=str)
def test_what_is_no_source_is_refused(pipe, source):
    with pytest.raises(InputError, match=r"nothing to load an IP-Adapter from(.|\n)*expected: a file, a folder"):
        pipe.load_ip_adapter(source)


def test_whole_numbers_are_no_weights(pipe):
    tensors = weights(pipe)
    tensors["image_proj.proj.weight"] = tensors["image_proj.proj.weight"].to(torch.int8)
    with pytest.raises(WeightsMismatchError, match=r"image_proj.proj.weight is no weight(.|\n)*int8(.|\n)*floating point"):
        pipe.load_ip_adapter(tensors)
    assert image_adapters_of(pipe.unet) is None


# ---------------------------------------------------------------- files that are refused


def without(tensors, part):
    return {name: tensor for name, tensor in tensors.items() if part not in name}


BAD = {
    "for XL": (
        lambda w: ip_adapter(tiny.unet(**tiny.xl_options())),
        AdapterError,
        r"0 of 4 layers(.|\n)*tokens of width 64(.|\n)*width 32",
    ),
    "a layer less": (lambda w: without(w, "ip_adapter.3."), AdapterError, "3 of 4 layers"),
    "half a layer": (lambda w: without(w, "ip_adapter.3.to_v"), AdapterError, "3 of 4 layers"),
    "a layer more": (
        lambda w: w | {f"ip_adapter.9.to_{p}_ip.weight": torch.ones(64, 32) for p in "kv"},
        AdapterError,
        "4 of 4 layers",
    ),
    "no projection": (lambda w: without(w, "image_proj"), AdapterError, "is no IP-Adapter"),
    "half a projection": (lambda w: without(w, "image_proj.norm.bias"), AdapterError, r"plain IP-Adapter: 3 keys"),
    "no layers": (lambda w: without(w, "ip_adapter"), AdapterError, "0 layers of ip_adapter"),
    "other keys": (lambda w: w | {"something": torch.ones(1)}, AdapterError, "not understood: something"),
    "a LoRA": (lambda w: low_rank(pair("text")[1]), AdapterError, "is no IP-Adapter"),
    "face ID plus": (
        lambda w: w | {"image_proj.perceiver_resampler.proj_in.weight": torch.ones(1, 1)},
        AdapterError,
        "is no IP-Adapter",
    ),
    "nothing": (lambda w: {}, AdapterError, "is no IP-Adapter"),
    "NaN": (lambda w: w | {"image_proj.norm.bias": torch.full((32,), torch.nan)}, NonFiniteError, "image_proj.norm.bias"),
    "odd shapes": (lambda w: w | {"image_proj.norm.weight": torch.ones(())}, AdapterError, "is no IP-Adapter"),
    "no tensors": (lambda w: w | {"image_proj.norm.bias": 3}, InputError, "something else than named tensors"),
    "low rank for another": (
        lambda w: (
            w | {"ip_adapter.0.to_q_lora.down.weight": torch.ones(2, 7), "ip_adapter.0.to_q_lora.up.weight": torch.ones(64, 2)}
        ),
        AdapterError,
        "0 of 1 layers",
    ),
    "low rank beyond": (lambda w: w | {"ip_adapter.99.to_q_lora.down.weight": torch.ones(2, 64)}, AdapterError, "does not fit"),
}


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("reason", BAD)
def test_what_does_not_fit_is_refused_and_changes_nothing(pipe, reason, loaded):
    make, error, message = BAD[reason]
    if loaded:
        pipe.load_ip_adapter(weights(pipe, seed=5))
    before, adapters = state_of(pipe), image_adapters_of(pipe.unet)
    with pytest.raises(error, match=message):
        pipe.load_ip_adapter(make(weights(pipe)))
    assert unchanged(before, state_of(pipe))
    assert image_adapters_of(pipe.unet) is adapters


def test_damaged_files_are_refused(pipe, tmp_path):
    whole = tmp_path / "whole.safetensors"
    safetensors.torch.save_file(weights(pipe), whole)
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-100])
    (tmp_path / "text.bin").write_text("hello")
    torch.save([1, 2], tmp_path / "list.bin")
    torch.save(nested(weights(pipe)) | {"more": print}, tmp_path / "code.bin")
    before = state_of(pipe)
    reasons = {
        "cut.safetensors": CorruptFileError,
        "text.bin": CorruptFileError,
        "list.bin": CorruptFileError,
        "code.bin": UnsafePickleError,
    }
    for name, error in reasons.items():
        with pytest.raises(error), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipe.load_ip_adapter(tmp_path, weight_name=name)
    with pytest.raises(MissingFileError, match=r"nowhere.bin(.|\n)*whole.safetensors"):
        pipe.load_ip_adapter(tmp_path, weight_name="nowhere.bin")
    with pytest.raises(AdapterError, match=r"lists of different lengths(.|\n)*3 of weight_name"):
        pipe.load_ip_adapter([tmp_path, tmp_path], weight_name=["a", "b", "c"])
    with pytest.raises(UnknownArgumentError, match="weight_nam"):
        pipe.load_ip_adapter(tmp_path, weight_nam="whole.safetensors")
    assert unchanged(before, state_of(pipe))


def test_an_image_encoder_that_is_missed_is_told(bare, tmp_path):
    safetensors.torch.save_file(weights(bare), tmp_path / "adapter.safetensors")
    before = state_of(bare)
    with pytest.raises(MissingFileError, match="image_encoder"):
        bare.load_ip_adapter(tmp_path)
    with pytest.raises(AdapterError, match=r"no image encoder(.|\n)*image_encoder_folder=None"):
        bare.load_ip_adapter(weights(bare))
    assert unchanged(before, state_of(bare))
    assert image_adapters_of(bare.unet) is None


def test_the_image_encoder_may_be_elsewhere(bare, tmp_path):
    (tmp_path / "models").mkdir()
    safetensors.torch.save_file(weights(bare), tmp_path / "models" / "adapter.safetensors")
    image_encoder().save_pretrained(tmp_path / "others" / "vision")
    bare.load_ip_adapter(tmp_path, "models", "adapter.safetensors", image_encoder_folder="others/vision")
    assert bare.image_encoder.config.projection_dim == FEATURES
    assert bare.feature_extractor.crop_size["height"] == 32


def test_a_pipeline_with_an_image_encoder_goes_through_a_folder(pipe, tmp_path):
    pipe.load_ip_adapter(weights(pipe))
    expected = call(pipe, "text", **SHOWN)
    pipe.save_pretrained(tmp_path)
    for library in (suffuse, diffusers):
        other = library.StableDiffusionPipeline.from_pretrained(tmp_path)
        assert other.image_encoder.config.projection_dim == FEATURES
    other = suffuse.StableDiffusionPipeline.from_pretrained(tmp_path)
    other.set_progress_bar_config(disable=True)
    other.load_ip_adapter(weights(pipe))
    assert difference(call(other, "text", **SHOWN), expected) == 0


def test_pictures_are_seen_upright_and_in_eight_bits(pipe):
    plain = picture(48, 64, seed=9)
    turned = plain.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    file = io.BytesIO()
    turned.save(file, "PNG", exif=exif)
    shown = [plain, Image.open(file), np.asarray(plain), np.asarray(plain) / 255.0]
    seen = [pipe._pixels(each) for each in shown]
    assert all(torch.equal(seen[0], each) for each in seen[1:])
