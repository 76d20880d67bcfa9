"""Pipelines and folders: load what the peer wrote, write what the peer loads, share components, move and print them."""

from __future__ import annotations

import json
import shutil
import warnings

import diffusers
import pytest
import tiny
import torch
from tasks import TASKS, align, call, difference, folder, pair, set_scheduler

import suffuse
from suffuse.errors import ConfigError, InputError, LimitError, MissingFileError, SaveError, SuffuseError, UnknownArgumentError


@pytest.fixture(autouse=True)
def quiet_peer():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="diffusers.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


@pytest.fixture
def copied(tmp_path):
    """A copy of the text-to-image folder, to be changed."""
    return shutil.copytree(folder("text"), tmp_path / "copied")


def edited(path, **entries):
    """Change entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("task", TASKS)
def test_what_we_save_the_peer_loads_and_draws_the_same(task, safe, tmp_path):
    _, ours = pair(task)
    set_scheduler(pair(task), "DDIMScheduler")
    ours.save_pretrained(tmp_path / "saved", safe_serialization=safe)
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    written = json.loads((folder(task) / "model_index.json").read_text())
    assert {k: v for k, v in index.items() if k not in ("_diffusers_version", "feature_extractor")} == {
        k: v for k, v in written.items() if k not in ("_diffusers_version", "feature_extractor")
    }
    peer = TASKS[task].peer.from_pretrained(tmp_path / "saved")
    peer.set_progress_bar_config(disable=True)
    align(peer)
    assert difference(call(peer, task), call(ours, task)) == 0


def test_all_files_of_a_save_are_for_the_same_eyes(tmp_path):
    pair("text")[1].save_pretrained(tmp_path / "saved")
    modes = {path.stat().st_mode for path in (tmp_path / "saved").rglob("*") if path.is_file()}
    assert len(modes) == 1


def test_saving_twice_writes_the_same_bytes_and_no_path(tmp_path):
    _, ours = pair("text")
    for name in ("one", "two"):
        ours.save_pretrained(tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) >= 9
    for file in files:
        data = (tmp_path / "one" / file).read_bytes()
        assert data == (tmp_path / "two" / file).read_bytes(), file
        assert str(tmp_path).encode() not in data, file


def test_saving_over_a_folder_keeps_what_is_not_the_pipelines(tmp_path):
    _, ours = pair("text")
    ours.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("mine")
    ours.save_pretrained(tmp_path / "model", variant="fp16")
    names = {path.name for path in (tmp_path / "model" / "unet").iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"}
    assert (tmp_path / "model" / "README.md").read_text() == "mine"
    ours.save_pretrained(tmp_path / "model", safe_serialization=False)
    names = {path.name for path in (tmp_path / "model" / "unet").iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"}


def test_the_class_is_picked_from_the_folder():
    for task in TASKS:
        assert type(suffuse.DiffusionPipeline.from_pretrained(folder(task))).__name__ == TASKS[task].name


def test_another_class_loads_the_same_folder():
    pipe = suffuse.StableDiffusionImg2ImgPipeline.from_pretrained(folder("text"))
    pipe.set_progress_bar_config(disable=True)
    assert difference(call(pipe, "image"), call(diffusers_image_to_image(), "image")) == 0


def diffusers_image_to_image():
    pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(folder("text"))
    pipe.set_progress_bar_config(disable=True)
    align(pipe)
    return pipe


def test_components_passed_in_replace_those_of_the_folder(copied):
    _, ours = pair("text")
    shutil.rmtree(copied / "unet")
    pipe = suffuse.StableDiffusionPipeline.from_pretrained(copied, unet=ours.unet, vae=None)
    assert pipe.unet is ours.unet
    assert pipe.vae is None
    assert pipe.config.vae == (None, None)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [(None, torch.float32), ("auto", torch.bfloat16), (torch.float16, torch.float16), ("bfloat16", torch.bfloat16)],
)
def test_the_type_asked_for(asked, expected, tmp_path):
    _, ours = pair("text")
    type(ours).from_pretrained(folder("text"), torch_dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    pipe = suffuse.StableDiffusionPipeline.from_pretrained(tmp_path / "half", torch_dtype=asked)
    assert {module.dtype for module in (pipe.unet, pipe.vae, pipe.text_encoder)} == {expected}
    mixed = suffuse.StableDiffusionPipeline.from_pretrained(
        tmp_path / "half", torch_dtype={"vae": torch.float32, "default": torch.bfloat16}
    )
    assert (mixed.vae.dtype, mixed.unet.dtype) == (torch.float32, torch.bfloat16)


def test_half_precision_draws_what_the_peer_draws():
    peer = diffusers.StableDiffusionPipeline.from_pretrained(folder("text"), torch_dtype=torch.bfloat16)
    ours = suffuse.StableDiffusionPipeline.from_pretrained(folder("text"), torch_dtype=torch.bfloat16)
    for pipe in (peer, ours):
        pipe.set_progress_bar_config(disable=True)
    align(peer)
    assert difference(call(peer, "text").float(), call(ours, "text").float()) == 0


def test_a_variant_that_some_components_have(copied):
    _, ours = pair("text")
    ours.unet.save_pretrained(copied / "unet", variant="fp16")
    with pytest.warns(UserWarning, match="no weights of variant 'fp16'"):
        pipe = suffuse.StableDiffusionPipeline.from_pretrained(copied, variant="fp16")
    assert difference(call(pipe, "text"), call(ours, "text")) == 0
    with pytest.raises(MissingFileError, match="variant 'ema'"):
        suffuse.StableDiffusionPipeline.from_pretrained(copied, variant="ema")


def test_loading_information(copied):
    _, information = suffuse.StableDiffusionPipeline.from_pretrained(copied, output_loading_info=True)
    assert information["unet"]["missing_keys"] == []


def test_from_pipe_shares_the_modules_both_ways():
    _, ours = pair("text")
    other = suffuse.StableDiffusionInpaintPipeline.from_pipe(ours)
    back = suffuse.StableDiffusionPipeline.from_pipe(other)
    for name in ("unet", "vae", "text_encoder", "tokenizer"):
        assert getattr(other, name) is getattr(ours, name) is getattr(back, name)
    assert back.config.requires_safety_checker is False
    with pytest.raises(UnknownArgumentError, match="did you mean 'safety_checker'"):
        suffuse.StableDiffusionPipeline.from_pipe(ours, safty_checker=None)


def test_pipelines_are_made_of_the_components_of_another():
    _, ours = pair("text")
    assert type(ours)(**ours.components, requires_safety_checker=False).components == ours.components


def test_assigning_a_component_is_seen_in_the_configuration():
    _, ours = pair("text")
    pipe = type(ours).from_pipe(ours)
    pipe.scheduler = suffuse.EulerDiscreteScheduler()
    assert pipe.config.scheduler == ("diffusers", "EulerDiscreteScheduler")
    assert json.loads(repr(pipe).removeprefix("StableDiffusionPipeline "))["scheduler"] == ["diffusers", "EulerDiscreteScheduler"]


def test_to_takes_what_the_peers_takes():
    pipe = suffuse.StableDiffusionPipeline.from_pretrained(folder("text"))
    assert pipe.to("cpu") is pipe
    assert pipe.to(torch.bfloat16).dtype == torch.bfloat16
    assert pipe.to("cpu", torch.float32).dtype == torch.float32
    assert pipe.to(dtype=torch.bfloat16, device="cpu").vae.dtype == torch.bfloat16
    assert pipe.to(torch_dtype=torch.float32, torch_device="cpu").unet.dtype == torch.float32
    assert pipe.to(torch.zeros(1, dtype=torch.float64)).text_encoder.dtype == torch.float64
    with pytest.warns(UserWarning, match="float16 on a CPU"):
        pipe.to(torch.float16)
    assert pipe.to(torch.float16, silence_dtype_warnings=True).device == torch.device("cpu")
    with pytest.raises(InputError, match="no device 'gpu'"):
        pipe.to("gpu")
    assert pipe.to(dtype="float32").dtype == torch.float32
    with pytest.raises(InputError, match="no floating point type"):
        pipe.to(torch.int8)
    with pytest.raises(InputError, match="weights would be lost"):
        pipe.to("meta")


def test_no_safety_checker_is_told_once_and_can_be_meant():
    _, ours = pair("text")
    with pytest.warns(UserWarning, match="runs without a safety checker"):
        type(ours)(**ours.components)
    with pytest.raises(ConfigError, match="needs a feature_extractor"):
        type(ours)(**{**ours.components, "safety_checker": tiny.safety_checker()})


def test_the_safety_checker_blanks_what_the_peers_does(tmp_path):
    parts = tiny.stable_diffusion(tmp_path / "tokenizer")
    parts |= {"safety_checker": tiny.safety_checker(), "feature_extractor": tiny.image_processor()}
    diffusers.StableDiffusionPipeline(**parts).save_pretrained(tmp_path / "safe")
    peer = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "safe")
    ours = suffuse.StableDiffusionPipeline.from_pretrained(tmp_path / "safe")
    ours.save_pretrained(tmp_path / "again")
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "again")
    for pipe in (peer, ours, again):
        pipe.set_progress_bar_config(disable=True)
        align(pipe)
    seen = []
    for threshold in (2.0, 0.21, -2.0):  # nothing, some, everything is flagged
        results = []
        for pipe in (peer, ours, again):
            pipe.safety_checker.concept_embeds_weights.data.fill_(threshold)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = pipe(
                    ["a cat", "a dog", "x"], num_inference_steps=2, generator=torch.Generator().manual_seed(1), output_type="pt"
                )
            results.append(made)
        assert results[0].nsfw_content_detected == results[1].nsfw_content_detected == results[2].nsfw_content_detected
        assert difference(results[0].images, results[1].images) == 0
        assert difference(results[0].images, results[2].images) == 0
        seen.append(sum(results[1].nsfw_content_detected))
    assert seen[0] == 0
    assert seen[2] == 3


def test_the_scheduler_is_corrected_without_touching_the_one_given():
    _, ours = pair("text")
    given = suffuse.DDIMScheduler()
    with pytest.warns(UserWarning, match="set to steps_offset=1, clip_sample=False"):
        pipe = type(ours)(**{**ours.components, "scheduler": given}, requires_safety_checker=False)
    assert (pipe.scheduler.config.steps_offset, pipe.scheduler.config.clip_sample) == (1, False)
    assert (given.config.steps_offset, given.config.clip_sample) == (0, True)


BROKEN = {
    "an unknown pipeline": (
        "model_index.json",
        {"_class_name": "StableDifusionPipeline"},
        ConfigError,
        "did you mean 'StableDiffusionPipeline'",
    ),
    "no pipeline": ("model_index.json", {"_class_name": "UNet2DConditionModel"}, ConfigError, "no pipeline class"),
    "an unknown class": (
        "model_index.json",
        {"unet": ["diffusers", "UNet2DConditionModl"]},
        ConfigError,
        "did you mean 'UNet2DConditionModel'",
    ),
    "a function of the system": ("model_index.json", {"unet": ["os", "system"]}, ConfigError, "unknown class"),
    "a dotted name": ("model_index.json", {"unet": ["subprocess.Popen", "x"]}, ConfigError, "unknown class"),
    "no pair": ("model_index.json", {"unet": "UNet2DConditionModel"}, ConfigError, "malformed"),
    "a number for a pair": ("model_index.json", {"unet": 3}, ConfigError, "malformed"),
    "a base class": ("model_index.json", {"scheduler": ["diffusers", "SchedulerMixin"]}, ConfigError, "unknown class"),
    "a function of ours": ("model_index.json", {"unet": ["diffusers", "register_to_config"]}, ConfigError, "unknown class"),
    "a pipeline for a model": (
        "model_index.json",
        {"unet": ["diffusers", "StableDiffusionPipeline"]},
        ConfigError,
        "unknown class",
    ),
    "a scheduler for a UNet": (
        "model_index.json",
        {"unet": ["diffusers", "DDIMScheduler"]},
        MissingFileError,
        "scheduler_config",
    ),
    "a tokenizer for a UNet": (
        "model_index.json",
        {"unet": ["transformers", "CLIPTokenizer"]},
        MissingFileError,
        "holds no CLIPTokenizer(.|\n)*vocab.json and merges.txt",
    ),
    "a picture processor for a tokenizer": (
        "model_index.json",
        {"tokenizer": ["transformers", "CLIPImageProcessor"]},
        MissingFileError,
        "preprocessor_config.json",
    ),
    "text for a truth": ("model_index.json", {"requires_safety_checker": "yes"}, ConfigError, "requires_safety_checker"),
    "a million layers": ("unet/config.json", {"layers_per_block": 10**6}, LimitError, "layers_per_block is too large"),
    "a thousand layers": ("unet/config.json", {"layers_per_block": 10**3}, LimitError, "far more than the files hold"),
    "a million layers of text": (
        "text_encoder/config.json",
        {"num_hidden_layers": 10**6},
        LimitError,
        "more than the files hold",
    ),
    "text of 10^9 numbers": ("text_encoder/config.json", {"hidden_size": 10**9, "num_attention_heads": 1}, LimitError, "larger"),
    "no layers of text": (
        "text_encoder/config.json",
        {"num_hidden_layers": 0},
        ConfigError,
        "num_hidden_layers must be at least 1",
    ),
    "an impossible dropout": ("unet/config.json", {"dropout": 5}, ConfigError, "no module can be built"),
    "a sample of one edge": ("unet/config.json", {"sample_size": [32]}, ConfigError, r"tuple\[int, int\]"),
    "infinite scaling": ("vae/config.json", {"scaling_factor": float("inf")}, ConfigError, "positive and finite"),
    "another scheduler's class": (
        "scheduler/scheduler_config.json",
        {"_class_name": "UNet2DModel"},
        ConfigError,
        "another class",
    ),
    "no timesteps": ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}, ConfigError, "no noise schedule"),
    "10^12 timesteps": ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}, ConfigError, "no noise schedule"),
    "betas below 0": ("scheduler/scheduler_config.json", {"beta_start": -1.0}, ConfigError, "no noise schedule"),
    "trained betas above 1": ("scheduler/scheduler_config.json", {"trained_betas": [2.0]}, ConfigError, "trained_betas"),
    "no trained betas": ("scheduler/scheduler_config.json", {"trained_betas": []}, ConfigError, "trained_betas"),
    "a text longer than its encoder": (
        "tokenizer/tokenizer_config.json",
        {"model_max_length": 200},
        ConfigError,
        "model_max_length=200, max_position_embeddings=77",
    ),
    "a required component that is null": ("model_index.json", {"unet": [None, None]}, None, ""),
    "vae and unet of other widths": ("unet/config.json", {"out_channels": 8}, SuffuseError, "."),
    "no scaling": ("vae/config.json", {"scaling_factor": 0.0}, ConfigError, "scaling_factor must be positive"),
    "text of another width": ("unet/config.json", {"cross_attention_dim": 64}, SuffuseError, "."),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_told(name, copied):
    file, entries, error, message = BROKEN[name]
    edited(copied / file, **entries)
    if error is None:
        assert suffuse.DiffusionPipeline.from_pretrained(copied).unet is None
        return
    with pytest.raises(error, match=message) as raised:
        suffuse.DiffusionPipeline.from_pretrained(copied)
    assert isinstance(raised.value, SuffuseError)


TOKENIZER = {
    "nothing": (None, MissingFileError, "holds no CLIPTokenizer"),
    "no JSON": (b"hello", ConfigError, "tokenizer.json:1:1: not JSON"),
    "a list": (b"[]", ConfigError, "holds no JSON object"),
    "an object of something else": (b"{}", ConfigError, "transformers makes no CLIPTokenizer"),
    "a thousand brackets": (b'{"a":' * 1000 + b"1" + b"}" * 1000, ConfigError, "nested too deep"),
    "a key twice": (b'{"a": 1, "a": 2}', ConfigError, "a key stands twice"),
    "not UTF-8": (b'{"\xff": 1}', ConfigError, "not UTF-8"),
}


@pytest.mark.parametrize("name", TOKENIZER)
def test_a_broken_tokenizer_is_told(name, copied):
    data, error, message = TOKENIZER[name]
    (copied / "tokenizer/tokenizer.json").unlink()
    if data is not None:
        (copied / "tokenizer/tokenizer.json").write_bytes(data)
    with pytest.raises(error, match=message):
        suffuse.DiffusionPipeline.from_pretrained(copied)


def test_a_link_to_itself_is_no_file(copied):
    (copied / "vae/config.json").unlink()
    (copied / "vae/config.json").symlink_to(copied / "vae/config.json")
    with pytest.raises(MissingFileError, match="Too many levels of symbolic links"):
        suffuse.DiffusionPipeline.from_pretrained(copied)


@pytest.mark.parametrize("path", [None, 3, ["a"], b"x", "a\0b", "x" * 5000, "", "http://x/y", "~/model"])
@pytest.mark.parametrize("name", ["DiffusionPipeline", "UNet2DConditionModel", "DDIMScheduler"])
def test_what_is_no_folder_is_told(name, path):
    with pytest.raises((InputError, MissingFileError)):
        getattr(suffuse, name).from_pretrained(path)


def test_types_by_component_name_components(copied):
    with pytest.raises(UnknownArgumentError, match="did you mean 'unet'"):
        suffuse.DiffusionPipeline.from_pretrained(copied, torch_dtype={"unets": torch.bfloat16})


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder"])
def test_components_of_different_types_draw(name):
    pipe = suffuse.StableDiffusionPipeline.from_pretrained(
        folder("text"), torch_dtype={name: torch.bfloat16, "default": torch.float32}
    )
    pipe.set_progress_bar_config(disable=True)
    assert call(pipe, "text").isfinite().all()


def test_from_pipe_takes_pipelines():
    with pytest.raises(InputError, match="needs a pipeline of suffuse"):
        suffuse.StableDiffusionPipeline.from_pipe(pair("text")[0])


def test_the_folder_that_a_process_works_in_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "here" / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "inside")
    _, ours = pair("text")
    for target in (".", "..", tmp_path / "here"):
        with pytest.raises(SaveError, match="the folder this process works in"):
            ours.save_pretrained(target)
    with pytest.raises(SaveError, match="needs a name"):
        ours.save_pretrained("")
    ours.save_pretrained("model")


def test_components_of_different_widths_are_told_with_both_files():
    _, ours = pair("text")
    wide = suffuse.UNet2DConditionModel.from_config(ours.unet.config, cross_attention_dim=64)
    with pytest.raises(ConfigError, match=r"unet/config.json and text_encoder/config.json disagree(.|\n)*64(.|\n)*32"):
        type(ours).from_pipe(ours, unet=wide)
    deep = suffuse.AutoencoderKL.from_config(ours.vae.config, latent_channels=8)
    with pytest.raises(ConfigError, match=r"out_channels=4, latent_channels=8"):
        type(ours).from_pipe(ours, vae=deep)


def test_a_unet_for_another_task_is_told_with_the_task():
    _, nine = pair("inpaint9")
    with pytest.raises(ConfigError, match=r"in_channels=9(.|\n)*StableDiffusionInpaintPipeline"):
        suffuse.StableDiffusionPipeline.from_pipe(nine)


def test_missing_parts_are_named(copied):
    shutil.rmtree(copied / "vae")
    with pytest.raises(MissingFileError, match=r"component 'vae'(.|\n)*unet"):
        suffuse.DiffusionPipeline.from_pretrained(copied)
    edited(copied / "model_index.json", sequel=["diffusers", "UNet2DModel"])
    with pytest.warns(UserWarning, match="no use for these entries of model_index.json: sequel"):
        suffuse.DiffusionPipeline.from_pretrained(copied, vae=None)
    with pytest.raises(ConfigError, match="has no sequel"):
        suffuse.DiffusionPipeline.from_pretrained(copied, vae=None, strict=True)
    with pytest.raises(UnknownArgumentError, match="did you mean 'torch_dtype'"):
        suffuse.DiffusionPipeline.from_pretrained(copied, torch_dtyp=torch.float16)


def test_switches_reach_the_models():
    peer, ours = pair("text")
    set_scheduler(pair("text"), "DDIMScheduler")
    expected = call(ours, "text")
    pipe = suffuse.StableDiffusionPipeline.from_pretrained(folder("text"))
    pipe.set_progress_bar_config(disable=True)
    for switch in ("attention_slicing", "vae_slicing"):
        getattr(pipe, f"enable_{switch}")()
        assert difference(call(pipe, "text"), expected) <= 1e-5
        getattr(pipe, f"disable_{switch}")()
    for both in (peer.vae, pipe):  # tiles are normalised one by one, there and here
        (both.enable_tiling if both is peer.vae else both.enable_vae_tiling)()
    assert difference(call(pipe, "text"), call(peer, "text")) == 0
    for both in (peer.vae, pipe):
        (both.disable_tiling if both is peer.vae else both.disable_vae_tiling)()
    pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    pipe.fuse_qkv_projections()
    pipe.unfuse_qkv_projections()
    pipe.disable_freeu()
    assert difference(call(pipe, "text"), expected) == 0
    with pytest.raises(ImportError, match="xformers"):
        pipe.enable_xformers_memory_efficient_attention()


def test_a_component_of_another_class_takes_what_fits_of_its_configuration():
    # AutoencoderTiny has no `block_out_channels`, and UNet2DModel, which wrote them, has: nothing to warn of.
    settings = suffuse.UNet2DModel(
        block_out_channels=(32, 64), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
    )
    written = {**settings.config, "_class_name": "UNet2DModel"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made, unused = suffuse.AutoencoderTiny.from_config(written, return_unused_kwargs=True)
    assert made.config.in_channels == settings.config.in_channels
    assert "block_out_channels" in unused
