"""`suffuse convert`: a single file to a folder, and back."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from suffuse.errors import InputError, MissingFileError
from suffuse.public_names import resolve


def convert(
    source: Annotated[Path, typer.Argument(help="A pipeline's folder, or a single file (.safetensors, .ckpt).", metavar="IN")],
    target: Annotated[Path, typer.Argument(help="The folder to make; or, from a folder, the .safetensors file.", metavar="OUT")],
    dtype: Annotated[
        str | None, typer.Option(help="Type of the weights: float16, bfloat16, float32; as they are, if left out.")
    ] = None,
    prediction_type: Annotated[
        str | None, typer.Option(help='"epsilon" or "v_prediction", where the file does not tell: Stable Diffusion 2.')
    ] = None,
    original_config: Annotated[
        Path | None, typer.Option(help="The original YAML configuration, where shapes do not tell all.")
    ] = None,
    variant: Annotated[str | None, typer.Option(help='Which weights of the folder, "fp16" for example.')] = None,
    extract_ema: Annotated[bool, typer.Option("--ema", help="Take the running averages of the UNet's weights.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is there.")] = False,
) -> None:
    """Turn a single file into a folder that suffuse and diffusers load, or such a folder into a single file.

    Nothing is fetched: what the file is, its tensors tell. OUT is written whole or not at all.

    Examples:
      suffuse convert dreamlike.safetensors ./dreamlike
      suffuse convert ./dreamlike dreamlike-fp16.safetensors --dtype float16
    """
    if not source.exists():
        raise MissingFileError(f"no file or folder {source}")
    if target.exists() and not force:
        raise InputError(f"{target} is there already", remedy="give another name, or --force to replace it")
    if source.is_dir() and target.suffix != ".safetensors":
        raise InputError("a folder becomes a .safetensors file", found=str(target), remedy=f"{target}.safetensors")
    unused = (variant,) if source.is_file() else (prediction_type, original_config, extract_ema or None)
    if any(option is not None for option in unused):
        raise InputError(
            "--variant is for folders; --prediction-type, --original-config and --ema are for single files", found=str(source)
        )
    if source.is_file() and target.suffix in (".safetensors", ".ckpt"):
        raise InputError("a single file becomes a folder", found=str(target), remedy=f"{target.with_suffix('')}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*safety checker")
        pipe = _load(source, dtype, prediction_type, original_config, variant, extract_ema)
    if source.is_dir():
        pipe.save_single_file(target)
    else:
        pipe.save_pretrained(target)
    typer.echo(target)


def _load(source: Path, dtype: str | None, prediction: str | None, original: Path | None, variant: str | None, ema: bool) -> Any:
    pipeline = resolve("DiffusionPipeline")
    if source.is_dir():
        return pipeline.from_pretrained(source, torch_dtype=dtype or "auto", variant=variant)
    return pipeline.from_single_file(
        source, torch_dtype=dtype or "auto", prediction_type=prediction, original_config_file=original, extract_ema=ema
    )
