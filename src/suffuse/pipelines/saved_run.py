"""A run as a file: written after any step, gone on with in another process, forked into another picture.

    pipe("a lighthouse", seed=7, save_run="lighthouse-{step}.safetensors")
    pipe(resume="lighthouse-20.safetensors")                              # the same picture, bit for bit
    pipe(resume="lighthouse-20.safetensors", prompt="a lighthouse at night")

The file holds what a step begins with: the latents, the memory of the scheduler and the state of the generators; and what the
pipeline was called with, so that all else (encoded prompts, masks, timesteps) is made again as it was. It is safetensors
with one entry of metadata, JSON: nothing in it can run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from suffuse.adapters.ip_adapter import scale_in_effect
from suffuse.checkpoints.atomic import write_whole
from suffuse.checkpoints.safetensors_file import SAVED_RUN, read_header
from suffuse.checkpoints.saving import write_safetensors
from suffuse.diffusion.loop import SilentHook, Step
from suffuse.errors import CorruptFileError, InputError, SaveError, SuffuseError
from suffuse.pipelines.beside import beside, tell_differences
from suffuse.pipelines.kept_guidance import check_kind, described, remembered, spelled
from suffuse.pipelines.packing import Packed, packed, unpacked
from suffuse.schedulers.scheduler import SchedulerMixin
from suffuse.version import __version__

FORMAT = 2
"""The version of what the entry of metadata holds."""
OF_THE_CALL = (
    "save_run", "resume", "callback", "callback_steps", "callback_on_step_end", "callback_on_step_end_tensor_inputs",
    "controlnet", "adapter", "guidance",
)  # fmt: skip
"""Arguments that belong to a call and not to the picture, and models: the next call passes its own."""
_TYPES = {
    "str": str, "str | None": (str, type(None)), "dict[str, Any]": dict, "dict[str, Any] | None": (dict, type(None)), "int": int,
    "Tensor": Tensor, "list[Tensor]": list,
}  # fmt: skip
PICTURES = ("ip_adapter_image", "ip_adapter_image_embeds")
"""Arguments that say what to take after: one takes the place of the other."""


@dataclass
class SavedRun:
    """A run after some step.

    Attributes:
        pipeline: Class of the pipeline.
        model: Where its weights were loaded from, if that is known.
        scheduler: Class of the scheduler.
        scheduler_config: Its configuration.
        guidance: What it remembers of the steps; and, if it was the pipeline's own, its scale and rescale, which a callback may
            have changed.
        arguments: What the pipeline was called with; generators are in the state they then had.
        step: How many entries of the timesteps are behind.
        total: How many there are.
        latents: (batch, channels, height, width), after that step.
        memory: The fields of the scheduler's memory.
        generators: The states of the generators among the arguments, after that step.
        guided_by: The classes and numbers of the guidance that the call was given (`kept_guidance.described`).
        beside: What was told by nets and adapters that are not kept (`beside.beside`); None in files of format 1.
    """

    pipeline: str
    model: str | None
    scheduler: str
    scheduler_config: dict[str, Any]
    guidance: dict[str, Any]
    arguments: dict[str, Any]
    step: int
    total: int
    latents: Tensor
    memory: dict[str, Any]
    generators: list[Tensor]
    guided_by: dict[str, Any] = field(default_factory=dict[str, Any])
    beside: dict[str, Any] | None = None

    # ------------------------------------------------------------ files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the run; the file is the old one or the new one, never a part.

        Raises:
            SaveError: It could not be written.
            InputError: An argument is of a kind that no file can hold.
        """
        tensors = dict[str, Tensor]()
        told = {name: packed(value, name, tensors) for name, value in _fields(self).items()}
        metadata = {SAVED_RUN: json.dumps({"format": FORMAT, "suffuse": __version__, **told})}
        write_whole(Path(path), lambda staged: write_safetensors(tensors, staged, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SavedRun:
        """Read a run.

        Raises:
            MissingFileError: There is no such file.
            CorruptFileError: It is damaged.
            InputError: It is no run.
        """
        from safetensors.torch import load

        path = Path(path)
        header = read_header(path)
        if SAVED_RUN not in header.metadata:
            raise InputError(f"{path} holds no run", expected="a file that a call with save_run=… wrote")
        try:
            octets = path.read_bytes()  # at once: a run that goes on replaces the file with each step
            told = json.loads(json.loads(octets[8 : 8 + int.from_bytes(octets[:8], "little")])["__metadata__"][SAVED_RUN])
            version = told.pop("format")
            if version > FORMAT:
                raise InputError(f"{path} was written by suffuse {told['suffuse']}", remedy="update suffuse to read it")
            tensors = load(octets)
            added = {"guided_by", "beside"} if version == 1 else set[str]()
            names = [one.name for one in dataclasses.fields(cls) if one.name not in added]
            run = cls(**{name: unpacked(told[name], tensors) for name in names})
            run._check_fields()
            return run
        except SuffuseError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, OSError) as error:
            raise CorruptFileError(f"{path} is a damaged run", found=f"{type(error).__name__}: {error}") from None

    def _check_fields(self) -> None:
        """Raise `TypeError` or `ValueError` unless everything is of the kind it has to be."""
        for one in dataclasses.fields(self):
            value, kind = getattr(self, one.name), _TYPES[str(one.type)]
            if not isinstance(value, kind):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"{one.name} is {value!r}")
        if not 0 <= self.step <= self.total or not all(isinstance(state, Tensor) for state in cast(list[Any], self.generators)):
            raise ValueError(f"step {self.step} of {self.total}")
        for label, entry in (self.beside or {}).items():
            if entry["weights"].count(":") != 1:
                raise ValueError(f"{label} is {entry!r}")
        spelled(self.guided_by)

    # ------------------------------------------------------------ going on

    def check(self, pipeline: str, model: str | None) -> None:
        """Raise `InputError` if another class of pipeline is to go on; warn if it has another checkpoint."""
        if self.pipeline != pipeline:
            raise InputError(f"the run is one of {self.pipeline}", found=pipeline, remedy=f"{self.pipeline}.from_pipe(pipe)")
        if self.model is not None and model is not None and self.model != place(model):
            warnings.warn(f"the run was begun with {self.model} and goes on with {model}", stacklevel=4)

    def check_call(self, pipe: Any, arguments: Mapping[str, Any]) -> None:
        """Raise `InputError` if the call that goes on is guided in another way; warn if it uses other nets or adapters."""
        check_kind(self.guided_by, arguments.get("guidance"))
        if self.beside is not None:
            tell_differences(self.beside, pipe, arguments)

    def restore(self, scheduler: SchedulerMixin, latents: Tensor, timesteps: Tensor, generator: Any) -> tuple[Tensor, int]:
        """Bring a run that is about to begin to where this one is.

        Args:
            scheduler: Of the run; gets this one's memory.
            latents: With which it would begin.
            timesteps: Its way.
            generator: The generators it draws from; those of `torch` get this run's states, unless they are others.

        Returns:
            The latents to go on with, and the step.

        Raises:
            InputError: It goes another way, or makes pictures of another size.
        """
        fresh, known = memory_fields(scheduler), self.memory
        if type(scheduler).__name__ != self.scheduler or fresh.keys() != known.keys():
            raise InputError(
                f"{type(scheduler).__name__} cannot go on with a run of {self.scheduler}",
                remedy=f"pipe.scheduler = suffuse.{self.scheduler}.from_config(SavedRun.load(file).scheduler_config)",
            )
        self._compare(scheduler.config)
        for name in ("timesteps", "sigmas"):
            if name in fresh and not _same(fresh[name], known[name]):
                raise InputError(
                    f"the run goes another way: its {name} are not those of this call",
                    found=_told(fresh[name]),
                    expected=_told(known[name]),
                    remedy="leave steps, strength and the settings of the scheduler as they were",
                )
        if (latents.shape, latents.dtype, len(timesteps)) != (self.latents.shape, self.latents.dtype, self.total):
            raise InputError(
                "the run makes other pictures than this call",
                found=f"{tuple(latents.shape)} of {latents.dtype} in {len(timesteps)} steps",
                expected=f"{tuple(self.latents.shape)} of {self.latents.dtype} in {self.total} steps",
                remedy="leave size, number and type as they were",
            )

        def placed(value: Any) -> Any:
            if isinstance(value, list):
                return [placed(item) for item in value]
            return value.to(latents.device) if isinstance(value, Tensor) and value.shape == latents.shape else value

        moved = {name: placed(value) for name, value in known.items()}
        moved |= {name: fresh[name] for name in ("timesteps", "sigmas") if name in fresh}  # equal, and on the right device
        scheduler.memory = dataclasses.replace(scheduler.memory, **moved, derived={})
        sources = torch_generators(generator)
        if self.generators and len(sources) != len(self.generators):
            raise InputError(f"the run has {len(self.generators)} generators", found=f"{len(sources)} in this call")
        for source, state in zip(sources, self.generators, strict=False):
            source.set_state(state)
        return self.latents.to(latents.device, copy=True), self.step

    def _compare(self, config: Mapping[str, Any]) -> None:
        """Tell what another configuration of the scheduler changes; what the model predicts is no setting to change."""
        told = {name: (value, config.get(name)) for name, value in self.scheduler_config.items() if not name.startswith("_")}
        other = {name: pair for name, pair in told.items() if str(pair[0]) != str(pair[1])}
        changes = ", ".join(f"{name}={new!r} instead of {old!r}" for name, (old, new) in other.items())
        if "prediction_type" in other:
            raise InputError(f"the model of the run predicts something else: {changes}")
        if other:
            warnings.warn(f"the run goes on with {changes}", stacklevel=6)


