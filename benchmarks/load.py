"""Time and memory to load a checkpoint the size and shape of Stable Diffusion 1.5 in half precision, peer and suffuse in turn.

    python benchmarks/load.py --folder /tmp/sd15 --repeats 3

The folder (2.1 GB of random weights) is made once. Every load runs in a process of its own; time is told with and without
imports, memory as the peak of what the process itself holds (mapped files not counted) over the size of the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

COMPONENTS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
LIBRARIES = ("diffusers", "suffuse")


def make(folder: Path) -> None:
    import diffusers
    import torch
    import transformers

    torch.set_default_dtype(torch.float16)
    diffusers.UNet2DConditionModel(cross_attention_dim=768).save_pretrained(folder / "unet")
    diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    ).save_pretrained(folder / "vae")
    text = transformers.CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    transformers.CLIPTextModel(text).save_pretrained(folder / "text_encoder")


def load(library: str, folder: Path, dtype: str, threads: int, mapped: bool) -> None:
    """Load the three models, and print the seconds of it as JSON."""
    began = time.perf_counter()
    import torch
    import transformers

    torch.set_num_threads(threads)
    models = __import__(library)
    unet, vae, text_encoder = models.UNet2DConditionModel, models.AutoencoderKL, transformers.CLIPTextModel
    if library == "suffuse":
        from suffuse.checkpoints.transformers_models import load_transformers_model
    imported = time.perf_counter()
    kind = getattr(torch, dtype)
    base = _anonymous("VmRSS", "RssFile", "RssShmem")
    options = {"disable_mmap": False} if mapped else {}
    loaded = [cls.from_pretrained(folder / name, torch_dtype=kind, **options) for name, cls in (("unet", unet), ("vae", vae))]
    if library == "suffuse":
        loaded.append(load_transformers_model(text_encoder, folder / "text_encoder", torch_dtype=kind))
    else:
        loaded.append(text_encoder.from_pretrained(folder / "text_encoder", dtype=kind))
    placed = time.perf_counter()
    # Every page is touched, so that nothing that was only promised counts as loaded.
    checksum = sum(
        float(tensor.detach().view(-1)[:: 4096 // tensor.itemsize].float().sum()) for m in loaded for tensor in m.parameters()
    )
    ended = time.perf_counter()
    weights = sum(tensor.nbytes for model in loaded for tensor in model.parameters())
    told = {"imports": imported - began, "load": placed - imported, "touch": ended - placed, "checksum": checksum}
    peak = _anonymous("VmHWM") - _anonymous("RssFile", "RssShmem")
    print(json.dumps({**told, "memory": (peak - base) / weights}))


def forget(folder: Path) -> None:
    """Drop the files from the page cache."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _anonymous(first: str, *less: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return 1024 * (2 * int(status[first].split()[0]) - sum(int(status[name].split()[0]) for name in (first, *less)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint is, or is to be made")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float16", choices=("float16", "float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cold", action="store_true", help="let the system forget the files before each load")
    parser.add_argument("--map", action="store_true", help="let suffuse map the files, as the peer does")
    parser.add_argument("--only", choices=LIBRARIES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        load(arguments.only, arguments.folder, arguments.dtype, arguments.threads, arguments.map)
        return
    if not (arguments.folder / "text_encoder").is_dir():
        make(arguments.folder)
    results: dict[str, list[dict[str, float]]] = {library: [] for library in LIBRARIES}
    for _ in range(arguments.repeats):
        for library in LIBRARIES:
            if arguments.cold:
                forget(arguments.folder)
            command = [sys.executable, "-W", "ignore", __file__, "--folder", str(arguments.folder), "--only", library]
            command += ["--dtype", arguments.dtype, "--threads", str(arguments.threads), *(["--map"] if arguments.map else [])]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            results[library].append(json.loads(output.splitlines()[-1]))
            print(library, {name: round(value, 3) for name, value in results[library][-1].items()}, flush=True)
    peer, ours = ({key: statistics.median(r[key] for r in results[name]) for key in results[name][0]} for name in LIBRARIES)
    assert peer["checksum"] == ours["checksum"], "both must load the same weights"
    loads = [{"load": r["load"] + r["touch"], "whole": r["load"] + r["touch"] + r["imports"]} for r in (peer, ours)]
    for name, what in (("load", "load"), ("whole", "imports and load")):
        print(f"{what}: {loads[0][name]:.2f} s, {loads[1][name]:.2f} s: {loads[0][name] / loads[1][name]:.2f} times as fast")
    print(f"peak memory over weights: {peer['memory']:.2f}, {ours['memory']:.2f}")


if __name__ == "__main__":
    main()
