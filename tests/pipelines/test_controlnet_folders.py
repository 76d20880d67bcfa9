"""ControlNets lie in a pipeline's folder beside each other: both libraries read what either wrote."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from tasks import CONTROLLED, align, call, difference, folder, pair, set_scheduler

import suffuse
from suffuse.checkpoints.fetching import namings_by_files
from suffuse.errors import ConfigError, MissingFileError
from suffuse.hub.options import HubOptions
from suffuse.hub.sources import opened
from suffuse.pipelines import auto
from suffuse.pipelines.loading import folder_namings, read_index


@pytest.fixture(autouse=True)
def quiet_peer():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="diffusers.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


@pytest.mark.parametrize("task", ["control inpaint", "control xl image", "controls text", "controls xl inpaint"])
def test_what_we_save_the_peer_loads(task, tmp_path):
    peer, ours = pair(task)
    set_scheduler((peer, ours), "DDIMScheduler")
    loaded = suffuse.DiffusionPipeline.from_pretrained(folder(task))
    assert type(loaded) is type(ours)
    loaded.save_pretrained(tmp_path / "saved")
    written, wanted = (json.loads((path / "model_index.json").read_text()) for path in (tmp_path / "saved", folder(task)))
    assert written | {"_diffusers_version": ""} == wanted | {"_diffusers_version": ""}
    again = type(peer).from_pretrained(tmp_path / "saved", **{"add_watermarker": False} if "xl" in task else {})
    again.set_progress_bar_config(disable=True)
    again.scheduler = peer.scheduler
    align(again)
    assert difference(call(again, task), call(ours, task)) == 0


def numbers(path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.name.startswith("controlnet"))


def test_fewer_nets_leave_none_behind_that_would_be_read(tmp_path):
    _, ours = pair("controls text")
    first, second = ours.controlnet.nets
    for nets in ([first, second, first], [first, second]):
        pipe = type(ours)(**ours.components | {"controlnet": nets}, requires_safety_checker=False)
        pipe.save_pretrained(tmp_path / "saved")
        assert numbers(tmp_path / "saved") == ["controlnet", "controlnet_1", "controlnet_2"][: len(nets)]
        assert len(type(ours).from_pretrained(tmp_path / "saved").controlnet.nets) == len(nets)


def test_another_variant_of_several_nets_stays_beside_the_first(tmp_path):
    _, ours = pair("controls text")
    ours.save_pretrained(tmp_path / "saved")
    ours.save_pretrained(tmp_path / "saved", variant="fp16")
    for name in ("controlnet", "controlnet_1"):
        weights = sorted(path.name for path in (tmp_path / "saved" / name).glob("*.safetensors"))
        assert weights == ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"]
    loaded = type(ours).from_pretrained(tmp_path / "saved", variant="fp16", torch_dtype=torch.bfloat16)
    assert [net.dtype for net in loaded.controlnet.nets] == [torch.bfloat16] * 2
    assert str(type(ours).download(tmp_path / "saved")) == str(tmp_path / "saved")


def test_all_folders_of_several_nets_are_fetched():
    with opened(folder("controls text"), HubOptions()) as source:
        fetched = namings_by_files(source, read_index(source), ())
        assert list(folder_namings(source, {"controlnet": suffuse.MultiControlNetModel})) == ["controlnet", "controlnet_1"]
    assert {"unet", "controlnet", "controlnet_1"} <= fetched.keys()


def test_an_entry_as_older_releases_wrote_it(tmp_path):
    copied = shutil.copytree(folder("controls text"), tmp_path / "older")
    index = json.loads((copied / "model_index.json").read_text())
    assert index["controlnet"] == ["diffusers", "MultiControlNetModel"]
    (copied / "model_index.json").write_text(json.dumps(index | {"controlnet": ["controlnet", "MultiControlNetModel"]}))
    assert len(suffuse.DiffusionPipeline.from_pretrained(copied).controlnet.nets) == 2


def test_nets_are_given_while_loading():
    nets = [suffuse.ControlNetModel.from_pretrained(folder("controls text") / name) for name in ("controlnet", "controlnet_1")]
    several = suffuse.StableDiffusionControlNetPipeline.from_pretrained(
        folder("text"), controlnet=nets, requires_safety_checker=False
    )
    one = suffuse.StableDiffusionControlNetPipeline.from_pretrained(folder("text"), controlnet=nets[1])
    assert several.nets == nets
    assert one.controlnet is nets[1]
    with pytest.raises(ConfigError, match="has no component 'controlnet', which StableDiffusionControlNetPipeline needs"):
        suffuse.StableDiffusionControlNetPipeline.from_pretrained(folder("text"))


def test_several_nets_are_read_and_written_on_their_own(tmp_path):
    made, report = suffuse.MultiControlNetModel.from_pretrained(folder("controls text") / "controlnet", output_loading_info=True)
    assert len(made.nets) == 2
    assert report["1"]["missing_keys"] == []
    made.save_pretrained(tmp_path / "nets")
    again = suffuse.MultiControlNetModel.from_pretrained(tmp_path / "nets")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in made.state_dict().items())
    with pytest.raises(MissingFileError, match="with a ControlNet"):
        suffuse.MultiControlNetModel.from_pretrained(tmp_path / "nothing")


# ------------------------------------------------------------ picked by task


@pytest.mark.parametrize("family", [family for family in auto.FAMILIES if family.controlnet], ids=lambda family: family.name)
@pytest.mark.parametrize("task", ["text_to_image", "image_to_image", "inpainting"])
def test_a_controlnet_picks_the_class_from_a_folder_and_a_pipeline(task, family):
    kind = next(kind for kind in auto.AutoPipeline.__subclasses__() if kind.task == task)
    xl = "xl " if "XL" in family.name else ""
    _, plain = pair(f"{xl}text")
    own = pair(f"control {xl}text")[1].controlnet
    options = {"add_watermarker": False} if xl else {}
    for made in (
        kind.from_pretrained(folder(f"{xl}text"), controlnet=own, **options),
        kind.from_pipe(plain, controlnet=[own, own], **options),
    ):
        assert type(made).__name__ == getattr(family, task)
        assert made.nets[0] is own
        back = kind.from_pipe(made, controlnet=None)
        assert type(back).__name__ == getattr(auto.FAMILIES[bool(xl)], task)
        assert back.unet is made.unet


# ------------------------------------------------------------ nets that wait elsewhere


@pytest.mark.parametrize("way", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
@pytest.mark.parametrize("task", ["control xl image", "controls text"])
def test_nets_that_wait_elsewhere_draw_the_same(task, way):
    _, ours = pair(task)
    set_scheduler(pair(task), "DDIMScheduler")
    expected = call(ours, task)
    try:
        getattr(ours, way)(device="cpu")
        assert all(hasattr(net, "_hf_hook") for net in ours.nets)
        assert difference(call(ours, task), expected) <= 1e-5
    finally:
        ours.remove_all_hooks()
    assert difference(call(ours, task), expected) == 0


def test_every_net_is_moved_and_mapped():
    _, ours = pair("controls text")
    pipe = type(ours).from_pretrained(folder("controls text"), device_map="balanced")
    assert set(pipe._modules_by_name) == {"vae", "text_encoder", "unet", "controlnet", "controlnet_1"}
    assert all(parameter.dtype == torch.bfloat16 for parameter in pipe.to(torch.bfloat16).controlnet.nets[1].parameters())


# ------------------------------------------------------------ runs


@pytest.mark.parametrize("task", ["controls text", "control xl inpaint"])
def test_a_run_under_control_goes_on(task, tmp_path):
    _, ours = pair(task)
    set_scheduler(pair(task), "EulerAncestralDiscreteScheduler")
    options = {"control_guidance_end": 0.5, "seed": 3, "generator": None}
    made = call(ours, task, **options, save_run=tmp_path / "{step}.safetensors")
    for step in (0, 2, 3):
        assert difference(ours(resume=tmp_path / f"{step}.safetensors")[0], made) == 0
    assert CONTROLLED[task].controlnets == len(ours.nets)