class RunWriter:
    """Writes the steps of one call.

    Args:
        path: The file, which each step replaces unless its name holds `{step}`.
        pipeline: Class of the pipeline.
        model: Where its weights came from.
        arguments: What it was called with, before a generator was used.
        beside: What it is told by, and the file does not keep.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        pipeline: str,
        model: str | None,
        arguments: Mapping[str, Any],
        beside: Mapping[str, Any] | None = None,
    ) -> None:
        tensors = dict[str, Tensor]()
        kept = {name: value for name, value in arguments.items() if name not in OF_THE_CALL}
        self.arguments: Any = Packed(packed(kept, "arguments", tensors), tensors)
        self.path, self.pipeline, self.model = os.fspath(path), pipeline, None if model is None else place(model)
        self.guided_by, self.beside = described(arguments.get("guidance")), dict(beside or {})
        self.generators = torch_generators(arguments.get("generator"))
        if len({*map(id, self.generators)}) < len(self.generators):
            raise InputError("a generator stands twice in the list: such a run cannot be saved", remedy="pass seed= instead")

    @classmethod
    def of(cls, pipe: Any, arguments: Mapping[str, Any]) -> RunWriter | None:
        """The writer that the arguments of a call ask for, if they do."""
        path = arguments["save_run"]
        if path is None:
            return None
        scaled = {**arguments, **scale_in_effect(pipe, arguments)}
        return cls(path, type(pipe).__name__, pipe.name_or_path, scaled, beside(pipe, arguments))

    def write(self, scheduler: SchedulerMixin, guidance: Any, latents: Tensor, step: int, total: int) -> None:
        """Write the run after `step` of `total` steps."""
        own = () if self.guided_by else ("scale", "rescale")
        numbers = {name: getattr(guidance, name) for name in own if hasattr(guidance, name)}
        SavedRun(
            pipeline=self.pipeline,
            model=self.model,
            scheduler=type(scheduler).__name__,
            scheduler_config=dict(scheduler.config),
            guidance=numbers | remembered(guidance),
            arguments=self.arguments,
            step=step,
            total=total,
            latents=latents,
            memory=memory_fields(scheduler),
            generators=[generator.get_state() for generator in self.generators],
            guided_by=self.guided_by,
            beside=self.beside,
        ).save(self.path.replace("{step}", str(step)))


@dataclass
class SaveBeginning(SilentHook):
    """Write the run before the first step, when nothing is lost yet if that fails; stands before the hooks that act in it."""

    writer: RunWriter
    scheduler: SchedulerMixin
    guidance: Any
    begun: bool = False

    def before(self, step: Step) -> None:
        """Write what the first step begins with."""
        if not self.begun:
            self.begun = True
            self.writer.write(self.scheduler, self.guidance, step.latents, step.index, step.total)


@dataclass
class SaveSteps(SilentHook):
    """Write the run after each step; stands after all hooks that act in it."""

    writer: RunWriter
    scheduler: SchedulerMixin
    guidance: Any

    def after(self, step: Step) -> None:
        """Write what the next step begins with; a disk that is full does not cost the picture."""
        try:
            self.writer.write(self.scheduler, self.guidance, step.latents, step.index + 1, step.total)
        except SaveError as error:
            warnings.warn(f"the run was not saved after step {step.index + 1}: {error}", stacklevel=2)


def place(model: str) -> str:
    """A name of a model that says the same from every folder."""
    return os.path.realpath(model) if os.path.exists(model) else model


def torch_generators(generator: Any) -> list[torch.Generator]:
    """The generators that have a state."""
    sources = generator if isinstance(generator, list) else [generator]
    return [source for source in sources if isinstance(source, torch.Generator)]


def memory_fields(scheduler: SchedulerMixin) -> dict[str, Any]:
    """What the scheduler remembers, without what is derived from it."""
    return {name: value for name, value in _fields(scheduler.memory).items() if name != "derived"}


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _same(one: Any, other: Any) -> bool:
    return isinstance(other, Tensor) and torch.equal(one.cpu(), other)


def _told(values: Any) -> str:
    return str(values.tolist()) if isinstance(values, Tensor) else repr(values)
