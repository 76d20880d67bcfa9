"""BLIP-Diffusion: models against their equations, pipelines against the peer's.

With transformers 5 the peer's Q-Former does not run and its text encoder sees what stands after a word. So both are held against
NumPy here, and then given to the peer's pipelines, which run with them.
"""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from diffusers.pipelines.controlnet.pipeline_controlnet_blip_diffusion import BlipDiffusionControlNetPipeline as PeerControlled
from diffusers.pipelines.deprecated.blip_diffusion.blip_image_processing import BlipImageProcessor as PeerProcessor
from diffusers.pipelines.deprecated.blip_diffusion.pipeline_blip_diffusion import BlipDiffusionPipeline as PeerPipeline
from tasks import align, difference, picture
from transformers import Blip2Config, CLIPTextConfig, CLIPTextModel

import suffuse
from suffuse.errors import ConfigError, InputError, MissingFileError
from suffuse.noise import CounterNoise
from suffuse.pipelines.blip_diffusion.image_processor import BlipImageProcessor
from suffuse.pipelines.blip_diffusion.qformer import Blip2QFormerModel
from suffuse.pipelines.blip_diffusion.text_encoder import ContextCLIPTextModel

PEERS = {"BlipDiffusionPipeline": PeerPipeline, "BlipDiffusionControlNetPipeline": PeerControlled}
QUERIES = 4


@pytest.fixture(autouse=True)
def quiet_peer():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="diffusers.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def spread(model: torch.nn.Module) -> Any:
    """No parameter is all zeros, or all ones."""
    for parameter in model.parameters():
        if parameter.std() == 0 or not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@cache
def text_encoder() -> ContextCLIPTextModel:
    torch.manual_seed(1)
    return spread(ContextCLIPTextModel(CLIPTextConfig.from_dict(tiny.text_encoder().config.to_dict())))


