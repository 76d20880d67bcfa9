"""Weights into modules: what fits, what is refused and how it is said."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from suffuse.checkpoints.layout import DIFFUSERS
from suffuse.checkpoints.reading import finite
from suffuse.checkpoints.saving import split_shards, write_safetensors, write_weights
from suffuse.checkpoints.weights import unfilled
from suffuse.configuration import register_to_config
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
from suffuse.files import parse_size
from suffuse.models.model import ModelMixin

WEIGHTS = "diffusion_pytorch_model.safetensors"


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.5)])


class Small(ModelMixin):
    """Has one of everything: ties, integers, buffers that are kept and buffers that are not, a scalar."""

    _keep_in_fp32_modules = ["norm"]
    _keys_to_ignore_on_load_unexpected = [r"position_ids$"]

    @register_to_config
    def __init__(self, width: int = 6, depth: int = 1):
        super().__init__()
        self.embedding = nn.Embedding(5, width)
        self.head = nn.Linear(width, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.layers = nn.ModuleList(Attention(width) for _ in range(depth))
        self.norm = nn.BatchNorm2d(width)
        self.scale = nn.Parameter(torch.randn(()))
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("frequencies", torch.arange(4.0), persistent=False)
        self.register_buffer("ones", torch.empty(2).fill_(1.0), persistent=False)


@pytest.fixture
def small() -> Small:
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture
def folder(small: Small, tmp_path: Path) -> Path:
    small.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def alter(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors of the file; None takes them out."""
    changed = {**load_file(folder / WEIGHTS), **tensors}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, folder / WEIGHTS)


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
        return {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}

    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert tensor.requires_grad == theirs[name].requires_grad, name
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("options", [{}, {"max_shard_size": 200}, {"safe_serialization": False}, {"variant": "fp16"}])
@pytest.mark.filterwarnings("ignore:.*is a pickle")
def test_what_is_saved_is_loaded(options: dict[str, object], small: Small, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path, **options)
    loaded, info = Small.from_pretrained(tmp_path, variant=options.get("variant"), output_loading_info=True)
    assert_equal(loaded, small)
    assert loaded.head.weight is loaded.embedding.weight
    assert not loaded.training
    assert loaded.config._name_or_path == str(tmp_path)
    assert info == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}


def test_sharded_pickles_are_found_and_read(small: Small, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path, safe_serialization=False, max_shard_size=200)
    assert (tmp_path / "diffusion_pytorch_model.bin.index.json").exists()
    with pytest.warns(UserWarning, match="is a pickle"):
        assert_equal(Small.from_pretrained(tmp_path), small)


@pytest.mark.parametrize("dtype", [torch.float16, "bfloat16", "torch.float64", "auto", None])
def test_floats_take_the_type_asked_for_and_the_rest_keeps_its_own(dtype: object, small: Small, tmp_path: Path) -> None:
    small.half().save_pretrained(tmp_path)
    loaded = Small.from_pretrained(tmp_path, torch_dtype=dtype)
    names = {"bfloat16": torch.bfloat16, "torch.float64": torch.float64, "auto": torch.float16, None: torch.float32}
    assert loaded.dtype == names.get(dtype, dtype)
    assert torch.equal(loaded.layers[0].to_q.weight, small.layers[0].to_q.weight.to(loaded.dtype))
    assert loaded.norm.weight.dtype == loaded.norm.running_mean.dtype == torch.float32
    assert loaded.norm.num_batches_tracked.dtype == torch.int64
    assert loaded.frequencies.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int64, "float99", "nn", 3])
def test_a_type_that_is_no_float_is_refused(dtype: object, folder: Path) -> None:
    with pytest.raises(InputError, match="torch_dtype is no floating point type"):
        Small.from_pretrained(folder, torch_dtype=dtype)


def test_missing_tensors_are_counted_and_named(folder: Path) -> None:
    alter(folder, **{"scale": None, "layers.0.to_q.bias": None})
    with pytest.raises(WeightsMismatchError, match=r"2 of the 17 tensors of Small are missing in .*layers\.0\.to_q\.bias"):
        Small.from_pretrained(folder)
    with pytest.raises(WeightsMismatchError, match="1 of the 17"):
        Small.from_pretrained(folder, allow_missing=["to_q"])


