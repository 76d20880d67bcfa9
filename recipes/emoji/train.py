"""All of it with one command: data, autoencoder, text encoder, gate, diffusion model, export, evaluation.

    python recipes/emoji/train.py --minutes 10 --device cuda TARGET

Run the same command again after an interruption. The budget is of training; data, gate and evaluation take their own time.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from compose import BUILD, HERE

SHARES = {"autoencoder": 0.2, "text_encoder": 0.08, "diffusion": 0.72}
"""How the minutes are split."""
BATCHES = {"cpu": {}, "cuda": {"autoencoder": 128, "text_encoder": 512, "diffusion": 256}}
"""Where an accelerator would idle with the small batches that suit a processor."""


def run(script: str, *arguments: object) -> None:
    """One stage; the first that fails ends it all."""
    print(f"== {script} {' '.join(map(str, arguments))}", flush=True)
    subprocess.run([sys.executable, str(HERE / f"{script}.py"), *map(str, arguments)], check=True)


def main(told: argparse.Namespace) -> None:
    """Every stage in its order."""
    if not (BUILD / "pictures-64.npz").exists():
        run("data")
    for stage, share in SHARES.items():
        batch = BATCHES[told.device].get(stage)
        settings = ["--device", told.device, *(["--batch", batch] if batch else [])]
        if stage == "diffusion":
            settings += ["--concepts", told.concepts]
            if not (BUILD / "unet.pt").exists() and not told.no_gate:
                run("diffusion", "--overfit", 27, "--minutes", 1 if told.device == "cuda" else 10, "--device", told.device)
        run(stage, "--minutes", share * told.minutes, *settings)
    run("export", told.target)
    run("evaluate", told.target, "--concepts", told.concepts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--concepts", type=int, default=160)
    parser.add_argument("--device", choices=BATCHES, default="cpu")
    parser.add_argument("--no-gate", action="store_true")
    main(parser.parse_args())
