"""Every scheduler beside the peer's: same schedule, same samples, to the last bit."""

from __future__ import annotations

import inspect
import itertools
import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from scheduler_oracle import EVERY, NAMES, OTHER, STEPS, equal, grid, made, options_of, parameters, possible, quiet, run

import suffuse

each_scheduler = pytest.mark.parametrize("name", EVERY)
each_compatible = pytest.mark.parametrize("name", NAMES)


def assert_same_run(name: str, config: dict, dtype: torch.dtype = torch.float32, **options: object) -> None:
    ours, theirs = made(suffuse, name, config), quiet(made, diffusers, name, config)
    samples, expected = run(ours, config["steps"], dtype, **options), quiet(run, theirs, config["steps"], dtype, **options)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert ours.timesteps.dtype == theirs.timesteps.dtype
    if hasattr(theirs, "sigmas"):
        assert equal(ours.sigmas, theirs.sigmas)
    assert len(samples) == len(expected) > 0
    for step, (mine, other) in enumerate(zip(samples, expected, strict=True)):
        assert equal(mine, other), f"step {step} of {config}"
        assert other.isfinite().all() or dtype is torch.float16, f"step {step} of {config}"


@pytest.mark.parametrize(("name", "index"), [(name, index) for name in EVERY for index in range(len(grid(name)))])
def test_a_run_is_the_peers_to_the_last_bit(name: str, index: int) -> None:
    assert_same_run(name, grid(name)[index])


@each_scheduler
def test_the_defaults_are_the_peers(name: str) -> None:
    least = {"PNDMScheduler": 4, "UnCLIPScheduler": 2}.get(name, 1)
    for steps in STEPS:
        if steps >= least:
            assert_same_run(name, {"steps": steps})


@each_compatible
@pytest.mark.parametrize("kind", [None, "karras"])
def test_numbers_of_steps_that_trailing_miscounts(name: str, kind: str | None) -> None:
    """Steps counted in floating point: 1000 in steps of 1000 / 61 are 62."""
    if {"timestep_spacing", *(["use_karras_sigmas"] if kind else [])} <= getattr(suffuse, name).parameters_of_init().keys():
        config = {"timestep_spacing": "trailing", "sigmas": kind}
        ours, theirs = made(suffuse, name, config), quiet(made, diffusers, name, config)
        ours.set_timesteps(61)
        quiet(theirs.set_timesteps, 61)
        assert equal(ours.timesteps, theirs.timesteps)
        assert ours.num_inference_steps == theirs.num_inference_steps


@each_scheduler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_floating_point_types_are_the_peers(name: str, dtype: torch.dtype) -> None:
    for config in grid(name)[:12]:
        assert_same_run(name, config, dtype)


@pytest.mark.parametrize("eta", [0.3, 0.9])
@pytest.mark.parametrize("clipped", [False, True])
def test_ddim_with_noise(eta: float, clipped: bool) -> None:
    for config in grid("DDIMScheduler"):
        if config["steps"] < 17:
            assert_same_run("DDIMScheduler", config, eta=eta, use_clipped_model_output=clipped)


def test_noise_given_by_the_caller() -> None:
    noise = torch.randn(2, 4, 6, 6)
    assert_same_run("DDIMScheduler", {"steps": 3}, eta=0.5, variance_noise=noise, generator=None)
    sde = {"steps": 5, "algorithm_type": "sde-dpmsolver++"}
    assert_same_run("DPMSolverMultistepScheduler", sde, variance_noise=noise, generator=None)


@pytest.mark.parametrize("churn", [{"s_churn": 2.0}, {"s_churn": 30.0, "s_tmin": 0.4, "s_tmax": 8.0, "s_noise": 1.1}])
def test_euler_with_churn(churn: dict[str, float]) -> None:
    for prediction in ("epsilon", "v_prediction", "sample"):
        assert_same_run("EulerDiscreteScheduler", {"steps": 7, "prediction_type": prediction}, **churn)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 6])
def test_lms_orders(order: int) -> None:
    assert_same_run("LMSDiscreteScheduler", {"steps": 8}, order=order)


@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [3, 4, 5])
def test_unipc_high_orders(solver_type: str, order: int) -> None:
    config = {"steps": 9, "solver_order": order, "solver_type": solver_type, "final_sigmas_type": "sigma_min"}
    assert_same_run("UniPCMultistepScheduler", config)