def test_tensors_allowed_to_be_missing_get_the_same_initial_values_every_time(folder: Path) -> None:
    alter(folder, **{"scale": None, "layers.0.to_q.bias": None, "norm.running_var": None})
    loaded: list[Small] = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with pytest.warns(UserWarning, match="has with initial values only 3 tensors"):
            loaded.append(Small.from_pretrained(folder, allow_missing=["scale", "to_q", "running_var"]))
    assert_equal(*loaded)
    assert torch.equal(loaded[0].norm.running_var, torch.ones(6))
    assert not any(tensor.is_meta for tensor in (*loaded[0].parameters(), *loaded[0].buffers()))


def test_all_missing_says_what_the_file_has_instead(folder: Path) -> None:
    save_file({f"module.{name}": t for name, t in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    with pytest.raises(WeightsMismatchError, match=r"17 of the 17.* and 7 more[\s\S]*module\."):
        Small.from_pretrained(folder)


def test_a_shard_without_a_tensor_of_the_index_is_a_mismatch(small: Small, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path, max_shard_size=200)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    tensors = load_file(shard)
    removed = tensors.pop(next(iter(tensors)))
    assert removed.numel()
    save_file(tensors, shard)
    with pytest.raises(WeightsMismatchError, match="1 of the 17 tensors"):
        Small.from_pretrained(tmp_path)


def test_tensors_left_over_are_warned_about_once_or_raised(folder: Path) -> None:
    alter(folder, extra=torch.ones(1), position_ids=torch.ones(1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Small.from_pretrained(folder)
    assert [str(warning.message).split(" of ")[0] for warning in caught] == ["Small does not know and ignores 1 tensors"]
    assert caught[0].filename == __file__
    with pytest.raises(WeightsMismatchError, match=r"1 tensors in .* are unknown to Small: extra$"):
        Small.from_pretrained(folder, strict=True)


def test_other_shapes_and_kinds_of_numbers_are_told_with_both_sides(folder: Path) -> None:
    alter(folder, scale=torch.ones(3), kept=torch.ones(3, dtype=torch.int64))
    with pytest.raises(WeightsMismatchError, match=r"2 tensors .* kept: int64 \[3\], wanted float32 \[3\]; scale: float32 \[3\]"):
        Small.from_pretrained(folder)
    with pytest.raises(WeightsMismatchError, match="kept: int64"):
        Small.from_pretrained(folder, ignore_mismatched_sizes=True)
    alter(folder, kept=torch.ones(3))
    with pytest.warns(UserWarning, match="initial values only 1 tensors"):
        loaded, info = Small.from_pretrained(folder, ignore_mismatched_sizes=True, output_loading_info=True)
    assert info["mismatched_keys"] == [("scale", (3,), ())]
    assert torch.isfinite(loaded.scale)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(value: float, small: Small, folder: Path) -> None:
    bias = small.layers[0].to_v.bias.detach().clone()
    bias[3] = value
    alter(folder, **{"layers.0.to_v.bias": bias})
    with pytest.raises(NonFiniteError, match=r"tensor 'layers\.0\.to_v\.bias' holds NaN or infinity"):
        Small.from_pretrained(folder)


def test_overflow_in_a_narrow_type_is_refused(folder: Path) -> None:
    alter(folder, scale=torch.tensor(1e6))
    with pytest.raises(NonFiniteError, match="'scale' holds NaN or infinity as float16"):
        Small.from_pretrained(folder, torch_dtype=torch.float16)
    assert Small.from_pretrained(folder, torch_dtype=torch.bfloat16).scale == torch.tensor(1e6).bfloat16()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "float8_e5m2", "float8_e4m3fn"])
def test_every_value_of_a_type_is_told_finite_or_not(dtype: str) -> None:
    dtype = getattr(torch, dtype)
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    wide = {8: bits[:256].to(torch.int8), 16: bits, 32: bits.int() << 16, 64: bits.long() << 48}[dtype.itemsize * 8]
    values = wide.view(dtype)
    expected = torch.isfinite(values.double())
    assert finite(values[expected])
    assert not any(finite(values[index : index + 1]) for index in (~expected).nonzero().flatten()[::7])
    many = torch.ones(300_001).to(dtype)
    assert finite(many)
    many[-1] = float("nan")
    assert not finite(many)
    assert finite(torch.empty(0, dtype=dtype))


def test_early_names_of_attention_are_understood(small: Small, folder: Path) -> None:
    early = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(folder / WEIGHTS)
    for new, old in early.items():
        for part in ("weight", "bias"):
            tensors[f"layers.0.{old}.{part}"] = tensors.pop(f"layers.0.{new}.{part}")
    save_file(tensors, folder / WEIGHTS)
    assert_equal(Small.from_pretrained(folder), small)


def test_configuration_entries_may_be_given_and_nothing_else(small: Small, tmp_path: Path) -> None:
    Small(width=4).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "width": 6}))
    assert Small.from_pretrained(tmp_path, width=4).config.width == 4
    with pytest.raises(UnknownArgumentError, match="did you mean 'variant'"):
        Small.from_pretrained(tmp_path, varaint="fp16")
    with pytest.raises(UnknownArgumentError, match="did you mean 'width'"):
        Small.from_pretrained(tmp_path, widht=4)


