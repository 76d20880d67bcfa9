"""A run's memory: forks, threads, copies."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from scheduler_oracle import EVERY, OTHER, equal, model, run

import suffuse
from suffuse.pipelines.saved_run import memory_fields, packed, unpacked

each_scheduler = pytest.mark.parametrize("name", [*EVERY, *OTHER])


def seeded(name: str) -> Any:
    """A scheduler whose noise is the same in every run."""
    return getattr(suffuse, name)(**({"noise_sampler_seed": 7} if name == "DPMSolverSDEScheduler" else {}))


def begun(name: str, steps: int = 8, taken: int = 0) -> tuple[Any, torch.Tensor]:
    """A scheduler some steps into a run, and the sample there."""
    scheduler = seeded(name)
    scheduler.set_timesteps(steps)
    sample = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    return scheduler, finished(scheduler, sample, 0, taken)


def finished(scheduler: Any, sample: torch.Tensor, begin: int, end: int | None = None) -> torch.Tensor:
    for index, timestep in list(enumerate(scheduler.timesteps))[begin:end]:
        seen = scheduler.scale_model_input(sample, timestep)
        takes = inspect.signature(scheduler.step).parameters
        options = {"generator": torch.Generator().manual_seed(index)} if "generator" in takes else {}
        sample = scheduler.step(model(seen), timestep, sample, **options).prev_sample
    return sample


def through_a_file(scheduler: Any) -> Any:
    """A fork with the memory as a saved run holds it."""
    tensors: dict[str, torch.Tensor] = {}
    told = json.loads(json.dumps(packed(memory_fields(scheduler), "memory", tensors)))
    twin = scheduler.fork()
    twin.memory = dataclasses.replace(twin.memory, **unpacked(told, tensors), derived={})
    return twin


COPIES = {
    "saved run": through_a_file,
    "fork": lambda scheduler: scheduler.fork(),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda scheduler: pickle.loads(pickle.dumps(scheduler)),
}


@each_scheduler
@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_goes_on_where_the_run_was_and_leaves_the_original_alone(name: str, kind: str) -> None:
    scheduler, sample = begun(name, taken=3)
    twin = COPIES[kind](scheduler)
    expected = finished(twin, sample, 3)
    assert equal(finished(scheduler, sample, 3), expected)
    again, sample = begun(name)
    assert equal(finished(again, sample, 0), expected)


@pytest.mark.parametrize("name", ["DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler"])
@pytest.mark.parametrize("generators", [None, 5, [5, 6]], ids=str)
def test_a_brownian_path_goes_on_after_every_step_of_a_run_that_was_saved(name: str, generators: Any) -> None:
    """The seed is a number in the memory, drawn or taken from the generator in the first step."""
    seeds = generators if isinstance(generators, list) else [generators]
    given = [seed and torch.Generator().manual_seed(seed) for seed in seeds]
    options = {"generator": given if isinstance(generators, list) else given[0]}
    scheduler = getattr(suffuse, name)()
    scheduler.set_timesteps(5)
    sample, saved, samples = torch.randn(2, 4, 4, 4), [], []
    for timestep in scheduler.timesteps:
        sample = scheduler.step(model(sample), timestep, sample, **options).prev_sample
        saved.append(pickle.dumps((scheduler, sample)))
        samples.append(sample)
    for index, state in enumerate(saved):
        again, sample = pickle.loads(state)
        assert "BrownianInterval" not in repr(state)
        for timestep, expected in list(zip(scheduler.timesteps, samples, strict=True))[index + 1 :]:
            sample = again.step(model(sample), timestep, sample).prev_sample
            assert equal(sample, expected)


def test_a_fork_shares_its_tables() -> None:
    scheduler = suffuse.DDIMScheduler()
    assert scheduler.fork().alphas_cumprod is scheduler.alphas_cumprod
    assert scheduler.fork().config is scheduler.config


@each_scheduler
def test_tables_never_change(name: str) -> None:
    scheduler = getattr(suffuse, name)()
    before = {key: value.clone() for key, value in vars(scheduler).items() if isinstance(value, torch.Tensor)}
    config = dict(scheduler.config)
    attributes = set(vars(scheduler))
    run(scheduler, 6)
    assert all(equal(getattr(scheduler, key), value) for key, value in before.items())
    assert dict(scheduler.config) == config
    assert set(vars(scheduler)) == attributes


@each_scheduler
def test_eight_threads_on_forks_get_the_serial_results(name: str) -> None:
    shared = seeded(name)

    def one(steps: int) -> list[torch.Tensor]:
        fork = shared.fork()
        shared.follow(fork)
        samples = run(fork, steps)
        assert shared.num_inference_steps == steps
        assert shared.timesteps is fork.timesteps
        return samples

    counts = [4 + index % 5 for index in range(16)]
    serial = [run(seeded(name), steps) for steps in counts]
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(one, counts))
    assert all(all(map(equal, *pair)) for pair in zip(serial, parallel, strict=True))


def in_thread(function: Any) -> Any:
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(function()))
    thread.start()
    thread.join()
    return result[0]


def test_threads_that_never_set_timesteps_see_the_last_ones_set() -> None:
    scheduler = suffuse.EulerDiscreteScheduler()
    in_thread(lambda: scheduler.set_timesteps(5))
    assert scheduler.num_inference_steps == 5
    in_thread(lambda: scheduler.set_timesteps(6))
    assert scheduler.num_inference_steps == 6
    scheduler.set_timesteps(7)
    in_thread(lambda: scheduler.set_timesteps(8))
    assert scheduler.num_inference_steps == 7
    assert in_thread(lambda: scheduler.num_inference_steps) == 8


def test_steps_may_be_taken_in_another_thread_than_set_timesteps() -> None:
    scheduler = suffuse.DPMSolverMultistepScheduler()
    scheduler.set_timesteps(5)
    assert all(map(equal, in_thread(lambda: run(scheduler)), run(suffuse.DPMSolverMultistepScheduler(), 5)))


def test_following_is_live_and_only_for_this_thread() -> None:
    scheduler = suffuse.EulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    fork = scheduler.fork()

    def elsewhere() -> tuple[int, int]:
        other = scheduler.fork()
        scheduler.follow(other)
        other.set_timesteps(9)
        return scheduler.num_inference_steps, fork.num_inference_steps

    scheduler.follow(fork)
    fork.set_timesteps(5)
    assert scheduler.num_inference_steps == 5
    assert in_thread(elsewhere) == (9, 5)
    assert scheduler.num_inference_steps == 5
    fork.set_timesteps(6)
    assert scheduler.num_inference_steps == 6
    scheduler.set_timesteps(4)
    assert fork.num_inference_steps == 4


def test_what_is_assigned_is_used_from_then_on() -> None:
    scheduler, other = suffuse.EulerDiscreteScheduler(), suffuse.EulerDiscreteScheduler()
    for one in (scheduler, other):
        one.set_timesteps(5)
        run(one)
    scheduler.sigmas = scheduler.sigmas * 2
    scheduler.timesteps = scheduler.timesteps - 1
    scheduler.step_index = None
    other.set_timesteps(5)
    assert not equal(run(scheduler)[-1], run(other)[-1])
    assert scheduler.index_for_timestep(998) == 0


def test_timesteps_are_found_without_reading_the_tensor() -> None:
    scheduler = suffuse.DDIMScheduler()
    scheduler.set_timesteps(5)
    listed = scheduler.timesteps.tolist()
    assert [scheduler._number(timestep) for timestep in scheduler.timesteps] == listed
    assert [scheduler._number(timestep) for timestep in scheduler.timesteps[2:]] == listed[2:]
    assert [scheduler._number(timestep.clone()) for timestep in scheduler.timesteps] == listed
    with torch.inference_mode():
        assert [scheduler._number(timestep) for timestep in scheduler.timesteps] == listed


def test_repeated_timesteps_stand_for_their_second_step() -> None:
    scheduler = suffuse.HeunDiscreteScheduler()
    scheduler.set_timesteps(4)
    assert [scheduler.index_for_timestep(t) for t in scheduler.timesteps] == [0, 2, 2, 4, 4, 6, 6]
    assert scheduler.index_for_timestep(3.0, torch.tensor([5.0, 3.0, 1.0])) == 1


def test_a_predictor_of_the_callers_choice_is_not_touched_by_runs() -> None:
    predictor = suffuse.DDIMScheduler()
    run(suffuse.UniPCMultistepScheduler(solver_p=predictor), 5)
    assert predictor.num_inference_steps is None


@each_scheduler
def test_gradients_flow_through_a_step(name: str) -> None:
    scheduler, _ = begun(name)
    # Small, so that no scheduler clips what it believes the clean sample to be: a clipped value has no gradient.
    output, sample = (0.01 * torch.randn(1, 4, 4, 4)).requires_grad_(), 0.01 * torch.randn(1, 4, 4, 4)
    # The first step of iPNDM is along the noise alone, that of unCLIP believes in enormous samples.
    timestep = scheduler.timesteps[4 if name in ("IPNDMScheduler", "UnCLIPScheduler") else 0]
    scheduler.scale_model_input(sample, timestep)
    scheduler.step(output, timestep, sample).prev_sample.sum().backward()
    assert output.grad is not None
    assert output.grad.abs().sum() > 0


@each_scheduler
def test_a_scheduler_is_something(name: str) -> None:
    assert getattr(suffuse, name)()
