"""Low-rank adapters of a UNet shaped like Stable Diffusion XL's: time to load one, to switch between two, and what one takes.

    python benchmarks/lora.py --rank 16 --repeats 5

The UNets have no weights (they are on the meta device); the adapters, random numbers for every linear layer of the transformers,
are files in the form diffusers writes. Peer and suffuse in turn, in one process.
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

SHAPE = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def unet(library: Any) -> Any:
    with torch.device("meta"):
        return library.UNet2DConditionModel(**SHAPE)


def write_adapter(path: Path, rank: int, seed: int) -> int:
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, layer in unet(suffuse).named_modules():
        if isinstance(layer, torch.nn.Linear) and "transformer_blocks" in name:
            shapes = {"lora_A": (rank, layer.in_features), "lora_B": (layer.out_features, rank)}
            for part, shape in shapes.items():
                tensors[f"unet.{name}.{part}.weight"] = torch.randn(shape, generator=generator).half()
    safetensors.torch.save_file(tensors, path)
    return len(tensors) // 2


def anonymous() -> int:
    """Bytes of memory of this process that are no file's, without what was given back and only waits to be used again."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def measure(library: Any, folder: Path, repeats: int) -> dict[str, float]:
    """Seconds of a load and of a switch, and bytes of memory over bytes of the file."""
    loads, switches, size = [], [], sum(path.stat().st_size for path in folder.iterdir())
    for _ in range(repeats):
        model = unet(library)
        before = anonymous()
        for name in ("a", "b"):
            began = time.perf_counter()
            model.load_lora_adapter(str(folder / f"{name}.safetensors"), prefix="unet", adapter_name=name, use_safetensors=True)
            loads.append(time.perf_counter() - began)
        memory = (anonymous() - before) / size
        for names in ("a", "b", ["a", "b"]):
            began = time.perf_counter()
            model.set_adapters(names)
            switches.append(time.perf_counter() - began)
    return {"load": statistics.median(loads), "switch": statistics.median(switches), "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    diffusers.logging.set_verbosity_error()
    with TemporaryDirectory() as made:
        folder = Path(made)
        for seed, name in enumerate(("a", "b")):
            layers = write_adapter(folder / f"{name}.safetensors", arguments.rank, seed)
        size = (folder / "a.safetensors").stat().st_size
        print(f"an adapter of rank {arguments.rank} for {layers} layers: {size / 1e6:.1f} MB")
        for library in (diffusers, suffuse):
            measure(library, folder, 1)
        peer, ours = measure(diffusers, folder, arguments.repeats), measure(suffuse, folder, arguments.repeats)
    print(f"load: {peer['load']:.3f} s, {ours['load']:.3f} s: {peer['load'] / ours['load']:.1f} times as fast")
    print(f"switch: {peer['switch'] * 1000:.1f} ms, {ours['switch'] * 1000:.1f} ms")
    print(f"memory over bytes of the file: {peer['memory']:.2f}, {ours['memory']:.2f}")


if __name__ == "__main__":
    main()
