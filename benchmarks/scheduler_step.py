"""How long `scale_model_input` and `step` take, beside the peer: each scheduler in turn, on a small latent."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from pathlib import Path

import diffusers
import torch

import suffuse

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "schedulers"))
from scheduler_oracle import NAMES


def seconds_a_step(library: object, name: str, steps: int, size: int) -> float:
    """The mean time of one `scale_model_input` and one `step`, over one run."""
    scheduler = getattr(library, name)()
    scheduler.set_timesteps(steps)
    sample = torch.randn(1, 4, size, size)
    output, spent = torch.randn_like(sample), 0.0
    for timestep in scheduler.timesteps:
        begun = time.perf_counter()
        scheduler.scale_model_input(sample, timestep)
        scheduler.step(output, timestep, sample)
        spent += time.perf_counter() - begun
    return spent / len(scheduler.timesteps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, default=64, help="height and width of the latent")
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    ratios: list[float] = []
    for name in NAMES:
        pairs = [
            [seconds_a_step(library, name, options.steps, options.size) for library in (diffusers, suffuse)]
            for _ in range(options.repeats if name != "LMSDiscreteScheduler" else 3)
        ]
        theirs, ours = (statistics.median(times) * 1e6 for times in zip(*pairs, strict=True))
        ratios.append(ours / theirs)
        print(f"{name:32} peer {theirs:8.1f} µs   suffuse {ours:8.1f} µs   ratio {ratios[-1]:.2f}")
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