@cache
def qformer() -> Blip2QFormerModel:
    folder = mkdtemp(prefix="suffuse-")
    tiny.bert_tokenizer(Path(folder)).save_pretrained(folder)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
    inner = {"vocab_size": 150, "hidden_size": tiny.WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    inner |= {"intermediate_size": 37, "encoder_hidden_size": 16, "cross_attention_frequency": 2}
    torch.manual_seed(2)
    config = Blip2Config(
        vision_config=vision | {"patch_size": 8, "hidden_act": "quick_gelu"},
        qformer_config=inner,
        num_query_tokens=QUERIES,
        tokenizer=folder,
    )
    return spread(Blip2QFormerModel(config))


# ---------------------------------------------------------------- models


def arrays(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().double().numpy() for name, value in model.state_dict().items()}


def norm(x, w, name, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def gelu(x):
    from math import erf

    return x * 0.5 * (1 + np.vectorize(erf)(x / np.sqrt(2)))


def quick_gelu(x):
    return x / (1 + np.exp(-1.702 * x))


def attend(query, key, value, heads, bias=0.0):
    query, key, value = (x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3) for x in (query, key, value))
    scores = query @ key.transpose(0, 1, 3, 2) / np.sqrt(query.shape[-1]) + bias
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = weights / weights.sum(-1, keepdims=True) @ value
    return mixed.transpose(0, 2, 1, 3).reshape(query.shape[0], query.shape[2], -1)


def test_the_text_encoder_reads_the_context_among_the_words():
    model, config = text_encoder(), text_encoder().config
    ids, context = torch.randint(0, 80, (2, 9)), torch.randn(2, QUERIES, tiny.WIDTH)
    with torch.no_grad():
        got = model(input_ids=ids, ctx_embeddings=context, ctx_begin_pos=[2, 3])[0]
    w = arrays(model)
    words = w["text_model.embeddings.token_embedding.weight"][ids.numpy()]
    x = np.stack([np.concatenate([words[i, :b], context[i].numpy(), words[i, b:]]) for i, b in ((0, 2), (1, 3))])
    x = x + w["text_model.embeddings.position_embedding.weight"][: x.shape[1]]
    bias = np.triu(np.full((x.shape[1],) * 2, -1e30), 1)
    for layer in range(config.num_hidden_layers):
        name = f"text_model.encoder.layers.{layer}"
        y = norm(x, w, f"{name}.layer_norm1", config.layer_norm_eps)
        projections = (linear(y, w, f"{name}.self_attn.{part}_proj") for part in "qkv")
        x = x + linear(attend(*projections, config.num_attention_heads, bias), w, f"{name}.self_attn.out_proj")
        y = norm(x, w, f"{name}.layer_norm2", config.layer_norm_eps)
        x = x + linear(quick_gelu(linear(y, w, f"{name}.mlp.fc1")), w, f"{name}.mlp.fc2")
    assert np.abs(norm(x, w, "text_model.final_layer_norm", 1e-5) - got.numpy()).max() < 1e-4


def test_the_text_encoder_without_context_is_clips():
    clip = CLIPTextModel(text_encoder().config).eval()
    known, own = clip.state_dict(), text_encoder().state_dict()
    clip.load_state_dict({name: own[name if name in own else f"text_model.{name}"] for name in known})
    ids = torch.randint(0, 80, (2, 77))
    with torch.no_grad():
        assert difference(text_encoder()(input_ids=ids)[0], clip(ids)[0]) < 1e-5
        assert not torch.equal(text_encoder()(input_ids=ids)[0][:, :5], text_encoder()(input_ids=ids.flip(1))[0][:, :5])


def test_the_queries_see_one_another_the_words_and_the_picture():
    model, config = qformer(), qformer().config.qformer_config
    pictures = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        got = model(["cat", "a dog"], pictures, return_dict=False)
        patches = model.visual_encoder(pictures).double().numpy()
    w = arrays(model)
    read = model.tokenizer(["cat", "a dog"], padding=True, return_tensors="np")
    words = w["embeddings.word_embeddings.weight"][read.input_ids]
    words = words + w["embeddings.position_embeddings.weight"][: words.shape[1]]
    x = np.concatenate([np.repeat(w["query_tokens"], 2, 0), words], 1)
    x = norm(x, w, "embeddings.LayerNorm", config.layer_norm_eps)
    bias = np.pad(1.0 - read.attention_mask, ((0, 0), (QUERIES, 0)))[:, None, None] * -10000.0

    def block(x, name, seen, bias=0.0):
        projections = (linear(s, w, f"{name}.attention.{p}") for p, s in (("query", x), ("key", seen), ("value", seen)))
        made = linear(attend(*projections, config.num_attention_heads, bias), w, f"{name}.output.dense")
        return norm(made + x, w, f"{name}.output.LayerNorm", config.layer_norm_eps)

    def feed(x, name, suffix):
        made = linear(gelu(linear(x, w, f"{name}.intermediate{suffix}.dense")), w, f"{name}.output{suffix}.dense")
        return norm(made + x, w, f"{name}.output{suffix}.LayerNorm", config.layer_norm_eps)

    for layer in range(config.num_hidden_layers):
        name = f"encoder.layer.{layer}"
        x = block(x, f"{name}.attention", x, bias)
        queries, rest = x[:, :QUERIES], x[:, QUERIES:]
        if layer % config.cross_attention_frequency == 0:
            queries = block(queries, f"{name}.crossattention", patches)
        x = np.concatenate([feed(queries, name, "_query"), feed(rest, name, "")], 1)
    queries = x[:, :QUERIES]
    y = linear(
        quick_gelu(linear(norm(queries, w, "proj_layer.LayerNorm", 1e-12), w, "proj_layer.dense1")), w, "proj_layer.dense2"
    )
    assert np.abs(y + queries - got.numpy()).max() < 1e-4


def test_names_in_files_are_the_peers():
    from diffusers.pipelines.deprecated.blip_diffusion import modeling_blip2, modeling_ctx_clip

    for own, cls in ((text_encoder(), modeling_ctx_clip.ContextCLIPTextModel), (qformer(), modeling_blip2.Blip2QFormerModel)):
        peer = cls(own.config)
        shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (own, peer)]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize("size", [(224, 224), (50, 70)], ids=str)
