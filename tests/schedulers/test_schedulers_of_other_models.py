"""Schedulers of other models than the latent ones, beside the peer's: same schedule, same samples, to the last bit."""

from __future__ import annotations

import itertools
from typing import Any

import diffusers
import pytest
import torch
from scheduler_oracle import equal, quiet, run

import suffuse
from suffuse.errors import ConfigError, InputError

OPTIONS: dict[str, dict[str, list[Any]]] = {
    "CMStochasticIterativeScheduler": {
        "num_train_timesteps": [40, 151],
        "sigma_data": [0.5, 1.0],
        "clip_denoised": [True, False],
        "rho": [7.0, 5.0],
    },
    "EDMEulerScheduler": {
        "sigma_data": [0.5, 1.0],
        "sigma_schedule": ["karras", "exponential"],
        "prediction_type": ["epsilon", "v_prediction"],
        "final_sigmas_type": ["zero", "sigma_min"],
    },
    "EDMDPMSolverMultistepScheduler": {
        "sigma_schedule": ["karras", "exponential"],
        "prediction_type": ["epsilon", "v_prediction"],
        "solver_order": [1, 2, 3],
        "thresholding": [False, True],
        "algorithm_type": ["dpmsolver++", "sde-dpmsolver++"],
        "solver_type": ["midpoint", "heun"],
        "lower_order_final": [True, False],
        "final_sigmas_type": ["zero", "sigma_min"],
    },
    "CosineDPMSolverMultistepScheduler": {
        "sigma_schedule": ["exponential", "karras"],
        "prediction_type": ["epsilon", "v_prediction"],
        "solver_order": [1, 2],
        "solver_type": ["midpoint", "heun"],
        "lower_order_final": [True, False],
        "sigma_max": [500.0, 80.0],
    },
    "FlowMatchHeunDiscreteScheduler": {"shift": [1.0, 3.0], "num_train_timesteps": [1000, 500]},
    "FlowMatchEulerDiscreteScheduler": {
        "shift": [1.0, 3.0],
        "invert_sigmas": [False, True],
        "shift_terminal": [None, 0.1],
        "ladder": ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "stochastic_sampling"],
    },
}
"""Scheduler → parameter of `__init__` → values to try, all with all."""

each_scheduler = pytest.mark.parametrize("name", OPTIONS)
STEPS = [1, 2, 5, 17]


def pairs(name: str) -> list[tuple[Any, Any]]:
    """Our scheduler and the peer's, in every configuration."""
    kinds = OPTIONS[name]
    configs = [dict(zip(kinds, values, strict=True)) for values in itertools.product(*kinds.values())]
    configs = [{k: v for k, v in c.items() if k != "ladder"} | ({c["ladder"]: True} if "ladder" in c else {}) for c in configs]
    configs = [c for c in configs if (c.get("solver_order"), c.get("algorithm_type")) != (3, "sde-dpmsolver++")]  # not the peer's
    return [(getattr(suffuse, name)(**config), quiet(getattr(diffusers, name), **config)) for config in configs]


