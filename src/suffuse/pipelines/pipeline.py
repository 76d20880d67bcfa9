"""What every pipeline is: named components, loaded, moved and saved together, and the state of a run.

A pipeline is read-only while it runs. What one call changes lives in its `Run`, held per thread; `pipe.guidance_scale` and its
like answer for the last run of the calling thread, so that threads may share one pipeline.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from suffuse.checkpoints.atomic import staged_folder
from suffuse.checkpoints.checksums import verify_folder
from suffuse.checkpoints.fetching import namings_by_files
from suffuse.checkpoints.foreign_code import Trust, write_sources
from suffuse.checkpoints.layout import check_variant, superseded
from suffuse.configuration import ConfigMixin
from suffuse.diffusion.advance import GuidedStep, step_options
from suffuse.diffusion.conditioning import Conditioner, Conditioning, Denoiser, warn_of_unheard
from suffuse.diffusion.guidance import ClassifierFreeGuidance, Guidance
from suffuse.diffusion.hooks import CallbackOnStepEnd, CountNoise, EndWhen, OnWholeSteps, WatchNumbers
from suffuse.diffusion.loop import Advance, Hook, Step, Walk, denoise
from suffuse.errors import ConfigError, InputError, unknown_argument
from suffuse.hub.options import HUB_KEYWORDS, HubOptions
from suffuse.hub.publishing import PushToHubMixin, publish
from suffuse.hub.sources import opened
from suffuse.memory.placement import Device, Memory
from suffuse.outputs import BaseOutput
from suffuse.pipelines.components import by_folder, check_component, component_entry, is_left_over, save_component, weights_naming
from suffuse.pipelines.kept_guidance import remind
from suffuse.pipelines.loading import (
    CustomPipeline,
    check_entries,
    check_keywords,
    component_classes,
    connected_components,
    fetch_pipeline,
    folder_namings,
    load_components,
    pipeline_class,
    place_models,
    read_index,
)
from suffuse.pipelines.placement import PlacedModels
from suffuse.pipelines.saved_run import RunWriter, SaveBeginning, SaveSteps
from suffuse.pipelines.single_file import FromSingleFileMixin
from suffuse.processing.image import VaeImageProcessor
from suffuse.schedulers.scheduler import SchedulerMixin

_Pipeline = TypeVar("_Pipeline", bound="DiffusionPipeline")
STEP_OPTIONS = ("eta", "use_clipped_model_output", "generator")
"""Arguments of a call that are handed to the scheduler's step, if it takes them."""


@dataclass
class ImagePipelineOutput(BaseOutput):
    """Pictures: a list of PIL pictures, or an array or tensor of them."""

    images: Any


@dataclass
class Run:
    """What one call of a pipeline changes.

    Attributes:
        scheduler: This run's own fork of the pipeline's scheduler.
        arguments: What the pipeline was called with, defaults filled in; empty when the call is over.
        guidance: How predictions are combined; callbacks may change its scale.
        clip_skip: As it was passed.
        cross_attention_kwargs: As they were passed.
        num_timesteps: Model evaluations on the way.
        num_inference_steps: Steps of the solver on the way.
        interrupt: Set by a callback to end before the next step.
        writer: Writes each step to a file, if the call asks for that.
    """

    scheduler: SchedulerMixin
    arguments: dict[str, Any] = field(default_factory=dict)
    guidance: Guidance = field(default_factory=lambda: ClassifierFreeGuidance(7.5))
    clip_skip: int | None = None
    cross_attention_kwargs: dict[str, Any] | None = None
    num_timesteps: int = 0
    num_inference_steps: int = 0
    interrupt: bool = False
    writer: RunWriter | None = None

    def set_timesteps(self, device: torch.device, **options: Any) -> int:
        """Tell the scheduler how many steps to take, or which, and what else it takes; returns how many."""
        steps, timesteps = self.arguments["num_inference_steps"], self.arguments.get("timesteps")
        if timesteps is None:
            self.scheduler.set_timesteps(steps, device=device, **options)
            self.guidance.check_scheduler(self.scheduler)
            return steps
        if "timesteps" not in inspect.signature(self.scheduler.set_timesteps).parameters:
            raise InputError(
                f"{type(self.scheduler).__name__} takes no custom timesteps",
                remedy="pass num_inference_steps, or another scheduler",
            )
        self.scheduler.set_timesteps(timesteps=timesteps, device=device, **options)
        self.guidance.check_scheduler(self.scheduler)
        return len(self.scheduler.timesteps)

    def timesteps_for(self, num_inference_steps: int, strength: float = 1.0) -> tuple[Tensor, int]:
        """The tail of the timesteps that `strength` leaves, and how many inference steps it is.

        Raises:
            InputError: None is left.
        """
        kept = kept_steps(num_inference_steps, strength)
        skipped = (num_inference_steps - kept) * self.scheduler.order
        self.scheduler.set_begin_index(skipped)
        return self.scheduler.timesteps[skipped:], kept


