"""Models out of single files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from suffuse.checkpoints.weights import Tolerance, load_weights
from suffuse.conversion.single_file import SingleFile, fetched, open_single_file
from suffuse.errors import ConfigError, unknown_argument
from suffuse.hub.options import HubOptions


class SingleFileModelMixin:
    """A model that single files hold.

    Class attributes:
        _single_file_part: What the component is called in a file's architecture.
    """

    _single_file_part: ClassVar[str] = ""

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | os.PathLike[str],
        *,
        torch_dtype: torch.dtype | str | None = None,
        image_size: int | None = None,
        upcast_attention: bool | None = None,
        original_config_file: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        extract_ema: bool = False,
        strict: bool = False,
        **config: Any,
    ) -> Any:
        """The model, out of a file of its own or of a whole pipeline; nothing but the file is ever fetched.

        Args:
            pretrained_model_link_or_path: The file, or its address on the hub.
            torch_dtype: Type of the weights: a torch type or its name, "auto" for that of the file, None for float32.
            image_size: What the model was trained on.
            upcast_attention: Compute attention scores in float32.
            original_config_file: The original configuration, if shapes do not tell all: a YAML file, or what it holds.
            extract_ema: Take the running averages of the weights, of files that hold both.
            strict: Unknown tensors are errors, not warnings.
            **config: Entries of the configuration that replace those told from the file; and the
                `suffuse.hub.options.HubOptions`.

        Raises:
            MissingFileError, CorruptFileError, UnsafePickleError: Of the file.
            ConfigError: The file holds no such model.
            WeightsMismatchError, NonFiniteError: The weights are not whole.
            UnknownArgumentError: A keyword is neither one of these nor an entry of the configuration.
        """
        hub, config = HubOptions.split(config)
        for name in config:
            if name not in cls.parameters_of_init():  # pyright: ignore[reportAttributeAccessIssue]
                raise unknown_argument(f"{cls.__name__}.from_single_file", name, cls.parameters_of_init())  # pyright: ignore[reportAttributeAccessIssue]
        file = open_single_file(
            fetched(pretrained_model_link_or_path, hub),
            image_size=image_size,
            prediction_type="epsilon",  # of no matter to a model alone
            upcast_attention=upcast_attention,
            original=original_config_file,
            strict=strict,
        )
        return load_part(cls, file, cls._single_file_part, torch_dtype=torch_dtype, averaged=extract_ema, strict=strict, **config)


def load_part(
    cls: type[Any],
    file: SingleFile,
    name: str,
    *,
    torch_dtype: torch.dtype | str | None = None,
    averaged: bool = False,
    strict: bool = False,
    **config: Any,
) -> Any:
    """A model of class `cls`, out of the component so named of a single file."""
    part = file.part(name)
    if part.kind != cls.__name__:
        raise ConfigError(f"{file.path}: {name} is no {cls.__name__}", found=part.kind)
    values = {name: value for name, value in part.config.items() if name in cls.parameters_of_init()} | config
    model, _ = load_weights(
        lambda: cls.from_config(values),
        file.tensors(part, averaged),
        dtype=torch_dtype,
        float32=cls._keep_in_fp32_modules or (),
        tolerance=Tolerance(unexpected=cls._keys_to_ignore_on_load_unexpected or (), strict=strict),
    )
    return model