def test_pictures_become_what_the_peers_processor_makes(size):
    image, edges = picture(90, 61, seed=4), {"height": size[0], "width": size[1]}
    wanted = PeerProcessor(size=edges).preprocess(image, return_tensors="pt")["pixel_values"]
    assert difference(BlipImageProcessor(size=edges).pixels(image, "image"), wanted) == 0


@pytest.mark.parametrize("size", [(224, 224), (50, 70)], ids=str)
def test_pictures_of_every_kind_are_the_same(size):
    image, processor = picture(90, 61, seed=4), BlipImageProcessor(size={"height": size[0], "width": size[1]})
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    kinds = [array, array / 255, tensor, tensor / 255, tensor[None] / 127.5 - 1, np.stack([array]), [tensor / 255]]
    for kind in kinds:
        assert difference(processor.pixels(kind, "image"), processor.pixels(image, "image")) == 0
    both = processor.pixels([array, array[:40]], "image")
    assert difference(both[:1], processor.pixels(image, "image")) == 0


# ---------------------------------------------------------------- pipelines


@cache
def folder(name: str) -> Path:
    """A checkpoint that our pipeline wrote."""
    path = Path(mkdtemp(prefix="suffuse-"))
    unet, parts = tiny.unet(), {"controlnet": tiny.controlnet()} if "Control" in name else {}
    for part, value in {"vae": tiny.vae(), "unet": unet, "scheduler": tiny.scheduler(), **parts}.items():
        value.save_pretrained(path / part)
    own = {"vae": suffuse.AutoencoderKL, "unet": suffuse.UNet2DConditionModel, "scheduler": suffuse.DDIMScheduler}
    own |= {"controlnet": suffuse.ControlNetModel} if parts else {}
    loaded = {part: cls.from_pretrained(path / part) for part, cls in own.items()}
    loaded |= {"text_encoder": text_encoder(), "qformer": qformer(), "tokenizer": tiny.tokenizer(path / "words")}
    size = {"height": 32, "width": 32}
    pipe = getattr(suffuse, name)(**loaded, image_processor=BlipImageProcessor(size=size), mean=[0.4, 0.5, 0.6], std=[0.2] * 3)
    pipe.save_pretrained(path / "pipeline")
    return path / "pipeline"


@cache
def pair(name: str) -> tuple[Any, Any]:
    """(the peer's pipeline with our text encoder and Q-Former, ours as it is loaded)."""
    ours = getattr(suffuse, name).from_pretrained(folder(name))
    peers = {"vae": diffusers.AutoencoderKL, "unet": diffusers.UNet2DConditionModel, "scheduler": diffusers.DDIMScheduler}
    peers |= {"controlnet": diffusers.ControlNetModel} if "Control" in name else {}
    parts = {part: cls.from_pretrained(folder(name) / part) for part, cls in peers.items()}
    shared = {part: getattr(ours, part) for part in ("text_encoder", "qformer", "tokenizer")}
    processor = PeerProcessor.from_pretrained(folder(name) / "image_processor")
    peer = PEERS[name](**parts, **shared, image_processor=processor, mean=[0.4, 0.5, 0.6], std=[0.2] * 3)
    align(peer)
    return peer, ours


def call(pipe: Any, **options: Any) -> Any:
    settings: dict[str, Any] = {"prompt": ["swims"], "reference_image": picture(70, 50), "num_inference_steps": 3}
    settings |= {"source_subject_category": ["cat"], "target_subject_category": ["dog"], "height": 64, "width": 48}
    if "ControlNet" in type(pipe).__name__:
        settings["condtioning_image"] = picture(40, 30, seed=3)
    seeded = {"generator": torch.Generator().manual_seed(7), "output_type": "np", "return_dict": False}
    return pipe(**{**settings, **seeded, **options})[0]


TWO = {"prompt": ["swims", "flies!"], "source_subject_category": ["cat", "a dog"], "target_subject_category": ["dog", "cat"]}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no guidance": {"guidance_scale": 1.0},
    "negative prompt": {"neg_prompt": "blurry"},
    "said less often": {"prompt_strength": 0.5, "prompt_reps": 4},
    "two prompts": TWO | {"reference_image": [picture(seed=1), picture(seed=2)]},
    "texts": {"prompt": "swims", "source_subject_category": "cat", "target_subject_category": "dog"},
    "latents in": {"latents": torch.randn(1, 4, 32, 24, generator=torch.Generator().manual_seed(5))},
    "tensors out": {"output_type": "pt"},
    "pictures out": {"output_type": "pil"},
}


