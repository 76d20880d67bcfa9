"""Every pipeline that looks at pictures has an image encoder, shared and saved like any component."""

from __future__ import annotations

import copy
import inspect
import json
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tasks import difference, mask, pair, picture

import suffuse
from suffuse.public_names import PUBLIC

sys.path.append(str(Path(__file__).parent.parent / "adapters"))
from image_weights import image_encoder, ip_adapter

CONTRACT = json.loads((Path(__file__).parent.parent / "contract.json").read_text())


def takes(name: str, keyword: str) -> bool:
    """Whether a pipeline takes a keyword."""
    kind = getattr(suffuse, name)
    return (
        PUBLIC[name].startswith("suffuse.pipelines.")
        and isinstance(kind, type)
        and issubclass(kind, suffuse.DiffusionPipeline)
        and keyword in inspect.signature(kind.__call__).parameters
    )


LOOKING = sorted(name for name in PUBLIC if takes(name, "ip_adapter_image"))
ALONE = [
    name for name in LOOKING if "image_encoder" not in {each["name"] for each in CONTRACT[name]["init"]} and "XL" not in name
]
"""Those whose class in diffusers takes pictures and has nothing to look at them with."""

CALLS: dict[str, dict[str, Any]] = {
    "StableDiffusionAttendAndExcitePipeline": {
        "token_indices": [2],
        "attn_res": (16, 12),
        "max_iter_to_alter": 0,
        "thresholds": {},
    },
    "CycleDiffusionPipeline": {"source_prompt": "a dog", "image": picture(64, 48)},
    "StableDiffusionInpaintPipelineLegacy": {"image": picture(64, 48), "mask_image": mask(64, 48)},
}
"""What some must be told besides."""
SCHEDULERS = {"StableDiffusionParadigmsPipeline": "DDIMParallelScheduler"}


@cache
def plain() -> Any:
    """Text to image with an adapter that is loaded."""
    parts = pair("text")[1].components | {"image_encoder": image_encoder(), "feature_extractor": tiny.image_processor()}
    parts["scheduler"] = suffuse.DDIMScheduler.from_config(tiny.scheduler().config)
    parts["unet"] = copy.deepcopy(parts["unet"])
    made = suffuse.StableDiffusionPipeline(**parts | {"safety_checker": None}, requires_safety_checker=False)
    made.load_ip_adapter(ip_adapter(pair("text")[0].unet), "", "")
    return made


def of(name: str) -> Any:
    """A pipeline of a class that shares the parts of the plain one."""
    scheduler = getattr(suffuse, SCHEDULERS.get(name, "DDIMScheduler")).from_config(plain().scheduler.config)
    return getattr(suffuse, name).from_pipe(plain(), scheduler=scheduler)


def draw(pipe: Any, **options: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 48} if takes(type(pipe).__name__, "height") else {}
    told = {"prompt": "a cat", "num_inference_steps": 3, "output_type": "pt", "return_dict": False, **size}
    seeded = {"generator": torch.Generator().manual_seed(7)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.meshgrid")
        return pipe(**told, **CALLS.get(type(pipe).__name__, {}), **seeded, **options)[0]


@pytest.mark.parametrize("name", LOOKING)
def test_who_looks_at_pictures_has_an_image_encoder(name):
    assert "image_encoder" in getattr(suffuse, name).component_names()


@pytest.mark.parametrize("name", ALONE)
def test_it_is_optional_and_waits_elsewhere_when_models_take_turns(name):
    kind = getattr(suffuse, name)
    assert inspect.signature(kind.__init__).parameters["image_encoder"].default is None
    assert "image_encoder" in kind._optional_components
    assert "image_encoder" in kind.model_cpu_offload_seq.split("->")


@pytest.mark.parametrize("name", ALONE)
def test_an_adapter_of_the_plain_pipeline_goes_on_working(name):
    pipe = of(name)
    assert pipe.image_encoder is plain().image_encoder
    first, other = (draw(pipe, ip_adapter_image=picture(seed=seed)) for seed in (1, 2))
    assert difference(first, other) > 1e-4
    assert difference(first, draw(pipe, ip_adapter_image=picture(seed=1))) == 0


@pytest.mark.parametrize("name", ALONE)
def test_it_is_saved_and_loaded(name, tmp_path):
    pipe = of(name)
    before = draw(pipe, ip_adapter_image=picture(seed=1))
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "image_encoder" / "model.safetensors").is_file()
    again = getattr(suffuse, name).from_pretrained(tmp_path)
    assert again.image_encoder is not pipe.image_encoder
    again.load_ip_adapter(ip_adapter(pair("text")[0].unet), "", "")
    assert difference(before, draw(again, ip_adapter_image=picture(seed=1))) == 0


@pytest.mark.parametrize("name", ALONE)
def test_a_folder_without_one_is_as_ever(name, tmp_path):
    pipe = of(name)
    pipe.image_encoder = None
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "image_encoder").exists()
    assert "image_encoder" not in json.loads((tmp_path / "model_index.json").read_text())
    again = getattr(suffuse, name).from_pretrained(tmp_path)
    assert again.image_encoder is None
    plain().set_ip_adapter_scale(0.0)
    try:
        assert difference(draw(again), draw(of(name))) == 0
    finally:
        plain().set_ip_adapter_scale(1.0)


@pytest.mark.parametrize("name", ALONE)
def test_the_parameters_of_diffusers_come_first(name):
    theirs = [each["name"] for each in CONTRACT[name]["init"] if each["kind"] == "positional_or_keyword"]
    assert list(inspect.signature(getattr(suffuse, name).__init__).parameters)[1:] == [*theirs, "image_encoder"]


@pytest.mark.parametrize("name", ALONE)
def test_what_diffusers_does_not_know_is_written_only_if_it_is_there(name):
    kind = getattr(suffuse, name)
    known = {each["name"] for each in CONTRACT[name]["init"]}
    assert {*kind._only_here} == {*kind.component_names()} - known
