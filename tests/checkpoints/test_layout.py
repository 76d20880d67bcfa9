"""Which files of a folder are the weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from suffuse.checkpoints.layout import DIFFUSERS, TRANSFORMERS, component_variants, find_weights, superseded, variants_in
from suffuse.errors import AmbiguousCheckpointError, ConfigError, InputError, MissingFileError, PathEscapeError
from suffuse.files import check_inside, local_folder

STEM = "diffusion_pytorch_model"
INDEXES = {
    None: f"{STEM}.safetensors.index.json",
    "as written now": f"{STEM}.safetensors.index.fp16.json",
    "as other libraries write it": f"{STEM}.fp16.safetensors.index.json",
    "as written before": f"{STEM}.safetensors.fp16.index.json",
}


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def write_index(folder: Path, name: str, weight_map: object, **more: object) -> None:
    (folder / name).write_text(json.dumps({"weight_map": weight_map, **more}))


@pytest.mark.parametrize(
    ("names", "options", "chosen"),
    [
        ([f"{STEM}.safetensors", f"{STEM}.bin"], {}, f"{STEM}.safetensors"),
        ([f"{STEM}.safetensors", f"{STEM}.bin"], {"use_safetensors": False}, f"{STEM}.bin"),
        ([f"{STEM}.bin"], {}, f"{STEM}.bin"),
        ([f"{STEM}.safetensors", f"{STEM}.fp16.safetensors"], {"variant": "fp16"}, f"{STEM}.fp16.safetensors"),
        ([f"{STEM}.safetensors", f"{STEM}.fp16.bin"], {"variant": "fp16"}, f"{STEM}.fp16.bin"),
        (["model.safetensors", "pytorch_model.bin"], {"naming": TRANSFORMERS}, "model.safetensors"),
        (["pytorch_model.bin"], {"naming": TRANSFORMERS}, "pytorch_model.bin"),
    ],
)
def test_safetensors_and_the_variant_asked_for_are_chosen(
    names: list[str], options: dict[str, object], chosen: str, tmp_path: Path
) -> None:
    assert [path.name for path in find_weights(touch(tmp_path, *names), **options).paths] == [chosen]


@pytest.mark.parametrize("spelling", INDEXES)
def test_shards_are_found_by_every_spelling_of_their_index(spelling: str | None, tmp_path: Path) -> None:
    touch(tmp_path, "one.safetensors", "two.safetensors")
    write_index(tmp_path, INDEXES[spelling], {"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"})
    found = find_weights(tmp_path, variant="fp16" if spelling else None)
    assert [path.name for path in found.paths] == ["one.safetensors", "two.safetensors"]


def test_missing_weights_are_told_with_what_is_there(tmp_path: Path) -> None:
    touch(tmp_path, "config.json", f"{STEM}.fp16.safetensors")
    with pytest.raises(MissingFileError, match=r"no weights in[\s\S]*config\.json[\s\S]*variant='fp16'"):
        find_weights(tmp_path)
    with pytest.raises(MissingFileError, match=r"of variant 'bf16'[\s\S]*try variant='fp16', no variant"):
        find_weights(tmp_path, variant="bf16")
    touch(tmp_path, f"{STEM}.bin")
    with pytest.raises(MissingFileError, match="no weights in"):
        find_weights(tmp_path, use_safetensors=True)
    with pytest.raises(InputError, match="variant is no name"):
        find_weights(tmp_path, variant="../fp16")


@pytest.mark.parametrize("name", ["../x.bin", "/etc/x.bin", "a/../../x.bin", r"..\x.bin", "C:x", "\\x", "nul\0", ""])
def test_an_index_that_leads_out_of_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    write_index(tmp_path, f"{STEM}.safetensors.index.json", {"a": name})
    with pytest.raises(PathEscapeError, match="leads out of the folder"):
        find_weights(tmp_path)
    with pytest.raises(PathEscapeError, match="leads out"):
        check_inside(tmp_path, name)


@pytest.mark.parametrize("weight_map", [["a"], {}, {"a": 1}, None])
def test_an_index_without_a_map_is_refused(weight_map: object, tmp_path: Path) -> None:
    write_index(tmp_path, f"{STEM}.safetensors.index.json", weight_map)
    with pytest.raises(ConfigError, match="is no shard index"):
        find_weights(tmp_path)


def test_an_index_cannot_lead_from_safetensors_to_a_pickle(tmp_path: Path) -> None:
    touch(tmp_path, "x.bin")
    write_index(tmp_path, f"{STEM}.safetensors.index.json", {"a": "x.bin"})
    with pytest.raises(ConfigError, match="another format"):
        find_weights(tmp_path)


def test_absent_shards_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "one.safetensors")
    write_index(tmp_path, f"{STEM}.safetensors.index.json", {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(MissingFileError, match=r"1 files that are not there: two\.safetensors[\s\S]*one\.safetensors"):
        find_weights(tmp_path)


def test_shards_beside_a_single_file_must_hold_the_same(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(4.0), "b": torch.ones(2)}
    save_file(tensors, tmp_path / f"{STEM}.safetensors")
    save_file({"a": tensors["a"]}, tmp_path / "one.safetensors")
    save_file({"b": tensors["b"]}, tmp_path / "two.safetensors")
    write_index(tmp_path, f"{STEM}.safetensors.index.json", {"a": "one.safetensors", "b": "two.safetensors"})
    assert len(find_weights(tmp_path).paths) == 2
    for other in (torch.zeros(2), torch.ones(3), torch.ones(2, dtype=torch.float16)):
        save_file({"b": other}, tmp_path / "two.safetensors")
        with pytest.raises(AmbiguousCheckpointError, match="two different sets of weights"):
            find_weights(tmp_path)


def test_a_variant_that_some_components_have_is_used_where_it_is(tmp_path: Path) -> None:
    touch(tmp_path, f"unet/{STEM}.fp16.safetensors", f"unet/{STEM}.safetensors", f"vae/{STEM}.safetensors")
    components = {name: (DIFFUSERS, [path.name for path in (tmp_path / name).iterdir()]) for name in ("unet", "vae")}
    with pytest.warns(UserWarning, match="vae in .* have no weights of variant 'fp16'"):
        assert component_variants(tmp_path, components, "fp16") == {"unet": "fp16", "vae": None}
    assert component_variants(tmp_path, components, None) == {"unet": None, "vae": None}
    with pytest.raises(MissingFileError, match=r"no component .* variant 'ema'[\s\S]*fp16"):
        component_variants(tmp_path, components, "ema")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_save_supersedes_its_own_variant_in_every_format_and_no_other(variant: str | None) -> None:
    def names(dot: str, middle: str) -> set[str]:
        index = {f"{STEM}.{suffix}.index{dot}.json" for suffix in ("safetensors", "bin")}
        return index | {f"{STEM}{dot}{middle}.{suffix}" for suffix in ("safetensors", "bin")}

    own = names(f".{variant}" if variant else "", "") | names(f".{variant}" if variant else "", "-00001-of-00002")
    others = names("", "") | names(".fp16", "-00001-of-00002") | names(".ema", "") | {"config.json", "README.md"}
    matched = superseded(DIFFUSERS, variant)
    assert all(matched.fullmatch(name) for name in own)
    assert not any(matched.fullmatch(name) for name in others - own)


def test_variants_are_read_off_the_names(tmp_path: Path) -> None:
    touch(tmp_path, f"{STEM}.fp16.bin", f"{STEM}-00001-of-00002.safetensors", f"{STEM}.ema-00001-of-00002.safetensors")
    touch(tmp_path, f"{STEM}-00001-of-00002.old.safetensors", "config.json")
    assert variants_in(tmp_path) == ["ema", "fp16", "old"]


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "unet/config.json", "file")
    assert local_folder(tmp_path, "unet") == tmp_path / "unet"
    with pytest.raises(MissingFileError, match=r"no folder 'vae'[\s\S]*unet"):
        local_folder(tmp_path, "vae")
    with pytest.raises(MissingFileError, match="is a file, not a folder"):
        local_folder(tmp_path / "file")
    with pytest.raises(PathEscapeError, match="leads out"):
        local_folder(tmp_path, "../x")


def test_loading_needs_neither_transformers_nor_accelerate() -> None:
    program = (
        "import sys, suffuse.models.model; print(sorted({'transformers', 'accelerate', 'scipy', 'diffusers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
