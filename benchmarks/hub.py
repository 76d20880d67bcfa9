"""Time to load a model by its name on the hub, when it is in the cache, over the time to load it from its folder.

    python benchmarks/hub.py --folder /tmp/sd15 --repeats 5

The folder is that of load.py (its autoencoder, 167 MB), made if it is not there. The hub is the stand-in of the tests, on this
machine: what is timed is our part, one request included, not the network.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from load import make

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "hub"))


def seconds(load: Callable[[], object]) -> float:
    began = time.perf_counter()
    load()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint is, or is to be made")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if not (arguments.folder / "text_encoder").is_dir():
        make(arguments.folder)
    from hub_server import Hub, serve

    hub = Hub()
    server = serve(hub)
    with TemporaryDirectory() as cache:
        os.environ |= {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": cache}
        import torch

        from suffuse import AutoencoderKL

        torch.set_num_threads(1)
        hub.add_folder("org/model", arguments.folder / "vae")
        AutoencoderKL.from_pretrained("org/model")
        ways: dict[str, Callable[[], object]] = {
            "folder": lambda: AutoencoderKL.from_pretrained(arguments.folder / "vae"),
            "name": lambda: AutoencoderKL.from_pretrained("org/model"),
            "name, asking nobody": lambda: AutoencoderKL.from_pretrained("org/model", local_files_only=True),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(arguments.repeats):
            for way, load in ways.items():
                times[way].append(seconds(load))
        base = statistics.median(times["folder"])
        for way, taken in times.items():
            print(f"{way:20} {statistics.median(taken):.3f} s  {statistics.median(taken) / base:.2f} ×")
    server.shutdown()


if __name__ == "__main__":
    main()
