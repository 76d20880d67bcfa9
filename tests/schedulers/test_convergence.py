"""How fast errors fall with the number of steps, where the exact solution is known."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from gaussian_mixture import (
    COUNTS,
    DEVIATIONS,
    LOG_SNR,
    MEANS,
    ODE,
    PRESERVING,
    SDE,
    WEIGHTS,
    Case,
    clean,
    data_moments,
    error,
    exact,
    moments_error,
    slope,
    start,
    walk,
)
from scheduler_oracle import equal, quiet

from suffuse.schedulers.catalogue import CATALOGUE
from suffuse.schedulers.dpm_solver import INTEGRATORS


@pytest.mark.parametrize("case", ODE, ids=str)
def test_errors_fall_with_the_order_of_the_solver(case: Case) -> None:
    measured = slope(COUNTS, [error(case, count) for count in COUNTS])
    assert abs(measured - case.order) < 0.4, measured


def test_every_solver_of_the_catalogue_is_measured_and_has_the_order_it_names() -> None:
    by_default = {
        case.name: case.order for case in ODE if not {"solver_order", "solver_type", "algorithm_type"} & set(case.options)
    }
    assert by_default == {name: facts.order for name, facts in CATALOGUE.items() if facts.kind == "ODE"}


def test_the_page_has_every_scheduler() -> None:
    docs = Path(__file__).parents[2] / "docs"
    page = (docs / "schedulers.md").read_text()
    for name, facts in CATALOGUE.items():
        order = "" if facts.order is None else facts.order
        assert f"| {name} | {facts.kind} | {order} | {facts.calls} |" in page
        assert f"(schedulers/{name}.svg)" in page
        assert (docs / "schedulers" / f"{name}.svg").stat().st_size < 60_000


@pytest.mark.parametrize("case", SDE, ids=str)
def test_noise_on_the_way_leaves_mean_and_covariance_right(case: Case) -> None:
    """4000 samples tell them to 0.02; 40 steps are 0.1 off at most, and a batch of the first noise alone 0.4."""
    options = {"eta": 1.0} if case.name == "DDIMScheduler" else {}
    assert moments_error(case, 40, **options) < 0.15


def test_the_third_order_multistep_solver_misses_a_factor_of_two() -> None:
    """Its second difference is half of what the expansion wants, in the reference code and so in the peer's: the order is 2."""
    case = Case("DPMSolverMultistepScheduler", LOG_SNR, {"solver_order": 3, "use_exponential_sigmas": True})
    right = INTEGRATORS["dpmsolver++"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(INTEGRATORS, "dpmsolver++", lambda *levels: right(*levels)._replace(c_2=2 * right(*levels).c_2))
        measured = slope(COUNTS, [error(case, count) for count in COUNTS])
    assert abs(measured - 3) < 0.4
    results = []
    for scheduler in (case.made(), quiet(case.made, diffusers)):
        scheduler.set_timesteps(20)
        x = torch.randn(8, 1, 1, 2, generator=torch.Generator().manual_seed(0))
        for timestep in scheduler.timesteps:
            x = scheduler.step(x.tanh(), timestep, x).prev_sample
        results.append(x)
    assert equal(*results)


def test_the_exact_solution_is_exact() -> None:
    """It does not change with twice the steps, and carries the noisy distribution to the data's."""
    case = ODE[0]
    scheduler = case.made()
    scheduler.set_timesteps(10)
    x, begin, end = start(case, scheduler, 1500), PRESERVING.level(scheduler, 0, scheduler.timesteps[0]), (1.0, 1e-3)
    once = exact(PRESERVING, x, begin, end)
    torch.testing.assert_close(once[:50], exact(PRESERVING, x[:50], begin, end, 600), rtol=0, atol=1e-6)
    mean, covariance = data_moments()
    torch.testing.assert_close(once.view(-1, 2).mean(dim=0), mean, rtol=0, atol=0.06)
    torch.testing.assert_close(once.view(-1, 2).T.cov(), covariance, rtol=0, atol=0.06)


def test_the_model_is_the_mean_of_what_the_noise_could_have_come_from() -> None:
    """Against samples of the data, weighted by how likely they are to have become x."""
    drawn = torch.Generator().manual_seed(0)
    which = torch.multinomial(WEIGHTS, 200_000, replacement=True, generator=drawn)
    data = MEANS[which] + DEVIATIONS[which, None] * torch.randn(200_000, 2, generator=drawn, dtype=torch.float64)
    x, alpha, sigma = torch.tensor([0.3, 0.4], dtype=torch.float64), 0.8, 0.6
    likely = (-((x - alpha * data) ** 2).sum(dim=1) / (2 * sigma**2)).exp()
    torch.testing.assert_close(clean(x, alpha, sigma), (likely[:, None] * data).sum(dim=0) / likely.sum(), rtol=0, atol=0.01)


def test_a_walk_of_all_steps_ends_at_the_data() -> None:
    case = ODE[0]
    scheduler = case.made()
    scheduler.set_timesteps(100)
    x = start(case, scheduler, 4000)
    ended = walk(case, scheduler, x, whole=True).view(-1, 2)
    torch.testing.assert_close(ended.mean(dim=0), data_moments()[0], rtol=0, atol=0.05)
