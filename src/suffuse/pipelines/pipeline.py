"""What every pipeline is: named components, loaded, moved and saved together, and the state of a run.

A pipeline is read-only while it runs. What one call changes lives in its `Run`, held per thread; `pipe.guidance_scale` and its
like answer for the last run of the calling thread, so that threads may share one pipeline.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import threading
import warnings
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from suffuse.checkpoints.atomic import staged_folder
from suffuse.checkpoints.checksums import verify_folder
from suffuse.checkpoints.layout import DIFFUSERS, component_variants, superseded
from suffuse.checkpoints.weights import parse_dtype
from suffuse.configuration import ConfigMixin
from suffuse.diffusion.advance import GuidedStep, step_options
from suffuse.diffusion.conditioning import Conditioner, Conditioning, Denoiser
from suffuse.diffusion.guidance import ClassifierFreeGuidance, Guidance
from suffuse.diffusion.hooks import CallbackOnStepEnd, EndWhen, OnWholeSteps, WatchNumbers
from suffuse.diffusion.loop import Hook, Step, denoise
from suffuse.errors import ConfigError, InputError, MissingFileError, nearest, unknown_argument
from suffuse.files import local_folder, read_json
from suffuse.memory.offload import execution_device, offload_models, offload_parts, remove_hooks
from suffuse.outputs import BaseOutput
from suffuse.pipelines.components import (
    check_component,
    component_class,
    component_entry,
    load_component,
    save_component,
    weights_naming,
)
from suffuse.processing.image import VaeImageProcessor
from suffuse.public_names import PUBLIC, resolve
from suffuse.schedulers.scheduler import SchedulerMixin

_Pipeline = TypeVar("_Pipeline", bound="DiffusionPipeline")


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
        interrupt: Set by a callback to end before the next step.
    """

    scheduler: SchedulerMixin
    arguments: dict[str, Any] = field(default_factory=dict)
    guidance: Guidance = field(default_factory=lambda: ClassifierFreeGuidance(7.5))
    clip_skip: int | None = None
    cross_attention_kwargs: dict[str, Any] | None = None
    num_timesteps: int = 0
    interrupt: bool = False

    def set_timesteps(self, device: torch.device) -> int:
        """Tell the scheduler how many steps to take, or which; returns how many."""
        steps, timesteps = self.arguments["num_inference_steps"], self.arguments.get("timesteps")
        if timesteps is None:
            self.scheduler.set_timesteps(steps, device=device)
            return steps
        if "timesteps" not in inspect.signature(self.scheduler.set_timesteps).parameters:
            raise InputError(
                f"{type(self.scheduler).__name__} takes no custom timesteps",
                remedy="pass num_inference_steps, or another scheduler",
            )
        self.scheduler.set_timesteps(timesteps=timesteps, device=device)
        return len(self.scheduler.timesteps)

    def timesteps_for(self, num_inference_steps: int, strength: float = 1.0) -> tuple[Tensor, int]:
        """The tail of the timesteps that `strength` leaves, and how many inference steps it is.

        Raises:
            InputError: None is left.
        """
        kept = min(int(num_inference_steps * strength), num_inference_steps)
        if kept < 1:
            raise InputError(
                f"strength={strength} leaves no step of num_inference_steps={num_inference_steps}",
                remedy=f"use num_inference_steps={int(np.ceil(1 / strength))} or more",
            )
        skipped = (num_inference_steps - kept) * self.scheduler.order
        self.scheduler.set_begin_index(skipped)
        return self.scheduler.timesteps[skipped:], kept


def _of_run(*path: str) -> property:
    """A property that reads and writes the run of the calling thread."""

    def owner(pipe: DiffusionPipeline) -> Any:
        value: Any = pipe._run
        for name in path[:-1]:
            value = getattr(value, name)
        return value

    return property(
        lambda pipe: getattr(owner(pipe), path[-1]),
        lambda pipe, value: setattr(owner(pipe), path[-1], value),
        doc=f"`{path[-1]}` of the last run of this thread.",
    )


