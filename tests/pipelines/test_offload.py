"""Models that wait elsewhere draw the same pictures; accelerate's CPU, disk and hooks stand in for an accelerator."""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tasks import TASKS, call, difference, folder, pair, set_scheduler

import suffuse
from suffuse.errors import InputError, LimitError, MissingPackageError
from suffuse.memory.placement import dispatch

WAYS = ("enable_model_cpu_offload", "enable_sequential_cpu_offload")


@pytest.fixture
def pipe():
    loaded = suffuse.DiffusionPipeline.from_pretrained(folder("text"))
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("task", TASKS)
def test_offloaded_models_draw_the_same(task, way):
    _, ours = pair(task)
    set_scheduler(pair(task), "DDIMScheduler")
    expected = call(ours, task)
    try:
        getattr(ours, way)(device="cpu")
        assert difference(call(ours, task), expected) <= 1e-5
        assert difference(call(ours, task), expected) <= 1e-5
    finally:
        ours.remove_all_hooks()
    assert difference(call(ours, task), expected) == 0


def test_parts_wait_without_storage_and_come_back_whole(pipe):
    weights = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    pipe.enable_sequential_cpu_offload(device="cpu")
    assert all(parameter.is_meta for parameter in pipe.unet.parameters())
    assert pipe._execution_device == torch.device("cpu")
    pipe.remove_all_hooks()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in pipe.unet.state_dict().items())


def test_each_model_sends_the_one_before_it_back_and_the_end_all(pipe, monkeypatch):
    order = []
    pipe.enable_model_cpu_offload(device="cpu")
    for hook in pipe._offloaded:
        model = type(hook.model).__name__
        monkeypatch.setattr(hook, "offload", lambda model=model, offload=hook.offload: (order.append(model), offload()))
    call(pipe, "text")
    assert order == ["CLIPTextModel", "UNet2DConditionModel", "AutoencoderKL"]
    assert [hook.hook.prev_module_hook for hook in pipe._offloaded] == [None, *pipe._offloaded[:-1]]


def test_an_offloaded_pipeline_is_not_moved_by_hand(pipe):
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(InputError, match=r"its models are offloaded(.|\n)*remove_all_hooks"):
        pipe.to("cpu")
    pipe.remove_all_hooks()
    assert pipe.to("cpu") is pipe


@pytest.mark.parametrize("way", WAYS)
def test_what_cannot_be_offloaded_to_is_told(way, pipe):
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match=rf"{way}: no device 'cuda'"):
            getattr(pipe, way)()
    with pytest.raises(InputError, match="gpu_id=1 and device='cpu:0' both name a number"):
        getattr(pipe, way)(gpu_id=1, device="cpu:0")
    assert not hasattr(pipe.unet, "_hf_hook")


def test_accelerate_is_asked_for_by_name(pipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingPackageError, match=r"pip install suffuse\[offload\]"):
        pipe.enable_sequential_cpu_offload(device="cpu")


def test_an_error_in_the_middle_sends_models_back(pipe):
    sent = []
    pipe.enable_model_cpu_offload(device="cpu")
    pipe._offloaded[0].offload = lambda: sent.append(True)

    def broken(*_: object) -> None:
        sent.clear()
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        pipe("a cat", num_inference_steps=2, callback_on_step_end=broken)
    assert sent == [True]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("way", WAYS)
def test_on_an_accelerator_memory_is_free_afterwards(way, pipe):
    on_cpu = call(pipe, "text")
    getattr(pipe, way)()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    assert difference(call(pipe, "text").cpu(), on_cpu) < 1e-2
    assert torch.cuda.memory_allocated() <= before + 2**20


# ---------------------------------------------------------------- whole models on several devices


def test_models_are_put_on_the_devices_of_a_map():
    expected = call(pair("text")[1], "text")
    for device_map in ("cpu", torch.device("cpu"), "balanced", {"unet": "cpu"}):
        pipe = suffuse.DiffusionPipeline.from_pretrained(folder("text"), device_map=device_map)
        pipe.set_progress_bar_config(disable=True)
        assert pipe.hf_device_map is None
        assert difference(call(pipe, "text"), expected) == 0


