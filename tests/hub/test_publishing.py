from __future__ import annotations

import time

import pytest
import torch
from hub_server import TOKEN

import suffuse
from suffuse.errors import HubError, InputError
from suffuse.hub import publishing

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub, of its HTTP client


@pytest.fixture
def pipe(tiny_folder):
    return suffuse.DiffusionPipeline.from_pretrained(tiny_folder)


def tree(hub, name, branch="main"):
    repo = hub.repos["models", name]
    return repo.commits[repo.branches[branch]]


def test_a_pipeline_goes_to_the_hub_in_one_commit_and_comes_back(hub, pipe):
    address = pipe.push_to_hub("org/mine", token=TOKEN, private=True)
    assert address.startswith(f"{hub.url}/org/mine/commit/")
    assert hub.repos["models", "org/mine"].private
    assert hub.repos["models", "org/mine"].messages == ["Upload StableDiffusionPipeline"]
    back = suffuse.DiffusionPipeline.from_pretrained("org/mine", token=TOKEN)
    for one, other in zip(pipe.unet.parameters(), back.unet.parameters(), strict=True):
        assert torch.equal(one, other)
    assert "SHA256SUMS" not in tree(hub, "org/mine")


@pytest.mark.parametrize("part", ["unet", "scheduler"])
def test_models_and_schedulers_go_and_come_back(hub, pipe, part):
    value = getattr(pipe, part)
    value.push_to_hub("org/part", token=TOKEN, commit_message="first")
    assert hub.repos["models", "org/part"].messages == ["first"]
    back = type(value).from_pretrained("org/part", token=TOKEN)
    assert type(back) is type(value)
    assert {k: v for k, v in back.config.items() if k[0] != "_"} == {k: v for k, v in value.config.items() if k[0] != "_"}


def test_save_pretrained_publishes_under_the_name_of_the_folder_or_the_one_given(hub, pipe, tmp_path):
    pipe.scheduler.save_pretrained(tmp_path / "steps", push_to_hub=True, token=TOKEN)
    pipe.unet.save_pretrained(tmp_path / "unet", push_to_hub=True, repo_id="org/unet", token=TOKEN, variant="fp16")
    pipe.save_pretrained(tmp_path / "pipe", push_to_hub=True, repo_id="org/pipe", token=TOKEN, commit_message="whole")
    assert "scheduler_config.json" in tree(hub, "me/steps")
    assert "diffusion_pytorch_model.fp16.safetensors" in tree(hub, "org/unet")
    assert "vae/config.json" in tree(hub, "org/pipe")
    assert hub.repos["models", "org/pipe"].messages == ["whole"]


def test_the_formats_and_variants_are_as_asked(hub, pipe):
    pipe.vae.push_to_hub("org/vae", token=TOKEN, safe_serialization=False, variant="ema")
    assert "diffusion_pytorch_model.ema.bin" in tree(hub, "org/vae")


def test_a_proposal_leaves_the_branch_as_it_is(hub, pipe):
    pipe.scheduler.push_to_hub("org/steps", token=TOKEN)
    before = hub.repos["models", "org/steps"].branches["main"]
    pipe.scheduler.register_to_config(beta_start=0.5)
    address = pipe.scheduler.push_to_hub("org/steps", token=TOKEN, create_pr=True)
    assert address == f"{hub.url}/org/steps/discussions/1"
    assert hub.repos["models", "org/steps"].branches["main"] == before
    assert b"0.5" in tree(hub, "org/steps", "refs/pr/1")["scheduler_config.json"]


def test_a_card_tells_the_class_and_how_to_load_it_and_an_older_one_stays(hub, pipe):
    pipe.push_to_hub("org/mine", token=TOKEN)
    card = tree(hub, "org/mine")["README.md"].decode()
    for text in ("library_name: diffusers", "- suffuse", "StableDiffusionPipeline", 'from_pretrained("org/mine")'):
        assert text in card
    hub.commit("org/mine", {"README.md": b"my own words"})
    pipe.scheduler.push_to_hub("org/mine", token=TOKEN)
    assert tree(hub, "org/mine")["README.md"] == b"my own words"


def test_the_card_of_the_folder_is_published_and_hidden_files_are_not(hub, pipe, tmp_path):
    (tmp_path / "steps" / ".secret").mkdir(parents=True)
    (tmp_path / "steps" / ".secret" / "key").write_text("x")
    (tmp_path / "steps" / "README.md").write_text("# mine")
    pipe.scheduler.save_pretrained(tmp_path / "steps", push_to_hub=True, repo_id="org/steps", token=TOKEN)
    assert tree(hub, "org/steps")["README.md"] == b"# mine"
    assert not any("secret" in name for name in tree(hub, "org/steps"))


def test_without_a_token_the_hub_refuses_and_the_message_says_so(hub, pipe):
    with pytest.raises(HubError, match=r"org/mine could not be published: the hub answered 401(.|\n)*token="):
        pipe.scheduler.push_to_hub("org/mine")


def test_a_name_is_checked_before_anything_is_saved_or_sent(hub, pipe):
    with pytest.raises(InputError, match="neither a folder here nor a name on the hub"):
        pipe.scheduler.push_to_hub("org/na me", token=TOKEN)
    assert hub.requests == []


def test_a_silent_hub_is_not_waited_for_for_ever(hub, pipe, monkeypatch):
    monkeypatch.setattr(publishing, "PATIENCE", 0.3)
    hub.misbehave["/api/repos/create"] = ["silent"] * 5
    started = time.monotonic()
    with pytest.raises(HubError, match="org/mine could not be published: the hub cannot be reached"):
        pipe.scheduler.push_to_hub("org/mine", token=TOKEN)
    assert time.monotonic() - started < 1.5


def test_what_is_published_names_no_place_of_this_machine(hub, pipe, tmp_path):
    pipe.push_to_hub("org/mine", token=TOKEN)
    assert not any(str(tmp_path.parent).encode() in content for content in tree(hub, "org/mine").values())