def test_unipc_with_another_predictor() -> None:
    samples = [
        quiet(run, library.UniPCMultistepScheduler(solver_p=library.DDIMScheduler()), 5) for library in (suffuse, diffusers)
    ]
    assert all(map(equal, *samples))


def test_unipc_for_flow_matching_models() -> None:
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    for config in (
        {"flow_shift": 3.0, "shift_terminal": 0.1},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"use_karras_sigmas": True},
    ):
        ours, theirs = (library.UniPCMultistepScheduler(**flow, **config) for library in (suffuse, diffusers))
        mu = {"mu": 0.7} if "use_dynamic_shifting" in config else {}
        for schedule in ({"num_inference_steps": 6}, {"sigmas": [1.0, 0.8, 0.5, 0.2]}):
            if config.get("use_karras_sigmas") and "sigmas" in schedule:
                continue
            ours.set_timesteps(**schedule, **mu)
            theirs.set_timesteps(**{key: np.array(value) if key == "sigmas" else value for key, value in schedule.items()}, **mu)
            assert equal(ours.sigmas, theirs.sigmas)
            assert equal(ours.timesteps, theirs.timesteps)
            assert all(map(equal, run(ours), quiet(run, theirs)))


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_models_that_predict_their_variance(variance_type: str) -> None:
    output, sample = torch.rand(2, 8, 6, 6), torch.randn(2, 4, 6, 6)
    results = []
    for library in (suffuse, diffusers):
        scheduler = library.DDPMScheduler(variance_type=variance_type)
        scheduler.set_timesteps(5)
        steps = [scheduler.step(output, t, sample, torch.Generator().manual_seed(3)).prev_sample for t in scheduler.timesteps]
        results.append(steps)
    assert all(map(equal, *results))


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("DPMSolver") and "variance_type" in parameters(n)])
def test_dpm_solver_drops_a_predicted_variance(name: str) -> None:
    output, sample = torch.rand(2, 6, 6, 6), torch.randn(2, 3, 6, 6)
    results = []
    for library in (suffuse, diffusers):
        scheduler = getattr(library, name)(variance_type="learned_range")
        scheduler.set_timesteps(4)
        results.append([scheduler.step(output, t, sample).prev_sample for t in scheduler.timesteps])
    assert all(map(equal, *results))


CUSTOM = {
    "DDPMScheduler": {"timesteps": [990, 500, 321, 20]},
    "EulerDiscreteScheduler": {"timesteps": [990.0, 500.5, 321.0, 20.0]},
    "HeunDiscreteScheduler": {"timesteps": [990, 500, 321, 20]},
    "DPMSolverMultistepScheduler": {"timesteps": [990, 500, 321, 20]},
    "DPMSolverSinglestepScheduler": {"timesteps": [990, 500, 321, 20]},
}