def test_what_hooked_models_compute_travels(pipe):
    expected = call(pipe, "text")
    for model in (pipe.unet, pipe.vae, pipe.text_encoder):
        dispatch(model, {"": "cpu"})
    assert pipe._execution_device == torch.device("cpu")
    assert difference(call(pipe, "text"), expected) <= 1e-5
    with pytest.raises(InputError, match="remove_all_hooks"):
        pipe.to("cpu")
    pipe.reset_device_map()
    assert not hasattr(pipe.unet, "_hf_hook")
    assert pipe.to("cpu").hf_device_map is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_models_on_the_cpu_and_an_accelerator_draw_together():
    places = {"unet": 0, "vae": "cpu", "text_encoder": "cpu"}
    pipe = suffuse.DiffusionPipeline.from_pretrained(folder("text"), device_map=places)
    assert pipe.hf_device_map == places
    assert difference(call(pipe, "text").cpu(), call(pair("text")[1], "text")) < 1e-2


def test_balanced_keeps_to_what_may_be_taken():
    with pytest.raises(LimitError, match=r"unet fits on no device(.|\n)*max_memory"):
        suffuse.DiffusionPipeline.from_pretrained(folder("text"), device_map="balanced", max_memory={"cpu": "1MB"})
    suffuse.DiffusionPipeline.from_pretrained(folder("text"), device_map="balanced", max_memory={"cpu": "1GB"})


@pytest.mark.parametrize(
    ("device_map", "says"),
    [("gpu", "device_map names no device"), ({"unett": "cpu"}, "no model 'unett'"), ({"unet": "gpu"}, "no device")],
)
def test_what_is_no_map_is_told(device_map, says):
    with pytest.raises(InputError, match=says):
        suffuse.DiffusionPipeline.from_pretrained(folder("text"), device_map=device_map)


# ---------------------------------------------------------------- what offloaded models can and cannot do


@pytest.mark.parametrize("safe", [True, False])
def test_an_offloaded_pipeline_is_saved_whole(safe, pipe, tmp_path):
    weights = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    pipe.enable_sequential_cpu_offload(device="cpu")
    pipe.save_pretrained(tmp_path / "saved", safe_serialization=safe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = suffuse.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.unet.state_dict().items())
    pipe.remove_all_hooks()
    assert difference(call(again, "text"), call(pipe, "text")) <= 1e-5


@pytest.mark.parametrize("way", WAYS)
def test_threads_that_share_offloaded_models_take_turns(way, pipe):
    expected = call(pipe, "text")
    getattr(pipe, way)(device="cpu")
    with ThreadPoolExecutor(4) as pool:
        for picture in pool.map(lambda _: call(pipe, "text"), range(4)):
            assert difference(picture, expected) <= 1e-5


def test_what_an_offloaded_pipeline_refuses(pipe):
    pipe.enable_sequential_cpu_offload(device="cpu")
    for act in (lambda: pipe.to(torch.bfloat16), lambda: pickle.dumps(pipe), lambda: copy.deepcopy(pipe)):
        with pytest.raises(InputError, match="remove_all_hooks"):
            act()


def test_two_models_may_share_the_folder_they_are_offloaded_to(tmp_path):
    whole = suffuse.UNet2DConditionModel.from_pretrained(folder("text"), subfolder="unet")
    places = {**{name: "cpu" for name, _ in whole.named_children()}, "mid_block": "disk"}
    options = {"device_map": places, "offload_folder": tmp_path / "disk"}
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(0.1)
    whole.save_pretrained(tmp_path / "other")
    inputs = (torch.ones(1, 4, 8, 8), 3, torch.ones(1, 7, 32))
    first = suffuse.UNet2DConditionModel.from_pretrained(folder("text"), subfolder="unet", **options)
    with torch.no_grad():
        before = first(*inputs).sample
        suffuse.UNet2DConditionModel.from_pretrained(tmp_path / "other", **options)
        assert torch.equal(first(*inputs).sample, before)
    with pytest.raises(InputError, match="parts of the unet are on disk already"):
        suffuse.DiffusionPipeline.from_pretrained(folder("text"), unet=first).enable_model_cpu_offload(device="cpu")


@pytest.mark.parametrize("options", [{"device_map": "meta"}, {"device_map": "balanced", "max_memory": "10GB"}])
def test_devices_that_are_none_are_told(options):
    with pytest.raises(InputError, match=r"device_map names no device|max_memory has the wrong type"):
        suffuse.DiffusionPipeline.from_pretrained(folder("text"), **options)
