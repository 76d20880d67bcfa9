"""Time to import a pipeline class, over the time to import torch: each in a fresh process, in turn.

python benchmarks/imports.py [--repeats 7]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

STATEMENTS = {
    "torch": "import torch",
    "suffuse": "from suffuse import StableDiffusionPipeline",
    "diffusers": "from diffusers import StableDiffusionPipeline",
}


def seconds(statement: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-W", "ignore", "-c", statement], check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    times = {name: [] for name in STATEMENTS}
    for repeat in range(arguments.repeats + 1):
        for name, statement in STATEMENTS.items():
            spent = seconds(statement)
            if repeat:  # the first fills the caches
                times[name].append(spent)
    base = statistics.median(times["torch"])
    for name, spent in times.items():
        middle = statistics.median(spent)
        print(f"{STATEMENTS[name]:48s} {middle:6.2f} s  {middle / base:5.2f} x import torch")


if __name__ == "__main__":
    main()
