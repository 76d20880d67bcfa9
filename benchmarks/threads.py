"""Eight threads on one shared pipeline, for each of several schedulers: how many pictures equal those of serial runs.

    python benchmarks/threads.py [--threads 8]

Peer and suffuse run the same tiny model, the same seeds and the same settings.
"""

from __future__ import annotations

import argparse
import warnings
from concurrent.futures import ThreadPoolExecutor

import diffusers
import torch
from loop import pipelines

SCHEDULERS = [
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
]


def draw(pipe, seed: int):
    embeds = torch.full((1, 77, 32), float(seed))
    return pipe(
        prompt_embeds=embeds,
        negative_prompt_embeds=-embeds,
        num_inference_steps=10 + seed % 3,
        guidance_scale=2.0 + seed,
        height=64,
        width=64,
        output_type="latent",
        generator=torch.Generator().manual_seed(seed),
    ).images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=8)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    diffusers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    seeds = range(arguments.threads)
    for library, pipe, _ in pipelines():
        right = 0
        for name in SCHEDULERS:
            pipe.scheduler = getattr(library, name).from_config(pipe.scheduler.config)
            serial = [draw(pipe, seed) for seed in seeds]

            def attempt(seed: int, pipe=pipe):
                try:
                    return draw(pipe, seed)
                except Exception:
                    return None  # the peer's shared scheduler runs off its end

            with ThreadPoolExecutor(arguments.threads) as pool:
                shared = list(pool.map(attempt, seeds))
            right += sum(made is not None and torch.equal(made, alone) for made, alone in zip(shared, serial, strict=True))
        print(f"{library.__name__:10s} {right} of {len(SCHEDULERS) * arguments.threads} pictures equal their serial run")


if __name__ == "__main__":
    main()
