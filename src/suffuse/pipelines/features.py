"""Features are values: what may be passed in to a call of any pipeline that draws, what each needs, and what it touches.

A feature is a row of `FEATURES`. It says which keyword asks for it, what it reads and writes of a run, and how its keywords
become conditioners; two features that write the same `EXCLUSIVE` place cannot work together, all others can. A pipeline takes
features by ending its signature with `**values: Unpack[…]` of one of the dictionaries here; `recipe` writes their keywords out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any, TypedDict

from suffuse.diffusion.conditioning import UNTOLD, Conditioner
from suffuse.errors import InputError
from suffuse.models.controlnet import ControlNetModel, MultiControlNetModel
from suffuse.models.t2i_adapter import MultiAdapter, T2IAdapter
from suffuse.pipelines.arguments import ARGUMENTS, check_place, predictor
from suffuse.pipelines.controlnet.controls import controls, one_model
from suffuse.pipelines.gligen.boxes import check_boxes, grounding
from suffuse.pipelines.t2i_adapter.adapters import adapter_features, one_adapter
from suffuse.processing.image import Frame, ImageInput

if TYPE_CHECKING:
    from torch import Tensor

    from suffuse.diffusion.guidance import Guidance


# ---------------------------------------------------------------- the keywords


class Beginnings(TypedDict, total=False):
    """Something to begin with other than noise."""

    image: ImageInput | None
    mask_image: ImageInput | None
    masked_image_latents: Tensor | None
    strength: float | None
    padding_mask_crop: int | None


class Controls(TypedDict, total=False):
    """ControlNets."""

    controlnet: ControlNetModel | MultiControlNetModel | Sequence[ControlNetModel] | None
    control_image: ImageInput | Sequence[Any] | None
    controlnet_conditioning_scale: float | list[float]
    guess_mode: bool
    control_guidance_start: float | list[float]
    control_guidance_end: float | list[float]


class Adapters(TypedDict, total=False):
    """T2I-Adapters."""

    adapter: T2IAdapter | MultiAdapter | Sequence[T2IAdapter] | None
    adapter_image: ImageInput | Sequence[Any] | None
    adapter_conditioning_scale: float | list[float]
    adapter_conditioning_factor: float


class Pictures(TypedDict, total=False):
    """IP-Adapters that are loaded; `ip_adapter_image` stands in the signatures, as it does in those of diffusers."""

    ip_adapter_image_embeds: Sequence[Tensor] | None
    ip_adapter_scale: float | Mapping[str, Any] | Sequence[Any] | None


class Boxes(TypedDict, total=False):
    """What stands where, for a UNet that was trained to be told (GLIGEN)."""

    gligen_phrases: list[str] | None
    gligen_boxes: list[list[float]] | None
    gligen_scheduled_sampling_beta: float


class Guided(TypedDict, total=False):
    """Another way to combine predictions."""

    guidance: Guidance | None


class BesideControl(Adapters, Pictures, Boxes, Guided, total=False):
    """For pipelines that have a ControlNet of their own."""


class BesideAdapter(Controls, Pictures, Boxes, Guided, total=False):
    """For pipelines that have a T2I-Adapter of their own."""


class BesideBoxes(Controls, Adapters, Pictures, Guided, total=False):
    """For pipelines that are told boxes anyway, or whose calls hold several parts or steps, which boxes are not told of."""


class BesideGuidance(Controls, Adapters, Pictures, Boxes, total=False):
    """For pipelines whose guidance is their own."""


class BesidePicture(Controls, Adapters, Pictures, Boxes, Guided, total=False):
    """For pipelines that begin with a picture."""


class Values(Beginnings, Controls, Adapters, Pictures, Boxes, Guided, total=False):
    """For pipelines that begin with noise."""


# ---------------------------------------------------------------- the table

COMPOSED = tuple(Values.__annotations__)
"""The keywords of all features."""

EXCLUSIVE: Mapping[str, str] = {
    "beginning": "a run begins with one thing",
    "branches": "one guidance combines the predictions",
    "image tokens": "pictures to take after are said once",
}
"""Places that one feature alone can write, and why."""


TOLD_BY_PROMPTS = ("uncond", "cond")
"""Branches of guidance that every pipeline tells: what the prompts say, and what they should not show."""


CALLED_BY = (
    *("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type", "attention_type", "encoder_hid_dim"),
    *("class_embed_type", "num_class_embeds", "time_cond_proj_dim"),
)
"""What the configurations of two models must say alike, so that both can be called in one way."""


@dataclass(frozen=True)
class Feature:
    """Something a call may be asked to do, on top of what its pipeline does.

    Attributes:
        name: As people call it.
        asked_by: The keyword that asks for it, or the method that loads it.
        needs: Keyword without which that one means nothing → what it may be, or a list of.
        settings: Keywords that mean nothing without it.
        reads: What it sees of a run.
        writes: What it changes: tokens, text, beginning, channels, added conditions, image tokens, residuals, attention,
            weights, branches, latents between steps.
        unless: A keyword that makes another feature of it.
        ready: Raises `InputError` if the pipeline cannot do what the arguments of a call ask for; computes nothing.
        values: From a pipeline that is called, and the frame that is filled, to what the UNet sees.
        size: From a pipeline that is called, and the (height, width) asked for, to the one of the result.
    """

    name: str
    asked_by: str
    needs: Mapping[str, tuple[type[Any], ...]] = field(default_factory=dict[str, tuple[type[Any], ...]])
    settings: tuple[str, ...] = ()
    reads: frozenset[str] = frozenset()
    writes: frozenset[str] = frozenset()
    unless: str = ""
    ready: Callable[[Any, Mapping[str, Any]], None] = field(default=lambda pipe, arguments: None)
    values: Callable[[Any, Frame], Sequence[Conditioner]] = field(default=lambda pipe, frame: ())
    size: Callable[[Any, int | None, int | None], tuple[int, int]] | None = None

    def is_asked(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the arguments of a call ask for it."""
        return arguments.get(self.asked_by) is not None and arguments.get(self.unless) is None


