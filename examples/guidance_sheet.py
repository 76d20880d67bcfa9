"""Draw the same pictures with one guidance after another, by the model that comes with suffuse: the strips of docs/guidance.md.

python examples/guidance_sheet.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

import suffuse

PROMPTS = ["a cat, 3d style", "a red apple", "a dog, cartoon style", "a house"]
SEED = 7
WAYS = {
    "none": suffuse.ClassifierFreeGuidance(1.0),
    "plain": suffuse.ClassifierFreeGuidance(3.0),
    "much": suffuse.ClassifierFreeGuidance(12.0),
    "interval": suffuse.GuidanceInterval(suffuse.ClassifierFreeGuidance(12.0), start=0.1, stop=0.6),
    "tangential": suffuse.TangentialGuidance(12.0),
    "projected": suffuse.AdaptiveProjectedGuidance(12.0, parallel=0.5),
    "unattended": suffuse.WorseGuidance(1.0, worse_scale=3.0, worsening=suffuse.Unattended(["up_blocks"])),
    "skipped": suffuse.WorseGuidance(1.0, worse_scale=2.0, worsening=suffuse.Skipped(["up_blocks.0"])),
    "self-attention": suffuse.SelfAttentionGuidance(1.0, sag_scale=2.0, layer="up_blocks.1"),
    "towards": suffuse.SemanticGuidance(3.0, [suffuse.Concept("green", scale=8.0, warmup=2, threshold=0.7)]),
    "away": suffuse.SemanticGuidance(3.0, [suffuse.Concept("red", scale=6.0, warmup=2, threshold=0.5, reverse=True)]),
    "safe": suffuse.SafeGuidance(3.0, "red", warmup=0, threshold=0.5),
}


def draw(name: str) -> Image.Image:
    """The pictures of one way to guide, side by side."""
    pipe = suffuse.DiffusionPipeline.from_pretrained(suffuse.bundled("emoji"), torch_dtype="float32")
    pipe.scheduler = suffuse.DDIMScheduler.from_config(pipe.scheduler.config)  # whole timesteps, for self-attention guidance
    pipe.set_progress_bar_config(disable=True)
    pictures = [pipe(prompt, num_inference_steps=25, guidance=WAYS[name], seed=SEED).images[0] for prompt in PROMPTS]
    strip = Image.new("RGB", (66 * len(pictures) - 2, 64), "white")
    for index, picture in enumerate(pictures):
        strip.paste(picture, (66 * index, 0))
    return strip


if __name__ == "__main__":
    for name in WAYS:
        draw(name).save(Path(sys.argv[1]) / f"{name}.png")
        print(name)
