"""Draw a sheet of samples with the small model that comes with suffuse: the same weights and seeds give the same bytes.

python examples/emoji_sheet.py SHEET.png
"""

from __future__ import annotations

import sys

from PIL import Image

import suffuse

PROMPTS = """
a cat, 3d style | a dog, cartoon style | a red apple, flat style | a penguin, retro style
a rocket, blue background | a house, green background | a snowman, 3d style | a butterfly, cartoon style
a pizza, flat style | a strawberry, 3d style | a smiling cat, 3d style, blue background | a robot, cartoon style
a banana, purple background | a palm tree, flat style | a balloon, yellow background | a rainbow, cartoon style
a blue cat | a green apple | a red car, 3d style | a puppy, pink background
a cat and an apple | a rose, 3d style | a guitar, cartoon style | a crown, 3d style, black background
"""
SEED, COLUMNS = 7, 6


def draw() -> Image.Image:
    """All prompts, in rows."""
    pipe = suffuse.DiffusionPipeline.from_pretrained(suffuse.bundled("emoji"), torch_dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    prompts = [prompt.strip() for line in PROMPTS.strip().splitlines() for prompt in line.split("|")]
    pictures = [pipe(prompt, num_inference_steps=25, guidance_scale=3.0, seed=SEED).images[0] for prompt in prompts]
    sheet = Image.new("RGB", (66 * COLUMNS + 2, 66 * -(-len(pictures) // COLUMNS) + 2), "white")
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (2 + 66 * (index % COLUMNS), 2 + 66 * (index // COLUMNS)))
    return sheet


if __name__ == "__main__":
    draw().save(sys.argv[1])
    print(sys.argv[1])
