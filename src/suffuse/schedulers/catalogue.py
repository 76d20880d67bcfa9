"""What there is to know about each scheduler before choosing one, as data. Imports nothing, so that it is told at once.

Orders are those of the default configuration; those of the solvers of the probability flow are measured (docs/schedulers.md).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["ODE", "SDE", "inverse", "distilled", "discrete"]
Noise = Literal["never", "on request", "always"]
Models = Literal["alphas", "EDM", "flow matching", "consistency", "score SDE", "tokens"]

KINDS: dict[Kind, str] = {
    "ODE": "follows the probability flow: the same noise gives the same picture, more steps the same one more exactly",
    "SDE": "adds noise on the way: more steps draw another picture",
    "inverse": "goes from a picture to the noise that it comes from",
    "distilled": "few steps, for models that were distilled for them",
    "discrete": "draws tokens",
}

MODELS: dict[Models, str] = {
    "alphas": "trained on a table of alphas: Stable Diffusion and its kin",
    "EDM": "preconditioned as Karras et al. (2022) do",
    "flow matching": "trained on straight paths",
    "consistency": "consistency models",
    "score SDE": "the score models of Song et al. (2021)",
    "tokens": "models of tokens",
}


class Facts(NamedTuple):
    """One scheduler.

    Attributes:
        kind: One of `KINDS`.
        order: The power of the number of steps that the error falls with; None where no exact solution is sought.
        calls: Calls of the model a step.
        noise: Whether noise is drawn on the way.
        models: One of `MODELS`.
        paper: Who described it, and when.
        page: Where.
    """

    kind: Kind
    order: int | None
    calls: int
    noise: Noise
    models: Models
    paper: str
    page: str


_ARXIV, _K_DIFFUSION = "https://arxiv.org/abs/", "https://github.com/crowsonkb/k-diffusion"

CATALOGUE: dict[str, Facts] = {
    "DDIMScheduler": Facts("ODE", 1, 1, "on request", "alphas", "Song, Meng and Ermon, 2021", _ARXIV + "2010.02502"),
    "DDIMParallelScheduler": Facts("ODE", 1, 1, "on request", "alphas", "Shih et al., 2023", _ARXIV + "2305.16317"),
    "PNDMScheduler": Facts("ODE", 2, 1, "never", "alphas", "Liu et al., 2022", _ARXIV + "2202.09778"),
    "IPNDMScheduler": Facts("ODE", 1, 1, "never", "alphas", "Zhang and Chen, 2023", _ARXIV + "2204.13902"),
    "EulerDiscreteScheduler": Facts("ODE", 1, 1, "on request", "alphas", "Karras et al., 2022", _ARXIV + "2206.00364"),
    "HeunDiscreteScheduler": Facts("ODE", 2, 2, "never", "alphas", "Karras et al., 2022", _ARXIV + "2206.00364"),
    "KDPM2DiscreteScheduler": Facts("ODE", 2, 2, "never", "alphas", "Lu et al., 2022", _ARXIV + "2206.00927"),
    "LMSDiscreteScheduler": Facts("ODE", 4, 1, "never", "alphas", "Crowson, 2022", _K_DIFFUSION),
    "DPMSolverMultistepScheduler": Facts("ODE", 2, 1, "on request", "alphas", "Lu et al., 2022", _ARXIV + "2211.01095"),
    "DPMSolverSinglestepScheduler": Facts("ODE", 2, 1, "on request", "alphas", "Lu et al., 2022", _ARXIV + "2206.00927"),
    "UniPCMultistepScheduler": Facts("ODE", 3, 1, "never", "alphas", "Zhao et al., 2023", _ARXIV + "2302.04867"),
    "DEISMultistepScheduler": Facts("ODE", 2, 1, "never", "alphas", "Zhang and Chen, 2023", _ARXIV + "2204.13902"),
    "EDMEulerScheduler": Facts("ODE", 1, 1, "on request", "EDM", "Karras et al., 2022", _ARXIV + "2206.00364"),
    "EDMDPMSolverMultistepScheduler": Facts("ODE", 2, 1, "on request", "EDM", "Lu et al., 2022", _ARXIV + "2211.01095"),
    "FlowMatchEulerDiscreteScheduler": Facts(
        "ODE", 1, 1, "on request", "flow matching", "Lipman et al., 2023", _ARXIV + "2210.02747"
    ),
    "FlowMatchHeunDiscreteScheduler": Facts(
        "ODE", 2, 2, "on request", "flow matching", "Lipman et al., 2023", _ARXIV + "2210.02747"
    ),
    "DDPMScheduler": Facts("SDE", None, 1, "always", "alphas", "Ho, Jain and Abbeel, 2020", _ARXIV + "2006.11239"),
    "DDPMParallelScheduler": Facts("SDE", None, 1, "always", "alphas", "Shih et al., 2023", _ARXIV + "2305.16317"),
    "DDPMWuerstchenScheduler": Facts("SDE", None, 1, "always", "alphas", "Pernias et al., 2024", _ARXIV + "2306.00637"),
    "UnCLIPScheduler": Facts("SDE", None, 1, "always", "alphas", "Ramesh et al., 2022", _ARXIV + "2204.06125"),
    "RePaintScheduler": Facts("SDE", None, 1, "always", "alphas", "Lugmayr et al., 2022", _ARXIV + "2201.09865"),
    "EulerAncestralDiscreteScheduler": Facts("SDE", None, 1, "always", "alphas", "Crowson, 2022", _K_DIFFUSION),
    "KDPM2AncestralDiscreteScheduler": Facts("SDE", None, 2, "always", "alphas", "Crowson, 2022", _K_DIFFUSION),
    "DPMSolverSDEScheduler": Facts("SDE", None, 2, "always", "alphas", "Crowson, 2022", _K_DIFFUSION),
    "SASolverScheduler": Facts("SDE", None, 1, "always", "alphas", "Xue et al., 2023", _ARXIV + "2309.05019"),
    "CosineDPMSolverMultistepScheduler": Facts("SDE", None, 1, "always", "EDM", "Evans et al., 2024", _ARXIV + "2407.14358"),
    "KarrasVeScheduler": Facts("SDE", None, 2, "always", "EDM", "Karras et al., 2022", _ARXIV + "2206.00364"),
    "ScoreSdeVeScheduler": Facts("SDE", None, 2, "always", "score SDE", "Song et al., 2021", _ARXIV + "2011.13456"),
    "ScoreSdeVpScheduler": Facts("SDE", None, 1, "always", "score SDE", "Song et al., 2021", _ARXIV + "2011.13456"),
    "DDIMInverseScheduler": Facts("inverse", 1, 1, "never", "alphas", "Mokady et al., 2023", _ARXIV + "2211.09794"),
    "DPMSolverMultistepInverseScheduler": Facts("inverse", 2, 1, "never", "alphas", "Mokady et al., 2023", _ARXIV + "2211.09794"),
    "LCMScheduler": Facts("distilled", None, 1, "always", "alphas", "Luo et al., 2023", _ARXIV + "2310.04378"),
    "TCDScheduler": Facts("distilled", None, 1, "always", "alphas", "Zheng et al., 2024", _ARXIV + "2402.19159"),
    "CMStochasticIterativeScheduler": Facts(
        "distilled", None, 1, "always", "consistency", "Song et al., 2023", _ARXIV + "2303.01469"
    ),
    "AmusedScheduler": Facts("discrete", None, 1, "always", "tokens", "Chang et al., 2022", _ARXIV + "2202.04200"),
    "VQDiffusionScheduler": Facts("discrete", None, 1, "always", "tokens", "Gu et al., 2022", _ARXIV + "2111.14822"),
}
"""Name → facts, those that one would try first first."""