class DiffusionPipeline(ConfigMixin):
    """Components that make something together.

    Class attributes:
        model_cpu_offload_seq: Order in which models are used, "text_encoder->unet->vae".
        _optional_components: Components that may be None.
        _callback_tensor_inputs: Tensors that callbacks may ask for.
    """

    config_name = "model_index.json"
    model_cpu_offload_seq: ClassVar[str] = ""
    _optional_components: ClassVar[list[str]] = []
    _exclude_from_cpu_offload: ClassVar[list[str]] = []
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    scheduler: Any
    guidance_scale = _of_run("guidance", "scale")
    _guidance_scale = _of_run("guidance", "scale")
    guidance_rescale = _of_run("guidance", "rescale")
    _guidance_rescale = _of_run("guidance", "rescale")
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

    @classmethod
    def component_names(cls) -> list[str]:
        """Names of the components, in the order of `__init__`."""
        return [
            name
            for name, parameter in cls.parameters_of_init().items()
            if parameter.default is inspect.Parameter.empty or parameter.default is None
        ]

    def needed_components(self, arguments: dict[str, Any]) -> list[str]:
        """Names of the components that a call with these arguments cannot do without."""
        return [name for name in self.component_names() if name not in self._optional_components]

    @property
    def components(self) -> dict[str, Any]:
        """The components by name: `OtherPipeline(**pipe.components)` shares them."""
        return {name: getattr(self, name) for name in self.component_names()}

    @property
    def _modules_by_name(self) -> dict[str, nn.Module]:
        return {name: value for name, value in self.components.items() if isinstance(value, nn.Module)}

    @property
    def device(self) -> torch.device:
        """Where the first component with parameters is."""
        return next((p.device for m in self._modules_by_name.values() for p in m.parameters()), torch.device("cpu"))

    @property
    def _execution_device(self) -> torch.device:
        """Where the pipeline computes: the accelerator that offloaded models come to, else `device`."""
        return execution_device(self._modules_by_name.values()) or self.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating point type of the first component with parameters."""
        floating = (p.dtype for m in self._modules_by_name.values() for p in m.parameters() if p.is_floating_point())
        return next(floating, torch.float32)

    @property
    def name_or_path(self) -> str | None:
        """Where the pipeline was loaded from."""
        return self.config.get("_name_or_path")

    def to(
        self: _Pipeline,
        *args: Any,
        torch_dtype: torch.dtype | None = None,
        torch_device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        device: str | int | torch.device | None = None,
        silence_dtype_warnings: bool = False,
    ) -> _Pipeline:
        """Move every model: `pipe.to("cuda")`, `pipe.to(torch.float16)`, `pipe.to("cuda", torch.float16)`, or by keyword.

        Args:
            *args: A dtype, a device, both, or a tensor to take both from.
            torch_dtype: The same as `dtype`.
            torch_device: The same as `device`.
            dtype: The floating point type.
            device: The device.
            silence_dtype_warnings: No warning for half precision on a CPU.

        Returns:
            The pipeline itself.

        Raises:
            InputError: Something that is neither device nor dtype, or a device that is not there; nothing was moved.
        """
        dtype, device = dtype or torch_dtype, device if device is not None else torch_device
        for value in args:
            if isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, Tensor):
                dtype, device = value.dtype, value.device
            else:
                device = value
        target = self._checked_device("to", device) if device is not None else None
        if target is not None and execution_device(self._modules_by_name.values()) is not None:
            raise InputError(
                f"{type(self).__name__}.to: its models are offloaded, and move on their own",
                remedy="pipe.remove_all_hooks() first; or leave it as it is: it computes on the accelerator",
            )
        dtype = parse_dtype(dtype)
        on_cpu = (target or self.device).type == "cpu"
        if dtype == torch.float16 and on_cpu and not silence_dtype_warnings:
            warnings.warn("float16 on a CPU is slow and overflows early: use torch.bfloat16 or torch.float32", stacklevel=2)
        for module in self._modules_by_name.values():
            module.to(device=target, dtype=dtype)
        return self

    def _checked_device(self, method: str, device: str | int | torch.device) -> torch.device:
        """The device of that name, if it is there and keeps what it is given."""
        try:
            target = torch.device(device)
            torch.empty(0, device=target)
            if target.type == "meta":
                raise ValueError("weights would be lost on 'meta'")
        except (RuntimeError, TypeError, AssertionError, ValueError) as error:
            raise InputError(
                f"{type(self).__name__}.{method}: no device {device!r}",
                found=str(error).split("\n")[0],
                expected="'cpu', 'cuda', 'cuda:1', 'mps', …",
            ) from None
        return target

    # ------------------------------------------------------------ offloading

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str = "cuda") -> None:
        """Let the models wait on the CPU: each moves to the accelerator when it is used, and back when the next one is.

        Takes the memory of the largest model instead of all, for little time.

        Args:
            gpu_id: The number of the accelerator.
            device: Its kind; with a number, if `gpu_id` is not given.

        Raises:
            InputError: There is no such device, or two numbers were given.
            MissingPackageError: accelerate is not installed.
        """
        target = self._offload_target("enable_model_cpu_offload", gpu_id, device)
        models = self._modules_by_name
        chain = [models.pop(name) for name in self.model_cpu_offload_seq.split("->") if name in models]
        for name in self._exclude_from_cpu_offload:
            if name in models:
                models.pop(name).to(target)
        self._offloaded = offload_models(chain, models.values(), target)

    def enable_sequential_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str = "cuda") -> None:
        """Let the weights wait on the CPU: those of each layer move to the accelerator while it computes.

        Takes the least memory of all, and by far the most time.

        Args:
            gpu_id: The number of the accelerator.
            device: Its kind; with a number, if `gpu_id` is not given.

        Raises:
            InputError: There is no such device, or two numbers were given.
            MissingPackageError: accelerate is not installed.
        """
        target = self._offload_target("enable_sequential_cpu_offload", gpu_id, device)
        for name, model in self._modules_by_name.items():
            if name in self._exclude_from_cpu_offload:
                model.to(target)
            else:
                offload_parts(model, target)

    def _offload_target(self, method: str, gpu_id: int | None, device: torch.device | str) -> torch.device:
        """The device to offload from, with all models on the CPU and free of hooks."""
        target = self._checked_device(method, device)
        if gpu_id is not None and target.index is not None:
            raise InputError(f"{method}: gpu_id={gpu_id} and device={device!r} both name a number", remedy="pass one of the two")
        if target.type != "cpu" and target.index is None:
            target = self._checked_device(method, f"{target.type}:{gpu_id or 0}")
        self.remove_all_hooks()
        self.to("cpu", silence_dtype_warnings=True)
        return target

    def remove_all_hooks(self) -> None:
        """End offloading: the models are on the CPU, whole."""
        for model in self._modules_by_name.values():
            remove_hooks(model)
        self._offloaded = []

    def maybe_free_model_hooks(self) -> None:
        """Send offloaded models back to the CPU; every call of the pipeline ends with it."""
        for hook in self.__dict__.get("_offloaded", ()):
            hook.offload()

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
        output_loading_info: bool = False,
        strict: bool = False,
        verify: bool = False,
        **components: Any,
    ) -> Any:
        """Load a pipeline from a folder.

        `DiffusionPipeline.from_pretrained` makes the class the folder names; a subclass makes itself of the folder's components.

        Args:
            pretrained_model_name_or_path: The folder with model_index.json.
            torch_dtype: The floating point type of all models, "auto" for the files' own, or a dictionary by component.
            variant: Load the weights with this infix, "fp16" for example, where a component has them.
            use_safetensors: True refuses anything else, False prefers .bin; safetensors where there are any, if None.
            low_cpu_mem_usage: Kept for its name: weights are always read straight into place.
            output_loading_info: Return (pipeline, information) with missing and unexpected tensors by component.
            strict: Raise on what is otherwise one warning: extra components, config entries or tensors.
            verify: Hold every file against the checksums that `save_pretrained` wrote beside them, first.
            **components: Components, or None, that replace those of the folder; and values of the pipeline's own configuration.

        Raises:
            MissingFileError: No such folder, or a component is not in it.
            ConfigError: model_index.json is not as it should be.
            UnknownArgumentError: A keyword that is neither option nor component.
        """
        folder = local_folder(pretrained_model_name_or_path)
        if verify:
            verify_folder(folder)
        index = read_json(folder / cls.config_name)
        target = cls if cls is not DiffusionPipeline else _pipeline_class(folder, index)
        parameters = target.parameters_of_init()
        for name in components:
            if name not in parameters:
                raise unknown_argument(f"{target.__name__}.from_pretrained", name, [*parameters, *_OPTIONS])
        names = target.component_names()
        by_name = torch_dtype if isinstance(torch_dtype, dict) else {"default": torch_dtype}
        for name in by_name.keys() - {*names, "default"}:
            raise unknown_argument(f"{target.__name__}.from_pretrained: torch_dtype", name, ["default", *names])
        extra = [name for name in index if not name.startswith("_") and name not in parameters]
        if extra and strict:
            raise ConfigError(f"{folder / cls.config_name}: {target.__name__} has no {', '.join(extra)}", expected=names)
        if extra:
            warnings.warn(
                f"{target.__name__} has no use for these entries of {cls.config_name}: {', '.join(extra)}", stacklevel=2
            )
        values = {name: index[name] for name in parameters if name in index and name not in names} | components
        planned = {name: _planned(target, folder, name, index) for name in names if name not in components}
        classes = {name: kind for name, kind in planned.items() if kind is not None}
        namings = {name: naming for name, kind in classes.items() if (naming := weights_naming(kind)) is not None}
        variants = component_variants(folder, namings, variant)
        information: dict[str, Any] = {}
        for name, kind in classes.items():
            options: dict[str, Any] = {"use_safetensors": use_safetensors, "strict": strict, "variant": variants.get(name)}
            options["torch_dtype"] = by_name.get(name, by_name.get("default"))
            if namings.get(name) is DIFFUSERS and output_loading_info:
                values[name], information[name] = load_component(kind, folder / name, output_loading_info=True, **options)
            else:
                values[name] = load_component(kind, folder / name, **options)
        pipe = target(**(dict.fromkeys(planned) | values))
        pipe.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return (pipe, information) if output_loading_info else pipe

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], safe_serialization: bool = True, variant: str | None = None
    ) -> None:
        """Write the pipeline as a folder that diffusers reads too; the folder is the old one or the new one, never a mixture.

        Files of the old folder that belong to no component stay, and weights of other variants.

        Args:
            save_directory: The folder; made or replaced.
            safe_serialization: safetensors; False writes .bin pickles.
            variant: An infix for the names of weight files, "fp16" for example.

        Raises:
            SaveError: It could not be written; what was there is untouched.
        """
        components = self.components

        def keep(path: PurePosixPath) -> bool:
            if path.parts[0] not in components:
                return True
            naming = weights_naming(type(components[path.parts[0]]))
            return naming is not None and not superseded(naming, variant).fullmatch(path.name)

        with staged_folder(save_directory, keep) as folder:
            for name, value in components.items():
                if value is not None:
                    save_component(value, folder / name, safe_serialization, variant)
            self.save_config(folder)

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
        return {name: value for name, value in self.__dict__.items() if name != "_threads"}

    @contextlib.contextmanager
    def running(self, arguments: dict[str, Any]) -> Generator[Run]:
        """A run of the calling thread, with its own fork of the scheduler; a run it interrupts goes on afterwards."""
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
    ) -> Tensor:
        """Walk latents down the timesteps, with the progress bar, the callbacks and the step options of the call.

        Raises:
            NonFiniteError: The latents became NaN or infinite; names the step.
        """
        run, numbers = self._run, WatchNumbers()
        # Half precision overflows on the way, and the step is worth knowing; else one look at the end does.
        watched = [numbers] if latents.dtype.itemsize < 4 else []
        scheduler, arguments = run.scheduler, run.arguments
        options = step_options(scheduler, eta=arguments["eta"], generator=arguments["generator"])
        advance = GuidedStep(Denoiser(model, scheduler, conditioning, conditioners), run.guidance, scheduler, options)
        run.num_timesteps = len(timesteps)
        with self.progress_bar(total=num_inference_steps) as bar:
            told = self.callbacks(run, conditioning, num_inference_steps, bar)
            latents = denoise(latents, timesteps, advance, [EndWhen(lambda: run.interrupt), *hooks, *watched, *told])
        numbers.check(latents, type(model).__name__)
        return latents

    def callbacks(self, run: Run, conditioning: Conditioning, num_inference_steps: int, bar: Any) -> list[Hook]:
        """The hooks that tell the outside of each step, in the order they are called."""
        order, arguments = run.scheduler.order, run.arguments
        function, older, every = arguments["callback_on_step_end"], arguments["callback"], arguments["callback_steps"] or 1

        def tell(step: Step) -> None:
            bar.update()
            if older is not None and step.index % every == 0:
                older(step.index // order, step.timestep, step.latents)

        names = arguments["callback_on_step_end_tensor_inputs"]
        newer = [CallbackOnStepEnd(self, function, names, conditioning)] if function is not None else []
        return [*newer, OnWholeSteps(order, num_inference_steps, tell)]

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """A tqdm bar, as `set_progress_bar_config` set it up."""
        return tqdm(iterable, total=total, **self.__dict__.get("_progress_bar_config", {}))

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


_OPTIONS = ("torch_dtype", "variant", "use_safetensors", "low_cpu_mem_usage", "output_loading_info", "strict", "verify")


def _pipeline_class(folder: Path, index: dict[str, Any]) -> type[Any]:
    name = index.get("_class_name")
    pipelines = [
        known for known, module in PUBLIC.items() if module.startswith("suffuse.pipelines") and known.endswith("Pipeline")
    ]
    if name not in pipelines or name == "DiffusionPipeline":
        close = nearest(str(name), pipelines)
        raise ConfigError(
            f"{folder / DiffusionPipeline.config_name}: no pipeline class {name!r}",
            remedy=f"did you mean {close}?" if close else "load it with the class it was made for",
        )
    return resolve(name)


def _planned(pipeline: type[DiffusionPipeline], folder: Path, name: str, index: dict[str, Any]) -> type[Any] | None:
    """The class of a component the folder should hold, or None if it does without."""
    entry = index.get(name)
    absent = entry in (None, [None, None])
    optional = name in pipeline._optional_components or pipeline.parameters_of_init()[name].default is None
    if absent and (optional or name in index):
        return None
    if absent:
        raise ConfigError(
            f"{folder / pipeline.config_name} has no component {name!r}, which {pipeline.__name__} needs",
            remedy=f"pass it: from_pretrained(…, {name}=…)",
        )
    if not (folder / name).is_dir():
        raise MissingFileError(
            f"no folder {folder / name} for the component {name!r}",
            found=sorted(p.name for p in folder.iterdir()),
            remedy=f"fetch it again, or pass the component: from_pretrained(…, {name}=…)",
        )
    return component_class(name, entry)
