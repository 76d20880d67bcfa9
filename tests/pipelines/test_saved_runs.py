"""A run is written after any step, goes on in another process bit for bit, and is forked into another picture."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tasks import TASKS, call, difference, folder, pair, picture, set_scheduler
from test_oracle import SCHEDULERS
from test_threads import OTHERS

import suffuse
from suffuse.checkpoints.safetensors_file import SAVED_RUN
from suffuse.errors import CorruptFileError, InputError, MissingFileError, SaveError
from suffuse.noise import CounterNoise
from suffuse.pipelines import saved_run
from suffuse.pipelines.saved_run import SavedRun

STEPS = 5


def saved(task: str, path: Path, **options):
    """The result of a call that keeps all its steps, and how many there are."""
    _, pipe = pair(task)
    made = call(pipe, task, num_inference_steps=STEPS, save_run=path / "{step}.safetensors", **options)
    return pipe, made, len(list(path.iterdir())) - 1


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept")  # the peer's KDPM2
@pytest.mark.parametrize("noise", ["generator", "seed"])
@pytest.mark.parametrize("scheduler", [*SCHEDULERS, *OTHERS])
def test_a_run_goes_on_after_any_step(scheduler, noise, tmp_path):
    set_scheduler(pair("text"), scheduler)
    source = {"generator": torch.Generator().manual_seed(3)} if noise == "generator" else {"generator": None, "seed": 3}
    pipe, made, steps = saved("text", tmp_path, **source)
    assert steps >= STEPS
    for step in range(steps + 1):
        assert difference(pipe(resume=tmp_path / f"{step}.safetensors")[0], made) == 0, step


@pytest.mark.parametrize("task", list(TASKS))
def test_every_task_goes_on(task, tmp_path):
    set_scheduler(pair(task), "EulerAncestralDiscreteScheduler")
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 9)]
    pipe, made, steps = saved(task, tmp_path, generator=generators, num_images_per_prompt=2)
    for step in (0, steps // 2, steps):
        assert difference(pipe(resume=tmp_path / f"{step}.safetensors")[0], made) == 0, step


PROGRAM = """
import sys, torch, suffuse
pipe = suffuse.StableDiffusionImg2ImgPipeline.from_pretrained(sys.argv[1])
pipe.scheduler = suffuse.DPMSolverMultistepScheduler.from_pretrained(sys.argv[4])
torch.save(pipe(resume=sys.argv[2])[0], sys.argv[3])
"""


def test_another_process_goes_on(tmp_path):
    set_scheduler(pair("image"), "DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++")
    pipe, made, _ = saved("image", tmp_path / "runs")
    pipe.scheduler.save_pretrained(tmp_path / "scheduler")
    files = (tmp_path / "runs" / "2.safetensors", tmp_path / "made.pt", tmp_path / "scheduler")
    arguments = [str(folder("image")), *map(str, files)]
    subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM, *arguments], check=True)
    assert difference(torch.load(arguments[2]), made) == 0


def test_a_run_is_forked(tmp_path):
    set_scheduler(pair("text"), "DDIMScheduler")
    pipe, made, _ = saved("text", tmp_path)
    begun = tmp_path / "2.safetensors"
    for change in (
        {"prompt": "a dog"},
        {"guidance_scale": 2.0},
        {"negative_prompt": "a dog"},
        {"eta": 1.0},
        {"eta": 1.0, "seed": 5},
    ):
        forked = pipe(resume=begun, **change)[0]
        assert difference(forked, made) > 0, change
        assert difference(pipe(resume=begun, **change)[0], forked) == 0, change


def test_a_fork_is_what_a_callback_would_have_made(tmp_path):
    set_scheduler(pair("text"), "DPMSolverMultistepScheduler")
    pipe, _, _ = saved("text", tmp_path)

    def change(pipe, index, timestep, tensors):
        if index == 1:
            pipe._guidance_scale = 3.0
        return {}

    wanted = call(pipe, "text", num_inference_steps=STEPS, callback_on_step_end=change)
    assert difference(pipe(resume=tmp_path / "2.safetensors", guidance_scale=3.0)[0], wanted) == 0


def test_a_compatible_solver_may_go_on(tmp_path):
    set_scheduler(pair("text"), "DPMSolverMultistepScheduler")
    pipe, made, _ = saved("text", tmp_path)
    set_scheduler(pair("text"), "DPMSolverMultistepScheduler", solver_type="heun")
    with pytest.warns(UserWarning, match="goes on with solver_type='heun' instead of 'midpoint'"):
        assert difference(pipe(resume=tmp_path / "2.safetensors")[0], made) > 0


def test_another_prediction_type_is_no_setting(tmp_path):
    set_scheduler(pair("text"), "DPMSolverMultistepScheduler")
    pipe, _, _ = saved("text", tmp_path)
    set_scheduler(pair("text"), "DPMSolverMultistepScheduler", prediction_type="v_prediction")
    with pytest.raises(InputError, match="predicts something else: prediction_type='v_prediction' instead of 'epsilon'"):
        pipe(resume=tmp_path / "2.safetensors")


def test_a_run_in_memory_serves_many_times(tmp_path):
    set_scheduler(pair("inpaint"), "EulerAncestralDiscreteScheduler")
    pipe, made, steps = saved("inpaint", tmp_path)
    run = SavedRun.load(tmp_path / "2.safetensors")
    assert [difference(pipe(resume=run)[0], made) for _ in range(3)] == [0, 0, 0]
    last = SavedRun.load(tmp_path / f"{steps}.safetensors")
    assert pipe(resume=last, output_type="latent")[0].data_ptr() != last.latents.data_ptr()


def test_none_beside_a_run_says_nothing(tmp_path):
    set_scheduler(pair("text"), "EulerAncestralDiscreteScheduler")
    pipe, made, _ = saved("text", tmp_path)
    assert difference(pipe(resume=tmp_path / "2.safetensors", seed=None, generator=None, prompt_embeds=None)[0], made) == 0


def test_guidance_that_a_callback_changed_goes_on(tmp_path):
    set_scheduler(pair("text"), "DDIMScheduler")

    def change(pipe, index, timestep, tensors):
        pipe._guidance_scale = 3.0 + index
        return {}

    pipe, made, _ = saved("text", tmp_path, callback_on_step_end=change)
    assert difference(pipe(resume=tmp_path / "2.safetensors", callback_on_step_end=change)[0], made) == 0


def test_pictures_with_an_orientation_and_arrays_of_any_strides(tmp_path):
    turned, exif = picture(), Image.Exif()
    exif[0x0112] = 6
    turned.info["exif"] = exif.tobytes()
    turned.getexif()[0x0112] = 6
    backwards = np.asarray(picture())[..., ::-1]
    set_scheduler(pair("image"), "DDIMScheduler")
    for name, image in (("turned", turned), ("backwards", backwards)):
        pipe, made, _ = saved("image", tmp_path / name, image=image)
        assert difference(pipe(resume=tmp_path / name / "1.safetensors")[0], made) == 0, name


def test_a_resumed_run_can_be_saved_and_told_of(tmp_path, capsys):
    set_scheduler(pair("text"), "PNDMScheduler")
    pipe, made, steps = saved("text", tmp_path)
    seen = []
    again = pipe(
        resume=tmp_path / "2.safetensors",
        save_run=tmp_path / "again.safetensors",
        callback_on_step_end=lambda pipe, index, timestep, tensors: seen.append(index),
    )
    assert seen == list(range(2, steps))
    assert difference(again[0], made) == 0
    assert SavedRun.load(tmp_path / "again.safetensors").step == steps


def test_what_an_interruption_leaves(tmp_path):
    set_scheduler(pair("text"), "HeunDiscreteScheduler")
    _, pipe = pair("text")
    made = call(pipe, "text", num_inference_steps=STEPS)

    def stop(pipe, index, timestep, tensors):
        if index == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(pipe, "text", num_inference_steps=STEPS, save_run=tmp_path / "run.safetensors", callback_on_step_end=stop)
    assert SavedRun.load(tmp_path / "run.safetensors").step == 3
    assert difference(pipe(resume=tmp_path / "run.safetensors")[0], made) == 0


def test_a_run_without_a_seed_gets_one(tmp_path):
    set_scheduler(pair("text"), "EulerAncestralDiscreteScheduler")
    pipe, made, _ = saved("text", tmp_path, generator=None)
    assert isinstance(SavedRun.load(tmp_path / "1.safetensors").arguments["seed"], int)
    assert difference(pipe(resume=tmp_path / "1.safetensors")[0], made) == 0
    _, other, _ = saved("text", tmp_path, generator=None)
    assert difference(made, other) > 0


def test_the_file_is_small_and_plain(tmp_path):
    set_scheduler(pair("text"), "DDIMScheduler")
    saved("text", tmp_path)
    file = tmp_path / "3.safetensors"
    assert file.stat().st_size < 32_000
    run = SavedRun.load(file)
    assert (run.pipeline, run.scheduler, run.step, run.total) == ("StableDiffusionPipeline", "DDIMScheduler", 3, STEPS)
    assert run.arguments["prompt"] == "a cat"
    assert "save_run" not in run.arguments


@pytest.mark.parametrize(
    "value",
    [
        None, True, 3, 2.5, "text", ["a", [1, None]], (1, 2**70), {"scale": 0.5, "more": {"x": torch.ones(2)}}, np.float32(2),
        torch.arange(6.0).reshape(1, 2, 3, 1), torch.ones(1, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.ones(2, dtype=torch.bfloat16), np.ones((2, 3)), picture(), picture(mode="L"), picture(mode="RGBA"),
        picture().convert("P"), CounterNoise(2**64 - 1, 3),
    ],
    ids=lambda value: f"{type(value).__name__}",
)  # fmt: skip
def test_values_come_back(value):
    tensors: dict[str, torch.Tensor] = {}
    told = json.loads(json.dumps(saved_run.packed(value, "value", tensors)))
    back = saved_run.unpacked(told, tensors)
    if isinstance(value, torch.Tensor):
        assert torch.equal(back, value)
        assert back.dtype == value.dtype
        assert back.stride() == value.stride()
    elif isinstance(value, (str, list, tuple, int, float, type(None))):
        assert back == value
    elif isinstance(value, CounterNoise):
        assert repr(back) == repr(value)
    elif isinstance(value, dict):
        assert torch.equal(back["more"]["x"], value["more"]["x"])
        assert back["scale"] == 0.5
    elif hasattr(value, "convert"):
        assert back == (value.convert("RGB") if value.mode == "P" else value)
    else:
        np.testing.assert_array_equal(back, value)


# ---------------------------------------------------------------- what cannot be


@pytest.fixture
def run(tmp_path):
    set_scheduler(pair("text"), "EulerDiscreteScheduler")
    pipe, _, _ = saved("text", tmp_path)
    return pipe, tmp_path / "2.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_inference_steps": 7}, "goes another way: its timesteps are not those of this call"),
        ({"height": 128}, "makes other pictures than this call"),
        ({"num_images_per_prompt": 2, "generator": None}, "makes other pictures than this call"),
        ({"seed": 3, "generator": torch.Generator()}, "seed and generator are both given"),
        ({"seed": -1}, "seed=-1 is out of range"),
        ({"seed": [1, 2]}, "seed: 2 given for 1 pictures"),
        ({"resume": 5}, "resume has the wrong type"),
        ({"save_run": 5}, "save_run has the wrong type"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_changes_that_cannot_be(run, change, message):
    pipe, file = run
    with pytest.raises(InputError, match=message):
        pipe(**{"resume": file, **change})


def test_another_scheduler_cannot_go_on(run):
    pipe, file = run
    set_scheduler(pair("text"), "DPMSolverMultistepScheduler")
    with pytest.raises(InputError, match="DPMSolverMultistepScheduler cannot go on with a run of EulerDiscreteScheduler"):
        pipe(resume=file)


def test_another_pipeline_cannot_go_on(run):
    _, file = run
    with pytest.raises(InputError, match="the run is one of StableDiffusionPipeline"):
        pair("image")[1](resume=file)


def test_another_checkpoint_is_told_of(run):
    pipe, file = run
    other = suffuse.StableDiffusionPipeline.from_pipe(pipe)
    other.register_to_config(_name_or_path="elsewhere")
    with pytest.warns(UserWarning, match="goes on with elsewhere"):
        other(resume=file)


def test_files_that_are_no_runs(tmp_path):
    _, pipe = pair("text")
    with pytest.raises(MissingFileError, match="no file"):
        pipe(resume=tmp_path / "none.safetensors")
    save_file({"x": torch.ones(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match="holds no run"):
        pipe(resume=tmp_path / "weights.safetensors")


@pytest.mark.parametrize(
    "damage",
    [
        {"step": 9},
        {"step": "two"},
        {"latents": None},
        {"latents": {"tensor": ["missing", False]}},
        {"arguments": []},
        {"memory": {"entries": 3}},
        {"generators": [1]},
        {"pipeline": {"a": 1, "b": 2}},
        {"format": "one"},
        {"beside": {"entries": {"ControlNet": {"entries": {"weights": "no mark"}}}}},
        {"beside": {"entries": {"ControlNet": 3}}},
        {"guided_by": {"entries": {"": "ClassifierFreeGuidance"}}},
    ],
    ids=str,
)
def test_damaged_runs(run, damage, tmp_path):
    _, file = run
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            told = json.loads(opened.metadata()[SAVED_RUN])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    save_file(tensors, tmp_path / "bad.safetensors", {SAVED_RUN: json.dumps({**told, **damage})})
    with pytest.raises(CorruptFileError, match="is a damaged run"):
        SavedRun.load(tmp_path / "bad.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CorruptFileError):
        SavedRun.load(tmp_path / "cut.safetensors")


def test_a_run_of_a_later_version(run, tmp_path):
    _, file = run
    later = file.read_bytes().replace(b'\\"format\\": 2', b'\\"format\\": 9')
    (tmp_path / "later.safetensors").write_bytes(later)
    with pytest.raises(InputError, match="was written by suffuse"):
        SavedRun.load(tmp_path / "later.safetensors")


def test_where_nothing_can_be_written(tmp_path):
    _, pipe = pair("text")
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="could not be written"):
        call(pipe, "text", save_run=tmp_path / "file" / "run.safetensors")


def test_a_disk_that_fills_costs_no_picture(tmp_path, monkeypatch):
    set_scheduler(pair("text"), "DDIMScheduler")
    _, pipe = pair("text")
    made = call(pipe, "text")
    write, written = saved_run.write_whole, []

    def full(path, action):
        written.append(path)
        if len(written) > 2:
            raise SaveError("no space left")
        write(path, action)

    monkeypatch.setattr(saved_run, "write_whole", full)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert difference(call(pipe, "text", save_run=tmp_path / "run.safetensors"), made) == 0
    assert [str(warning.message).partition(":")[0] for warning in told] == [
        f"the run was not saved after step {step}" for step in (2, 3, 4)
    ]


def test_a_generator_that_stands_twice(tmp_path):
    _, pipe = pair("text")
    twice = [torch.Generator()] * 2
    with pytest.raises(InputError, match="a generator stands twice"):
        call(pipe, "text", generator=twice, num_images_per_prompt=2, save_run=tmp_path / "run.safetensors")


def test_arguments_that_no_file_can_hold(tmp_path):
    _, pipe = pair("text")
    with pytest.raises(InputError, match=r"cross_attention_kwargs\.scale cannot be saved with the run"):
        call(pipe, "text", cross_attention_kwargs={"scale": object()}, save_run=tmp_path / "run.safetensors")
