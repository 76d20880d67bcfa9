"""The public names, keywords and defaults of diffusers 0.26.3, by introspection."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pytest

import suffuse
from suffuse.public_names import PUBLIC

CONTRACT = json.loads((Path(__file__).parent / "contract.json").read_text())
CLASSES = sorted(PUBLIC.keys() & CONTRACT.keys())
LATER = ("add_adapter", "single_file", "attn_procs", "cpu_offload")
"""Parts of method names that belong to what is not here yet."""
UNSPOKEN = {"get_config_dict", "check_inputs", "prepare_latents", "register_to_config"}
UNSPOKEN |= {"prepare_mask_latents", "convert_state_dict_legacy_attn_format"}
UNSPOKEN |= {
    "crop",
    "target_size_center_crop",
    "draw_inpaint_mask_from_boxes",
    "complete_mask",
    "get_clip_feature",
    "enable_fuser",
}
UNSPOKEN |= {"get_cross_attention_kwargs_with_grounded", "get_cross_attention_kwargs_without_grounded"}
UNSPOKEN |= {
    "pred_epsilon",
    "pred_x0",
    "sag_masking",
    "perform_safety_guidance",
    "auto_corr_loss",
    "kl_divergence",
    "register_attention_control",
}
UNSPOKEN |= {"check_source_inputs", "prepare_image_latents"}
"""Steps inside the peer's methods that nobody calls by name; here they are parts of other shape."""


def plain(value):
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, (int, float, str, bool)) else str(value)


def spoken(name: str) -> bool:
    return name not in UNSPOKEN and not any(part in name for part in LATER)


@pytest.mark.parametrize("name", CLASSES)
def test_init_takes_the_same_keywords_in_the_same_order(name):
    wanted = [p for p in CONTRACT[name]["init"] if p["kind"] == "positional_or_keyword"]
    parameters = list(inspect.signature(getattr(suffuse, name).__init__).parameters.values())[1:]
    assert [p.name for p in parameters[: len(wanted)]] == [p["name"] for p in wanted]
    for mine, theirs in zip(parameters, wanted, strict=False):
        if "default" in theirs:
            assert plain(mine.default) == theirs["default"], mine.name
    assert all(p.default is not p.empty for p in parameters[len(wanted) :] if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


METHODS = [(name, method) for name in CLASSES for method in CONTRACT[name]["methods"] if spoken(method)]


@pytest.mark.parametrize(("name", "method"), METHODS)
def test_methods_take_the_same_keywords(name, method):
    wanted = [p for p in CONTRACT[name]["methods"][method] if p["kind"] == "positional_or_keyword"]
    function = getattr(getattr(suffuse, name), method)
    if not callable(function):  # the table has some classes from their source alone, where a property looks like a method
        assert wanted == []
        return
    parameters = inspect.signature(function).parameters
    for theirs in wanted:
        if not spoken(theirs["name"]):
            continue
        assert theirs["name"] in parameters, f"{name}.{method} has no {theirs['name']}"
        if "default" in theirs:
            assert plain(parameters[theirs["name"]].default) == theirs["default"], theirs["name"]


@pytest.mark.parametrize("name", CLASSES)
def test_properties_are_there(name):
    kind = getattr(suffuse, name)
    assert [p for p in CONTRACT[name].get("properties", []) if spoken(p) and not hasattr(kind, p) and p != "lora_scale"] == []


@pytest.mark.parametrize("name", [name for name in CLASSES if "_callback_tensor_inputs" in CONTRACT[name]])
def test_pipelines_declare_what_the_peers_do(name):
    kind, contract = getattr(suffuse, name), CONTRACT[name]
    theirs = {each["name"] for each in contract["init"]}
    own = {component for component in kind.component_names() if component not in theirs}
    optional = [component for component in kind._optional_components if component not in own]
    assert kind._callback_tensor_inputs == contract["_callback_tensor_inputs"]
    assert optional == contract.get("_optional_components", optional)
    assert [part for part in kind.model_cpu_offload_seq.split("->") if part not in own] == contract[
        "model_cpu_offload_seq"
    ].split("->")
