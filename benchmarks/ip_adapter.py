"""IP-Adapters of a UNet shaped like Stable Diffusion 1.5's: time to load one, what it takes, and what it adds to a step.

    python benchmarks/ip_adapter.py --repeats 3 --steps 4

The weights are random. Peer and suffuse in turn, in one process; of a step the UNet alone is timed, with a picture and without.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import safetensors.torch
import torch

import suffuse
from suffuse.checkpoints.adapter_files import Choice
from suffuse.diffusion.conditioning import Conditioning, ModelCall
from suffuse.diffusion.image_prompts import ShowPictures
from suffuse.hub.options import HubOptions
from suffuse.models.image_adapter import image_adapters_of, read_adapter, use_adapters

WIDTH, FEATURES, STATES, INNER = 768, 1024, 1280, 768
LIBRARIES = {"diffusers": diffusers, "suffuse": suffuse}


def unet(library: Any, weights: dict[str, torch.Tensor] | None = None) -> Any:
    with torch.device("meta"):
        made = library.UNet2DConditionModel(cross_attention_dim=WIDTH).eval()
    if weights is not None:
        made.load_state_dict(weights, assign=True)
        return made
    made.to_empty(device="cpu")
    for parameter in made.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    return made


def shapes_of(kind: str) -> dict[str, tuple[int, ...]]:
    """The image projection: one embedding as four tokens, or sixteen queries of four layers."""
    if kind == "plain":
        shapes = {"proj.weight": (4 * WIDTH, FEATURES), "proj.bias": (4 * WIDTH,), "norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}
    else:
        shapes = {"latents": (1, 16, INNER), "proj_in.weight": (INNER, STATES), "proj_in.bias": (INNER,)}
        shapes |= {"proj_out.weight": (WIDTH, INNER), "proj_out.bias": (WIDTH,)}
        shapes |= {f"norm_out.{part}": (WIDTH,) for part in ("weight", "bias")}
        for layer in (f"layers.{number}" for number in range(4)):
            shapes |= {
                f"{layer}.{norm}.{part}": (INNER,) for norm in ("0.norm1", "0.norm2", "1.0") for part in ("weight", "bias")
            }
            shapes |= {f"{layer}.0.to_q.weight": (INNER, INNER), f"{layer}.0.to_kv.weight": (2 * INNER, INNER)}
            shapes |= {f"{layer}.0.to_out.weight": (INNER, INNER), f"{layer}.1.1.weight": (4 * INNER, INNER)}
            shapes |= {f"{layer}.1.3.weight": (INNER, 4 * INNER)}
    return shapes


def write_adapter(path: Path, model: Any, kind: str) -> None:
    shapes = {f"image_proj.{name}": shape for name, shape in shapes_of(kind).items()}
    for number, name in enumerate(model.attn_processors):
        if number % 2:
            outputs = model.get_submodule(name.removesuffix(".processor")).to_q.out_features
            shapes |= {f"ip_adapter.{number}.to_{part}_ip.weight": (outputs, WIDTH) for part in "kv"}
    generator = torch.Generator().manual_seed(0)
    safetensors.torch.save_file({n: (torch.randn(s, generator=generator) * 0.02).half() for n, s in shapes.items()}, path)


def anonymous() -> int:
    """Bytes of memory of this process that are no file's, without what was given back and only waits to be used again."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def load(library: Any, model: Any, path: Path) -> None:
    """What `load_ip_adapter` does beside looking for image encoders."""
    if library is suffuse:
        use_adapters(model, [read_adapter(path, Choice(), HubOptions(), model)])
        return
    tensors = safetensors.torch.load_file(path)
    parts = ("image_proj", "ip_adapter")
    nested = {part: {n.removeprefix(f"{part}."): t for n, t in tensors.items() if n.startswith(part)} for part in parts}
    model._load_ip_adapter_weights([nested], low_cpu_mem_usage=True)


def longer(library: Any, plain: Any, model: Any, kind: str, count: int) -> float:
    """A step with a picture over one without; both in turn, the shortest of each, but for the first, in which more is made."""
    inputs = torch.randn(2, 4, 16, 16), torch.tensor(10), torch.randn(2, 77, WIDTH)
    embeds = torch.randn(2, 1, FEATURES) if kind == "plain" else torch.randn(2, 1, 257, STATES)
    added, branches = {"image_embeds": [embeds]}, ("uncond", "cond")
    show = ShowPictures(image_adapters_of(model), [embeds], [1.0], [None]) if library is suffuse else None
    taken: dict[str, list[float]] = {"with": [], "without": []}
    for _ in range(count + 1):
        began = time.perf_counter()
        plain(*inputs)
        taken["without"].append(time.perf_counter() - began)
        began = time.perf_counter()
        call = ModelCall(inputs[0], inputs[1], branches, Conditioning(1, branches, {}))
        if show is not None:
            show(call, None)
        model(*inputs, **(call.kwargs or {"added_cond_kwargs": added}))
        taken["with"].append(time.perf_counter() - began)
    return min(taken["with"][1:]) / min(taken["without"][1:])


def measure(library: Any, folder: Path, kind: str, repeats: int, count: int) -> dict[str, float]:
    path, loads, memory = folder / f"{kind}.safetensors", [], []
    model = plain = unet(library)
    for _ in range(repeats):
        model = unet(library, plain.state_dict())
        before, began = anonymous(), time.perf_counter()
        load(library, model, path)
        loads.append(time.perf_counter() - began)
        memory.append((anonymous() - before) / path.stat().st_size)
    ratio = longer(library, plain, model, kind, count)
    return {"load s": statistics.median(loads), "memory / file": statistics.median(memory), "step with / without": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    with TemporaryDirectory() as name:
        for kind in ("plain", "plus"):
            with torch.device("meta"):
                shaped = diffusers.UNet2DConditionModel(cross_attention_dim=WIDTH)
            write_adapter(Path(name) / f"{kind}.safetensors", shaped, kind)
            for library_name, library in LIBRARIES.items():
                figures = measure(library, Path(name), kind, arguments.repeats, arguments.steps)
                print(f"{kind:6} {library_name:10}", *(f"{what} {value:.3f}" for what, value in figures.items()), sep="   ")


if __name__ == "__main__":
    main()