def kept_steps(num_inference_steps: int, strength: float) -> int:
    """How many steps `strength` leaves.

    Raises:
        InputError: None.
    """
    kept = min(int(num_inference_steps * strength), num_inference_steps)
    if kept < 1:
        enough = f"num_inference_steps={int(np.ceil(1 / strength))}" if strength > 0 else "a strength of 1 / num_inference_steps"
        found = f"strength={strength} leaves no step of num_inference_steps={num_inference_steps}"
        raise InputError(found, remedy=f"use {enough} or more")
    return kept


def _of_run(*path: str, otherwise: tuple[Any, ...] = ()) -> property:
    """A property that reads and writes the run of the calling thread; where that has none, it is read as `otherwise`."""

    def owner(pipe: DiffusionPipeline) -> Any:
        value: Any = pipe._run
        for name in path[:-1]:
            value = getattr(value, name)
        return value

    def write(pipe: DiffusionPipeline, value: Any) -> None:
        held = owner(pipe)
        if not hasattr(held, path[-1]):
            name = "_".join(path)
            raise InputError(
                f"{name} cannot be set: {type(held).__name__} has no {path[-1]}", found=value, remedy=f"leave {name} alone"
            )
        setattr(held, path[-1], value)

    return property(
        lambda pipe: getattr(owner(pipe), path[-1], *otherwise), write, doc=f"`{path[-1]}` of the last run of this thread."
    )


