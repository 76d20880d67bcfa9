"""Configurations: the signature of `__init__` is the schema of config.json.

A class says what it needs once, in its `__init__`; `register_to_config` keeps the values that came in `.config`, checks them
against the annotations, and remembers which were left to their default. Reading, writing and converting between classes
that share parameters (two schedulers, say) follow from that.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import json
import os
import re
import types
import typing
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

import numpy as np

from suffuse.errors import ConfigError, nearest, unknown_argument
from suffuse.files import read_json, write_text
from suffuse.hub.options import HUB_KEYWORDS, HubOptions
from suffuse.hub.publishing import publish
from suffuse.hub.sources import opened_subfolder
from suffuse.public_names import PUBLIC

FORMAT_VERSION = "0.26.3"
"""The release of diffusers whose file layout is written; stands in `_diffusers_version`."""

WRITTEN_SINCE: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("beta_start", "beta_end", "beta_schedule", "num_train_timesteps"), (0, 3)),
    **dict.fromkeys(("block_out_channels", "layers_per_block", "attention_head_dim", "norm_num_groups", "act_fn"), (0, 3)),
    **dict.fromkeys(("in_channels", "out_channels", "latent_channels", "flip_sin_to_cos", "freq_shift", "norm_eps"), (0, 3)),
    "prediction_type": (0, 10),
    "scaling_factor": (0, 14),
}
"""Entries whose defaults draw another picture without a word → the release of diffusers since which every file has them."""

_Self = TypeVar("_Self", bound="ConfigMixin")
_Init = TypeVar("_Init", bound=Callable[..., None])


class FrozenConfig(dict[str, Any]):
    """A dictionary that cannot change, with its keys as attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            close = nearest(name, self)
            raise AttributeError(f"no {name!r} in this config" + (f"; there is {close}" if close else "")) from None

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise ConfigError(
            "a config cannot be changed in place",
            remedy="make a new object: cls.from_config(config, name=value); or use register_to_config(name=value)",
        )

    __setattr__ = __delattr__ = __setitem__ = __delitem__ = _refuse
    pop = popitem = update = setdefault = clear = __ior__ = _refuse  # pyright: ignore[reportAssignmentType]

    def __reduce__(self) -> Any:
        return FrozenConfig, (dict(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenConfig:
        return FrozenConfig(copy.deepcopy(dict(self), memo))


class ConfigMixin:
    """An object that can be made from, and written as, a configuration file.

    Class attributes:
        config_name: The file name, "config.json" for example.
        ignore_for_config: Parameters of `__init__` that are not configuration.
    """

    config_name: ClassVar[str] = ""
    ignore_for_config: ClassVar[list[str]] = []
    _internal_dict: FrozenConfig

    @property
    def config(self) -> FrozenConfig:
        """The configuration, read-only; its keys are attributes too."""
        return self._internal_dict

    def register_to_config(self, **values: Any) -> None:
        """Add or replace entries of the configuration."""
        # Written past torch.nn.Module.__setattr__ because configuration is known before Module.__init__ has run.
        self.__dict__["_internal_dict"] = FrozenConfig({**self.__dict__.get("_internal_dict", {}), **values})

    @classmethod
    def parameters_of_init(cls) -> dict[str, inspect.Parameter]:
        """The parameters of `__init__` that are configuration, in order."""
        return {n: p for n, p in _init_parameters(cls).items() if n not in cls.ignore_for_config}

    @classmethod
    def compatible_classes(cls) -> list[type[ConfigMixin]]:
        """Classes whose configurations this one may be given; their keys are kept and not warned about."""
        return []

    @classmethod
    def compatible_names(cls) -> set[str]:
        """Class names that a file may bear which this class reads."""
        return {known.__name__ for known in (*cls.__mro__, *cls.compatible_classes())}

    @classmethod
    def check_stored(cls, config: Mapping[str, Any], folder: str | os.PathLike[str]) -> None:
        """Hold a configuration that was read from `folder` against the class.

        Raises:
            ConfigError: It says that it is another class's. An entry that its release wrote and that is gone is warned about.
        """
        written = config.get("_class_name", cls.__name__)
        if str(written) not in cls.compatible_names():
            raise ConfigError(
                f"{Path(folder) / cls.config_name} describes another class",
                found=written,
                expected=cls.__name__,
                remedy="load it with the class it was written for, or give the right subfolder",
            )
        release = tuple(int(part) for part in re.findall(r"\d+", str(config.get("_diffusers_version", "")))[:2])
        known = cls.parameters_of_init()
        left = [name for name, since in WRITTEN_SINCE.items() if name in known and name not in config and release >= since]
        if left:
            used = ", ".join(f"{name}={known[name].default!r}" for name in left)
            warnings.warn(
                f"{Path(folder) / cls.config_name} leaves out entries that change results; defaults are used: {used}",
                stacklevel=3,
            )

    @classmethod
    def from_config(
        cls: type[_Self],
        config: Mapping[str, Any] | None = None,
        return_unused_kwargs: bool = False,
        strict: bool = False,
        **kwargs: Any,
    ) -> Any:
        """An object of this class with the values of `config`.

        Args:
            config: A configuration, of this class or of a compatible one. Values that were only another class's defaults
                do not count: this class's own defaults stand in for them.
            return_unused_kwargs: Also return a dictionary of what was not used.
            strict: Raise on keys this class does not know, instead of one warning.
            **kwargs: Values that replace those of `config`.

        Returns:
            The object, or (object, unused) with `return_unused_kwargs`.

        Raises:
            ConfigError: `config` is no mapping, or a value does not fit the declared type.
        """
        if not isinstance(config, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(
                f"{cls.__name__}.from_config needs a mapping",
                found=config,
                remedy=f"use {cls.__name__}.from_pretrained(folder) for a folder",
            )
        given, unused, kept = cls.extract_init_dict(config, **kwargs)
        if strict and unused.keys() - kwargs.keys():
            raise ConfigError(
                f"{cls.__name__} does not know {', '.join(sorted(unused))}", expected=sorted(cls.parameters_of_init())
            )
        made = cls(**given)
        made.register_to_config(**kept)
        return (made, {**unused, **kept}) if return_unused_kwargs else made

    @classmethod
    def extract_init_dict(
        cls, config_dict: Mapping[str, Any], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Split a configuration into (values for `__init__`, unused values, values of other classes to keep)."""
        defaults = set(config_dict.get("_use_default_values", ()))
        config = {k: v for k, v in config_dict.items() if k not in defaults and k != "_use_default_values"}
        values, known = {**config, **kwargs}, cls.parameters_of_init()
        given = {name: values[name] for name in known if name in values}
        unknown = {k: v for k, v in config.items() if k not in known and not k.startswith("_")}
        others = [*cls.compatible_classes(), *_public_class(config.get("_class_name"))] if unknown else []
        elsewhere = {name for other in others for name in _init_parameters(other)}
        unexpected = {k: v for k, v in unknown.items() if k not in elsewhere}
        if unexpected:
            warnings.warn(
                f"{cls.__name__} does not know these config entries and ignores them: {', '.join(sorted(unexpected))}",
                stacklevel=4,
            )
        unused = {**unexpected, **{k: v for k, v in kwargs.items() if k not in known}}
        kept = {k: v for k, v in config.items() if k not in given and k != "_class_name"}
        return given, unused, kept

    @classmethod
    def load_config(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        return_unused_kwargs: bool = False,
        return_commit_hash: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Read the configuration from a folder, a repository, or the file itself.

        Args:
            pretrained_model_name_or_path: The folder, "org/name", or the file.
            return_unused_kwargs: Return (configuration, keywords that were not used).
            return_commit_hash: Return the commit too, last; None for a folder.
            **kwargs: `subfolder`, a folder inside; and the `suffuse.hub.options.HubOptions`.

        Raises:
            MissingFileError: There is no such folder or file.
            PathEscapeError: `subfolder` leads out of the folder.
            ConfigError: It is not a JSON object.
            HubError: The hub did not give it.
        """
        subfolder, path = kwargs.pop("subfolder", None), pretrained_model_name_or_path
        hub, unused = HubOptions.split(kwargs)
        if unused and not return_unused_kwargs:
            raise unknown_argument(f"{cls.__name__}.load_config", next(iter(unused)), ["subfolder", *HUB_KEYWORDS])
        commit = None
        if not isinstance(path, (str, os.PathLike)) or not os.path.isfile(path):  # pyright: ignore[reportUnnecessaryIsInstance]
            with opened_subfolder(path, subfolder, hub) as (source, prefix):
                source.fetch([prefix + cls.config_name])
            path, commit = source.folder / prefix / cls.config_name, source.commit
        made = (read_json(Path(path)), *([unused] if return_unused_kwargs else []), *([commit] if return_commit_hash else []))
        return made if len(made) > 1 else made[0]

    def save_config(
        self,
        save_directory: str | os.PathLike[str],
        push_to_hub: bool = False,
        repo_id: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
    ) -> None:
        """Write the configuration into a folder, which is made if need be; publish the folder too, with `push_to_hub`."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.to_json_file(Path(save_directory) / self.config_name)
        if push_to_hub:
            publish(type(self).__name__, save_directory, repo_id, commit_message, private, token, create_pr)

    def written(self) -> dict[str, Any]:
        """The entries of the configuration that go into a file."""
        return {k: v for k, v in self.config.items() if k not in ("_use_default_values", "_name_or_path")}

    def to_json_string(self) -> str:
        """The configuration as JSON text, keys sorted."""
        entries = {k: _plain(v) for k, v in self.written().items()}
        entries |= {"_class_name": type(self).__name__, "_diffusers_version": FORMAT_VERSION}
        return json.dumps(entries, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write the configuration to a file."""
        write_text(Path(json_file_path), self.to_json_string())

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


def register_to_config(init: _Init) -> _Init:
    """Keep what `__init__` was called with in `.config`, checked against the annotations.

    Raises:
        ConfigError: A value does not fit its annotation.
    """

    @functools.wraps(init)
    def keeping(self: ConfigMixin, *args: Any, **kwargs: Any) -> None:
        cls = type(self)
        parameters = cls.parameters_of_init()
        values = dict(zip(_init_parameters(cls), args, strict=False)) | kwargs
        given = {name: value for name, value in values.items() if name in parameters}
        for name, value in given.items():
            check_type(cls.__name__, name, value, _init_hints(cls).get(name, Any))
        left = {n: p.default for n, p in parameters.items() if n not in given and p.default is not inspect.Parameter.empty}
        self.register_to_config(**left, **given, _use_default_values=sorted(left))
        init(self, *args, **kwargs)

    return typing.cast("_Init", keeping)


def check_type(owner: str, name: str, value: Any, declared: Any) -> None:
    """Raise `ConfigError` unless `value` fits the annotation `declared` (an int is a float; a list is a tuple)."""
    if not _fits(value, declared):
        raise ConfigError(
            f"{owner}: {name} has the wrong type", found=f"{value!r} ({type(value).__name__})", expected=_spelled(declared)
        )


def _fits(value: Any, declared: Any) -> bool:
    origin, arguments = typing.get_origin(declared), typing.get_args(declared)
    if declared is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is typing.Literal:
        return value in arguments
    if declared is None or declared is type(None):
        return value is None
    if declared is float:
        return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and value == value  # NaN is not
    if declared is int:
        return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    kind = origin or declared
    if kind in (list, tuple):
        if not isinstance(value, (list, tuple)):
            return False
        if kind is tuple and arguments and arguments[-1] is not Ellipsis:
            return len(value) == len(arguments) and all(map(_fits, value, arguments))
        return not arguments or all(_fits(item, arguments[0]) for item in value)
    return isinstance(value, kind) if isinstance(kind, type) else True


def _spelled(declared: Any) -> str:
    return (
        declared.__name__
        if isinstance(declared, type) and not typing.get_args(declared)
        else str(declared).replace("typing.", "")
    )


def _public_class(name: Any) -> list[type]:
    """The class a configuration was written by, if there is one of that name."""
    return [getattr(importlib.import_module(PUBLIC[name]), name)] if isinstance(name, str) and name in PUBLIC else []


@functools.cache
def _init_parameters(cls: type) -> dict[str, inspect.Parameter]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {n: p for n, p in inspect.signature(cls.__init__).parameters.items() if n != "self" and p.kind not in kinds}


@functools.cache
def _init_hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls.__init__)


def _plain(value: Any) -> Any:
    match value:
        case np.ndarray():
            return value.tolist()
        case np.generic():
            return value.item()
        case Path():
            return value.as_posix()
        case _:
            return value
