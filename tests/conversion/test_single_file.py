"""Single files: recognised, loaded, written; against the conversion of the peer, which knows their names too."""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import tiny
import torch
from diffusers.loaders import single_file_utils as peer
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from typer.testing import CliRunner

import suffuse
from suffuse.cli.main import app
from suffuse.conversion.architecture import recognise
from suffuse.conversion.single_file import open_single_file
from suffuse.conversion.single_file_writer import single_file_tensors
from suffuse.conversion.vocabulary import clip_tokenizer
from suffuse.errors import (
    ConfigError,
    CorruptFileError,
    InputError,
    MissingFileError,
    NonFiniteError,
    SaveError,
    UnknownArgumentError,
    UnsafePickleError,
    WeightsMismatchError,
)
from suffuse.public_names import PUBLIC

REAL = {
    "1": {"cross_attention_dim": 768},
    "2": {"cross_attention_dim": 1024, "use_linear_projection": True, "attention_head_dim": [5, 10, 20, 20]},
    "XL": {
        "cross_attention_dim": 2048, "use_linear_projection": True, "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    },
    "XL refiner": {
        "cross_attention_dim": 1280, "use_linear_projection": True, "attention_head_dim": [6, 12, 24, 24],
        "block_out_channels": [384, 768, 1536, 1536],
        "transformer_layers_per_block": [1, 4, 4, 4],  # 4 in the first too, which has no attention
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2560,
    },
}  # fmt: skip
"""The UNets as they were published."""


def unet(family: str, channels: int = 4) -> suffuse.UNet2DConditionModel:
    """A small UNet of the family's structure."""
    torch.manual_seed(0)
    wide = {"1": 64, "2": 1024, "XL": 192}[family]
    options: dict[str, Any] = {"block_out_channels": (32, 64), "attention_head_dim": 8}
    if family != "1":
        options = {"block_out_channels": (64, 128), "attention_head_dim": [1, 2], "use_linear_projection": True}
    if family == "XL":
        options |= {key: value for key, value in REAL["XL"].items() if key.startswith("addition")}
        options |= {"projection_class_embeddings_input_dim": 128 + 6 * 256, "transformer_layers_per_block": [1, 2]}
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    return suffuse.UNet2DConditionModel(
        cross_attention_dim=wide, in_channels=channels, layers_per_block=1, sample_size=16, **options, **blocks
    ).eval()


def text_encoder(hidden: int, act: str, projected: bool = False, vocabulary: int = 49408) -> Any:
    torch.manual_seed(1)
    config = CLIPTextConfig(
        hidden_size=hidden, intermediate_size=96, num_hidden_layers=2, num_attention_heads=hidden // 64, vocab_size=vocabulary,
        projection_dim=hidden, hidden_act=act, bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=1,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


@cache
def components(family: str, channels: int = 4) -> dict[str, Any]:
    parts = {"unet": unet(family, channels), "vae": suffuse.AutoencoderKL.from_config(tiny.vae().config)}
    if family == "XL":
        encoders = {"text_encoder": text_encoder(64, "quick_gelu"), "text_encoder_2": text_encoder(128, "gelu", projected=True)}
        return {**parts, **encoders}
    second = family == "2"
    return {
        **parts,
        "text_encoder": text_encoder(
            1024 if second else 64, "gelu" if second else "quick_gelu", vocabulary=86 if second else 49408
        ),
    }


@cache
def file(family: str, channels: int = 4) -> Path:
    """A single file of the family, with what training leaves in it."""
    path = Path(mkdtemp(prefix="suffuse-"), "model.safetensors")
    extras = {"alphas_cumprod": torch.ones(3), "model_ema.decay": torch.ones(())}
    tensors = single_file_tensors(components(family, channels)) | extras
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def same(one: Any, other: Any) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


# ---------------------------------------------------------------- names, against the peer


@pytest.mark.parametrize("family", REAL)
def test_the_names_of_published_unets_are_those_the_peer_reads(family):
    with torch.device("meta"):
        model = suffuse.UNet2DConditionModel(**REAL[family])
    written = single_file_tensors({"unet": model})
    assert len(written) == len(model.state_dict())
    read = peer.convert_ldm_unet_checkpoint(dict(written), dict(model.config))
    assert {name: tensor.shape for name, tensor in read.items()} == {n: t.shape for n, t in model.state_dict().items()}


@pytest.mark.parametrize("family", REAL)
def test_the_configurations_of_published_unets_are_told_from_shapes(family):
    with torch.device("meta"):
        model = suffuse.UNet2DConditionModel(**REAL[family])
    written = single_file_tensors({"unet": model})
    if family.startswith("XL"):
        prefix = "conditioner.embedders.0."
        written[prefix + ("model.positional_embedding" if family == "XL refiner" else "transformer.text_model.x")] = torch.zeros(
            1
        )
    config = recognise(written, prediction_type="epsilon").parts["unet"].config
    told = suffuse.UNet2DConditionModel.parameters_of_init()
    default = {name: told[name].default for name in told}
    wanted = {name: value for name, value in model.config.items() if name in told and name != "sample_size"}
    plain = {name: value for name, value in (default | config).items() if name in wanted}
    assert json.loads(json.dumps(plain)) == json.loads(json.dumps(_listed(wanted, plain)))


def _listed(wanted: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """One number for all levels is the same as a list of it."""
    return {
        name: [value] * len(plain[name]) if isinstance(plain[name], list) and isinstance(value, int) else value
        for name, value in wanted.items()
    }


def test_the_names_of_published_autoencoders_are_those_the_peer_reads():
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        model = suffuse.AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, **blocks)
    read = peer.convert_ldm_vae_checkpoint(dict(single_file_tensors({"vae": model})), dict(model.config))
    assert {name: tensor.shape for name, tensor in read.items()} == {n: t.shape for n, t in model.state_dict().items()}


@pytest.mark.parametrize("family", ["1", "2", "XL"])
def test_the_peer_reads_what_we_write(family):
    parts, written = components(family), load_file(file(family))
    read = peer.convert_ldm_unet_checkpoint(dict(written), dict(parts["unet"].config))
    assert all(torch.equal(tensor, read[name]) for name, tensor in parts["unet"].state_dict().items())
    read = peer.convert_ldm_vae_checkpoint(dict(written), dict(parts["vae"].config))
    assert all(torch.equal(tensor, read[name]) for name, tensor in parts["vae"].state_dict().items())
    for name, model in parts.items():
        if not name.startswith("text"):
            continue
        if model.config.hidden_act == "quick_gelu":
            prefix = "conditioner.embedders.0.transformer." if family == "XL" else "cond_stage_model.transformer."
            read = peer.convert_ldm_clip_checkpoint(dict(written), remove_prefix=prefix)
        else:
            prefix = "conditioner.embedders.1.model." if family == "XL" else "cond_stage_model.model."
            read = peer.convert_open_clip_checkpoint(model, dict(written), prefix=prefix)
        plain = {key.removeprefix("text_model."): tensor for key, tensor in read.items()}
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, plain[key.removeprefix("text_model.")]), key


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize(("family", "channels"), [("1", 4), ("1", 9), ("2", 4)])
def test_a_pipeline_comes_out_of_one_file_without_a_network(family, channels):
    parts = components(family, channels)
    options: dict[str, Any] = {}
    if family == "2":
        options = {"tokenizer": tiny.tokenizer(Path(mkdtemp())), "prediction_type": "epsilon"}
    pipe = suffuse.DiffusionPipeline.from_single_file(file(family, channels), **options)
    assert type(pipe).__name__ == ("StableDiffusionInpaintPipeline" if channels == 9 else "StableDiffusionPipeline")
    assert all(same(getattr(pipe, name), part) for name, part in parts.items())
    assert type(pipe.scheduler) is suffuse.DDIMScheduler
    assert pipe.config.requires_safety_checker is False
    if channels == 4:
        pipe.set_progress_bar_config(disable=True)
        whole = type(pipe)(**{**pipe.components, **parts}, requires_safety_checker=False)
        whole.set_progress_bar_config(disable=True)
        pictures = [
            p(
                "a cat", height=32, width=32, num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)
            ).images
            for p in (pipe, whole)
        ]
        assert (pictures[0] == pictures[1]).all()