@pytest.mark.parametrize(
    "options",
    [
        {"num_inference_steps": 4, "strength": 0.6},
        {"num_inference_steps": 7, "original_inference_steps": 100},
        {"timesteps": [999, 759, 499, 259]},
        {"timesteps": [999, 759, 499, 259], "strength": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_schedules_of_distilled_models(name: str, options: dict) -> None:
    ours, theirs = getattr(suffuse, name)(), getattr(diffusers, name)()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(**options)
    assert equal(ours.timesteps, theirs.timesteps)
    assert all(map(equal, run(ours), run(theirs)))
    assert [ours.previous_timestep(t) for t in ours.timesteps] == [int(theirs.previous_timestep(t)) for t in theirs.timesteps]


@pytest.mark.parametrize("variance_type", ["fixed_small_log", "learned_range"])
def test_unclip_goes_to_the_timestep_it_is_told(variance_type: str) -> None:
    output, sample = torch.rand(2, 8 if variance_type == "learned_range" else 4, 6, 6), torch.randn(2, 4, 6, 6)
    results = []
    for library in (suffuse, diffusers):
        scheduler = library.UnCLIPScheduler(variance_type=variance_type)
        scheduler.set_timesteps(7)
        drawn = torch.Generator().manual_seed(3)
        pairs = [*itertools.pairwise(scheduler.timesteps), (scheduler.timesteps[-1], None)]
        results.append([scheduler.step(output, t, sample, before, drawn).prev_sample for t, before in pairs])
    assert all(map(equal, *results))


def test_ipndm_with_betas_of_the_callers_choice() -> None:
    betas = torch.linspace(0.9, 0.1, 9).tolist()
    ours, theirs = suffuse.IPNDMScheduler(trained_betas=betas), diffusers.IPNDMScheduler(trained_betas=betas)
    assert all(map(equal, run(ours, 8), run(theirs, 8)))


@pytest.mark.parametrize("name", CUSTOM)
def test_timesteps_of_the_callers_choice(name: str) -> None:
    ours, theirs = (getattr(library, name)() for library in (suffuse, diffusers))
    for scheduler in (ours, theirs):
        quiet(scheduler.set_timesteps, **CUSTOM[name])
    assert equal(ours.timesteps, theirs.timesteps)
    assert all(map(equal, run(ours), quiet(run, theirs)))


def test_sigmas_of_the_callers_choice() -> None:
    ours, theirs = suffuse.EulerDiscreteScheduler(), diffusers.EulerDiscreteScheduler()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(sigmas=[14.615, 6.315, 3.771, 2.181, 0.862, 0.38, 0.0])
    assert equal(ours.timesteps, theirs.timesteps)
    assert all(map(equal, run(ours), quiet(run, theirs)))


@each_compatible
def test_noise_is_added_as_the_peer_does(name: str) -> None:
    samples, noise = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    for config in grid(name)[:10]:
        ours, theirs = made(suffuse, name, config), quiet(made, diffusers, name, config)
        for steps in (None, 10):
            if steps:
                ours.set_timesteps(steps)
                quiet(theirs.set_timesteps, steps)
            if theirs.timesteps is None:  # the peer's PNDM, before set_timesteps
                continue
            timesteps = theirs.timesteps[[0, len(theirs.timesteps) // 2, -1]]
            for dtype in (torch.float32, torch.float16):
                given = samples.to(dtype), noise.to(dtype), timesteps
                assert equal(ours.add_noise(*given), theirs.add_noise(*given))
                if hasattr(ours, "get_velocity"):
                    assert equal(ours.get_velocity(*given), diffusers.DDPMScheduler.get_velocity(theirs, *given))


@pytest.mark.parametrize("name", [n for n in NAMES if hasattr(getattr(diffusers, n), "set_begin_index")])
def test_a_run_that_begins_in_the_middle(name: str) -> None:
    results = []
    for library in (suffuse, diffusers):
        torch.manual_seed(2)
        scheduler = quiet(getattr(library, name))
        quiet(scheduler.set_timesteps, 10)
        begin = 4 * scheduler.order
        scheduler.set_begin_index(begin)
        sample = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        sample = scheduler.add_noise(sample, sample.flip(0), scheduler.timesteps[begin : begin + 1])
        collected = [sample]
        for timestep in scheduler.timesteps[begin:]:
            seen = scheduler.scale_model_input(sample, timestep)
            options = {"generator": torch.Generator().manual_seed(1)} if "Ancestral" in name else {}
            sample = quiet(scheduler.step, seen.tanh(), timestep, sample, **options).prev_sample
            collected.append(sample)
        results.append(collected)
        assert scheduler.begin_index == begin
    assert all(map(equal, *results))


@each_scheduler
def test_tables_and_attributes_are_the_peers(name: str) -> None:
    for config in grid(name)[:15]:
        ours, theirs = made(suffuse, name, config), quiet(made, diffusers, name, config)
        for attribute in ("betas", "alphas", "alphas_cumprod", "final_alpha_cumprod", "alpha_t", "sigma_t", "lambda_t", "sigmas"):
            if hasattr(theirs, attribute):
                assert equal(getattr(ours, attribute), getattr(theirs, attribute)), attribute
        for attribute in ("order", "num_inference_steps", "step_index", "begin_index", "init_noise_sigma"):
            if hasattr(theirs, attribute):
                assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
        assert len(ours) == theirs.config.num_train_timesteps == 1000
        ours.set_timesteps(10)
        quiet(theirs.set_timesteps, 10)
        assert ours.init_noise_sigma == theirs.init_noise_sigma
        assert ours.num_inference_steps == theirs.num_inference_steps
        assert ours.num_inference_steps == (len(ours.timesteps) if name == "DPMSolverMultistepInverseScheduler" else 10)


@each_scheduler
def test_configurations_travel_both_ways(name: str, tmp_path: Path) -> None:
    for index, config in enumerate(grid(name)[:6]):
        ours = made(suffuse, name, config)
        ours.save_pretrained(tmp_path / f"{index}")
        theirs = quiet(getattr(diffusers, name).from_pretrained, tmp_path / f"{index}")
        theirs.save_pretrained(tmp_path / f"{index}-back")
        again = getattr(suffuse, name).from_pretrained(tmp_path / f"{index}-back")
        written, back = (json.loads((tmp_path / f / "scheduler_config.json").read_text()) for f in (f"{index}", f"{index}-back"))
        values, mine = ({k: v for k, v in entries.items() if not k.startswith("_")} for entries in (back, again.config))
        assert values.items() <= mine.items()
        assert {k: v for k, v in written.items() if not k.startswith("_")}.items() <= values.items()


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(NAMES, 2)))
def test_compatible_schedulers_are_made_from_each_others_configurations(source: str, target: str) -> None:
    config = next(c for c in grid(source) if c["prediction_type"] == "epsilon" and c.get("sigmas") in (None, "karras"))
    made_ours, made_theirs = made(suffuse, source, config), quiet(made, diffusers, source, config)
    if "algorithm_type" in config and target == "DPMSolverSinglestepScheduler" and config["algorithm_type"] == "sde-dpmsolver":
        return
    ours = getattr(suffuse, target).from_config(made_ours.config)
    theirs = quiet(getattr(diffusers, target).from_config, made_theirs.config)
    mine = {k: v for k, v in ours.config.items() if not k.startswith("_")}
    assert mine == {k: v for k, v in theirs.config.items() if not k.startswith("_")}
    if possible(target, {**dict.fromkeys(options_of(target)), **mine, "steps": 10}):
        assert all(map(equal, run(ours, 10), quiet(run, theirs, 10)))


@each_scheduler
def test_signatures_hold_what_the_peer_has(name: str) -> None:
    ours, theirs = getattr(suffuse, name), getattr(diffusers, name)
    for method in ("__init__", "set_timesteps", "step", "add_noise"):
        if not hasattr(theirs, method):
            continue
        mine, other = (dict(inspect.signature(getattr(cls, method)).parameters) for cls in (ours, theirs))
        other.pop("kwargs", None)
        assert set(other) <= set(mine), method
        assert {n: p.default for n, p in other.items()} == {n: mine[n].default for n in other}, method
        assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in mine.values()), method


@each_scheduler
def test_compatibles_are_the_peers_that_are_here(name: str) -> None:
    ours = {cls.__name__ for cls in getattr(suffuse, name)().compatibles}
    theirs = {cls.__name__ for cls in quiet(getattr(diffusers, name)).compatibles}
    assert ours == (theirs & {*EVERY, *OTHER}) | {name}


@pytest.mark.parametrize("name", ["DDIMParallelScheduler", "DDPMParallelScheduler"])
def test_steps_of_a_batch_at_different_timesteps(name: str) -> None:
    samples, outputs = torch.randn(2, 5, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    for config in grid(name)[:20]:
        ours, theirs = made(suffuse, name, config), quiet(made, diffusers, name, config)
        for steps in (None, 10) if name == "DDPMParallelScheduler" else (10,):
            if steps:
                ours.set_timesteps(steps)
                theirs.set_timesteps(steps)
            for timesteps in (theirs.timesteps[[0, 3, 4, 8, -1]], torch.tensor([5, 990, 0, 3, 411])):
                for dtype in (torch.float32, torch.float16):
                    given = outputs.to(dtype), timesteps, samples.to(dtype)
                    assert equal(ours.batch_step_no_noise(*given), theirs.batch_step_no_noise(*given))
    for scheduler in (ours, theirs):
        assert scheduler._is_ode_scheduler == (name == "DDIMParallelScheduler")


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_tcd_with_more_and_less_noise(eta: float) -> None:
    for config in grid("TCDScheduler"):
        if config["steps"] < 17:
            assert_same_run("TCDScheduler", config, eta=eta)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_sa_solver_with_as_much_noise_as_the_caller_wants(tau: float) -> None:
    samples = [
        run(library.SASolverScheduler(tau_func=lambda t: tau, predictor_order=3, corrector_order=3), 10)
        for library in (suffuse, diffusers)
    ]
    assert all(map(equal, *samples))
