"""The pipeline of a task, whatever the checkpoint: its model_index.json names one class, a table the others of its family.

AutoPipelineForInpainting.from_pretrained(folder)           a StableDiffusionInpaintPipeline for a Stable Diffusion folder
AutoPipelineForImage2Image.from_pipe(text_to_image)         the same parts, for another task
AutoPipelineForText2Image.from_pipe(pipe, controlnet=net)   the class of the family that takes a ControlNet
"""

from __future__ import annotations

import os
import warnings
from typing import Any, ClassVar, NamedTuple

from suffuse.configuration import ConfigMixin
from suffuse.errors import ConfigError, InputError, nearest
from suffuse.hub.options import HUB_KEYWORDS
from suffuse.pipelines.pipeline import DiffusionPipeline
from suffuse.public_names import resolve


class Family(NamedTuple):
    """Pipelines that share their components, by task; None where there is none for it."""

    name: str
    text_to_image: str | None
    image_to_image: str | None
    inpainting: str | None
    controlnet: bool = False


FAMILIES: tuple[Family, ...] = (
    Family("Stable Diffusion", "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    Family(
        "Stable Diffusion XL", "StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"
    ),
    Family(
        "Stable Diffusion",
        "StableDiffusionControlNetPipeline",
        "StableDiffusionControlNetImg2ImgPipeline",
        "StableDiffusionControlNetInpaintPipeline",
        controlnet=True,
    ),
    Family(
        "Stable Diffusion XL",
        "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLControlNetImg2ImgPipeline",
        "StableDiffusionXLControlNetInpaintPipeline",
        controlnet=True,
    ),
    Family("latent consistency", "LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline", None),
    Family("AltDiffusion", "AltDiffusionPipeline", "AltDiffusionImg2ImgPipeline", None),
)
"""Every family of which a task can be asked; those that take a ControlNet stand in a row of their own, under the same name."""


class AutoPipeline(ConfigMixin):
    """Picks a class; is none itself.

    Class attributes:
        task: The column of `FAMILIES`.
    """

    config_name = DiffusionPipeline.config_name
    task: ClassVar[str] = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        raise InputError(f"{name} picks a class and is none itself", remedy=f"{name}.from_pretrained(…) or {name}.from_pipe(…)")

    @classmethod
    def from_pretrained(cls, pretrained_model_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load a checkpoint as the pipeline of this task.

        Args:
            pretrained_model_or_path: A folder, or the name of a repository.
            **kwargs: As of `DiffusionPipeline.from_pretrained`; `controlnet=` picks the class that takes one.

        Raises:
            ConfigError: The checkpoint is of no family in the table, or its family has nothing for this task.
        """
        where = {name: value for name, value in kwargs.items() if name in HUB_KEYWORDS}
        index, commit = DiffusionPipeline.load_config(pretrained_model_or_path, return_commit_hash=True, **where)
        if commit is not None:
            kwargs["revision"] = commit  # what the branch was at, though it may move meanwhile
        family = _family(str(index.get("_class_name")), f"{pretrained_model_or_path} was saved as")
        if "controlnet" in kwargs:
            family = _controlled(family, kwargs["controlnet"] is not None)
        return cls._class_of(family).from_pretrained(pretrained_model_or_path, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """The pipeline of this task with the components of another: shared, not copied.

        Args:
            pipeline: Where the components come from.
            **kwargs: As of `DiffusionPipeline.from_pipe`; `controlnet=` picks the class that takes one, `controlnet=None` the
                one that takes none.

        Raises:
            ConfigError: The pipeline is of no family in the table, has nothing for this task, or a component is missing.
            UnknownArgumentError: A keyword that the class has no use for.
        """
        family = _family(type(pipeline).__name__, "the pipeline is a")
        if "controlnet" in kwargs:
            family = _controlled(family, kwargs["controlnet"] is not None)
        target = cls._class_of(family)
        if kwargs.get("controlnet", ...) is None and not family.controlnet:
            del kwargs["controlnet"]
        elif left := [n for n, v in pipeline.components.items() if v is not None and n not in target.component_names()]:
            warnings.warn(f"{target.__name__} has no use for {', '.join(left)} of {type(pipeline).__name__}", stacklevel=2)
        return target.from_pipe(pipeline, **kwargs)

    @classmethod
    def _class_of(cls, family: Family) -> type[DiffusionPipeline]:
        name = getattr(family, cls.task)
        if name is None:
            there = [task for task in TASKS if getattr(family, task) is not None]
            raise ConfigError(f"{_spelled(family)} has no pipeline for {cls.task.replace('_', ' ')}", expected=f"one of {there}")
        return resolve(name)


class AutoPipelineForText2Image(AutoPipeline):
    """Pictures from prompts, with the checkpoint's own family."""

    task = "text_to_image"


class AutoPipelineForImage2Image(AutoPipeline):
    """Pictures from a picture and prompts, with the checkpoint's own family."""

    task = "image_to_image"


class AutoPipelineForInpainting(AutoPipeline):
    """Pictures from a picture, a mask and prompts, with the checkpoint's own family."""

    task = "inpainting"


TASKS = tuple(kind.task for kind in AutoPipeline.__subclasses__())


def has_tasks(name: str) -> bool:
    """Whether a class belongs to a family of which a task can be asked."""
    return any(name in (getattr(family, task) for task in TASKS) for family in FAMILIES)


def _family(name: str, what: str) -> Family:
    """The family that a class belongs to."""
    for family in FAMILIES:
        if name in (getattr(family, task) for task in TASKS):
            return family
    known = [getattr(family, task) for family in FAMILIES for task in TASKS if getattr(family, task)]
    close = nearest(name, known)
    raise ConfigError(
        f"{what} {name!r}, of which no family of pipelines is known",
        expected=f"one of {', '.join(known)}",
        remedy=f"did you mean {close}?" if close else "load it with DiffusionPipeline.from_pretrained",
    )


def _controlled(family: Family, controlnet: bool) -> Family:
    """The row of the same family that takes a ControlNet, or the one that takes none."""
    for other in FAMILIES:
        if (other.name, other.controlnet) == (family.name, controlnet):
            return other
    raise ConfigError(f"{family.name} takes no controlnet", remedy="leave controlnet out")


def _spelled(family: Family) -> str:
    return family.name + (" with a ControlNet" if family.controlnet else "")