def test_the_configuration_of_another_class_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderKL"}))
    with pytest.raises(ConfigError, match=r"describes another class[\s\S]*AutoencoderKL"):
        Small.from_pretrained(folder)


def test_the_folder_or_its_parts_may_be_missing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="is not a folder here"):
        Small.from_pretrained(tmp_path / "absent")
    assert Small.from_pretrained(tmp_path, subfolder="small").config.width == 6
    (folder / WEIGHTS).unlink()
    with pytest.raises(MissingFileError, match=r"no weights in .*[\s\S]*config\.json"):
        Small.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(MissingFileError, match=r"no file .*config\.json"):
        Small.from_pretrained(folder)


def test_devices_are_given_whole_or_by_prefix(folder: Path) -> None:
    assert Small.from_pretrained(folder, device_map="cpu").device == torch.device("cpu")
    assert Small.from_pretrained(folder, device_map={"": "cpu", "layers": "cpu"}).device == torch.device("cpu")
    with pytest.raises(InputError, match="device_map names no device"):
        Small.from_pretrained(folder, device_map="sideways")


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch EXECUTED",)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", WEIGHTS])
def test_a_pickle_that_asks_for_more_than_tensors_is_refused(
    legacy: bool, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / WEIGHTS).unlink()
    if legacy:
        (folder / name).write_bytes(pickle.dumps({"scale": Evil()}))
    else:
        torch.save({"scale": Evil()}, folder / name)
    with warnings.catch_warnings(), pytest.raises(UnsafePickleError, match="nothing of it was run"):
        warnings.simplefilter("ignore")
        Small.from_pretrained(folder)
    assert not (folder / "EXECUTED").exists()


@pytest.mark.filterwarnings("ignore:.*is a pickle")
def test_a_damaged_pickle_is_named(small: Small, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path, safe_serialization=False)
    path = tmp_path / "diffusion_pytorch_model.bin"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"text", b"<html>"):
        path.write_bytes(content)
        with pytest.raises(CorruptFileError, match=r"diffusion_pytorch_model\.bin"):
            Small.from_pretrained(tmp_path)
    torch.save([1, 2], path)
    with pytest.raises(CorruptFileError, match="something else than named tensors"):
        Small.from_pretrained(tmp_path)


def test_nothing_of_the_file_is_needed_once_it_is_loaded(small: Small, folder: Path) -> None:
    loaded = Small.from_pretrained(folder)
    (folder / WEIGHTS).write_bytes(b"")
    shutil.rmtree(folder)
    assert_equal(loaded, small)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_mapping_on_request_loads_the_same_and_leaves_the_file_alone(dtype: torch.dtype, small: Small, folder: Path) -> None:
    before = (folder / WEIGHTS).read_bytes()
    mapped = Small.from_pretrained(folder, disable_mmap=False, torch_dtype=dtype)
    assert_equal(mapped, Small.from_pretrained(folder, torch_dtype=dtype))
    with torch.no_grad():
        mapped.embedding.weight.zero_()
    assert (folder / WEIGHTS).read_bytes() == before
    alter(folder, scale=torch.tensor(torch.nan))
    with pytest.raises(NonFiniteError, match="'scale' holds NaN"):
        Small.from_pretrained(folder, disable_mmap=False)


def test_modules_are_built_without_storage_in_this_thread_only() -> None:
    with unfilled(100):
        module = Small(width=512)
    assert module.layers[0].to_q.weight.is_meta
    assert torch.equal(module.frequencies, torch.arange(4.0))
    assert not Small().embedding.weight.is_meta


