"""Where a scheduler differs from the peer's, on purpose."""

from __future__ import annotations

import diffusers
import pytest
import torch
from scheduler_oracle import NAMES, equal, quiet, run

import suffuse
from suffuse.errors import ConfigError


def test_fixed_large_log_is_a_standard_deviation() -> None:
    """The peer takes the square root of a logarithm, which is NaN."""
    assert quiet(run, diffusers.DDPMScheduler(variance_type="fixed_large_log"), 5)[0].isnan().all()
    ours = run(suffuse.DDPMScheduler(variance_type="fixed_large_log"), 5)
    large = run(suffuse.DDPMScheduler(variance_type="fixed_large"), 5)
    torch.testing.assert_close(ours, large)


def test_ddim_with_all_noise_is_finite() -> None:
    """The peer takes the root of a number that rounding has put below 0, where almost no signal is left."""
    config = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    runs = [
        quiet(run, library.DDIMScheduler(**config, prediction_type="sample"), 20, eta=1.0) for library in (diffusers, suffuse)
    ]
    assert runs[0][-1].isnan().any()
    assert runs[1][-1].isfinite().all()


def test_unipc_of_kind_bh1_reaches_sigma_zero() -> None:
    """The peer multiplies the infinite length of the last step with an absent correction, which is NaN."""
    assert quiet(run, diffusers.UniPCMultistepScheduler(solver_type="bh1"), 6)[-1].isnan().all()
    scheduler = suffuse.UniPCMultistepScheduler(solver_type="bh1")
    assert equal(run(scheduler, 6)[-1], scheduler.model_outputs[-1])


@pytest.mark.parametrize(
    "config",
    [
        {"predict_x0": False},
        {"lower_order_final": False},
        {"use_karras_sigmas": True, "solver_order": 3, "lower_order_final": False},
    ],
)
def test_unipc_refuses_last_steps_that_are_not_finite(config: dict) -> None:
    """The peer returns NaN or infinity."""
    final = {"final_sigmas_type": "sigma_min"} if "use_karras_sigmas" in config else {}
    assert not quiet(run, diffusers.UniPCMultistepScheduler(**config, **final), 6)[-1].isfinite().all()
    with pytest.raises(ConfigError, match=r"predict_x0=False cannot end at sigma 0|cannot take the last step"):
        suffuse.UniPCMultistepScheduler(**config, **final).set_timesteps(6)


def test_singlestep_leaves_its_configuration_alone() -> None:
    """The peer switches `lower_order_final` on for good, so that a run depends on the runs before it."""
    config = {"final_sigmas_type": "sigma_min", "solver_order": 2}
    ours, theirs = suffuse.DPMSolverSinglestepScheduler(**config), diffusers.DPMSolverSinglestepScheduler(**config)
    for scheduler in (ours, theirs):
        quiet(scheduler.set_timesteps, 5)
        quiet(scheduler.set_timesteps, 6)
    assert theirs.config.lower_order_final
    assert not ours.config.lower_order_final
    assert ours.order_list == [1, 2, 1, 2, 1, 2] != theirs.order_list
    fresh = diffusers.DPMSolverSinglestepScheduler(**config)
    assert all(map(equal, run(ours, 6), quiet(run, fresh, 6)))


def test_a_run_whose_first_timesteps_round_to_the_same_begins_at_the_first() -> None:
    """The peer begins at the second of them and runs past its end, unless a pipeline says where it begins."""
    config = {"use_beta_sigmas": True, "beta_schedule": "squaredcos_cap_v2"}
    theirs, ours = diffusers.DPMSolverMultistepScheduler(**config), suffuse.DPMSolverMultistepScheduler(**config)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
    assert ours.timesteps[0] == ours.timesteps[1]
    sample = torch.randn(1, 4, 4, 4)
    with pytest.raises(IndexError):
        for timestep in theirs.timesteps:
            theirs.step(sample, timestep, sample)
    for timestep in ours.timesteps:
        ours.step(sample, timestep, sample)
    assert ours.step_index == 10


