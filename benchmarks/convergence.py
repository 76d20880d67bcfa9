"""How fast the error of each scheduler falls with its steps, on a Gaussian mixture where the exact solution is known.

Prints the tables, and writes docs/schedulers.md with a plot of each scheduler (`pip install "suffuse[docs]"`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

import suffuse
from suffuse.schedulers.catalogue import CATALOGUE, KINDS

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "schedulers"))
from gaussian_mixture import COUNTS, ODE, SDE, Case, error, moments_error, slope

ROOT = Path(__file__).parents[1]
MOMENT_COUNTS = (10, 20, 40, 80)
TOKENS = {"AmusedScheduler": {"mask_token_id": 1}, "VQDiffusionScheduler": {"num_vec_classes": 2}}
SHOWN = 20
"""How many steps the curve of sigmas has."""

HEAD = """# Schedulers

A scheduler takes a model's predictions from noise to a picture. `suffuse schedulers` lists them, `suffuse schedulers NAME` tells
one in full; a pipeline takes another one by

    pipe.scheduler = suffuse.UniPCMultistepScheduler.from_config(pipe.scheduler.config)

This page is written by `python benchmarks/convergence.py --write`.

{kinds}

{catalogue}

## How fast the error falls

The model here is never wrong: of a mixture of three Gaussians in the plane, what a diffusion model predicts is known in closed
form (`tests/schedulers/gaussian_mixture.py`). A run that follows the probability flow is held against the exact solution (Runge
and Kutta's fourth order, float64) from the same 64 points, at the noise level of the last timestep: the step from there to no
noise is the same for all. The root mean square error falls with `steps^-order`; the slope is fitted to the last four numbers of
steps above the rounding of float32. `tests/schedulers/test_convergence.py` keeps it within 0.4 of the order.

{ode}

Where it is not what the name or the paper says:

- **DPMSolverMultistep, `solver_order=3`, is of order 2.** Its second difference is half of the second derivative that the
  expansion wants. diffusers, whose results are equal to the last bit, has it so; twice the coefficient gives order 3 (there is a
  test), and other pictures, so it stays.
- **UniPC is of order `solver_order + 1`**, thanks to its corrector (Zhao et al., 2023, section 3).
- **PNDM's** formula of the fourth order gives order 2: that is what its paper proves (Liu et al., 2022). Its warm-up of Runge and
  Kutta makes no difference.
- **IPNDM** is of order 1: its first step begins where there is no signal, and takes the clean sample there for 0 (with that step
  made exactly the slope is 1.6: its coefficients are those of even steps, its steps are not even). Its models predict `v`.
- **Evenly spaced timesteps cost order.** With the default `timestep_spacing="linspace"` the last steps are long in log sigma,
  however many there are: DPMSolverMultistep, Singlestep, UniPC, DEIS and KDPM2 then show 1.3 to 1.7. The table is with
  `use_exponential_sigmas=True`; `use_karras_sigmas=True` gives the same orders, but for that third-order solver (1.3).

## What noise on the way leaves of the data

The largest error of mean and covariance of 4000 finished samples, whose own chance is about 0.02.

{sde}

`KarrasVe`, `ScoreSdeVe`, `ScoreSdeVp`, `UnCLIP`, `RePaint` and `DDPMWuerstchen` step in other ways than the rest and are not
measured, nor are the inverse, distilled and discrete ones, which have no exact solution to be held against.

## Plots

Left the noise levels of a run of {shown} steps, right the error.

{plots}
"""


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows))


def noise_levels(name: str) -> tuple[str, list[float]]:
    """What falls in a run, and its values."""
    scheduler: Any = getattr(suffuse, name)(**TOKENS.get(name, {}))
    scheduler.set_timesteps(SHOWN if CATALOGUE[name].kind != "distilled" else 4)
    if name == "AmusedScheduler":
        return "masked tokens", [1.0, *(scheduler._masked(step).item() for step in range(SHOWN))]
    if name == "VQDiffusionScheduler":
        scheduler.set_timesteps(len(scheduler))
        return "masked tokens", scheduler.log_cumprod_ct[scheduler.timesteps].exp().tolist()
    if name == "ScoreSdeVpScheduler":
        low, high, t = scheduler.config.beta_min, scheduler.config.beta_max, scheduler.timesteps
        return "sigma / alpha", ((low * t + (high - low) * t**2 / 2).exp() - 1).sqrt().tolist()
    if name == "ScoreSdeVeScheduler":
        scheduler.set_sigmas(SHOWN)
        return "sigma", scheduler.discrete_sigmas.flip(0).tolist()
    if name == "KarrasVeScheduler":
        return "sigma", scheduler.schedule.sqrt().tolist()
    if name == "IPNDMScheduler":
        return "noise share", scheduler.betas.tolist()
    if name == "DDPMWuerstchenScheduler":
        return "noise share", [(1 - scheduler._alpha_bar(t.view(1), t.view(1)).item()) for t in scheduler.timesteps]
    if hasattr(scheduler, "sigmas"):
        return "noise share" if "FlowMatch" in name else "sigma / alpha", scheduler.sigmas.tolist()
    bars = scheduler.alphas_cumprod[scheduler.timesteps]
    return "sigma / alpha", ((1 - bars) / bars).sqrt().tolist()


def plot(name: str, curves: dict[str, tuple[tuple[int, ...], list[float]]], path: Path) -> None:
    """One small picture: noise levels, errors."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 8})
    figure, places = plt.subplots(1, 2 if curves else 1, figsize=(6 if curves else 3, 2.2), squeeze=False, layout="constrained")
    label, levels = noise_levels(name)
    left = places[0, 0]
    left.plot(range(len(levels)), levels, ".-", linewidth=0.8, markersize=3)
    left.set(xlabel="step", ylabel=label)
    if label.startswith("sigma"):
        left.set_yscale("log")
    for title, (counts, errors) in curves.items():
        places[0, 1].loglog(counts, errors, ".-", linewidth=0.8, markersize=4, label=title)
    if curves:
        places[0, 1].set(
            xlabel="steps", ylabel="error", xticks=[10, 20, 50, 100, 200], xticklabels=["10", "20", "50", "100", "200"]
        )
        places[0, 1].legend(fontsize=6)
    for place in places.flat:
        place.minorticks_off()
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)


