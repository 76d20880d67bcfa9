"""Models, tokenizers and picture processors of transformers: our reader brings the bytes, transformers knows where they belong.

transformers renames tensors between releases, ties some and computes others; none of that is repeated here. It is given the
tensors, in memory and of the right type already, and puts them in place without another copy.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from suffuse.checkpoints.layout import TRANSFORMERS, find_weights
from suffuse.checkpoints.reading import Source, Stored, check_finite, open_source
from suffuse.checkpoints.weights import first_names, matches, parse_dtype, unfilled
from suffuse.errors import ConfigError, LimitError, MissingFileError, MissingPackageError, WeightsMismatchError
from suffuse.files import local_folder, names_in, read_json

TOKENIZER_BYTES = 64 * 2**20
"""Vocabularies are larger than other JSON."""

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
"""Configuration entries that transformers lets be 0 or less."""

SMALL = 10**6
"""So many more numbers than the weights hold do no harm; what is missing is then told by name."""

_ATTENTION = (None, "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")


def load_transformers_model(
    cls: type[Any],
    folder: Path,
    *,
    torch_dtype: torch.dtype | str | None = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    allow_missing: Sequence[str] = (),
    strict: bool = False,
) -> Any:
    """A model of transformers, equal in every tensor to what `cls.from_pretrained(folder, dtype=torch_dtype)` makes.

    Args:
        cls: The class, `transformers.CLIPTextModel` for example.
        folder: The folder of the model, with config.json.
        torch_dtype: Type of floating tensors: a type, its name, "auto" for that of the files, None for float32.
        variant: "fp16" and the like.
        use_safetensors: True refuses pickles, False reads nothing else, None prefers safetensors.
        allow_missing: Regular expressions of tensors that may be missing; transformers gives them initial values.
        strict: Raise on tensors that the model does not know, instead of one warning.

    Raises:
        MissingFileError: No such folder, configuration or weights.
        ConfigError: The configuration is not one that transformers takes, or names code to fetch.
        WeightsMismatchError: The weights do not fit the model.
        NonFiniteError: A tensor holds NaN or infinity.
        CorruptFileError: A file is damaged.
        UnsafePickleError: A pickle asks for more than tensors.
        LimitError: The configuration describes a much larger model than there are weights for.
        MissingPackageError: The weights are quantized, and the package for that is not installed.
    """
    folder = local_folder(folder)
    written = read_json(folder / "config.json")
    _refuse_foreign_kernels(folder, written)
    files = find_weights(folder, TRANSFORMERS, variant, use_safetensors)
    source = open_source(files)
    dtype = parse_dtype(torch_dtype, source) or torch.float32
    if written.get("quantization_config") or cls.can_generate():
        # These read further files of the folder on their own.
        try:
            with quiet():
                return cls.from_pretrained(folder, dtype=dtype, variant=variant, local_files_only=True).eval()
        except ImportError as error:
            raise MissingPackageError(f"{folder}: {error}") from error
    model = make_transformers_model(cls, _config(cls, folder, source.tensors), source, dtype, allow_missing, strict)
    model.name_or_path = model.config._name_or_path = str(folder)
    return model


def make_transformers_model(
    cls: type[Any],
    config: Any,
    source: Source,
    dtype: torch.dtype = torch.float32,
    allow_missing: Sequence[str] = (),
    strict: bool = False,
) -> Any:
    """A model of transformers with the tensors of a source.

    Args:
        cls: The class.
        config: Its configuration, an object of transformers.
        source: The weights.
        dtype: Type of floating tensors.
        allow_missing: Regular expressions of tensors that may be missing.
        strict: Raise on tensors that the model does not know, instead of one warning.

    Raises:
        ConfigError, WeightsMismatchError, NonFiniteError: As of `load_transformers_model`.
    """
    folder = source.where
    # To widen is exact, so it may be done while reading. To narrow is left to transformers, which knows what it keeps wide.
    tensors = {name: torch.empty(stored.shape, dtype=_widened(stored.dtype, dtype)) for name, stored in source.tensors.items()}
    source.fill(tensors)
    with quiet():
        try:
            model, info = cls.from_pretrained(
                None, config=config, state_dict=tensors, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True
            )
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            raise ConfigError(f"{folder}: transformers makes no {cls.__name__} of its configuration: {error}") from error
    _compare(cls, folder, info, allow_missing, strict)
    whole = {name for name, stored in source.tensors.items() if not stored.dtype.is_floating_point}
    for name, parameter in model.named_parameters():
        if any(f".{other}".endswith(f".{name}") for other in whole):  # early releases put a prefix before names
            raise WeightsMismatchError(f"{folder}: tensor {name!r} holds whole numbers", expected=str(parameter.dtype))
        check_finite(folder, name, parameter)
    return model.eval()


def _widened(stored: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    return dtype if stored.is_floating_point and stored.itemsize < dtype.itemsize else stored


def load_processor(cls: type[Any], folder: Path) -> Any:
    """A tokenizer or a picture processor of transformers.

    Args:
        cls: The class, `transformers.CLIPTokenizer` for example.
        folder: The folder of its files.

    Raises:
        MissingFileError: No such folder, or the vocabulary or the settings are not in it: transformers would make up empty ones.
        ConfigError: A file is not JSON, or not what transformers takes.
    """
    folder = local_folder(folder)
    names = getattr(cls, "vocab_files_names", {})
    ways = [[name for key, name in names.items() if (key == "tokenizer_file") is whole] for whole in (True, False)]
    ways += [] if names else [["preprocessor_config.json"], ["processor_config.json"]]
    if not any(way and all((folder / name).is_file() for name in way) for way in ways):
        raise MissingFileError(
            f"{folder} holds no {cls.__name__}",
            found=names_in(folder),
            expected=" or ".join(" and ".join(way) for way in ways if way),
        )
    for path in sorted(folder.glob("*.json")):
        read_json(path, TOKENIZER_BYTES)
    try:
        with quiet():
            return cls.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever it stumbles over
        raise ConfigError(f"{folder}: transformers makes no {cls.__name__} of it: {error}") from error


def _config(cls: type[Any], folder: Path, stored: Mapping[str, Stored]) -> Any:
    """The configuration, if a model as it says is of about the size of the weights; told without storage for one."""
    try:
        with quiet(), torch.device("meta"), unfilled(len(stored)):
            config = cls.config_class.from_pretrained(folder, local_files_only=True)
            wanted = sum(parameter.numel() for parameter in cls(config).parameters())
    except LimitError as error:
        raise LimitError(f"{folder / 'config.json'}: {error}") from None
    except Exception as error:  # the validation of transformers raises errors with no common base
        raise ConfigError(f"{folder / 'config.json'}: transformers makes no {cls.__name__} of it: {error}") from error
    for name, value in config.to_dict().items():
        if name in SIZES and isinstance(value, int) and value < 1:
            raise ConfigError(f"{folder / 'config.json'}: {name} must be at least 1", found=value)
    there = sum(math.prod(tensor.shape) for tensor in stored.values())
    if wanted > 2 * there + SMALL:
        raise LimitError(
            f"{folder / 'config.json'} describes a larger model than there are weights for",
            found=f"{wanted} numbers, and {there} in the weights",
        )
    return config


def _compare(cls: type[Any], folder: Path, info: Mapping[str, Any], allow_missing: Sequence[str], strict: bool) -> None:
    missing = sorted(name for name in info["missing_keys"] if not matches(allow_missing, name))
    if missing:
        raise WeightsMismatchError(
            f"{len(missing)} tensors of {cls.__name__} are missing in {folder}: {first_names(missing)}",
            remedy="check that the folder and the class belong together; allow_missing=[regular expressions] accepts it",
        )
    shapes = sorted(f"{name}: {list(found)}, wanted {list(wanted)}" for name, found, wanted in info["mismatched_keys"])
    if shapes:
        raise WeightsMismatchError(f"{len(shapes)} tensors in {folder} do not fit {cls.__name__}: {first_names(shapes)}")
    unexpected = sorted(info["unexpected_keys"])
    if unexpected and strict:
        raise WeightsMismatchError(
            f"{len(unexpected)} tensors in {folder} are unknown to {cls.__name__}: {first_names(unexpected)}"
        )
    if unexpected:
        warnings.warn(
            f"{cls.__name__} does not know and ignores {len(unexpected)} tensors of {folder}: {first_names(unexpected)}",
            stacklevel=3,
        )


def _refuse_foreign_kernels(folder: Path, config: Any) -> None:
    """Never let a configuration name, as its attention, code that transformers would fetch and run."""
    if not isinstance(config, Mapping):
        return
    for key, value in config.items():
        if any(word in str(key) for word in ("attn_implementation", "experts_implementation")) and value not in _ATTENTION:
            raise ConfigError(f"{folder / 'config.json'}: {key} is not allowed", found=value, expected=f"one of {_ATTENTION}")
        _refuse_foreign_kernels(folder, value)


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Without progress bars and tables: what matters in them is raised or warned about here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