class DiffusionPipeline(FromSingleFileMixin, PlacedModels, ConfigMixin, PushToHubMixin):
    """Components that make something together.

    Class attributes:
        _optional_components: Components that may be None.
        _only_here: Components that the class of diffusers does not know, and is not told of if there are none.
        _settings: Parameters of `__init__` that may be None and are no components.
        _load_connected_pipes: Components may come from other checkpoints, which the model card names.
        _callback_tensor_inputs: Tensors that callbacks may ask for.
    """

    config_name = "model_index.json"
    _optional_components: ClassVar[list[str]] = []
    _only_here: ClassVar[tuple[str, ...]] = ()
    _settings: ClassVar[tuple[str, ...]] = ()
    _load_connected_pipes: ClassVar[bool] = False
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]
    called: ClassVar[Mapping[str, str]] = {}
    """Keyword of a feature → what the pipeline, which has it built in, calls it."""

    scheduler: Any
    guidance_scale = _of_run("guidance", "scale", otherwise=(1.0,))
    _guidance_scale = _of_run("guidance", "scale", otherwise=(1.0,))
    guidance_rescale = _of_run("guidance", "rescale", otherwise=(0.0,))
    _guidance_rescale = _of_run("guidance", "rescale", otherwise=(0.0,))
    clip_skip = _of_run("clip_skip")
    _clip_skip = _of_run("clip_skip")
    cross_attention_kwargs = _of_run("cross_attention_kwargs")
    _cross_attention_kwargs = _of_run("cross_attention_kwargs")
    num_timesteps = _of_run("num_timesteps")
    _num_timesteps = _of_run("num_timesteps")
    interrupt = _of_run("interrupt")
    _interrupt = _of_run("interrupt")

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the last run of this thread asks for an unconditional prediction."""
        return "uncond" in self._run.guidance.branches

    # ------------------------------------------------------------ components

    def register_modules(self, **modules: Any) -> None:
        """Make components attributes of the pipeline, and entries of its configuration."""
        for name, module in modules.items():
            check_component(name, module)
            self.register_to_config(**{name: component_entry(module)})
            object.__setattr__(self, name, module)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__ and name in self.component_names():
            check_component(name, value)
            self.register_to_config(**{name: component_entry(value)})
        object.__setattr__(self, name, value)

    def written(self) -> dict[str, Any]:
        """The entries of the configuration that go into a file."""
        return {name: entry for name, entry in super().written().items() if name not in self._only_here or entry[0] is not None}

    @classmethod
    def component_names(cls) -> list[str]:
        """Names of the components, in the order of `__init__`."""
        return [
            name
            for name, parameter in cls.parameters_of_init().items()
            if parameter.default is inspect.Parameter.empty or (parameter.default is None and name not in cls._settings)
        ]

    def needed_components(self, arguments: dict[str, Any]) -> list[str]:
        """Names of the components that a call with these arguments cannot do without."""
        return [name for name in self.component_names() if name not in self._optional_components]

    def check_call(self, arguments: dict[str, Any]) -> None:
        """Raise `InputError` unless the arguments of a call, each of which is as it may be, go together."""

    def pictures_of(self, arguments: dict[str, Any]) -> int:
        """How many pictures, or whatever the pipeline makes, a call makes at once."""
        return arguments.get("batch_size", 1)

    @property
    def components(self) -> dict[str, Any]:
        """The components by name: `OtherPipeline(**pipe.components)` shares them."""
        return {name: getattr(self, name) for name in self.component_names()}

    @property
    def dtype(self) -> torch.dtype:
        """The floating point type of the first component with parameters."""
        floating = (p.dtype for m in self._modules_by_name.values() for p in m.parameters() if p.is_floating_point())
        return next(floating, torch.float32)

    @property
    def name_or_path(self) -> str | None:
        """Where the pipeline was loaded from."""
        return self.config.get("_name_or_path")

    # ------------------------------------------------------------ loading and saving

    @classmethod
    def from_pretrained(
        cls: type[_Pipeline],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        torch_dtype: torch.dtype | str | dict[str, Any] | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        low_cpu_mem_usage: bool = True,
        device_map: Device | Mapping[str, Device] | None = None,
        max_memory: Memory | None = None,
        offload_folder: str | os.PathLike[str] | None = None,
        offload_state_dict: bool | None = None,
        output_loading_info: bool = False,
        strict: bool = False,
        verify: bool = False,
        use_onnx: bool | None = None,
        custom_pipeline: str | os.PathLike[str] | None = None,
        custom_revision: str | None = None,
        trust_remote_code: bool = False,
        trust_code: str | Sequence[str] | None = None,
        **keywords: Any,
    ) -> Any:
        """Load a pipeline from a folder, or from a repository of the hub.

        `DiffusionPipeline.from_pretrained` makes the class the checkpoint names; a subclass makes itself of its components.

        Args:
            pretrained_model_name_or_path: The folder with model_index.json, or "org/name". Of a repository, only what is needed
                is fetched: nothing of components that are passed, no second format, no other variant.
            torch_dtype: The floating point type of all models, "auto" for the files' own, or a dictionary by component.
            variant: Load the weights with this infix, "fp16" for example, where a component has them.
            use_safetensors: True refuses anything else, False prefers .bin; safetensors where there are any, if None.
            low_cpu_mem_usage: Kept for its name: weights are always read straight into place.
            device_map: A device for all models; a device by component; or "balanced", which shares whole models out over the
                accelerators there are.
            max_memory: For "balanced": device → bytes, or "10GB" and the like, that may be taken; what is free, if None.
            offload_folder: Kept for its name: whole models are not sent to disk; a model of its own may be.
            offload_state_dict: Kept for its name: no weight is in memory twice.
            output_loading_info: Return (pipeline, information) with missing and unexpected tensors by component.
            strict: Raise on what is otherwise one warning: extra components, config entries or tensors.
            verify: Hold every file against the checksums that `save_pretrained` wrote beside them, first; those of a
                repository against the hub's, and fetch again what is not right.
            use_onnx: Fetch ONNX models too.
            custom_pipeline: A class that is none of suffuse's: a .py file, a folder or a repository with pipeline.py, or the name
                of a community pipeline. Its code runs only if it is trusted.
            custom_revision: Of that repository; of a community pipeline, the release, "0.26.3" if None.
            trust_remote_code: Run whatever Python the checkpoint brings.
            trust_code: Run the Python of this hash only, "sha256:…", or of these hashes.
            **keywords: Components, or None, that replace those of the checkpoint; values of the pipeline's own configuration;
                and the `suffuse.hub.options.HubOptions`.

        Raises:
            MissingFileError: No such folder, or a component is not in it.
            ConfigError: model_index.json is not as it should be.
            UnknownArgumentError: A keyword that is neither option nor component.
            HubError: The hub did not give what was asked for.
            UntrustedCodeError: The checkpoint wants Python of its own to run; nothing of it was run.
        """
        hub, components = HubOptions.split(keywords)
        trust, custom = Trust(trust_remote_code, trust_code), CustomPipeline(custom_pipeline, custom_revision)
        with opened(pretrained_model_name_or_path, hub, verify=verify) as source:
            if verify and source.commit is None:
                verify_folder(source.folder)
            index = read_index(source)
            target = pipeline_class(cls, source, index, custom, hub, trust)
            dtypes = torch_dtype if isinstance(torch_dtype, dict) else {"default": torch_dtype}
            check_keywords(target, components, dtypes, _options(cls))
            check_entries(target, source, index, strict)
            planned = component_classes(target, source, index, components, trust)
            classes = {name: kind for name, kind in planned.items() if kind is not None}
            namings = folder_namings(source, classes)
            variants = fetch_pipeline(source, namings, variant, use_safetensors, use_onnx)
        places = place_models(
            source.folder, [n for n, naming in namings.items() if naming], variant, dtypes, device_map, max_memory
        )
        options = {"use_safetensors": use_safetensors, "strict": strict}
        loaded, information = load_components(source.folder, classes, variants, dtypes, places, output_loading_info, options)
        written = {n: index[n] for n in target.parameters_of_init() if n in index and n not in target.component_names()}
        if target._load_connected_pipes:
            passed = {**options, **vars(hub), "torch_dtype": torch_dtype, "variant": variant, "device_map": device_map}
            loaded |= connected_components(target, source, components, passed)
        pipe = target(**(dict.fromkeys(planned) | written | components | loaded))
        pipe.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        pipe.hold_in_place(places)
        return (pipe, information) if output_loading_info else pipe

    @classmethod
    def download(
        cls,
        pretrained_model_name: str | os.PathLike[str],
        *,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        use_onnx: bool | None = None,
        **keywords: Any,
    ) -> str:
        """Fetch what `from_pretrained` would, without loading it and without running anything.

        Args:
            pretrained_model_name: "org/name"; a folder is returned as it is.
            variant: As `from_pretrained` takes it, like the two that follow.
            use_safetensors: Which format.
            use_onnx: ONNX models too.
            **keywords: The `suffuse.hub.options.HubOptions`; and components that will be passed, or None, which are not fetched.

        Returns:
            The folder, to be given to `from_pretrained`.
        """
        hub, components = HubOptions.split(keywords)
        with opened(pretrained_model_name, hub) as source:
            index = read_index(source)
            for name in components:
                if name not in index or name.startswith("_"):
                    raise unknown_argument(f"{cls.__name__}.download", name, [*index, *_options(cls)])
            fetch_pipeline(source, namings_by_files(source, index, components), variant, use_safetensors, use_onnx)
        return str(source.folder)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
    ) -> None:
        """Write the pipeline as a folder that diffusers reads too; the folder is the old one or the new one, never a mixture.

        Files of the old folder that belong to no component stay, and weights of other variants.

        Args:
            save_directory: The folder; made or replaced.
            safe_serialization: safetensors; False writes .bin pickles.
            variant: An infix for the names of weight files, "fp16" for example.
            push_to_hub: Publish the folder as well; those that follow are as `push_to_hub()` takes them.
            repo_id: The name of the folder, if None.
            commit_message: What the commit says.
            private: Whether a new repository is private.
            token: Of the account.
            create_pr: Propose the change instead of making it.

        Raises:
            SaveError: It could not be written; what was there is untouched.
            HubError: It was written, but the hub did not take it.
        """
        parts = by_folder(self.components)

        def keep(path: PurePosixPath) -> bool:
            if path.parts[0] not in parts:
                return not is_left_over(path.parts[0], self.components)
            naming = weights_naming(type(parts[path.parts[0]]))
            return naming is not None and not superseded(naming, variant).fullmatch(path.name)

        check_variant(variant)
        size = sum(tensor.nbytes for model in self._modules_by_name.values() for tensor in model.parameters())
        with staged_folder(save_directory, keep, size) as folder:
            for name, value in parts.items():
                if value is not None:
                    save_component(value, folder / name, safe_serialization, variant)
            self.save_config(folder)
            write_sources(type(self), folder, "pipeline")
        if push_to_hub:
            publish(type(self).__name__, save_directory, repo_id, commit_message, private, token, create_pr)

    @classmethod
    def from_pipe(cls: type[_Pipeline], pipeline: DiffusionPipeline, **kwargs: Any) -> _Pipeline:
        """A pipeline of this class with the components of another pipeline: shared, not copied.

        Args:
            pipeline: Where the components come from.
            **kwargs: Components, or values of the configuration, that replace or add to them;
                `torch_dtype` converts the shared ones.

        Raises:
            ConfigError: A component this class needs is in neither.
        """
        if not isinstance(pipeline, DiffusionPipeline):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"{cls.__name__}.from_pipe needs a pipeline of suffuse", found=type(pipeline))
        dtype = kwargs.pop("torch_dtype", None)
        parameters = cls.parameters_of_init()
        for name in kwargs:
            if name not in parameters:
                raise unknown_argument(f"{cls.__name__}.from_pipe", name, parameters)
        inherited = {**{k: v for k, v in pipeline.config.items() if k not in pipeline.component_names()}, **pipeline.components}
        values = {name: value for name, value in {**inherited, **kwargs}.items() if name in parameters}
        values |= dict.fromkeys(n for n in cls._optional_components if n not in values and n in parameters)
        missing = [n for n in cls.component_names() if n not in values and parameters[n].default is inspect.Parameter.empty]
        if missing:
            raise ConfigError(
                f"{cls.__name__} needs {', '.join(missing)}, which {type(pipeline).__name__} does not have",
                remedy=f"{cls.__name__}.from_pipe(pipe, {missing[0]}=…)",
            )
        made = cls(**values)
        made.register_to_config(_name_or_path=pipeline.name_or_path)
        return made.to(dtype=dtype) if dtype is not None else made

    # ------------------------------------------------------------ running

    @property
    def _run(self) -> Run:
        """The last run of the calling thread."""
        threads = self.__dict__.setdefault("_threads", threading.local())
        if not hasattr(threads, "run"):
            threads.run = Run(self.scheduler)
        return threads.run

    @_run.setter
    def _run(self, run: Run) -> None:
        self.__dict__.setdefault("_threads", threading.local()).run = run

    def __getstate__(self) -> dict[str, Any]:
        if self.__dict__.get("_one_at_a_time") is not None:
            raise InputError("an offloaded pipeline cannot be copied or pickled", remedy="pipe.remove_all_hooks() first")
        return {name: value for name, value in self.__dict__.items() if name != "_threads"}

    @contextlib.contextmanager
    def running(self, arguments: dict[str, Any]) -> Generator[Run]:
        """A run of the calling thread, with its own fork of the scheduler; a run it interrupts goes on afterwards."""
        with self._one_at_a_time or contextlib.nullcontext():
            yield from self._running(arguments)

    def _running(self, arguments: dict[str, Any]) -> Generator[Run]:
        outer, run = self._run, Run(self.scheduler.fork(), arguments)
        run.clip_skip, run.cross_attention_kwargs = arguments.get("clip_skip"), arguments.get("cross_attention_kwargs")
        self._tell(run)
        try:
            yield run
        finally:
            self.maybe_free_model_hooks()
            run.arguments = {}
            if outer.arguments:
                self._tell(outer)

    def _tell(self, run: Run) -> None:
        """Let the attributes of the pipeline, and of its scheduler, answer for this run in the calling thread."""
        self.scheduler.follow(run.scheduler)
        self._run = run

    def denoise(
        self,
        model: nn.Module,
        conditioning: Conditioning,
        latents: Tensor,
        timesteps: Tensor,
        num_inference_steps: int,
        conditioners: Sequence[Conditioner],
        hooks: Sequence[Hook] = (),
        advance: Callable[[Denoiser, Guidance, SchedulerMixin, dict[str, Any]], Advance] = GuidedStep,
        walk: Walk = denoise,
    ) -> Tensor:
        """Walk latents down the timesteps, with the progress bar, the callbacks and the step options of the call.

        Args:
            model: What predicts.
            conditioning: The tensors of the run.
            latents: To begin with.
            timesteps: The way.
            num_inference_steps: How many steps of the solver it is.
            conditioners: What the model sees.
            hooks: What acts between the steps.
            advance: How a step is taken, made of denoiser, guidance, scheduler and the options of the scheduler's step.
            walk: How the way is gone.

        Raises:
            NonFiniteError: The latents became NaN or infinite; names the step.
        """
        run, numbers = self._run, WatchNumbers()
        # Half precision overflows on the way, and the step is worth knowing; else one look at the end does.
        watched = [numbers] if latents.dtype.itemsize < 4 else []
        scheduler, arguments = run.scheduler, run.arguments
        options = step_options(scheduler, **{name: arguments[name] for name in STEP_OPTIONS if name in arguments})
        take = advance(Denoiser(model, scheduler, conditioning, conditioners), run.guidance, scheduler, options)
        run.num_timesteps, run.num_inference_steps, begin = len(timesteps), num_inference_steps, 0
        warn_of_unheard([*conditioners, run.guidance], len(timesteps))
        if arguments["resume"] is not None:
            latents, begin = arguments["resume"].restore(scheduler, latents, timesteps, arguments["generator"])
            remind(run.guidance, arguments["resume"].guidance)
        begun, saved = (
            [save(run.writer, scheduler, run.guidance)] if run.writer is not None else [] for save in (SaveBeginning, SaveSteps)
        )
        with self.progress_bar(total=num_inference_steps, initial=begin // scheduler.order) as bar:
            told = self.callbacks(run, conditioning, num_inference_steps, bar)
            watching = [EndWhen(lambda: run.interrupt), CountNoise(arguments["generator"])]
            acting = [*begun, *watching, *hooks, *watched, *told, *saved]
            latents = walk(latents, timesteps, take, acting, begin)
        numbers.check(latents, type(model).__name__)
        return latents

    def callbacks(self, run: Run, conditioning: Conditioning, num_inference_steps: int, bar: Any) -> list[Hook]:
        """The hooks that tell the outside of each step, in the order they are called."""
        order, arguments = run.scheduler.order, run.arguments
        function, older = arguments["callback_on_step_end"], arguments.get("callback")
        every = arguments.get("callback_steps") or 1

        def tell(step: Step) -> None:
            bar.update()
            if older is not None and step.index % every == 0:
                older(step.index // order, step.timestep, step.latents)

        names = arguments["callback_on_step_end_tensor_inputs"]
        newer = [CallbackOnStepEnd(self, function, names, conditioning)] if function is not None else []
        return [*newer, OnWholeSteps(order, num_inference_steps, tell)]

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None, initial: int = 0) -> Any:
        """A tqdm bar, as `set_progress_bar_config` set it up."""
        return tqdm(iterable, total=total, initial=initial, **self.__dict__.get("_progress_bar_config", {}))

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Keywords for the tqdm bars of this pipeline: `disable=True`, `desc="…"`."""
        self._progress_bar_config = kwargs

    # ------------------------------------------------------------ switches of the models

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Compute attention in slices: less memory, more time. "auto" halves, "max" goes head by head."""
        self.set_attention_slice(slice_size)

    def disable_attention_slicing(self) -> None:
        """Compute attention in one go."""
        self.set_attention_slice(None)

    def set_attention_slice(self, slice_size: str | int | None) -> None:
        """Set the slice size of every model that has attention."""
        self._each("set_attention_slice", slice_size)

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Use xFormers for attention; PyTorch's own memory-efficient attention is the default and needs no switch."""
        self._each("enable_xformers_memory_efficient_attention", attention_op)

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Back to PyTorch's attention."""
        self._each("disable_xformers_memory_efficient_attention")

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: Any = None) -> None:
        """Switch xFormers on or off."""
        self._each("set_use_memory_efficient_attention_xformers", valid, attention_op)

    def _each(self, method: str, *args: Any) -> None:
        for module in self._modules_by_name.values():
            if isinstance(module, ConfigMixin) and hasattr(module, method):
                getattr(module, method)(*args)

    @staticmethod
    def numpy_to_pil(images: np.ndarray) -> list[Image.Image]:
        """(batch, height, width, channels) in [0, 1] → pictures."""
        return VaeImageProcessor.numpy_to_pil(images)


def _options(cls: type[DiffusionPipeline]) -> list[str]:
    """The keywords of `from_pretrained` that are no components."""
    named = inspect.signature(cls.from_pretrained).parameters.values()
    return [*(p.name for p in named if p.kind is p.KEYWORD_ONLY), *HUB_KEYWORDS]
