"""What the scheduler tests share: the classes, the option grids, and a run beside the peer's."""

from __future__ import annotations

import functools
import inspect
import itertools
import random
import warnings
from typing import Any

import diffusers
import torch

import suffuse
from suffuse.public_names import MODULES
from suffuse.schedulers.scheduler import KarrasDiffusionSchedulers

diffusers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)

OTHER = [
    "CMStochasticIterativeScheduler",
    "CosineDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EDMDPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
]
"""Schedulers of other models than the latent ones: their schedules are of another kind, and tested apart."""

LONERS = ["DDPMWuerstchenScheduler", "RePaintScheduler", "ScoreSdeVeScheduler", "ScoreSdeVpScheduler", "KarrasVeScheduler"]
"""Those whose steps take other arguments than everyone's."""

DISCRETE = ["AmusedScheduler", "VQDiffusionScheduler"]
"""Those of models of tokens."""

EVERY = [
    name
    for module, names in MODULES.items()
    for name in names
    if module.startswith("suffuse.schedulers.")
    and hasattr(diffusers, name)
    and name not in ("SchedulerMixin", *OTHER, *LONERS, *DISCRETE)
]
"""Every scheduler of latent models in the registry that the peer has."""

NAMES = [name for name in EVERY if name in KarrasDiffusionSchedulers.__members__]
"""Those that take each other's configurations."""

OPTIONS: dict[str, list[Any]] = {
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "trained_betas": [None, torch.linspace(1e-4, 0.02, 1000).tolist()],
    "prediction_type": ["epsilon", "v_prediction", "sample"],
    "timestep_spacing": ["linspace", "leading", "trailing"],
    "steps_offset": [0, 1],
    "rescale_betas_zero_snr": [False, True],
    "set_alpha_to_one": [True, False],
    "clip_sample": [False, True],
    "clip_sample_range": [1.0, 0.5],
    "thresholding": [False, True],
    "sample_max_value": [1.0, 1.5],
    "variance_type": ["fixed_small", "fixed_small_log", "fixed_large"],
    "skip_prk_steps": [False, True],
    "interpolation_type": ["linear", "log_linear"],
    "timestep_type": ["discrete", "continuous"],
    "sigmas": [None, "karras", "exponential", "beta", "lu", "flow"],
    "sigma_min": [None, 0.1],
    "sigma_max": [None, 10.0],
    "final_sigmas_type": ["zero", "sigma_min"],
    "solver_order": [1, 2, 3],
    "algorithm_type": ["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"],
    "solver_type": ["midpoint", "heun", "bh1", "bh2"],
    "lower_order_final": [True, False],
    "euler_at_final": [False, True],
    "lambda_min_clipped": [-float("inf"), -5.1],
    "predict_x0": [True, False],
    "disable_corrector": [[], [0, 2]],
    "flow_shift": [1.0, 3.0],
    "noise_sampler_seed": [None, 0, 11],
}
"""Parameter of `__init__` → values to try; "sigmas" stands for the switches `use_*_sigmas`."""

NO_SAMPLE = (
    "EulerAncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
)
"""Schedulers whose `prediction_type` "sample" the peer lacks."""

SWITCHES = {"lu": "use_lu_lambdas"}
STEPS = [1, 2, 3, 10, 17]


def parameters(name: str) -> set[str]:
    """The parameters of a scheduler that both libraries have."""
    return set(inspect.signature(getattr(suffuse, name).__init__).parameters) & set(
        inspect.signature(getattr(diffusers, name).__init__).parameters
    )


def options_of(name: str) -> dict[str, list[Any]]:
    """What can be varied in a scheduler."""
    known = parameters(name)
    options = {option: values for option, values in OPTIONS.items() if option in known}
    kinds = [kind for kind in OPTIONS["sigmas"] if kind and SWITCHES.get(kind, f"use_{kind}_sigmas") in known]
    if kinds:
        options["sigmas"] = [None, *kinds]
    if name == "DEISMultistepScheduler":
        del options["algorithm_type"], options["solver_type"]  # it has one of each, and reads the others as that
    if name == "UnCLIPScheduler":
        options |= {"beta_schedule": ["squaredcos_cap_v2"], "prediction_type": ["epsilon", "sample"]}
        options["variance_type"] = ["fixed_small_log"]
    if name == "DDIMInverseScheduler":
        options["timestep_spacing"] = ["leading", "trailing"]
    if name.startswith("DDPM"):
        options["beta_schedule"] = [*options["beta_schedule"], "sigmoid", "laplace"]
    if name == "HeunDiscreteScheduler":
        options["beta_schedule"] = [*options["beta_schedule"], "exp"]
    if name == "DPMSolverMultistepInverseScheduler":
        options["algorithm_type"] = ["dpmsolver++", "dpmsolver"]  # the peer's equations with noise give NaN, backwards
    if name.startswith("DPMSolver"):
        options.pop("variance_type", None)  # here it says what the model returns: tested by itself
    if name == "SASolverScheduler":
        options |= {"algorithm_type": ["data_prediction", "noise_prediction"]}
        options |= {"predictor_order": [1, 2, 3, 4], "corrector_order": [1, 2, 3, 4]}
    if "flow" in kinds:
        options["prediction_type"] = [*options["prediction_type"], "flow_prediction"]
    return options


