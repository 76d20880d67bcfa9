from __future__ import annotations

import os
import time

import pytest
import torch
from hub_server import TOKEN
from safetensors.torch import save_file

import suffuse
from suffuse.conversion.single_file_writer import single_file_tensors
from suffuse.errors import HubError, InputError, MissingFileError, PathEscapeError, UnknownArgumentError
from suffuse.memory.plan import Request, plan, survey

NAME = "org/tiny"
NEEDED = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer_config.json",
    "tokenizer/tokenizer.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}


@pytest.fixture
def tiny(hub, tiny_folder):
    """The tiny checkpoint, with all that lies around in real repositories too."""
    hub.add_folder(NAME, tiny_folder)
    unet = (tiny_folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    noise = {
        "unet/diffusion_pytorch_model.bin": b"pickle",
        "unet/diffusion_pytorch_model.fp16.safetensors": unet,
        "unet/diffusion_pytorch_model.non_ema.safetensors": b"x",
        "unet/diffusion_flax_model.msgpack": b"x",
        "unet/model.onnx": b"onnx",
        "text_encoder/pytorch_model.bin": b"pickle",
        "safety_checker/model.safetensors": b"x",
        "tiny.ckpt": b"x",
        "picture.png": b"x",
        "README.md": b"# tiny",
    }
    hub.commit(NAME, noise)
    return hub


def same(one, other) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_pipeline_is_loaded_by_name_with_only_the_files_it_needs(tiny, tiny_folder):
    pipe = suffuse.DiffusionPipeline.from_pretrained(NAME)
    assert type(pipe) is suffuse.StableDiffusionPipeline
    assert pipe.name_or_path == NAME
    assert same(pipe.unet, suffuse.UNet2DConditionModel.from_pretrained(tiny_folder, subfolder="unet"))
    assert tiny.fetched() == NEEDED | {"README.md"}


def test_nothing_is_fetched_of_components_that_are_passed_or_none(tiny, tiny_folder):
    unet = suffuse.UNet2DConditionModel.from_pretrained(tiny_folder, subfolder="unet")
    pipe = suffuse.DiffusionPipeline.from_pretrained(NAME, unet=unet, text_encoder=None, tokenizer=None)
    assert pipe.unet is unet
    assert not [name for name in tiny.fetched() if name.startswith(("unet/", "text_encoder/", "tokenizer/"))]


def test_a_variant_is_fetched_where_there_is_one(tiny):
    with pytest.warns(UserWarning, match=r"vae.*have no weights of variant 'fp16'"):
        suffuse.DiffusionPipeline.from_pretrained(NAME, variant="fp16")
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in tiny.fetched()
    assert "unet/diffusion_pytorch_model.safetensors" not in tiny.fetched()
    with pytest.raises(MissingFileError, match=r"no component of .* has weights of variant 'bf16'"):
        suffuse.DiffusionPipeline.from_pretrained(NAME, variant="bf16")


def test_download_returns_the_folder_and_onnx_comes_when_asked_for(tiny):
    folder = suffuse.DiffusionPipeline.download(NAME, vae=None)
    assert isinstance(suffuse.DiffusionPipeline.from_pretrained(folder, vae=None), suffuse.StableDiffusionPipeline)
    assert not any(name.endswith(".onnx") for name in tiny.fetched())
    suffuse.DiffusionPipeline.download(NAME, use_onnx=True)
    assert "unet/model.onnx" in tiny.fetched()


@pytest.mark.parametrize(
    ("kind", "subfolder"), [("UNet2DConditionModel", "unet"), ("AutoencoderKL", "vae"), ("DDIMScheduler", "scheduler")]
)
def test_models_and_schedulers_are_loaded_by_name(tiny, kind, subfolder):
    assert type(getattr(suffuse, kind).from_pretrained(NAME, subfolder=subfolder)).__name__ == kind
    assert tiny.fetched() == {name for name in NEEDED if name.startswith(f"{subfolder}/")}
    config, unused, commit = getattr(suffuse, kind).load_config(
        NAME, subfolder=subfolder, return_unused_kwargs=True, return_commit_hash=True, other=1
    )
    assert config["_class_name"] == kind
    assert unused == {"other": 1}
    assert commit == tiny.repos["models", NAME].branches["main"]


def test_shards_are_fetched_as_their_index_says(tiny, tmp_path):
    model = suffuse.UNet2DConditionModel.from_pretrained(NAME, subfolder="unet")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="1MB")
    tiny.add_folder("org/sharded", tmp_path / "sharded")
    tiny.commit("org/sharded", {"diffusion_pytorch_model-00009-of-00009.safetensors": b"stale"})
    tiny.forget()
    assert same(model, suffuse.UNet2DConditionModel.from_pretrained("org/sharded"))
    assert len([name for name in tiny.fetched() if "-of-" in name]) > 1
    assert "diffusion_pytorch_model-00009-of-00009.safetensors" not in tiny.fetched()


