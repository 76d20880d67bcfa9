"""What every scheduler is: a configuration, tables that never change, and the memory of a run.

Everything that `set_timesteps()` and `step()` change lives in one dataclass, `scheduler.memory`. It is held per thread, and
`fork()` gives a scheduler with the same tables and a memory of its own, so that one pipeline can serve many threads:

    run = pipe.scheduler.fork()      # this run's own
    pipe.scheduler.follow(run)       # `pipe.scheduler.timesteps` now answers for it, in this thread
    run.set_timesteps(30)
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from suffuse.configuration import ConfigMixin
from suffuse.errors import InputError, unknown_argument
from suffuse.hub.options import HUB_KEYWORDS
from suffuse.hub.publishing import PushToHubMixin
from suffuse.outputs import BaseOutput
from suffuse.public_names import PUBLIC, resolve
from suffuse.schedulers.noise_schedule import Array, training_betas

_Value = TypeVar("_Value")
_Self = TypeVar("_Self", bound="SchedulerMixin")

KarrasDiffusionSchedulers = Enum(
    "KarrasDiffusionSchedulers",
    [
        "DDIMScheduler",
        "DDPMScheduler",
        "PNDMScheduler",
        "LMSDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "DEISMultistepScheduler",
        "UniPCMultistepScheduler",
        "DPMSolverSDEScheduler",
        "EDMEulerScheduler",
    ],
)
"""The schedulers that take each other's configurations: they sample the same models."""


@dataclass
class SchedulerOutput(BaseOutput):
    """What a step returns.

    Attributes:
        prev_sample: The sample one step less noisy, (batch, channels, height, width).
        pred_original_sample: The clean sample the step believes in, same shape, where the solver has one.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


@dataclass
class Memory:
    """What a run changes. Lists in it are replaced, never changed in place, so that a copy is one of its own."""

    timesteps: Tensor
    num_inference_steps: int | None = None
    step_index: int | None = None
    begin_index: int | None = None
    derived: dict[Hashable, Any] = field(default_factory=dict[Hashable, Any], repr=False, compare=False)

    def derive(self, key: Hashable, make: Callable[..., _Value], *arguments: Any) -> _Value:
        """`make(*arguments)`, computed once for as long as this memory keeps its timesteps and sigmas."""
        try:
            return self.derived[key]
        except KeyError:
            return self.derived.setdefault(key, make(*arguments))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "derived": {}}


class Remembered:
    """An attribute of a scheduler that lives in its memory.

    Assign it to replace it; what was derived from the old value is forgotten. Changing a tensor in place is not noticed.
    """

    def __init__(self, name: str = "") -> None:
        self.name = name

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = self.name or name

    def __get__(self, scheduler: SchedulerMixin | None, owner: type | None = None) -> Any:
        return self if scheduler is None else getattr(scheduler.memory, self.name)

    def __set__(self, scheduler: SchedulerMixin, value: Any) -> None:
        memory = scheduler.memory
        setattr(memory, self.name, value)
        memory.derived = {}


class _Slot:
    """A place for a memory, which several schedulers may look into."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory


class _Slots:
    """One slot for each thread that wrote, and the last one written for the threads that did not."""

    def __init__(self, memory: Memory) -> None:
        self.last, self.own = _Slot(memory), threading.local()

    @property
    def current(self) -> _Slot:
        return self.own.__dict__.get("slot", self.last)

    @current.setter
    def current(self, slot: _Slot) -> None:
        self.own.slot = self.last = slot