def assert_same_run(ours: Any, theirs: Any, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    """The same run on the schedules that are set."""
    assert equal(ours.timesteps, theirs.timesteps)
    assert equal(ours.sigmas, theirs.sigmas)
    assert ours.init_noise_sigma == getattr(theirs, "init_noise_sigma", 1.0)
    samples, expected = run(ours, None, dtype, **options), quiet(run, theirs, None, dtype, **options)
    assert len(samples) == len(expected) > 0
    for step, (mine, other) in enumerate(zip(samples, expected, strict=True)):
        nothing = step + 1 == len(samples) and other.isnan().all()  # the peer has divided by a step of length 0
        assert equal(mine, other) or nothing, f"step {step} of {ours.config}"
        assert mine.isfinite().all() or dtype is torch.float16, f"step {step} of {ours.config}"


@each_scheduler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_a_run_is_the_peers_to_the_last_bit(name: str, dtype: torch.dtype) -> None:
    for index, (ours, theirs) in enumerate(pairs(name)):
        assert equal(ours.timesteps, theirs.timesteps)
        assert equal(ours.sigmas, theirs.sigmas)
        for steps in STEPS if dtype is torch.float32 else STEPS[index % 3 : index % 3 + 1]:
            if steps == 1 and ours.config.get("shift_terminal"):  # 0 / 0, there
                ours.set_timesteps(steps)
                assert ours.sigmas.isfinite().all()
                continue
            ours.set_timesteps(steps)
            quiet(theirs.set_timesteps, steps)
            assert getattr(ours, "state_in_first_order", True)
            assert ours.num_inference_steps == theirs.num_inference_steps == steps
            assert_same_run(ours, theirs, dtype)


def test_consistency_models_at_timesteps_of_the_callers_choice() -> None:
    ours, theirs = (library.CMStochasticIterativeScheduler() for library in (suffuse, diffusers))
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(timesteps=[22, 5, 0])
    assert_same_run(ours, theirs)
    with pytest.raises(InputError, match="timesteps must be in descending order"):
        ours.set_timesteps(timesteps=[3, 5])
    sigma = torch.rand(5) * 80
    for name in ("get_scalings", "get_scalings_for_boundary_condition"):
        assert all(map(equal, getattr(ours, name)(sigma), getattr(theirs, name)(sigma)))


def test_consistency_models_need_two_noise_levels() -> None:
    with pytest.raises(ConfigError, match="has no noise levels"):
        suffuse.CMStochasticIterativeScheduler(sigma_min=3.0, sigma_max=2.0)


@pytest.mark.parametrize("churn", [{"s_churn": 2.0}, {"s_churn": 30.0, "s_tmin": 0.4, "s_tmax": 8.0, "s_noise": 1.1}])
@pytest.mark.parametrize("name", ["EDMEulerScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_runs_with_churn(name: str, churn: dict[str, float]) -> None:
    for ours, theirs in pairs(name):
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(7)
        assert_same_run(ours, theirs, **churn)


def test_edm_euler_at_places_of_the_callers_choice() -> None:
    ours, theirs = (library.EDMEulerScheduler() for library in (suffuse, diffusers))
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(sigmas=torch.tensor([0.0, 0.3, 0.5, 0.9]))
    assert_same_run(ours, theirs)
    with pytest.raises(InputError, match="sigmas are no places on the curve"):
        ours.set_timesteps(sigmas=[0.5, 0.3])


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler"])
def test_edm_parts_are_the_peers(name: str) -> None:
    samples, noise = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    ours, theirs = (getattr(library, name)(sigma_data=0.7) for library in (suffuse, diffusers))
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(9)
    sigma = ours.sigmas[4]
    assert equal(ours.precondition_inputs(samples, sigma), theirs.precondition_inputs(samples, sigma))
    assert equal(ours.precondition_outputs(samples, noise, sigma), theirs.precondition_outputs(samples, noise, sigma))
    assert equal(ours.precondition_noise(ours.sigmas[:4]), theirs.precondition_noise(ours.sigmas[:4]))
    assert equal(
        ours.add_noise(samples, noise, ours.timesteps[[0, 3, 8]]), theirs.add_noise(samples, noise, theirs.timesteps[[0, 3, 8]])
    )
    with pytest.raises(ConfigError, match="has no noise levels"):
        getattr(suffuse, name)(sigma_min=3.0, sigma_max=2.0)


def test_edm_dpm_solver_integrates_the_clean_sample() -> None:
    with pytest.raises(ConfigError, match="algorithm_type is not possible"):
        suffuse.EDMDPMSolverMultistepScheduler(algorithm_type="dpmsolver", final_sigmas_type="sigma_min")


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_flow_matching_shifted_by_resolution(kind: str) -> None:
    ours, theirs = (
        library.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
        for library in (suffuse, diffusers)
    )
    for schedule in (
        {"num_inference_steps": 6},
        {"sigmas": [1.0, 0.8, 0.5, 0.2]},
        {"sigmas": [1.0, 0.5], "timesteps": [900.0, 7.0]},
    ):
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(**schedule, mu=0.7)
        assert_same_run(ours, theirs)
    with pytest.raises(InputError, match="needs mu"):
        ours.set_timesteps(5)


def test_flow_matching_schedules_of_the_callers_choice() -> None:
    ours, theirs = (library.FlowMatchEulerDiscreteScheduler(shift=3.0) for library in (suffuse, diffusers))
    for scheduler in (ours, theirs):
        scheduler.set_shift(2.5)
        quiet(scheduler.set_timesteps, timesteps=[900.0, 500.0, 20.0])
        assert scheduler.shift == 2.5
    assert_same_run(ours, theirs)
    samples, noise = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(8)
    given = samples, ours.timesteps[[0, 3, 7]], noise
    assert equal(ours.scale_noise(*given), theirs.scale_noise(*given))
    with pytest.raises(InputError, match="as many of one as of the other"):
        ours.set_timesteps(3, sigmas=[1.0, 0.5])
    with pytest.raises(InputError, match="not its index"):
        ours.step(samples, 3, samples)


def test_flow_matching_with_a_timestep_for_each_token() -> None:
    output, sample = torch.randn(2, 2, 7, 5, generator=torch.Generator().manual_seed(0))
    tokens = torch.linspace(40, 960, 14).reshape(2, 7)
    results = []
    for library in (suffuse, diffusers):
        scheduler = library.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(8)
        results.append(scheduler.step(output, scheduler.timesteps[0], sample, per_token_timesteps=tokens).prev_sample)
    assert equal(*results)