def test_predictions_of_the_clean_sample_are_taken_everywhere() -> None:
    """The peer's ancestral Euler, both KDPM2 and PNDM refuse `prediction_type="sample"`."""
    clean = torch.full((1, 4, 4, 4), 0.25)
    for name in NAMES:
        scheduler = getattr(suffuse, name)(prediction_type="sample")
        scheduler.set_timesteps(20)
        sample = torch.randn(1, 4, 4, 4) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            scheduler.scale_model_input(sample, timestep)
            sample = scheduler.step(clean, timestep, sample).prev_sample
        torch.testing.assert_close(sample, clean, atol=0.1, rtol=0)


@pytest.mark.parametrize("schedule", ["exponential", "karras"])
def test_a_step_too_short_for_the_brownian_path_has_no_noise(schedule: str) -> None:
    """The peer halves the path forever: its last sigma and `sigma_min` differ in the last bit."""
    config = {"sigma_schedule": schedule, "final_sigmas_type": "sigma_min"}
    theirs, ours = (library.CosineDPMSolverMultistepScheduler(**config) for library in (diffusers, suffuse))
    with pytest.raises(RecursionError):
        quiet(run, theirs, 10)
    samples = run(ours, 10)
    torch.testing.assert_close(samples[-1], samples[-2])


def test_a_generator_seeds_the_brownian_path() -> None:
    """The peer's DPM-Solver++ SDE takes none, and draws another picture each time."""

    def last(scheduler: suffuse.DPMSolverSDEScheduler, **generator: object) -> torch.Tensor:
        scheduler.set_timesteps(3)
        sample = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        for timestep in scheduler.timesteps:
            sample = scheduler.step(torch.zeros_like(sample), timestep, sample, **generator).prev_sample
        return sample

    each = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    alone = last(suffuse.DPMSolverSDEScheduler(), generator=each)
    assert equal(alone, last(suffuse.DPMSolverSDEScheduler(), generator=each))
    assert not equal(alone, last(suffuse.DPMSolverSDEScheduler(), generator=each[::-1]))
    assert not equal(last(suffuse.DPMSolverSDEScheduler()), last(suffuse.DPMSolverSDEScheduler()))
    configured = suffuse.DPMSolverSDEScheduler(noise_sampler_seed=3)
    assert equal(last(configured), last(configured, generator=each[0]))


def test_ancestral_kdpm2_is_finite() -> None:
    """The peer takes the root of a number that rounding has put below 0, and so the logarithm of NaN."""
    config = {"beta_schedule": "squaredcos_cap_v2"}
    theirs, ours = (quiet(library.KDPM2AncestralDiscreteScheduler, **config) for library in (diffusers, suffuse))
    assert quiet(run, theirs, 10)[-1].isnan().all()
    assert run(ours, 10)[-1].isfinite().all()
    assert ours.timesteps.isfinite().all()


def test_every_scheduler_knows_every_beta_schedule() -> None:
    for name in NAMES:
        for schedule in ("sigmoid", "laplace", "exp"):
            assert getattr(suffuse, name)(beta_schedule=schedule).alphas_cumprod.isfinite().all()


def test_noise_is_not_taken_back_by_an_equation_that_adds_it() -> None:
    """The peer's inverse DPM-Solver takes the root of a negative number there."""
    config = {"algorithm_type": "sde-dpmsolver++"}
    assert quiet(run, quiet(diffusers.DPMSolverMultistepInverseScheduler, **config), 10)[-1].isnan().all()
    with pytest.raises(ConfigError, match="adds noise, which cannot be taken back"):
        suffuse.DPMSolverMultistepInverseScheduler(**config)


def test_a_last_step_of_no_length_stays_where_it_is() -> None:
    """The peer divides by its length where the solver is of second order and the final sigma is the last of a ladder."""
    config = {"use_karras_sigmas": True, "solver_type": "heun", "lower_order_final": False}
    theirs, ours = (quiet(library.DPMSolverMultistepInverseScheduler, **config) for library in (diffusers, suffuse))
    assert quiet(run, theirs, 10)[-1].isnan().all()
    samples = run(ours, 10)
    assert equal(samples[-1], samples[-2])
