"""A pipeline is saved over another: whoever is killed, whatever the disk refuses, the folder is the old one or the new one."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tasks import folder, pair

import suffuse
from suffuse.checkpoints.checksums import verify_folder
from suffuse.errors import InputError, SaveError
from suffuse.files import write_text

EVENTS = ("open", "os.", "shutil.", "fcntl.")
"""Beginnings of the audit events (PEP 578) at which a process may be killed."""


@pytest.fixture
def new():
    """The pipeline of the tests with one other number."""
    pipe = suffuse.DiffusionPipeline.from_pretrained(folder("text"))
    with torch.no_grad():
        pipe.unet.conv_in.bias[0] = 7.0
    return pipe


@pytest.fixture
def saved(tmp_path):
    pair("text")[1].save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def state(saved: Path) -> str:
    """ "old" or "new"; the folder must load, and be what its checksums say."""
    verify_folder(saved)
    pipe = suffuse.DiffusionPipeline.from_pretrained(saved)
    return "new" if pipe.unet.conv_in.bias[0] == 7.0 else "old"


def killed_at(moment: int, pipe: suffuse.DiffusionPipeline, saved: Path) -> bool:
    """Save in a child that is killed at so many file operations; whether it came to that."""
    child = os.fork()
    if child == 0:
        seen = iter(range(10**6))

        def audit(event: str, _: object) -> None:
            if event.startswith(EVENTS) and next(seen) == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)
        pipe.save_pretrained(saved)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_kill_9_at_any_moment_leaves_old_or_new(new, saved, tmp_path):
    whole = shutil.copytree(saved, tmp_path / "whole")
    seen = []
    for moment in range(0, 4000, 9):
        struck = killed_at(moment, new, saved)
        seen.append(state(saved))
        if not struck:
            break
        shutil.rmtree(saved)
        shutil.copytree(whole, saved)
    assert (seen[0], seen[-1]) == ("old", "new")
    assert len(seen) >= 16
    new.save_pretrained(saved)
    assert sorted(os.listdir(tmp_path)) == ["model", "whole"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="sets a limit in a child")
@pytest.mark.parametrize("limit", [100, 50_000, 1_000_000])
def test_a_file_that_may_not_grow_is_told(limit, new, saved, tmp_path):
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            new.save_pretrained(saved)
        except SaveError as error:
            os._exit(0 if "nothing was replaced" in str(error) else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert state(saved) == "old"
    assert os.listdir(tmp_path) == ["model"]


FULL_DISK = """
import shutil, sys, types, warnings
import suffuse
shutil.disk_usage = lambda path: types.SimpleNamespace(free=2**40)  # somebody else fills the disk while it is written
warnings.simplefilter("ignore")
pipe = suffuse.DiffusionPipeline.from_pretrained(sys.argv[1])
try:
    pipe.save_pretrained("/mnt/model")
except suffuse.errors.SaveError as error:
    print(error.problem)
    import os
    print(sorted(os.listdir("/mnt")))
"""


def test_a_full_disk_is_told_and_nothing_is_left(tmp_path):
    mounting = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = "mount -t tmpfs -o size=300k tmpfs /mnt"
    if shutil.which("unshare") is None or subprocess.run([*mounting, mount], capture_output=True).returncode != 0:
        pytest.skip("this system lets nobody mount a small disk")
    write_text(tmp_path / "save.py", FULL_DISK)
    run = f'{mount} && exec "{sys.executable}" "{tmp_path / "save.py"}" "{folder("text")}"'
    done = subprocess.run([*mounting, run], capture_output=True, text=True, check=True)
    told, left = done.stdout.splitlines()
    assert "/mnt/model could not be written" in told
    assert "No space left" in told
    assert left == "[]"


@pytest.mark.parametrize("component", ["unet", "text_encoder", "tokenizer", "scheduler"])
def test_a_component_that_cannot_be_written_replaces_nothing(component, new, saved, tmp_path, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("this component is broken")

    monkeypatch.setattr(type(getattr(new, component)), "save_pretrained", broken)
    with pytest.raises(SaveError, match=f"(?s){component}.*this component is broken"):
        new.save_pretrained(saved)
    assert state(saved) == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_a_changed_byte_is_told_when_asked_for(saved):
    suffuse.DiffusionPipeline.from_pretrained(saved, verify=True)
    weights = saved / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1
    weights.write_bytes(data)
    suffuse.DiffusionPipeline.from_pretrained(saved)
    for load in (
        lambda: suffuse.DiffusionPipeline.from_pretrained(saved, verify=True),
        lambda: suffuse.UNet2DConditionModel.from_pretrained(saved, subfolder="unet", verify=True),
    ):
        with pytest.raises(OSError, match=r"1 files of .* are not what was saved: unet/diffusion_pytorch_model.safetensors"):
            load()
    suffuse.AutoencoderKL.from_pretrained(saved / "vae", verify=True)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_pipeline_is_saved_over_the_folder_it_was_loaded_from(mapped, saved):
    pipe = suffuse.DiffusionPipeline.from_pretrained(saved)
    pipe.unet = suffuse.UNet2DConditionModel.from_pretrained(saved, subfolder="unet", disable_mmap=not mapped)
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    pipe.save_pretrained(saved)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.unet.state_dict().items())
    assert state(saved) == "old"


@pytest.mark.parametrize("target", [None, 5, "", "x" * 300, "a\0b"])
def test_a_place_that_is_none_is_told(target, new):
    with pytest.raises(SaveError, match=r"needs a name|could not be written"):
        new.save_pretrained(target)


@pytest.mark.parametrize("variant", ["../x", "fp\n16", 5])
def test_a_variant_that_is_no_name_is_told(variant, new, tmp_path):
    for part in (new, new.unet):
        with pytest.raises(InputError, match="variant is no name"):
            part.save_pretrained(tmp_path / "model", variant=variant)
    assert not list(tmp_path.iterdir())
