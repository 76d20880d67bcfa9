"""What the peer saves is loaded here, and the reverse, bit for bit, in every format."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch

import suffuse
from suffuse.models.model import ModelMixin
from suffuse.public_names import PUBLIC

MAKERS = {
    "UNet2DConditionModel": tiny.unet,
    "ControlNetModel": tiny.controlnet,
    "AutoencoderKL": tiny.vae,
    "AsymmetricAutoencoderKL": tiny.asymmetric_vae,
}
FORMATS: dict[str, dict[str, Any]] = {
    "one file": {},
    "shards": {"max_shard_size": "50KB"},
    "a variant": {"variant": "fp16"},
    "shards of a variant": {"variant": "fp16", "max_shard_size": "50KB"},
    "a pickle": {"safe_serialization": False},
    "a pickle of a variant": {"safe_serialization": False, "variant": "fp16"},
}
pytestmark = pytest.mark.filterwarnings("ignore:.*is a pickle")


def models() -> list[str]:
    """The public models of which this file knows a tiny one."""
    return [name for name, module in PUBLIC.items() if name in MAKERS and importlib.util.find_spec(module)]


def states_equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )


def settings(model: Any) -> dict[str, Any]:
    return {name: value for name, value in model.config.items() if not name.startswith("_")}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", models())
def test_the_peers_files_are_loaded(name: str, form: str, tmp_path: Path) -> None:
    options = FORMATS[form]
    MAKERS[name]().save_pretrained(tmp_path, **options)
    cls = getattr(suffuse, name)
    assert issubclass(cls, ModelMixin)
    for dtype in (None, torch.float16):
        theirs = getattr(diffusers, name).from_pretrained(tmp_path, variant=options.get("variant"), torch_dtype=dtype)
        ours = cls.from_pretrained(tmp_path, variant=options.get("variant"), torch_dtype=dtype)
        assert states_equal(ours, theirs)
        assert ours.dtype == theirs.dtype
        assert ours.num_parameters() == theirs.num_parameters()
        assert [p.requires_grad for p in ours.parameters()] == [p.requires_grad for p in theirs.parameters()]
        assert ours.training == theirs.training


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", models())
def test_the_peer_loads_our_files(name: str, form: str, tmp_path: Path) -> None:
    options, theirs = FORMATS[form], getattr(diffusers, name)
    variant = options.get("variant")
    MAKERS[name]().save_pretrained(tmp_path / "theirs", **options)
    getattr(suffuse, name).from_pretrained(tmp_path / "theirs", variant=variant).save_pretrained(tmp_path / "ours", **options)
    ours, original = (theirs.from_pretrained(tmp_path / folder, variant=variant) for folder in ("ours", "theirs"))
    assert states_equal(ours, original)
    assert settings(ours) == settings(original)


@pytest.mark.parametrize("form", ["one file", "a variant"])
@pytest.mark.parametrize("name", models())
def test_our_files_are_the_peers_byte_for_byte(name: str, form: str, tmp_path: Path) -> None:
    MAKERS[name]().save_pretrained(tmp_path / "theirs", **FORMATS[form])
    variant = FORMATS[form].get("variant")
    getattr(suffuse, name).from_pretrained(tmp_path / "theirs", variant=variant).save_pretrained(
        tmp_path / "ours", variant=variant
    )
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == sorted([*names, "SHA256SUMS"])
    (weights,) = (name for name in names if name != "config.json")
    assert (tmp_path / "ours" / weights).read_bytes() == (tmp_path / "theirs" / weights).read_bytes()


@pytest.mark.skipif("AutoencoderKL" not in models(), reason="needs the model")
def test_the_early_attention_names_of_autoencoders_are_read_as_the_peer_reads_them(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny.vae().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    early = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(path)
    for name in list(tensors):
        for new, old in early.items():
            if f".attentions.0.{new}." in name:
                tensors[name.replace(new, old)] = tensors.pop(name)
    assert any("proj_attn" in name for name in tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert states_equal(suffuse.AutoencoderKL.from_pretrained(tmp_path), theirs)