def test_a_cached_branch_costs_one_request_and_a_commit_or_the_cache_alone_none(tiny):
    suffuse.DiffusionPipeline.from_pretrained(NAME)
    commit = tiny.repos["models", NAME].branches["main"]
    for options, requests in [({}, 1), ({"revision": commit}, 0), ({"local_files_only": True}, 0)]:
        tiny.forget()
        suffuse.DiffusionPipeline.from_pretrained(NAME, **options)
        assert len(tiny.requests) == requests, options


def test_an_auto_pipeline_asks_once_and_loads_the_commit_it_looked_at(tiny):
    pipe = suffuse.AutoPipelineForImage2Image.from_pretrained(NAME, revision="main")
    assert type(pipe) is suffuse.StableDiffusionImg2ImgPipeline
    assert len([path for path in tiny.requests if path.startswith("/api/")]) == 1


def test_offline_means_no_request_and_says_what_is_missing(tiny, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    started = time.monotonic()
    with pytest.raises(
        HubError, match=r"'org/tiny' is no folder here, and the cache does not hold all of it.*\n.*\n.*connection"
    ):
        suffuse.DiffusionPipeline.from_pretrained(NAME)
    assert time.monotonic() - started < 1
    assert tiny.requests == []


def test_a_cache_that_holds_a_part_says_which_files_are_missing(tiny):
    suffuse.AutoencoderKL.from_pretrained(NAME, subfolder="vae")
    with pytest.raises(HubError, match=r"does not hold all of it: model_index\.json"):
        suffuse.DiffusionPipeline.from_pretrained(NAME, local_files_only=True)


def test_force_download_fetches_again_and_heals(tiny, tmp_path):
    folder = suffuse.DiffusionPipeline.download(NAME)
    tiny.forget()
    suffuse.DiffusionPipeline.from_pretrained(NAME, force_download=True)
    assert tiny.fetched() >= NEEDED
    with pytest.raises(InputError, match="force_download"):
        suffuse.DiffusionPipeline.from_pretrained(NAME, force_download=True, local_files_only=True)
    assert folder == suffuse.DiffusionPipeline.download(NAME)


def test_verify_finds_a_flipped_bit_in_the_cache_and_fetches_that_file_again(tiny):
    from pathlib import Path

    folder = Path(suffuse.DiffusionPipeline.download(NAME))
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.resolve().write_bytes(content)
    tiny.forget()
    suffuse.DiffusionPipeline.from_pretrained(NAME, verify=True)
    assert tiny.fetched() == {"vae/diffusion_pytorch_model.safetensors"}


def test_cache_dir_keeps_the_layout_that_other_libraries_read(tiny, tmp_path):
    from huggingface_hub import try_to_load_from_cache

    suffuse.DiffusionPipeline.from_pretrained(NAME, cache_dir=tmp_path / "mine")
    path = try_to_load_from_cache(NAME, "unet/config.json", cache_dir=tmp_path / "mine")
    assert isinstance(path, str)
    assert "snapshots" in path


def test_what_another_library_cached_is_used_offline(tiny):
    from huggingface_hub import hf_hub_download

    for name in ("vae/config.json", "vae/diffusion_pytorch_model.safetensors"):
        hf_hub_download(NAME, name)
    tiny.forget()
    suffuse.AutoencoderKL.from_pretrained(NAME, subfolder="vae", local_files_only=True)
    suffuse.AutoencoderKL.from_pretrained(NAME, subfolder="vae")
    assert len(tiny.requests) == 1


def test_tokens_open_private_repositories(tiny):
    tiny.repos["models", NAME].private = True
    with pytest.raises(HubError, match=r"org/tiny at main: the hub answered 401(.|\n)*token="):
        suffuse.DiffusionPipeline.from_pretrained(NAME)
    for options in ({"token": TOKEN}, {"use_auth_token": TOKEN}):
        suffuse.DiffusionPipeline.from_pretrained(NAME, **options)


def test_a_token_does_not_follow_a_redirect_to_another_host(tiny):
    tiny.redirect = tiny.url.replace("127.0.0.1", "localhost")
    suffuse.DiffusionPipeline.from_pretrained(NAME, token=TOKEN)
    assert any(headers["Host"].startswith("localhost") for headers in tiny.headers)
    for headers in tiny.headers:
        sent = {key.lower() for key in headers}
        assert ("authorization" in sent) == headers["Host"].startswith("127.0.0.1")


def test_a_mirror_is_asked_through_a_proxy_and_gets_only_a_token_that_was_passed(tiny, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    options = {"mirror": "http://mirror.example", "proxies": {"http": tiny.url}}
    suffuse.AutoencoderKL.from_pretrained(NAME, subfolder="vae", **options)
    assert {headers["Host"] for headers in tiny.headers} == {"mirror.example"}
    assert not any(key.lower() == "authorization" for headers in tiny.headers for key in headers)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("org/nothing", {}, r"org/nothing at main: the hub answered 404(.|\n)*spelling"),
        (NAME, {"revision": "nowhere"}, r"org/tiny at nowhere: the hub answered 404(.|\n)*branch, a tag or a commit"),
    ],
)
def test_what_is_not_there_is_told(tiny, name, options, message):
    with pytest.raises(HubError, match=message):
        suffuse.DiffusionPipeline.from_pretrained(name, **options)


