"""One model on several devices and on disk computes the same; which part goes where is told by a map or found."""

from __future__ import annotations

import itertools

import accelerate
import pytest
import tiny
import torch

import suffuse
from suffuse.errors import InputError, LimitError
from suffuse.memory.placement import STRATEGIES, share_out

INPUTS = {"sample": torch.linspace(-1, 1, 2 * 4 * 16 * 16).view(2, 4, 16, 16), "timestep": 3}
STATES = torch.linspace(-1, 1, 2 * 7 * tiny.WIDTH).view(2, 7, tiny.WIDTH)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("unet")
    tiny.unet().save_pretrained(path)
    return path


def predict(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**INPUTS, encoder_hidden_states=STATES).sample


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("share", [0.7, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_does_not_fit_goes_to_disk_and_is_read_when_it_is_used(strategy, share, dtype, folder, tmp_path):
    whole = suffuse.UNet2DConditionModel.from_pretrained(folder, torch_dtype=dtype)
    room = int(share * sum(parameter.nbytes for parameter in whole.parameters()))
    spread = suffuse.UNet2DConditionModel.from_pretrained(
        folder, torch_dtype=dtype, device_map=strategy, max_memory={"cpu": room}, offload_folder=tmp_path / "disk"
    )
    assert {*spread.hf_device_map.values()} == {"cpu", "disk"}
    in_memory = sum(parameter.nbytes for parameter in spread.parameters() if not parameter.is_meta)
    assert in_memory <= room
    assert list((tmp_path / "disk").rglob("*.dat"))
    if dtype is torch.float32:
        assert (predict(spread) - predict(whole)).abs().max() <= 1e-5


def test_everything_that_fits_stays_in_one_place(folder):
    model = suffuse.UNet2DConditionModel.from_pretrained(folder, device_map="auto", max_memory={"cpu": "1GB"})
    assert not hasattr(model, "_hf_hook")
    assert torch.equal(predict(model), predict(suffuse.UNet2DConditionModel.from_pretrained(folder)))


def test_a_map_may_send_parts_to_disk(folder, tmp_path):
    names = {name.split(".")[0] for name, _ in suffuse.UNet2DConditionModel.from_pretrained(folder).named_parameters()}
    devices = {**dict.fromkeys(names, "cpu"), "mid_block": "disk"}
    model = suffuse.UNet2DConditionModel.from_pretrained(folder, device_map=devices, offload_folder=tmp_path)
    assert all(parameter.is_meta is name.startswith("mid_block") for name, parameter in model.named_parameters())
    assert (predict(model) - predict(suffuse.UNet2DConditionModel.from_pretrained(folder))).abs().max() <= 1e-5


def test_a_residual_block_is_never_torn(folder, tmp_path):
    """accelerate's own loader, told the same classes, makes the same map."""
    with accelerate.init_empty_weights():
        empty = suffuse.UNet2DConditionModel.from_config(suffuse.UNet2DConditionModel.load_config(folder))
    expected = accelerate.infer_auto_device_map(
        empty, {"cpu": 10**6}, list(suffuse.UNet2DConditionModel._no_split_modules), dtype=torch.float32
    )
    model = suffuse.UNet2DConditionModel.from_pretrained(
        folder, device_map="sequential", max_memory={"cpu": 10**6}, offload_folder=tmp_path
    )
    assert model.hf_device_map == expected


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device_map": "sideways"}, "device_map names no device(.|\n)*balanced_low_0"),
        ({"device_map": {"": "nowhere"}}, "device_map names no device"),
        ({"device_map": "auto", "max_memory": {"cpu": "400KB"}}, "offload_folder=…"),
        ({"device_map": "auto", "max_memory": {"cpu": "lots"}}, "no size(.|\n)*lots"),
    ],
)
def test_what_is_no_map_is_told(options, says, folder):
    with pytest.raises(InputError, match=says):
        suffuse.UNet2DConditionModel.from_pretrained(folder, **options)


def test_models_are_shared_out_largest_first():
    sizes = {"vae": 1, "unet": 10, "text_encoder": 4, "text_encoder_2": 6}
    assert share_out(sizes, {0: "20B", 1: "20B"}) == {"unet": 0, "text_encoder_2": 1, "text_encoder": 1, "vae": 0}
    assert share_out(sizes, {0: "11B"}) == {"unet": 0, "text_encoder_2": "cpu", "text_encoder": "cpu", "vae": 0}
    assert share_out(sizes, {"cpu": "21B"}) == dict.fromkeys(sizes, "cpu")
    with pytest.raises(LimitError, match="text_encoder fits on no device"):
        share_out(sizes, {0: "10B", "cpu": "7B"})


@pytest.mark.parametrize("rooms", list(itertools.product([8, 12, 40], repeat=2)), ids=str)
def test_no_device_is_given_more_than_it_has(rooms):
    sizes = {"a": 9, "b": 7, "c": 5, "d": 3, "e": 1}
    placed = share_out(sizes, dict(enumerate(f"{room}B" for room in rooms)))
    assert placed.keys() == sizes.keys()
    for device, room in enumerate(rooms):
        assert sum(size for name, size in sizes.items() if placed[name] == device) <= room
