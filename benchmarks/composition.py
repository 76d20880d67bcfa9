"""How long it takes to refuse what cannot work together, with the model that comes along.

python benchmarks/composition.py [--repeats 20]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from PIL import Image

import suffuse
from suffuse.errors import InputError

PICTURE = Image.new("RGB", (64, 64))
REFUSED = {
    "two beginnings": {"image": PICTURE, "latents": torch.zeros(1, 4, 8, 8)},
    "a control picture for no net": {"control_image": PICTURE},
    "a picture for no adapter": {"adapter_image": PICTURE},
    "a mask of no picture": {"mask_image": PICTURE},
    "a setting of nothing": {"guess_mode": True},
    "a picture for no IP-Adapter": {"ip_adapter_image": PICTURE},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    pipe = suffuse.DiffusionPipeline.from_pretrained(suffuse.bundled("emoji"))
    slowest = 0.0
    for name, given in REFUSED.items():
        times = []
        for _ in range(options.repeats):
            began = time.perf_counter()
            try:
                pipe("a red apple", **given)
            except InputError:
                times.append(1000 * (time.perf_counter() - began))
        slowest = max(slowest, *times)
        print(f"{name:32} median {statistics.median(times):6.2f} ms, slowest {max(times):6.2f} ms, of {len(times)}")
    print(f"slowest of all {slowest:.2f} ms (goal 50)")


if __name__ == "__main__":
    main()