@pytest.mark.parametrize("name", ["./tiny", "../tiny", "/nowhere/tiny", "~/tiny", "a/b/c", "a\\b", "C:/tiny", "tiny.safetensors"])
def test_what_looks_like_a_path_never_reaches_the_hub(tiny, name):
    with pytest.raises(MissingFileError, match="is not a folder here"):
        suffuse.DiffusionPipeline.from_pretrained(name)
    assert tiny.requests == []


@pytest.mark.parametrize("name", ["org/..", "a..b/c", "..org/x"])
def test_a_name_that_leads_out_is_refused(tiny, name):
    with pytest.raises((PathEscapeError, MissingFileError)):
        suffuse.DiffusionPipeline.from_pretrained(name)
    assert tiny.requests == []


@pytest.mark.parametrize("name", ["org/na me", "org/", "ü/x", "org/x?y", "org--x/y", "a" * 200])
def test_what_can_be_no_name_is_refused(tiny, name):
    with pytest.raises(InputError, match="neither a folder here nor a name on the hub"):
        suffuse.DiffusionPipeline.from_pretrained(name)
    assert tiny.requests == []


def test_a_folder_goes_before_a_repository_of_the_same_name(tiny, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "tiny").symlink_to(tiny_folder)
    suffuse.DiffusionPipeline.from_pretrained(NAME)
    assert tiny.requests == []


@pytest.mark.parametrize(
    ("kind", "options"),
    [("DiffusionPipeline", {}), ("UNet2DConditionModel", {"subfolder": "unet"}), ("DDIMScheduler", {"subfolder": "scheduler"})],
)
def test_a_misspelt_keyword_is_told(tiny, kind, options):
    with pytest.raises(UnknownArgumentError, match="did you mean 'revision'"):
        getattr(suffuse, kind).from_pretrained(NAME, revison="main", **options)


def test_a_branch_that_moves_while_loading_gives_one_commit(tiny, monkeypatch):
    first = tiny.repos["models", NAME].branches["main"]
    from suffuse.hub.repository import Repository

    fetch = Repository.fetch

    def moving(repository, names):
        fetch(repository, names)
        tiny.commit(NAME, {"vae/config.json": b"{}"})

    monkeypatch.setattr(Repository, "fetch", moving)
    suffuse.DiffusionPipeline.from_pretrained(NAME)
    assert all(f"/resolve/{first}/" in path for path in tiny.requests if "/resolve/" in path)


def test_a_listing_that_leads_out_is_refused(tiny):
    tiny.commit(NAME, {"vae/../../evil.json": b"{}", "/etc/x.json": b"{}"})
    suffuse.DiffusionPipeline.from_pretrained(NAME)
    index = b'{"metadata": {}, "weight_map": {"a": "../../x.safetensors"}}'
    tiny.commit("org/out", {"config.json": b"{}", "diffusion_pytorch_model.safetensors.index.json": index})
    with pytest.raises(PathEscapeError, match="leads out"):
        suffuse.AutoencoderKL.from_pretrained("org/out")


def test_diffusers_loads_what_suffuse_cached(tiny):
    import diffusers

    suffuse.DiffusionPipeline.from_pretrained(NAME)
    tiny.forget()
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(NAME, local_files_only=True, safety_checker=None)
    assert same(pipe.unet, suffuse.UNet2DConditionModel.from_pretrained(NAME, subfolder="unet", local_files_only=True))
    assert tiny.requests == []


def test_a_plan_fetches_configurations_only_and_tells_what_a_load_would_fetch(tiny, tiny_folder):
    surveyed = survey(NAME)
    assert sorted(surveyed.fetch) == [
        "text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    assert surveyed.fetch["unet/diffusion_pytorch_model.safetensors"] == os.path.getsize(
        tiny_folder / "unet" / "diffusion_pytorch_model.safetensors"
    )
    assert not any(name.endswith(".safetensors") for name in tiny.fetched())
    assert plan(surveyed, Request()).peak == pytest.approx(plan(survey(tiny_folder), Request()).peak, rel=0.01)
    suffuse.DiffusionPipeline.from_pretrained(NAME)
    assert survey(NAME).fetch == {}


def test_a_single_file_comes_by_its_address(hub, tmp_path):
    torch.manual_seed(0)
    vae = suffuse.AutoencoderKL(norm_num_groups=32, block_out_channels=(32,))
    save_file({n: t.contiguous() for n, t in single_file_tensors({"vae": vae}).items()}, tmp_path / "vae.safetensors")
    hub.commit("org/files", {"vae.safetensors": (tmp_path / "vae.safetensors").read_bytes()})
    for address in ("https://huggingface.co/org/files/blob/main/vae.safetensors", "org/files/resolve/main/vae.safetensors"):
        loaded = suffuse.AutoencoderKL.from_single_file(address)
        assert torch.equal(loaded.quant_conv.weight, vae.quant_conv.weight)
    with pytest.raises(MissingFileError, match=r"no file 'unet\.safetensors'"):
        suffuse.AutoencoderKL.from_single_file("org/files/blob/main/unet.safetensors")