def test_our_bytes_are_those_of_the_reference_implementation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "wide": torch.randn(3, 4).double(), "whole": torch.arange(5), "zeta": torch.randn(2, 2), "half": torch.randn(7).half(),
        "brain": torch.randn(3).bfloat16(), "truth": torch.tensor([True, False]), "ünï": torch.randn(()),
        "none": torch.zeros(0, 4),
        "byte": torch.arange(3, dtype=torch.uint8), "eight": torch.randn(4).to(torch.float8_e4m3fn), "a": torch.randn(4, 6).t(),
        "five": torch.randn(4).to(torch.float8_e5m2), "short": torch.arange(3, dtype=torch.int16),
    }  # fmt: skip
    write_safetensors(tensors, tmp_path / "ours.safetensors")
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_saving_twice_gives_the_same_bytes(small: Small, folder: Path, tmp_path: Path) -> None:
    Small.from_pretrained(folder).save_pretrained(tmp_path / "again")
    for path in folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    assert str(tmp_path) not in (folder / "config.json").read_text()


def test_a_save_removes_its_own_other_formats_and_nothing_else(small: Small, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    small.save_pretrained(tmp_path, variant="fp16")
    small.save_pretrained(tmp_path, max_shard_size=200)
    small.save_pretrained(tmp_path, safe_serialization=False)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md", "SHA256SUMS", "config.json", "diffusion_pytorch_model.bin",
        "diffusion_pytorch_model.fp16.safetensors",
    }  # fmt: skip
    small.save_pretrained(tmp_path)
    assert not (tmp_path / "diffusion_pytorch_model.bin").exists()


def test_files_have_the_mode_the_user_asked_for(small: Small, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        small.save_pretrained(tmp_path / "small")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "small").iterdir()} == {0o640}
    assert (tmp_path / "small").stat().st_mode & 0o777 == 0o750


def test_a_function_of_the_user_may_write_the_files(small: Small, tmp_path: Path) -> None:
    written: list[str] = []
    small.save_pretrained(tmp_path, save_function=lambda tensors, path: (written.append(path.name), save_file(tensors, path)))
    assert written == [WEIGHTS]
    assert_equal(Small.from_pretrained(tmp_path), small)


def test_saving_refuses_what_it_cannot_do(small: Small, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="is a file"):
        small.save_pretrained(tmp_path / "file")
    small.save_pretrained(tmp_path / "small", is_main_process=False)
    with unfilled(100):
        empty = Small()
    with pytest.raises(SaveError, match="cannot be saved"):
        empty.save_pretrained(tmp_path / "small")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize(("size", "count"), [("10GB", 10**10), ("5GiB", 5 * 2**30), ("1.5MB", 1_500_000), (7, 7), ("2 kb", 2000)])
def test_sizes_are_read(size: int | str, count: int) -> None:
    assert parse_size(size, "max_shard_size") == count


@pytest.mark.parametrize("size", ["GB", "-1GB", 0, -5, "10 XB", True, "0B"])
def test_what_is_no_size_is_refused(size: object) -> None:
    with pytest.raises(InputError, match="max_shard_size is no size"):
        parse_size(size, "max_shard_size")


def test_shards_are_filled_in_order_and_large_tensors_stand_alone(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(count) for name, count in {"a": 2, "b": 9, "c": 2, "d": 1}.items()}
    assert [list(shard) for shard in split_shards(tensors, 16)] == [["b"], ["a", "c"], ["d"]]
    write_weights({}, tmp_path, DIFFUSERS)
    assert load_file(tmp_path / WEIGHTS) == {}


def test_dtype_device_and_size_are_told() -> None:
    class Bare(ModelMixin):
        @register_to_config
        def __init__(self):
            super().__init__()

    assert (Bare().dtype, Bare().device, Bare().num_parameters()) == (torch.float32, torch.device("cpu"), 0)
    small = Small().requires_grad_(False)
    small.scale.requires_grad_(True)
    assert small.num_parameters(only_trainable=True) == 1
    assert small.num_parameters() - small.num_parameters(exclude_embeddings=True) == 30


@pytest.mark.parametrize("operation", ["open", "write", "fsync", "replace", "rename", "chmod", "mkdir"])
def test_a_save_that_fails_anywhere_leaves_the_old_model(
    operation: str, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Small()
    genuine: Callable[..., object] = getattr(os, operation)
    for failing in range(200):
        small.save_pretrained(tmp_path / "small", max_shard_size=400)
        calls = iter(range(1000))

        def faulty(*args: object, calls: Iterator[int] = calls, failing: int = failing, **kwargs: object) -> object:
            if next(calls) == failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            return genuine(*args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(os, operation, faulty)
            try:
                other.save_pretrained(tmp_path / "small", max_shard_size=300)
                expected = other
            except SaveError:
                expected = small
        assert_equal(Small.from_pretrained(tmp_path / "small"), expected.eval())
        if expected is other and next(calls) <= failing:
            return
    pytest.fail("the loop must end with a save in which nothing failed")