def test_another_task_and_other_components_may_be_asked_for():
    pipe = suffuse.StableDiffusionImg2ImgPipeline.from_single_file(file("1"), scheduler_type="euler", vae=components("1")["vae"])
    assert type(pipe.scheduler) is suffuse.EulerDiscreteScheduler
    assert pipe.vae is components("1")["vae"]
    assert pipe.scheduler.config.prediction_type == "epsilon"
    half = suffuse.StableDiffusionPipeline.from_single_file(file("1"), torch_dtype=torch.bfloat16)
    assert {module.dtype for module in (half.unet, half.vae, half.text_encoder)} == {torch.bfloat16}


def test_sdxl_has_its_components():
    opened = open_single_file(file("XL"))
    assert opened.architecture.name == "Stable Diffusion XL"
    assert set(opened.architecture.parts) == {"unet", "vae", "text_encoder", "text_encoder_2"}
    assert opened.architecture.tokenizers == {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}
    assert opened.architecture.parts["vae"].config["scaling_factor"] == 0.13025
    if "StableDiffusionXLPipeline" not in PUBLIC:
        return
    pipe = suffuse.DiffusionPipeline.from_single_file(file("XL"))
    assert type(pipe).__name__ == "StableDiffusionXLPipeline"
    assert all(same(getattr(pipe, name), part) for name, part in components("XL").items())