def possible(name: str, config: dict[str, Any]) -> bool:
    """Whether the peer can run this configuration, and without NaN: the other cases have tests of their own."""
    algorithm, kind = config.get("algorithm_type", ""), config.get("prediction_type")
    noise = algorithm in ("dpmsolver", "sde-dpmsolver", "noise_prediction") or config.get("predict_x0") is False
    steps, zero, ladder = config["steps"], config.get("final_sigmas_type") == "zero", config.get("sigmas")
    order, snr = config.get("solver_order", 1), config.get("rescale_betas_zero_snr")
    single, unipc = name == "DPMSolverSinglestepScheduler", name == "UniPCMultistepScheduler"
    refusals = [
        algorithm in ("dpmsolver", "sde-dpmsolver") and zero,
        algorithm == "sde-dpmsolver" and (order == 3 or single),
        kind == "flow_prediction" and (noise or ladder != "flow"),
        single and ((noise and config.get("thresholding")) or steps < order),
        unipc and ((config["solver_type"] == "bh1" and zero) or (noise and (zero or config["thresholding"]))),
        unipc and not config["lower_order_final"] and order > 1 and (zero or ladder),
        name.startswith(("DDIMS", "DDIMP", "DDPM", "LCM", "TCD")) and snr and kind == "epsilon",
        name == "DDIMInverseScheduler" and kind == "sample" and config["set_alpha_to_one"],
        name == "DPMSolverMultistepInverseScheduler"
        and order > 1
        and ladder
        and not (config["lower_order_final"] and steps < 15),
        name == "SASolverScheduler" and noise and config["thresholding"],
        name == "UnCLIPScheduler" and steps == 1,
        name == "PNDMScheduler" and (kind == "sample" or (not config["skip_prk_steps"] and steps < 4)),
        name in NO_SAMPLE and kind == "sample",
        noise and snr,
        name == "KDPM2AncestralDiscreteScheduler" and (config["beta_schedule"] == "squaredcos_cap_v2" or config["trained_betas"]),
    ]
    return not any(refusals)


@functools.cache
def grid(name: str) -> list[dict[str, Any]]:
    """Configurations in which every pair of option values that can stand together does."""
    options, shuffled = {**options_of(name), "steps": STEPS}, random.Random(name)

    def index_pairs(picked: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
        return {(a, picked[a], b, picked[b]) for a, b in itertools.combinations(range(len(picked)), 2)}

    covered, chosen, idle = set[tuple[int, int, int, int]](), list[dict[str, Any]](), 0
    while idle < 300:
        picked = tuple(shuffled.randrange(len(values)) for values in options.values())
        config = {option: values[index] for (option, values), index in zip(options.items(), picked, strict=True)}
        if not possible(name, config) or not index_pairs(picked) - covered:
            idle += 1
            continue
        idle, covered = 0, covered | index_pairs(picked)
        chosen.append(config)
    return chosen


def made(library: Any, name: str, config: dict[str, Any]) -> Any:
    """A scheduler of one of the libraries."""
    values = {option: value for option, value in config.items() if option not in ("steps", "sigmas")}
    if config.get("sigmas"):
        values[SWITCHES.get(config["sigmas"], f"use_{config['sigmas']}_sigmas")] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if library is diffusers else "error")
        return getattr(library, name)(**values)


def model(sample: torch.Tensor) -> torch.Tensor:
    """A prediction that depends on the sample, so that errors would grow."""
    return torch.tanh(sample * 0.7 + 0.1) * 1.3


def run(scheduler: Any, steps: int | None = None, dtype: torch.dtype = torch.float32, **options: Any) -> list[torch.Tensor]:
    """The samples after every step of a run, and with `steps=None` one on the schedule that is set."""
    if steps is not None:
        scheduler.set_timesteps(steps)
    if (scheduler.timesteps == scheduler.timesteps[0]).sum() > 1 and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # the peer takes the second of equal timesteps, and would run past the end
    sample = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)).to(dtype) * getattr(
        scheduler, "init_noise_sigma", 1.0
    )
    torch.manual_seed(2)  # where no generator is taken, seeds are drawn globally
    if "generator" in inspect.signature(scheduler.step).parameters and "noise_sampler_seed" not in scheduler.config:
        options = {"generator": torch.Generator().manual_seed(1), **options}
    samples = []
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample
        sample = scheduler.step(model(seen).to(dtype), timestep, sample.to(dtype), **options).prev_sample
        samples.append(sample)
    return samples


def equal(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two tensors are the same to the last bit, type and shape included; NaN (of an overflow) equals NaN."""
    same = ours.dtype == theirs.dtype and ours.shape == theirs.shape
    return same and bool(((ours == theirs) | (ours.isnan() & theirs.isnan())).all())


def quiet(function: Any, *arguments: Any, **options: Any) -> Any:
    """Call something of the peer's, whose warnings are not our concern."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **options)
