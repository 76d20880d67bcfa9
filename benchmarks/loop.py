"""Time of a denoising step outside of the model, peer and suffuse in turn in one process, on a tiny model.

    python benchmarks/loop.py [--steps 50] [--repeats 9] [--schedulers DDIMScheduler …]

The model's own time is measured inside and taken off; what is left is the loop, the guidance, the scheduler, the callbacks' hooks
and the progress bar. Each library runs its own model of the same weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import diffusers
import torch

import suffuse

SCHEDULERS = [
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
]


class Clock:
    """Seconds spent inside a module."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.spent, forward = 0.0, module.forward

        def timed(*args, **kwargs):
            began = time.perf_counter()
            try:
                return forward(*args, **kwargs)
            finally:
                self.spent += time.perf_counter() - began

        module.forward = timed


def pipelines():
    sizes = {"block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 8, "cross_attention_dim": 32}
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    theirs = diffusers.UNet2DConditionModel(**sizes, **blocks).eval()
    ours = suffuse.UNet2DConditionModel(**sizes, **blocks).eval()
    ours.load_state_dict(theirs.state_dict())
    rest = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    for library, unet in ((diffusers, theirs), (suffuse, ours)):
        vae = library.AutoencoderKL(
            block_out_channels=(8,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=8,
        )
        scheduler = library.DDIMScheduler(clip_sample=False, steps_offset=1)
        pipe = library.StableDiffusionPipeline(vae=vae, unet=unet, scheduler=scheduler, **rest, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        yield library, pipe, Clock(unet)


def seconds(pipe, clock: Clock, steps: int) -> float:
    embeds = torch.zeros(1, 77, 32)
    clock.spent, began = 0.0, time.perf_counter()
    pipe(
        prompt_embeds=embeds,
        negative_prompt_embeds=embeds,
        num_inference_steps=steps,
        height=64,
        width=64,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )
    return time.perf_counter() - began - clock.spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--schedulers", nargs="*", default=SCHEDULERS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    diffusers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    pairs = list(pipelines())
    ratios = []
    print(f"{'scheduler':34s} {'diffusers':>10s} {'suffuse':>10s} {'suffuse/diffusers':>18s}")
    for name in arguments.schedulers:
        for library, pipe, _ in pairs:
            pipe.scheduler = getattr(library, name).from_config(pairs[0][1].scheduler.config)
        best = [[float("inf")] * 2 for _ in pairs]
        for _ in range(arguments.repeats):
            for (_, pipe, clock), record in zip(pairs, best, strict=True):
                for which, steps in enumerate((arguments.steps, 2 * arguments.steps)):
                    record[which] = min(record[which], seconds(pipe, clock, steps))
        # The difference of a long and a short run is steps alone; the best of each is the least disturbed.
        theirs, ours = ((long - short) / arguments.steps for short, long in best)
        ratios.append(ours / theirs)
        print(f"{name:34s} {theirs * 1e6:7.0f} µs {ours * 1e6:7.0f} µs {ratios[-1]:18.2f}")
    print(f"{'median':34s} {'':10s} {'':10s} {statistics.median(ratios):18.2f}")


if __name__ == "__main__":
    main()
