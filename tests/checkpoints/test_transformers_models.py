"""Models of transformers: equal to what they load themselves, and stricter about what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPVisionConfig, DPTConfig, T5Config

from suffuse.checkpoints.transformers_models import load_transformers_model
from suffuse.errors import ConfigError, CorruptFileError, MissingFileError, NonFiniteError, WeightsMismatchError

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
TEXT = CLIPTextConfig(**SIZES, num_hidden_layers=2, vocab_size=99, projection_dim=32, bos_token_id=97, eos_token_id=98)
VISION = CLIPVisionConfig(**SIZES, num_hidden_layers=2, image_size=32, patch_size=8, projection_dim=32)
DEPTH = DPTConfig(
    **SIZES,
    num_hidden_layers=4,
    image_size=32,
    patch_size=8,
    neck_hidden_sizes=[8] * 4,
    backbone_out_indices=[0, 1, 2, 3],
    fusion_hidden_size=8,
)
T5 = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=99)
CLASSES = {
    "CLIPTextModel": TEXT,
    "CLIPTextModelWithProjection": TEXT,
    "CLIPVisionModelWithProjection": VISION,
    "DPTForDepthEstimation": DEPTH,
    "T5EncoderModel": T5,
    "T5ForConditionalGeneration": T5,
}


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32, **options: object) -> type:
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    cls(CLASSES[name]).to(dtype).save_pretrained(folder, **options)
    return cls


def assert_same(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    def tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
        return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers()])

    one, other = tensors(ours), tensors(theirs)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert tensor.requires_grad == other[name].requires_grad, name
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, "auto"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", CLASSES)
def test_every_tensor_is_what_transformers_loads(name: str, stored: torch.dtype, dtype: object, tmp_path: Path) -> None:
    cls = saved(name, tmp_path, stored)
    theirs = cls.from_pretrained(tmp_path, dtype=dtype)
    ours = load_transformers_model(cls, tmp_path, torch_dtype=dtype)
    assert_same(ours, theirs)
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.training is False
    ours.save_pretrained(tmp_path / "again")
    assert_same(cls.from_pretrained(tmp_path / "again", dtype=theirs.dtype), theirs)


@pytest.mark.parametrize(
    "options", [{"max_shard_size": "20KB"}, {"variant": "fp16"}, {"variant": "fp16", "max_shard_size": "20KB"}]
)
def test_shards_and_variants_are_read(options: dict[str, object], tmp_path: Path) -> None:
    cls = saved("CLIPTextModel", tmp_path, **options)
    variant = options.get("variant")
    theirs = cls.from_pretrained(tmp_path, variant=variant, dtype=torch.float32)
    assert_same(load_transformers_model(cls, tmp_path, variant=variant), theirs)


def test_early_files_with_prefix_and_position_ids_are_read(tmp_path: Path) -> None:
    cls = saved("CLIPTextModel", tmp_path)
    early = {f"text_model.{name}": tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    early["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(early, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = cls.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same(load_transformers_model(cls, tmp_path), theirs)
    (tmp_path / "model.safetensors").unlink()
    torch.save(early, tmp_path / "pytorch_model.bin")
    with pytest.warns(UserWarning, match="is a pickle"):
        assert_same(load_transformers_model(cls, tmp_path), theirs)


def test_none_means_float32_whatever_the_files_hold(tmp_path: Path) -> None:
    # transformers itself would keep float16 since its release 5, and a float32 UNet would then refuse its output.
    cls = saved("CLIPTextModel", tmp_path, torch.float16)
    assert load_transformers_model(cls, tmp_path).dtype == torch.float32


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    cls = saved("CLIPTextModel", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    norm = "final_layer_norm.weight"

    def alter(**changed: torch.Tensor | None) -> None:
        save_file({n: t for n, t in {**tensors, **changed}.items() if t is not None}, path, metadata={"format": "pt"})

    alter(**{norm: None})
    with pytest.raises(WeightsMismatchError, match=rf"1 tensors of CLIPTextModel are missing in .*{norm}"):
        load_transformers_model(cls, tmp_path)
    assert torch.equal(load_transformers_model(cls, tmp_path, allow_missing=["norm"]).final_layer_norm.weight, torch.ones(32))
    alter(**{norm: torch.ones(7)})
    with pytest.raises(WeightsMismatchError, match=rf"1 tensors .* do not fit CLIPTextModel: {norm}: \[7\], wanted \[32\]"):
        load_transformers_model(cls, tmp_path)
    alter(**{norm: torch.full((32,), torch.nan)})
    with pytest.raises(NonFiniteError, match=rf"tensor '{norm}' holds NaN"):
        load_transformers_model(cls, tmp_path)
    alter(**{norm: torch.full((32,), 1e6)})
    with pytest.raises(NonFiniteError, match=rf"tensor '{norm}' holds NaN or infinity as float16"):
        load_transformers_model(cls, tmp_path, torch_dtype=torch.float16)
    alter(extra=torch.ones(1))
    with pytest.warns(UserWarning, match="does not know and ignores 1 tensors of .*: extra"):
        load_transformers_model(cls, tmp_path)
    with pytest.raises(WeightsMismatchError, match=r"1 tensors .* unknown to CLIPTextModel: extra"):
        load_transformers_model(cls, tmp_path, strict=True)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CorruptFileError, match="is cut"):
        load_transformers_model(cls, tmp_path)
    path.unlink()
    with pytest.raises(MissingFileError, match=r"no weights in [\s\S]*model\.safetensors or pytorch_model\.bin"):
        load_transformers_model(cls, tmp_path)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_whole_numbers_for_weights_are_refused(prefix: str, tmp_path: Path) -> None:
    cls = saved("CLIPTextModel", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "final_layer_norm.weight"
    tensors = {f"{prefix}{key.removeprefix('text_model.')}": tensor for key, tensor in tensors.items()}
    save_file({**tensors, f"{prefix}{name}": tensors[f"{prefix}{name}"].long()}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsMismatchError, match=r"final_layer_norm.weight' holds whole numbers"):
        load_transformers_model(cls, tmp_path)


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_attn_implementation_internal"])
def test_a_configuration_cannot_name_code_to_fetch(key: str, tmp_path: Path) -> None:
    cls = saved("CLIPTextModel", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changed in ({key: "someone/attention"}, {"text_config": {key: "someone/attention:forward"}}):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changed}))
        with pytest.raises(ConfigError, match="is not allowed"):
            load_transformers_model(cls, tmp_path)


def test_a_configuration_that_transformers_refuses_is_named(tmp_path: Path) -> None:
    cls = saved("CLIPTextModel", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": "wide"}))
    with pytest.raises(ConfigError, match=r"config\.json: transformers makes no CLIPTextModel of it"):
        load_transformers_model(cls, tmp_path)