class SchedulerMixin(ConfigMixin, PushToHubMixin):
    """Base of all schedulers: a run is `set_timesteps`, then `scale_model_input`, the model and `step` at every timestep.

    `set_timesteps(num_inference_steps, device)` begins a run of so many steps, 1 to `num_train_timesteps`, with `timesteps` on
    `device`. Some take falling `timesteps` (or `sigmas`) of the caller's choice instead of a number.

    `step(model_output, timestep, sample)` takes the model's prediction for `sample`, (batch, channels, …), at the entry of
    `timesteps` whose turn it is, and returns the sample one step less noisy: a `SchedulerOutput`, or the tuple of its fields
    with `return_dict=False`. Where noise is drawn, `generator` is its source, and `variance_noise` the noise itself.

    Both raise `InputError` for what is not possible: numbers out of range, timesteps that are not in the schedule, steps before
    `set_timesteps` or after the last.

    Class attributes:
        order: How many entries of `timesteps` make one step of the solver.

    Attributes:
        timesteps: The timesteps of the run, falling, shape (steps,).
        num_inference_steps: What `set_timesteps` was asked for, None before.
        step_index: Which step is next, None before the first.
        begin_index: At which step the run begins, None if that is found from the first timestep.
    """

    config_name: ClassVar[str] = "scheduler_config.json"
    order: ClassVar[int] = 1
    _compatibles: ClassVar[list[str]] = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    set_timesteps: Callable[..., None]
    scale_model_input: Callable[..., Tensor]
    step: Callable[..., Any]
    add_noise: Callable[..., Tensor]
    init_noise_sigma: Any
    _slots: _Slots
    betas: Tensor
    alphas: Tensor
    alphas_cumprod: Tensor

    timesteps = Remembered()
    num_inference_steps = Remembered()
    step_index = _step_index = Remembered("step_index")
    begin_index = _begin_index = Remembered("begin_index")

    # ------------------------------------------------------------ memory

    @property
    def memory(self) -> Any:
        """The memory that this thread works with: a `Memory`, of the class its solver needs."""
        return self._slots.current.memory

    @memory.setter
    def memory(self, memory: Memory) -> None:
        if "slot" in self._slots.own.__dict__:
            self._slots.current.memory = memory
            self._slots.last = self._slots.current
        else:
            self._slots.current = _Slot(memory)

    def _start(self, memory: Memory) -> None:
        """Give a new scheduler its first memory, which belongs to no thread yet."""
        self._slots = _Slots(memory)

    def fork(self: _Self) -> _Self:
        """A scheduler of the same configuration and tables, with its own copy of the memory."""
        return copy.copy(self)

    def follow(self, other: SchedulerMixin) -> None:
        """Look, in this thread, into the memory of `other` (a fork of this one): both are one run from now on."""
        slot = other._slots.current
        self._slots.current = other._slots.current = slot

    def __getstate__(self) -> dict[str, Any]:
        return {**{name: value for name, value in self.__dict__.items() if name != "_slots"}, "memory": copy.copy(self.memory)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        memory = state.pop("memory")
        self.__dict__.update(state)
        self._slots = _Slots(memory)

    # ------------------------------------------------------------ tables

    def _make_alphas(self, betas: Tensor | None = None) -> None:
        """Make `betas`, `alphas` and `alphas_cumprod`, each of shape (num_train_timesteps,), from the configuration."""
        self.betas = training_betas(self.config) if betas is None else betas
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    def __bool__(self) -> bool:
        return True  # also where there is no such number

    # ------------------------------------------------------------ which step

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at this step (a pipeline that starts in the middle of the schedule says so, before the first step)."""
        self.memory.begin_index = begin_index

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """The step that `timestep` stands for; the second one where it stands twice, so that no sigma is skipped.

        Raises:
            InputError: It is not one of the timesteps.
        """
        memory = self.memory
        if schedule_timesteps is None:
            positions = memory.derive("positions", lambda: _positions(_listed(memory)))
        else:
            positions = _positions(schedule_timesteps.tolist())
        value = self._number(timestep)
        if value not in positions:
            return self._missing(value)
        return positions[value]

    def _missing(self, timestep: float) -> int:
        raise InputError(
            f"timestep {timestep} is not one of scheduler.timesteps",
            expected=str(_listed(self.memory)),
            remedy="pass an entry of scheduler.timesteps",
        )

    def _number(self, timestep: float | Tensor) -> float:
        """A timestep as a Python number; one of our own is looked up, which spares waiting for the device it is on."""
        if not isinstance(timestep, Tensor):
            return timestep
        memory = self.memory
        if timestep._base is memory.timesteps and timestep.ndim == 0:
            return _listed(memory)[timestep.storage_offset() // memory.timesteps.stride(0)]
        if timestep.numel() != 1:
            raise InputError("step needs one timestep for the whole batch", found=f"a tensor of shape {tuple(timestep.shape)}")
        return timestep.item()

    def _row(
        self, timestep: float | Tensor | None, columns: Callable[..., tuple[Tensor, ...]], *arguments: Any
    ) -> tuple[Any, ...]:
        """The row of this step in a table of coefficients.

        Args:
            timestep: What the caller of `step` named, which matters at the first step only; None when that is behind.
            columns: Makes the table from (memory, *arguments): tensors of shape (steps, …).
            *arguments: Further hashable arguments of `columns`.
        """
        memory = self.memory
        if memory.step_index is None:
            memory.step_index = self._first_step(timestep)
        table = self._table(columns, *arguments)
        if memory.step_index >= len(table):
            raise InputError(f"all {len(table)} steps of the run are taken", remedy="call set_timesteps before the next run")
        return table[memory.step_index]

    def _table(self, columns: Callable[..., tuple[Tensor, ...]], *arguments: Any) -> list[tuple[Tensor, ...]]:
        memory = self.memory
        return memory.derive((columns.__name__, *arguments), lambda: rows(columns(memory, *arguments)))

    def _first_step(self, timestep: float | Tensor | None) -> int:
        memory = self.memory
        if memory.begin_index is not None:
            return memory.begin_index
        if timestep is None:
            raise InputError("the run has not begun", remedy="call step, or set_begin_index")
        if self._number(timestep) == _listed(memory)[0]:
            return 0  # even where rounding made the second timestep the same
        return self.index_for_timestep(timestep)

    def _check_ready(self) -> None:
        if self.memory.num_inference_steps is None:
            raise InputError(f"{type(self).__name__} has no timesteps yet", remedy="call set_timesteps before step")

    # ------------------------------------------------------------ files

    @property
    def compatibles(self) -> list[type[ConfigMixin]]:
        """The classes that this scheduler's configuration can be given to."""
        return self.compatible_classes()

    @classmethod
    def compatible_classes(cls) -> list[type[ConfigMixin]]:
        """The class itself, and those of its compatibles that suffuse has."""
        names = [name for name in dict.fromkeys([cls.__name__, *cls._compatibles]) if name in PUBLIC]
        return [resolve(name) for name in names]

    @classmethod
    def compatible_names(cls) -> set[str]:
        """Class names that a file may bear which this class reads: those of all its compatibles, known to suffuse or not."""
        return {*super().compatible_names(), *cls._compatibles}

    @classmethod
    def from_pretrained(
        cls: type[_Self],
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """A scheduler from the `scheduler_config.json` of a folder or a repository.

        Args:
            pretrained_model_name_or_path: The folder, or "org/name".
            subfolder: A folder inside of it.
            return_unused_kwargs: Return (scheduler, unused) and do not complain about unknown keywords.
            **kwargs: Configuration values that replace those of the file; and the `suffuse.hub.options.HubOptions`.

        Raises:
            MissingFileError: There is no such file.
            ConfigError: It is no configuration of a scheduler.
            UnknownArgumentError: A keyword that is no configuration value.
        """
        known = cls.parameters_of_init()
        hub = {name: kwargs.pop(name) for name in HUB_KEYWORDS if name in kwargs}
        for name in kwargs:
            if name not in known and not return_unused_kwargs:
                raise unknown_argument(f"{cls.__name__}.from_pretrained", name, [*known, *HUB_KEYWORDS])
        config = cls.load_config(pretrained_model_name_or_path, subfolder=subfolder, **hub)
        cls.check_stored(config, pretrained_model_name_or_path)
        return cls.from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        push_to_hub: bool = False,
        repo_id: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
    ) -> None:
        """Write `scheduler_config.json` into a folder, which is made if need be; publish it too, with `push_to_hub`."""
        self.save_config(save_directory, push_to_hub, repo_id, commit_message, private, token, create_pr)


def rows(columns: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """A table, column by column, as one tuple of (zero-dimensional) tensors a step.

    Zero-dimensional CPU tensors take part in arithmetic as numbers do, on every device, and faster than Python's.
    """
    return list(zip(*(column.unbind() for column in columns), strict=True))


def on_device(timesteps: Array | Tensor, device: str | torch.device | None, dtype: torch.dtype) -> Tensor:
    """Timesteps as a tensor on a device."""
    return torch.as_tensor(timesteps).to(device=device, dtype=dtype)


def stepped(return_dict: bool, *results: Tensor) -> Any:
    """What `step` returns: a `SchedulerOutput`, or the tuple of its fields."""
    return SchedulerOutput(*results) if return_dict else results


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """One value a sample, (batch,), shaped to multiply with `like`, (batch, …)."""
    return values.flatten().view(-1, *[1] * (like.ndim - 1))


def _listed(memory: Memory) -> list[float]:
    return memory.derive("listed", memory.timesteps.tolist)


def _positions(timesteps: list[float]) -> dict[float, int]:
    found: dict[float, list[int]] = {}
    for index, timestep in enumerate(timesteps):
        found.setdefault(timestep, []).append(index)
    return {timestep: indices[:2][-1] for timestep, indices in found.items()}
