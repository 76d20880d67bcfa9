"""Time to save a pipeline the size and shape of Stable Diffusion 1.5 in half precision, peer and suffuse in turn.

    python benchmarks/save.py --folder /tmp/sd15 --into /tmp --repeats 3

The folder (2.1 GB of random weights) is the one of load.py, made if it is not there. The peer returns when its files are in
the page cache; suffuse when they are on the disk, summed up, and exchanged for the old ones. Told are both that time and the
time until the peer's files are on the disk as well (`sync`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from load import LIBRARIES, make


def save(library: str, folder: Path, target: Path) -> None:
    """Load the pipeline, save it over an older copy of itself, and print the seconds as JSON."""
    import torch
    import transformers

    models = __import__(library)
    options = {"torch_dtype": torch.float16}
    pipe = models.StableDiffusionPipeline(
        unet=models.UNet2DConditionModel.from_pretrained(folder / "unet", **options),
        vae=models.AutoencoderKL.from_pretrained(folder / "vae", **options),
        text_encoder=transformers.CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float16),
        scheduler=models.PNDMScheduler(),
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    float(sum(tensor.float().sum() for tensor in pipe.unet.parameters()))  # what is only mapped is read before the clock runs
    os.sync()
    began = time.perf_counter()
    pipe.save_pretrained(target)
    returned = time.perf_counter()
    os.sync()
    print(json.dumps({"returned": returned - began, "on disk": time.perf_counter() - began}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint is, or is to be made")
    parser.add_argument("--into", type=Path, required=True, help="where to save: on the disk that is to be measured")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=LIBRARIES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        save(arguments.only, arguments.folder, arguments.into)
        return
    if not (arguments.folder / "text_encoder").is_dir():
        make(arguments.folder)
    results: dict[str, list[dict[str, float]]] = {library: [] for library in LIBRARIES}
    for _ in range(arguments.repeats):
        for library in LIBRARIES:
            target = arguments.into / f"saved-by-{library}"
            command = [sys.executable, "-W", "ignore", __file__, "--folder", str(arguments.folder), "--into", str(target)]
            output = subprocess.run([*command, "--only", library], capture_output=True, text=True, check=True).stdout
            results[library].append(json.loads(output.splitlines()[-1]))
            print(library, {name: round(value, 3) for name, value in results[library][-1].items()}, flush=True)
    for library in LIBRARIES:
        shutil.rmtree(arguments.into / f"saved-by-{library}")
    peer, ours = ({key: statistics.median(r[key] for r in results[name]) for key in results[name][0]} for name in LIBRARIES)
    for name in peer:
        print(f"{name}: {peer[name]:.2f} s, {ours[name]:.2f} s: {peer[name] / ours[name]:.2f} times as fast")


if __name__ == "__main__":
    main()