def test_an_autoencoder_comes_out_of_either_kind_of_file(tmp_path):
    vae = components("1")["vae"]
    assert same(suffuse.AutoencoderKL.from_single_file(file("1")), vae)
    alone = {
        name.removeprefix("first_stage_model."): tensor
        for name, tensor in load_file(file("1")).items()
        if name.startswith("first")
    }
    save_file(alone, tmp_path / "vae.safetensors")
    loaded = suffuse.AutoencoderKL.from_single_file(tmp_path / "vae.safetensors", scaling_factor=0.5, torch_dtype="bfloat16")
    assert loaded.config.scaling_factor == 0.5
    assert loaded.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:.*is a pickle")
def test_a_pickle_of_training_is_read_as_tensors_only(tmp_path):
    state = load_file(file("1"))
    torch.save({"state_dict": state, "global_step": 3, "callbacks": {"a": 1.0}}, tmp_path / "model.ckpt")
    pipe = suffuse.StableDiffusionPipeline.from_single_file(tmp_path / "model.ckpt")
    assert all(same(getattr(pipe, name), part) for name, part in components("1").items())

    class Callback:
        pass

    globals()["Callback"] = Callback
    Callback.__qualname__ = "Callback"
    torch.save({"state_dict": state, "callbacks": Callback()}, tmp_path / "model.ckpt")
    with pytest.raises(UnsafePickleError, match=r"asks for more than tensors(.|\n)*Callback"):
        suffuse.StableDiffusionPipeline.from_single_file(tmp_path / "model.ckpt")


def test_running_averages_are_taken_on_request(tmp_path):
    state = load_file(file("1"))
    names = [name for name in state if name.startswith("model.diffusion_model.")]
    averages = {"model_ema." + name.removeprefix("model.").replace(".", ""): state[name] + 1 for name in names}
    save_file({**state, **averages}, tmp_path / "model.safetensors")
    plain = suffuse.StableDiffusionPipeline.from_single_file(tmp_path / "model.safetensors")
    averaged = suffuse.StableDiffusionPipeline.from_single_file(tmp_path / "model.safetensors", extract_ema=True)
    assert same(plain.unet, components("1")["unet"])
    assert torch.equal(averaged.unet.conv_in.weight, plain.unet.conv_in.weight + 1)
    with pytest.raises(InputError, match="holds no running averages"):
        suffuse.StableDiffusionPipeline.from_single_file(file("1"), extract_ema=True)


def test_a_controlnet_comes_out_of_a_file_of_its_own(tmp_path):
    controlnet = suffuse.ControlNetModel.from_unet(components("1")["unet"])
    for parameter in controlnet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    written = single_file_tensors({"controlnet": controlnet})
    read = peer.convert_controlnet_checkpoint(dict(written), dict(controlnet.config))
    assert all(torch.equal(tensor, read[name]) for name, tensor in controlnet.state_dict().items())
    for prefix in ("control_model.", ""):
        named = {name.replace("control_model.", prefix): tensor.contiguous() for name, tensor in written.items()}
        save_file(named, tmp_path / "control.safetensors")
        assert same(suffuse.ControlNetModel.from_single_file(tmp_path / "control.safetensors"), controlnet)


def test_the_original_configuration_has_the_last_word(tmp_path):
    told = {"model": {"params": {"parameterization": "v", "unet_config": {"params": {"num_heads": 4}}}}}
    pipe = suffuse.StableDiffusionPipeline.from_single_file(file("1"), original_config_file=told)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.unet.config.attention_head_dim == 4
    (tmp_path / "v1.yaml").write_text("model: {params: {unet_config: {params: {num_heads: 2}}}}")
    pipe = suffuse.StableDiffusionPipeline.from_single_file(file("1"), original_config_file=tmp_path / "v1.yaml")
    assert pipe.unet.config.attention_head_dim == 2
    (tmp_path / "v1.yaml").write_text("model: [")
    with pytest.raises(ConfigError, match="is no YAML"):
        suffuse.StableDiffusionPipeline.from_single_file(file("1"), original_config_file=tmp_path / "v1.yaml")
    with pytest.raises(InputError, match="does not describe a model"):
        suffuse.StableDiffusionPipeline.from_single_file(file("1"), original_config_file={"a": 1})


