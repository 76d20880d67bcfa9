"""The model that comes with suffuse, as a new user meets it: from a cold start to a PNG, one more picture, and memory.

python benchmarks/bundled.py [--repeats 5] [--steps 25]

Cold is `suffuse generate "a red apple"` in a fresh process, with the files in the page cache; warm is one picture of a pipeline
that is loaded. diffusers draws the same with the same folder: warm in this process, in turn; cold in a fresh process of its own.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

SUFFUSE = "from suffuse.cli.main import app; app()"
DIFFUSERS = """
import sys, torch, diffusers
pipe = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1], dtype=torch.float32)
made = pipe("a red apple", num_inference_steps=int(sys.argv[2]), guidance_scale=3.0, generator=torch.Generator().manual_seed(7))
made.images[0].save(sys.argv[3])
"""


def seconds(program: str, *arguments: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-W", "ignore", "-c", program, *arguments], check=True, capture_output=True)
    return time.perf_counter() - began


def cold(repeats: int, steps: int, model: str) -> dict[str, float]:
    """Median seconds of a fresh process, by library, in turn; the first round fills the page cache."""
    with tempfile.TemporaryDirectory() as folder:
        png = str(Path(folder, "apple.png"))
        programs = {
            "suffuse": (SUFFUSE, "generate", "a red apple", "--seed", "7", "--steps", str(steps), "-o", png),
            "diffusers": (DIFFUSERS, model, str(steps), png),
        }
        times = {name: [seconds(*program) for _ in range(repeats + 1)][1:] for name, program in programs.items()}
    return {name: statistics.median(spent) for name, spent in times.items()}


def warm(repeats: int, steps: int, model: str) -> dict[str, float]:
    """Median seconds of one picture, by library, in turn."""
    import diffusers
    import torch

    import suffuse

    pipes = {
        "suffuse": suffuse.DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32),
        "diffusers": diffusers.DiffusionPipeline.from_pretrained(model, dtype=torch.float32),
    }
    times: dict[str, list[float]] = {name: [] for name in pipes}
    for repeat in range(repeats + 1):
        for name, pipe in pipes.items():
            pipe.set_progress_bar_config(disable=True)
            began = time.perf_counter()
            pipe("a red apple", num_inference_steps=steps, guidance_scale=3.0)
            if repeat:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(spent) for name, spent in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=25)
    arguments = parser.parse_args()
    from suffuse.checkpoints.bundle import bundled

    model = bundled("emoji")
    started = cold(arguments.repeats, arguments.steps, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drawn = warm(arguments.repeats, arguments.steps, model)
    peak = memory(arguments.steps)
    for name in started:
        print(f"{name:10s} cold {started[name]:5.2f} s   warm {drawn[name]:5.2f} s")
    print(f"suffuse    peak memory of a cold start: {peak / 1e9:.2f} GB")


def memory(steps: int) -> int:
    """Peak resident memory in bytes of a cold start; in a process that starts no other."""
    watched = (
        "import resource, subprocess, sys; subprocess.run([sys.executable, '-W', 'ignore', '-c', *sys.argv[1:]], check=True, "
        "capture_output=True); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    with tempfile.TemporaryDirectory() as folder:
        command = [SUFFUSE, "generate", "a red apple", "--steps", str(steps), "-o", str(Path(folder, "apple.png"))]
        told = subprocess.run([sys.executable, "-c", watched, *command], check=True, capture_output=True, text=True)
    return int(told.stdout) * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
