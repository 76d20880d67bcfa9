"""What every model is: a torch module that knows its configuration, and can be read from and written to a folder."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from suffuse.checkpoints.atomic import staged_folder
from suffuse.checkpoints.checksums import verify_folder
from suffuse.checkpoints.fetching import Wanted, fetch_components
from suffuse.checkpoints.layout import DIFFUSERS, PICKLE, SAFETENSORS, check_variant, find_weights, superseded
from suffuse.checkpoints.saving import write_weights
from suffuse.checkpoints.weights import Tolerance, load_weights
from suffuse.configuration import ConfigMixin
from suffuse.errors import unknown_argument
from suffuse.hub.options import HUB_KEYWORDS, HubOptions
from suffuse.hub.publishing import PushToHubMixin, publish
from suffuse.hub.sources import opened_subfolder
from suffuse.layers.gradient_checkpointing import GradientCheckpointing
from suffuse.memory.offload import gathered_weights
from suffuse.memory.placement import Device, Memory, Placing


class ModelMixin(ConfigMixin, PushToHubMixin, GradientCheckpointing):
    """A torch module with a configuration, loadable from and savable to a folder.

    Class attributes:
        _keep_in_fp32_modules: Names of modules that stay float32 when a model is loaded as another type.
        _no_split_modules: Names of module classes inside that stay on one device.
        _keys_to_ignore_on_load_unexpected: Regular expressions of tensors in files that nobody misses.
    """

    config_name: ClassVar[str] = "config.json"
    _keep_in_fp32_modules: ClassVar[Sequence[str] | None] = None
    _no_split_modules: ClassVar[Sequence[str]] = ("ResnetBlock2D", "SpatialTransformer", "UpBlock", "KUpBlock", "SkipUpBlock")
    _keys_to_ignore_on_load_unexpected: ClassVar[Sequence[str] | None] = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        variant: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        use_safetensors: bool | None = None,
        device_map: Device | Mapping[str, Device] | None = None,
        max_memory: Memory | None = None,
        offload_folder: str | os.PathLike[str] | None = None,
        offload_state_dict: bool | None = None,
        allow_missing: Sequence[str] = (),
        ignore_mismatched_sizes: bool = False,
        strict: bool = False,
        verify: bool = False,
        output_loading_info: bool = False,
        low_cpu_mem_usage: bool | None = None,
        disable_mmap: bool = True,
        trust_remote_code: bool = False,
        trust_code: str | Sequence[str] | None = None,
        **keywords: Any,
    ) -> Any:
        """The model of a folder or a repository, in evaluation mode.

        Args:
            pretrained_model_name_or_path: The folder of the model, or of a pipeline with `subfolder`; or "org/name".
            subfolder: The folder of the model inside, "unet" for example.
            variant: Which weights files: "fp16" for `diffusion_pytorch_model.fp16.safetensors`.
            torch_dtype: Type of the weights: a torch type or its name, "auto" for that of the files, None for float32.
            dtype: Another name for `torch_dtype`; it wins over it.
            use_safetensors: True refuses pickles, False reads nothing else, None prefers safetensors.
            device_map: A device for the whole model; prefixes of tensor names → devices, or "disk"; or a way to spread it over
                what there is: "auto", "balanced", "balanced_low_0", "sequential".
            max_memory: For those ways: device → bytes, or "10GB" and the like; what is free, if None.
            offload_folder: Where weights go that are sent to disk; it must stay for as long as the model.
            offload_state_dict: Accepted, and without effect: no weight is in memory twice.
            allow_missing: Regular expressions of tensors that may be missing; they get seeded initial values.
            ignore_mismatched_sizes: Tensors of another shape get seeded initial values instead of an error.
            strict: Unknown tensors and unknown configuration entries are errors, not warnings.
            verify: Hold the files against the checksums that `save_pretrained` wrote beside them, first.
            output_loading_info: Return (model, dictionary of missing, unexpected and mismatched tensors).
            low_cpu_mem_usage: Accepted, and without effect: memory for the weights is taken once in any case.
            disable_mmap: False leaves weights that need no conversion as pages of the file, as
                diffusers does: loading is quicker, but a file that is truncated later crashes the process. True reads a copy.
            trust_remote_code: Accepted, and without effect: the class is there, nothing of the checkpoint is run.
            trust_code: The same.
            **keywords: Entries of the configuration that replace those of config.json; and the
                `suffuse.hub.options.HubOptions`.

        Raises:
            MissingFileError: No such folder, configuration or weights.
            HubError: The hub did not give what was asked for.
            ConfigError: config.json is not JSON, does not fit the class, or is another class's.
            WeightsMismatchError: The weights do not fit the model.
            NonFiniteError: A tensor holds NaN or infinity.
            CorruptFileError: A file is damaged.
            UnsafePickleError: A pickle asks for more than tensors.
            UnknownArgumentError: A keyword is neither one of these nor an entry of the configuration.
        """
        hub, config = HubOptions.split(keywords)
        for name in config:
            if name not in cls.parameters_of_init():
                known = [*inspect.signature(cls.from_pretrained).parameters, *HUB_KEYWORDS, *cls.parameters_of_init()]
                raise unknown_argument(f"{cls.__name__}.from_pretrained", name, known)
        with opened_subfolder(pretrained_model_name_or_path, subfolder, hub, verify) as (source, prefix):
            if source.commit is not None:
                fetch_components(source, {prefix: Wanted(DIFFUSERS, variant, use_safetensors)})
            elif verify:
                verify_folder(source.folder)
        folder = source.folder / prefix
        placing = Placing(device_map, max_memory, offload_folder, cls._no_split_modules)
        stored = cls.load_config(folder)
        cls.check_stored(stored, folder)
        model, report = load_weights(
            lambda: cls.from_config(stored, strict=strict, **config),
            find_weights(folder, DIFFUSERS, variant, use_safetensors),
            dtype=dtype if dtype is not None else torch_dtype,
            float32=cls._keep_in_fp32_modules or (),
            devices=placing,
            spill=placing.spill,
            mapped=not disable_mmap,
            tolerance=Tolerance(allow_missing, ignore_mismatched_sizes, cls._keys_to_ignore_on_load_unexpected or (), strict),
        )
        placing.finish(model)
        model.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return (model, vars(report)) if output_loading_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        save_function: Callable[[dict[str, torch.Tensor], Path], Any] | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        repo_id: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
    ) -> None:
        """Write configuration and weights; the folder is replaced whole, or left as it was.

        Files that are not the weights of this variant stay in the folder; weights of this variant in another format go.

        Args:
            save_directory: The folder to make or to replace.
            is_main_process: False does nothing: of many processes with the same weights, one writes.
            save_function: Writes each weights file, called with (tensors by name, path).
            safe_serialization: False writes pickles.
            variant: "fp16" and the like, which becomes part of the file names.
            max_shard_size: Bytes, or "5GB" and the like: larger weights are split over several files.
            push_to_hub: Publish the folder as well; those that follow are as `push_to_hub()` takes them.
            repo_id: The name of the folder, if None.
            commit_message: What the commit says.
            private: Whether a new repository is private.
            token: Of the account.
            create_pr: Propose the change instead of making it.

        Raises:
            SaveError: The files could not be written; the folder is as it was.
            BusyError: Another process was writing the folder for half a minute.
            HubError: It was written, but the hub did not take it.
        """
        check_variant(variant)
        if not is_main_process:
            return
        tensors = gathered_weights(self)
        stale, size = superseded(DIFFUSERS, variant), sum(tensor.nbytes for tensor in tensors.values())
        with staged_folder(save_directory, keep=lambda path: not stale.fullmatch(str(path)), size=size) as folder:
            self.save_config(folder)
            suffix = SAFETENSORS if safe_serialization else PICKLE
            write_weights(tensors, folder, DIFFUSERS, suffix, variant, max_shard_size, save_function)
        if push_to_hub:
            publish(type(self).__name__, save_directory, repo_id, commit_message, private, token, create_pr)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the first floating tensor that is not kept in float32 on purpose; torch's default if there is none."""
        kept = self._keep_in_fp32_modules or ()
        named = [*self.named_parameters(), *self.named_buffers()]
        floating = {name: tensor.dtype for name, tensor in named if tensor.is_floating_point()}
        free = (dtype for name, dtype in floating.items() if not any(part in name for part in kept))
        return next(free, next(iter(floating.values()), torch.get_default_dtype()))

    @property
    def device(self) -> torch.device:
        """Where the first tensor is; the CPU if there is none."""
        return next((tensor.device for tensor in (*self.parameters(), *self.buffers())), torch.device("cpu"))

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the parameters hold.

        Args:
            only_trainable: Count only parameters that require a gradient.
            exclude_embeddings: Leave out the weights of `torch.nn.Embedding`.
        """
        embeddings = {id(module.weight) for module in self.modules() if isinstance(module, nn.Embedding)}
        return sum(
            parameter.numel()
            for parameter in self.parameters()
            if (parameter.requires_grad or not only_trainable) and not (exclude_embeddings and id(parameter) in embeddings)
        )