def test_what_the_file_does_not_tell_is_said():
    with pytest.warns(UserWarning, match=r"nothing in the file tells Stable Diffusion 2(.|\n)*prediction_type"):
        architecture = open_single_file(file("2")).architecture
    assert architecture.scheduler["prediction_type"] == "v_prediction"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            open_single_file(file("2"), prediction_type="v_prediction").architecture.scheduler["prediction_type"]
            == "v_prediction"
        )


# ---------------------------------------------------------------- what is wrong


def changed(tmp_path: Path, change: Any) -> Path:
    state = load_file(file("1"))
    change(state)
    save_file(state, tmp_path / "changed.safetensors")
    return tmp_path / "changed.safetensors"


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "a missing tensor": (
        lambda s: s.pop("model.diffusion_model.time_embed.0.bias"),
        WeightsMismatchError,
        "time_embedding.linear_1.bias",
    ),
    "no autoencoder": (lambda s: [s.pop(n) for n in list(s) if n.startswith("first")], ConfigError, r"holds no vae(.|\n)*vae=…"),
    "NaN": (lambda s: s["first_stage_model.quant_conv.bias"].fill_(float("nan")), NonFiniteError, "quant_conv.bias"),
    "a LoRA": (lambda s: (s.clear(), s.update({"lora_unet_x.lora_up.weight": torch.zeros(1)})), ConfigError, "is a LoRA"),
    "names of diffusers": (
        lambda s: (s.clear(), s.update(components("1")["unet"].state_dict())),
        ConfigError,
        "by the names of diffusers",
    ),
    "something else": (lambda s: (s.clear(), s.update({"weight": torch.zeros(1)})), ConfigError, "no architecture that is known"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_not_whole_is_told(name, tmp_path):
    change, error, says = BAD[name]
    with pytest.raises(error, match=says):
        suffuse.StableDiffusionPipeline.from_single_file(changed(tmp_path, change))


def test_strangers_are_told_once_or_refused(tmp_path):
    path = changed(tmp_path, lambda state: state.update({"extra.weight": torch.zeros(1)}))
    with pytest.warns(UserWarning, match=r"1 tensors belong to nothing that is known: extra\.weight"):
        suffuse.StableDiffusionPipeline.from_single_file(path)
    with pytest.raises(ConfigError, match=r"1 tensors belong to nothing"):
        suffuse.StableDiffusionPipeline.from_single_file(path, strict=True)


def test_arguments_are_checked(tmp_path):
    load = suffuse.StableDiffusionPipeline.from_single_file
    (tmp_path / "cut.safetensors").write_bytes(file("1").read_bytes()[:1000])
    for arguments, error, says in (
        ((tmp_path / "nothing.safetensors",), MissingFileError, "no file"),
        ((tmp_path,), InputError, "no suffix of a single file"),
        ((tmp_path / "cut.safetensors",), CorruptFileError, "is cut"),
    ):
        with pytest.raises(error, match=says):
            load(*arguments)
    for options, error, says in (
        ({"scheduler_type": "fast"}, InputError, "euler-ancestral"),
        ({"prediction_type": "noise"}, InputError, "v_prediction"),
        ({"load_safety_checker": True}, InputError, "pass safety_checker=…"),
        ({"unett": None}, UnknownArgumentError, "did you mean 'unet'"),
    ):
        with pytest.raises(error, match=says):
            load(file("1"), **options)
    with pytest.raises(UnknownArgumentError, match="did you mean 'scaling_factor'"):
        suffuse.AutoencoderKL.from_single_file(file("1"), scaling_facto=1.0)
    with pytest.raises(ConfigError, match="holds no vae"):
        only = tmp_path / "unet.safetensors"
        save_file({n: t for n, t in load_file(file("1")).items() if n.startswith("model.diff")}, only)
        suffuse.AutoencoderKL.from_single_file(only)


def test_the_vocabulary_is_that_of_clip():
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("A  Photo OF a Cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer.decode(tokenizer("naïve café, 7 €").input_ids, skip_special_tokens=True) == "naïve café , 7 €"
    assert (clip_tokenizer("!").pad_token_id, tokenizer.pad_token_id) == (0, 49407)


# ---------------------------------------------------------------- and back


def test_a_folder_becomes_a_single_file_and_a_folder_again(tmp_path):
    run = CliRunner().invoke
    for arguments in (
        [file("1"), tmp_path / "folder"],
        [tmp_path / "folder", tmp_path / "again.safetensors"],
        [tmp_path / "again.safetensors", tmp_path / "half", "--dtype", "bfloat16"],
    ):
        done = run(app, ["convert", *map(str, arguments)])
        assert done.exit_code == 0, done.output
    first, again = load_file(file("1")), load_file(tmp_path / "again.safetensors")
    assert again.keys() == first.keys() - {"alphas_cumprod", "model_ema.decay"}
    assert all(torch.equal(tensor, first[name]) for name, tensor in again.items())
    pipe = suffuse.DiffusionPipeline.from_pretrained(tmp_path / "folder", verify=True)
    assert all(same(getattr(pipe, name), part) for name, part in components("1").items())
    assert pipe.tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    half = suffuse.DiffusionPipeline.from_pretrained(tmp_path / "half", torch_dtype="auto")
    assert half.unet.dtype == torch.bfloat16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.safetensors", "folder", "half"]


def test_converting_replaces_nothing_unasked(tmp_path):
    run = CliRunner().invoke
    (tmp_path / "there").mkdir()
    for arguments, says in (
        ([file("1"), tmp_path / "there"], "is there already"),
        ([tmp_path / "nothing", tmp_path / "x"], "no file or folder"),
        ([tmp_path / "there", tmp_path / "x"], "becomes a .safetensors file"),
    ):
        done = run(app, ["convert", *map(str, arguments)])
        assert done.exit_code == 1
        assert says in done.output
    pipe = suffuse.StableDiffusionPipeline.from_single_file(file("1"))
    with pytest.raises(InputError, match=r"ends in \.safetensors"):
        pipe.save_single_file(tmp_path / "model.ckpt")
    with pytest.raises(SaveError, match="nothing was replaced"):
        pipe.save_single_file(file("1") / "inside.safetensors")


DAMAGE = {
    "no output": lambda s: s.pop("model.diffusion_model.out.2.weight"),
    "no attention": lambda s: [s.pop(n) for n in list(s) if "attn2" in n],
    "no tokens": lambda s: s.pop("cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"),
    "a block without a number": lambda s: s.update({"model.diffusion_model.input_blocks.x.0.weight": torch.zeros(1)}),
    "a hint alone": lambda s: s.update({"control_model.input_hint_block.0.weight": torch.zeros(1)}),
    "a level without a number": lambda s: s.update({"first_stage_model.encoder.down.x": torch.zeros(1)}),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_file_of_no_whole_model_is_told(name, tmp_path):
    with pytest.raises(ConfigError, match="not those of a whole model"):
        suffuse.DiffusionPipeline.from_single_file(changed(tmp_path, DAMAGE[name]))


def test_a_file_of_another_family_is_told():
    with pytest.raises(ConfigError, match="is no checkpoint for StableDiffusionXLPipeline"):
        suffuse.StableDiffusionXLPipeline.from_single_file(file("1"))
    with pytest.raises(ConfigError, match="needs unet"):
        suffuse.DiffusionPipeline.from_single_file(file("1"), unet=None)
    for options in ({"image_size": 0}, {"image_size": "512"}, {"upcast_attention": "x"}, {"original_config_file": 5}):
        with pytest.raises(InputError, match=next(iter(options))):
            suffuse.StableDiffusionPipeline.from_single_file(file("1"), **options)
    for path in (5, None):
        with pytest.raises(InputError, match="needs a path"):
            suffuse.StableDiffusionPipeline.from_single_file(path)


def test_a_single_file_keeps_its_place_and_its_mode(tmp_path):
    pipe = suffuse.StableDiffusionPipeline.from_single_file(file("1"))
    pipe.save_single_file(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").chmod(0o600)
    (tmp_path / "link.safetensors").symlink_to("a.safetensors")
    (tmp_path / ".a.safetensors.staged-0123").write_text("left by a killed save")
    pipe.save_single_file(tmp_path / "link.safetensors")
    assert (tmp_path / "link.safetensors").is_symlink()
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "link.safetensors"]
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(SaveError, match="is a folder"):
        pipe.save_single_file(tmp_path / "folder.safetensors")