def _controls(pipe: Any, frame: Frame) -> Sequence[Conditioner]:
    return controls(pipe, one_model(pipe._run.arguments["controlnet"]), "control_image", frame)


def _adapters(pipe: Any, frame: Frame) -> Sequence[Conditioner]:
    return [adapter_features(pipe, one_adapter(pipe._run.arguments["adapter"]), "adapter_image", frame)]


def _check_guidance(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Raise `InputError` unless a guidance can guide the model; its worse one, if any, is one like it, and beside it."""
    guidance, model = arguments["guidance"], predictor(pipe)
    if guidance.texts and not getattr(pipe, "_told_by_text", ()):
        found, expected = ", ".join(guidance.texts), "a guidance that is told nothing but the prompts"
        raise InputError(f"guidance has texts of its own, and {type(pipe).__name__} reads none", found=found, expected=expected)
    taken = {*guidance.texts} & {"cond", *UNTOLD}
    if taken:
        raise InputError(f"guidance has a text for the branch {min(taken)!r}", remedy="give the branch a name of its own")
    unknown = {*guidance.branches} - {*TOLD_BY_PROMPTS, *guidance.texts}
    if unknown:
        raise InputError(
            "guidance asks for a branch that nothing is told", found=min(unknown), expected=", ".join(TOLD_BY_PROMPTS)
        )
    guidance.check_model(model)
    kind = type(getattr(model, "_orig_mod", model))  # of one that is compiled
    for name, worse in guidance.models.items():
        unlike = [key for key in CALLED_BY if isinstance(worse, kind) and worse.config.get(key) != model.config.get(key)]
        if not isinstance(worse, kind) or unlike:
            found = ", ".join(f"{key}={worse.config.get(key)}" for key in unlike) or type(worse).__name__
            raise InputError(f"the worse model is no {kind.__name__} like the pipeline's", found=found)
        check_place(f"guidance.{name}", worse, pipe)
        if any(arguments.get(name) is not None for name in ("ip_adapter_image", "ip_adapter_image_embeds")):
            raise InputError(
                "a worse model looks at no pictures, and an IP-Adapter shows some", remedy="leave out one of the two"
            )


def _boxes(pipe: Any, frame: Frame) -> Sequence[Conditioner]:
    return [grounding(pipe, pipe._run.arguments["gligen_scheduled_sampling_beta"])]


def _adapter_size(pipe: Any, height: int | None, width: int | None) -> tuple[int, int]:
    return pipe.size_by("adapter_image", height, width, one_adapter(pipe._run.arguments["adapter"]).downscale_factor)


_NET = ("controlnet_conditioning_scale", "guess_mode", "control_guidance_start", "control_guidance_end")
_ADAPTER = ("adapter_conditioning_scale", "adapter_conditioning_factor")

FEATURES: tuple[Feature, ...] = (
    Feature("given noise", "latents", writes=frozenset({"beginning"}), unless="mask_image"),
    Feature("image to image", "image", settings=("strength",), writes=frozenset({"beginning"}), unless="mask_image"),
    Feature(
        "inpainting",
        "mask_image",
        needs={"image": (object,)},
        settings=("strength", "masked_image_latents", "padding_mask_crop"),
        writes=frozenset({"beginning", "channels", "latents between steps"}),
    ),
    Feature(
        "ControlNet",
        "control_image",
        needs={"controlnet": (ControlNetModel, MultiControlNetModel)},
        settings=_NET,
        reads=frozenset({"text", "added conditions"}),
        writes=frozenset({"residuals"}),
        values=_controls,
        size=lambda pipe, height, width: pipe.size_by("control_image", height, width),
    ),
    Feature(
        "T2I-Adapter",
        "adapter_image",
        needs={"adapter": (T2IAdapter, MultiAdapter)},
        settings=_ADAPTER,
        writes=frozenset({"residuals"}),
        values=_adapters,
        size=_adapter_size,
    ),
    Feature("IP-Adapter", "ip_adapter_image", settings=("ip_adapter_scale",), writes=frozenset({"image tokens"})),
    Feature(
        "IP-Adapter embeddings", "ip_adapter_image_embeds", settings=("ip_adapter_scale",), writes=frozenset({"image tokens"})
    ),
    Feature(
        "GLIGEN",
        "gligen_boxes",
        needs={"gligen_phrases": (object,)},
        settings=("gligen_scheduled_sampling_beta",),
        writes=frozenset({"attention"}),
        ready=check_boxes,
        values=_boxes,
    ),
    Feature("guidance", "guidance", ready=_check_guidance, writes=frozenset({"branches"})),
    Feature("LoRA", "load_lora_weights", writes=frozenset({"weights"})),
    Feature("textual inversion", "load_textual_inversion", writes=frozenset({"tokens"})),
    Feature("FreeU", "enable_freeu", writes=frozenset({"skip connections"})),
    Feature("weighted prompts", "prompt", reads=frozenset({"tokens"}), writes=frozenset({"text"})),
    Feature("clip skip", "clip_skip", writes=frozenset({"text"})),
)


# ---------------------------------------------------------------- a call


def asked_features(pipe: Any, arguments: Mapping[str, Any]) -> list[Feature]:
    """The features that a call asks for by values; what a keyword of the pipeline's own means is the pipeline's affair."""
    own = {name for name in arguments if name in COMPOSED} - {*pipe.__call__.values}
    return [feature for feature in FEATURES if feature.asked_by not in own and feature.is_asked(arguments)]


def values_of(pipe: Any, frame: Frame) -> list[Conditioner]:
    """What the UNet sees of the features that a call asks for by values."""
    return [value for feature in asked_features(pipe, pipe._run.arguments) for value in feature.values(pipe, frame)]


def guidance_of(pipe: Any, own: Guidance) -> Guidance:
    """How a call is guided: as it says, with what that remembers for this run alone; or as the pipeline does, if it does not."""
    given: Guidance | None = pipe._run.arguments.get("guidance")
    return own if given is None else given.fork()


def check_features(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Raise `InputError` if a feature lacks what it needs, a setting has no feature, or two features cannot work together."""
    asked = asked_features(pipe, arguments)
    for feature in asked:
        for need, kinds in feature.needs.items():
            given = arguments[need]
            if given is None:
                raise InputError(f"{feature.asked_by} is given and no {need}", remedy=f"pass {need}=… too")
            for one in given if isinstance(given, list) else [given]:
                if not isinstance(one, kinds):
                    expected = " or ".join(kind.__name__ for kind in kinds)
                    raise InputError(f"{need} is no {feature.name}", found=type(one).__name__, expected=f"{expected}, or a list")
        feature.ready(pipe, arguments)
    means = {name for feature in asked for name in (feature.asked_by, *feature.needs, *feature.settings)}
    for name in pipe.__call__.values:
        if name not in means and not _is_default(name, arguments[name]):
            wanted = " or ".join(each.asked_by for each in FEATURES if name in (*each.needs, *each.settings))
            raise InputError(f"{name} is given and no {wanted}", remedy=f"pass {wanted}=… too, or leave it out")
    for one, other in combinations(asked, 2):
        for place in one.writes & other.writes & EXCLUSIVE.keys():
            raise InputError(
                f"{one.name} ({one.asked_by}) and {other.name} ({other.asked_by}) cannot work together",
                found=EXCLUSIVE[place],
                remedy=f"leave out {one.asked_by} or {other.asked_by}",
            )


def _is_default(name: str, value: Any) -> bool:
    default = ARGUMENTS[name].default
    return value is default or (isinstance(value, (bool, int, float)) and value == default)