def short(case: Case) -> str:
    """The options that tell a case from the others of its scheduler."""
    told = {k: v for k, v in case.options.items() if k in ("solver_order", "solver_type", "algorithm_type", "skip_prk_steps")}
    return ", ".join(f"{k}={v}" for k, v in told.items()) or "default"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write docs/schedulers.md and the plots too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    curves: dict[str, dict[str, tuple[tuple[int, ...], list[float]]]] = {name: {} for name in CATALOGUE}
    ode, sde = list[list[str]](), list[list[str]]()
    for case in ODE:
        errors = [error(case, count) for count in COUNTS]
        measured = slope(COUNTS, errors)
        ode.append([case.name, short(case), str(case.order), f"{measured:.2f}", *(f"{one:.1e}" for one in errors)])
        curves[case.name][f"{short(case)}: {measured:.2f}"] = (COUNTS, errors)
        print(*ode[-1], flush=True)
    for case in SDE:
        eta = {"eta": 1.0} if case.name == "DDIMScheduler" else {}
        errors = [moments_error(case, count, **eta) for count in MOMENT_COUNTS]
        sde.append([case.name, "eta=1" if eta else short(case), *(f"{one:.3f}" for one in errors)])
        curves[case.name]["mean and covariance, " + sde[-1][1]] = (MOMENT_COUNTS, errors)
        print(*sde[-1], flush=True)
    if not options.write:
        return
    folder = ROOT / "docs" / "schedulers"
    folder.mkdir(exist_ok=True)
    for name in CATALOGUE:
        plot(name, curves[name], folder / f"{name}.svg")
    rows = [
        [name, f.kind, "" if f.order is None else str(f.order), str(f.calls), f.noise, f.models, f"[{f.paper}]({f.page})"]
        for name, f in CATALOGUE.items()
    ]
    page = HEAD.format(
        kinds="\n".join(f"- **{kind}** {text}." for kind, text in KINDS.items()),
        catalogue=table(["scheduler", "kind", "order", "calls a step", "noise", "models", "paper"], rows),
        ode=table(["scheduler", "options", "order", "slope", *(f"{count} steps" for count in COUNTS)], ode),
        sde=table(["scheduler", "options", *(f"{count} steps" for count in MOMENT_COUNTS)], sde),
        plots="\n\n".join(f"### {name}\n\n![{name}](schedulers/{name}.svg)" for name in CATALOGUE),
        shown=SHOWN,
    )
    (ROOT / "docs" / "schedulers.md").write_text(page)


if __name__ == "__main__":
    main()