@pytest.mark.filterwarnings("ignore:prompt 0 has")
@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("option", OPTIONS)
def test_pictures_equal_the_peers(name, option):
    peer, ours = pair(name)
    assert difference(call(peer, **OPTIONS[option]), call(ours, **OPTIONS[option])) == 0


@pytest.mark.parametrize("name", PEERS)
def test_a_run_goes_on_and_each_picture_has_its_noise(name, tmp_path):
    _, ours = pair(name)
    two = TWO | {"reference_image": picture(seed=1)}
    made = call(ours, **two, generator=None, seed=3, save_run=tmp_path / "{step}.safetensors")
    for file in sorted(tmp_path.iterdir()):
        assert difference(ours(resume=file)[0], made) == 0, file.name
    second = {key: value[1:] for key, value in TWO.items()} | {"reference_image": picture(seed=1)}
    assert difference(made[1:], call(ours, **second, generator=CounterNoise(3, 1))) < 1e-4


def test_the_folder_names_what_the_peers_do():
    import json

    index = json.loads((folder("BlipDiffusionControlNetPipeline") / "model_index.json").read_text())
    assert index["qformer"] == ["blip_diffusion", "Blip2QFormerModel"]
    assert index["text_encoder"] == ["blip_diffusion", "ContextCLIPTextModel"]
    assert index["image_processor"] == ["blip_diffusion", "BlipImageProcessor"]
    assert (index["mean"], index["ctx_begin_pos"]) == ([0.4, 0.5, 0.6], 2)
    assert isinstance(suffuse.DiffusionPipeline.from_pretrained(folder("BlipDiffusionPipeline")), suffuse.BlipDiffusionPipeline)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"prompt": []}, "prompt is an empty list"),
    "subjects of other prompts": ({"source_subject_category": ["cat", "dog"]}, "source_subject_category is missing, or not one"),
    "no target": ({"target_subject_category": None}, "target_subject_category is missing, or not one"),
    "no picture": ({"reference_image": None}, "reference_image"),
    "a tensor of other numbers": ({"reference_image": 3 * torch.rand(3, 32, 32)}, "reference_image is out of range"),
    "pictures of other prompts": ({"reference_image": [picture()] * 3}, "3 pictures for 1 subjects"),
    "never said": ({"prompt_reps": 0}, "prompt_reps=0 is out of range"),
    "a list of negatives": ({"neg_prompt": ["a"]}, "neg_prompt has the wrong type"),
    "a size between latents": ({"height": 50}, "height=50 is not divisible by 8"),
    "no control picture": ({"condtioning_image": None}, "condtioning_image"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case):
    options, message = BAD[case]
    generator = torch.Generator().manual_seed(7)
    before = generator.get_state()
    with pytest.raises(InputError, match=message):
        call(pair("BlipDiffusionControlNetPipeline")[1], generator=generator, **options)
    assert torch.equal(generator.get_state(), before)


def test_a_tokenizer_that_is_not_here():
    config = Blip2Config.from_dict(qformer().config.to_dict() | {"tokenizer": None})
    model = Blip2QFormerModel(config)
    with pytest.raises(MissingFileError, match=r"bert-base-uncased, which is not here(.|\n)*pipe\.qformer\.tokenizer = "):
        model(["cat"], torch.zeros(1, 3, 32, 32))
    model.tokenizer = qformer().tokenizer
    assert model(["cat"], torch.zeros(1, 3, 32, 32), return_dict=False).shape == (1, QUERIES, tiny.WIDTH)


def test_a_controlnet_of_another_unet_is_refused():
    _, ours = pair("BlipDiffusionControlNetPipeline")
    other = suffuse.ControlNetModel.from_config(ours.controlnet.config, block_out_channels=(32, 32))
    with pytest.raises(ConfigError, match="a ControlNet that was trained for this UNet"):
        type(ours)(**ours.components | {"controlnet": other})
