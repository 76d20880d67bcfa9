"""Measure an exported model; fails where a figure is not reached.

    python recipes/emoji/evaluate.py FOLDER [--concepts 100] [--write build/evaluation] [--drawings taught]

Needs the drawings that `keep.py` kept, no downloads. Writes `figures.json` and a sheet of pictures for each figure. Judges are
not people: an object is right if the drawing that is nearest in the autoencoder's latent space, of all that the model was taught,
shows it.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from autoencoder import held_out, psnr
from compose import BUILD, GROUNDS, KEPT, NONE, STYLES, Drawings, Lessons, Scenes, concepts, sheet
from diffusion import draw
from palette import BACKGROUNDS
from torch import Tensor
from torch.nn import functional

from suffuse import AutoencoderKL, DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline

LEAST = {
    "seen: object": 0.80,
    "held out: object": 0.65,
    "held out: style": 0.80,
    "held out: background": 0.90,
    "reconstruction: dB": 30.0,
    "image to image: colours kept": 0.90,
    "inpainting: dB outside the mask": 30.0,
    "inpainting: something else inside the mask": 0.80,
}
"""What the model has to reach."""


@torch.no_grad()
def latents_of(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Flat latents, for distances."""
    return torch.cat([vae.encode(some).latent_dist.mode().flatten(1) for some in pictures.split(128)])


def alone(rows: Tensor, ground: int) -> Scenes:
    """Drawings alone on one background."""
    none = torch.full_like(rows, NONE)
    return Scenes(rows, none, none, torch.full_like(rows, ground), torch.zeros_like(rows))


def background_of(pictures: Tensor) -> list[int]:
    """The named colour that is nearest to the middle colour of the rim; objects seldom reach the corners."""
    colours = (pictures.permute(0, 2, 3, 1) + 1) * 127.5
    rim = torch.cat([colours[:, :6, :6], colours[:, :6, -6:], colours[:, -6:, :6], colours[:, -6:, -6:]], 1).flatten(1, 2)
    named = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32)
    return torch.cdist(rim.median(1).values, named).argmin(1).tolist()


class Judge:
    """Says which taught drawing a picture shows.

    Args:
        vae: In whose latent space distances are taken.
        lessons: What was taught; every drawing is looked at on every background.
    """

    def __init__(self, vae: AutoencoderKL, lessons: Lessons):
        self.vae, self.rows = vae, torch.tensor(sorted(lessons.concept_of))
        grounds = range(len(GROUNDS))
        self.known = torch.cat([latents_of(vae, lessons.drawings.picture(alone(self.rows, ground))) for ground in grounds])

    def rows_of(self, pictures: Tensor) -> list[int]:
        """For each picture the row of the drawing that is nearest to it."""
        nearest = torch.cdist(latents_of(self.vae, pictures), self.known).argmin(1)
        return self.rows[nearest % len(self.rows)].tolist()


def prompt_of(lessons: Lessons, row: int, ground: int) -> str:
    """The plainest words for a drawing on a background."""
    concept, style = lessons.concept_of[row]
    return f"a {concept.words[0]}, {style} style, {GROUNDS[ground]} background"


def seen(pipeline: DiffusionPipeline, lessons: Lessons, judge: Judge, count: int, folder: Path) -> dict[str, float]:
    """Objects of combinations that were shown in training."""
    chosen = random.Random(1).sample(range(lessons.singles), count)
    scenes = lessons.scenes[torch.tensor(chosen)]
    rows, grounds = scenes.first.tolist(), scenes.background.tolist()
    pictures = draw(pipeline, [prompt_of(lessons, row, ground) for row, ground in zip(rows, grounds, strict=True)])
    sheet(pictures, 20).save(folder / "seen.png")
    found = judge.rows_of(pictures)
    right = [lessons.concept_of[a][0] is lessons.concept_of[b][0] for a, b in zip(rows, found, strict=True)]
    return {"seen: object": sum(right) / count}


def combined(pipeline: DiffusionPipeline, lessons: Lessons, judge: Judge, count: int, folder: Path) -> dict[str, float]:
    """Objects, styles and backgrounds of combinations that were kept back."""
    chosen = random.Random(2).sample(lessons.held_out, min(count, len(lessons.held_out)))
    rows, grounds = [scene[0] for scene in chosen], [scene[3] for scene in chosen]
    pictures = draw(pipeline, [prompt_of(lessons, row, ground) for row, ground in zip(rows, grounds, strict=True)])
    sheet(pictures, 20).save(folder / "held-out.png")
    asked = [lessons.concept_of[row] for row in rows]
    found = [lessons.concept_of[row] for row in judge.rows_of(pictures)]
    pairs = list(zip(asked, found, strict=True))
    return {
        "held out: object": sum(a[0] is b[0] for a, b in pairs) / len(pairs),
        "held out: style": sum(a[1] == b[1] for a, b in pairs) / len(pairs),
        "held out: background": sum(a == b for a, b in zip(grounds, background_of(pictures), strict=True)) / len(pairs),
    }


def edited(pipeline: DiffusionPipeline, lessons: Lessons, count: int, folder: Path) -> dict[str, float]:
    """Image to image at half strength towards another style, and the middle of pictures painted anew as something else."""
    chance = random.Random(3)
    rows = [chance.choice(chance.choice(lessons.known).rows) for _ in range(count)]
    ground = 7
    pictures = lessons.drawings.picture(alone(torch.tensor(rows), ground))
    others = [lessons.concept_of[row][0].rows[(STYLES.index(lessons.concept_of[row][1]) + 1) % 4] for row in rows]
    strangers = [chance.choice(chance.choice(lessons.known).rows) for _ in rows]
    image_to_image, inpaint = (
        kind(**pipeline.components, requires_safety_checker=False)
        for kind in (StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline)
    )
    for kind in (image_to_image, inpaint):
        kind.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 30, "guidance_scale": 3.0, "output_type": "pt"}
    changed = image_to_image(
        [prompt_of(lessons, row, ground) for row in others],
        image=(pictures + 1) / 2,
        strength=0.5,
        generator=torch.Generator().manual_seed(0),
        **settings,
    ).images
    changed = changed * 2 - 1
    coarse = [functional.avg_pool2d(some, 16) * 127.5 for some in (pictures, changed)]
    kept = ((coarse[0] - coarse[1]).abs().mean((1, 2, 3)) < 25).float().mean()

    mask = torch.zeros(count, 1, 64, 64)
    mask[:, :, 16:48, 16:48] = 1
    anew = inpaint(
        [prompt_of(lessons, row, ground) for row in strangers],
        image=(pictures + 1) / 2,
        mask_image=mask,
        height=64,
        width=64,
        strength=1.0,
        generator=torch.Generator().manual_seed(0),
        **settings,
    ).images
    anew = anew * 2 - 1
    # The decoder sees some pixels across the border of the mask.
    outside = functional.max_pool2d(mask, 17, 1, 8) == 0
    error = ((anew - pictures) * 127.5)[outside.expand_as(pictures)].square().mean()
    inside = ((anew - pictures)[:, :, 16:48, 16:48].abs().mean((1, 2, 3)) > 0.1).float().mean()
    sheet(torch.cat([pictures, changed, anew]), count).save(folder / "edited.png")
    return {
        "image to image: colours kept": float(kept),
        "inpainting: dB outside the mask": float(10 * torch.log10(255**2 / error)),
        "inpainting: something else inside the mask": float(inside),
    }


def evaluate(model: Path, count: int, folder: Path, kept: Path = KEPT) -> dict[str, float]:
    """All figures of a model that was taught `count` concepts, and the sheets."""
    folder.mkdir(parents=True, exist_ok=True)
    pipeline = DiffusionPipeline.from_pretrained(str(model), torch_dtype=torch.float32)
    drawings = Drawings.load(kept)
    lessons = Lessons(drawings, concepts(drawings, count))
    test = held_out(drawings)
    with torch.no_grad():
        back = pipeline.vae.decode(pipeline.vae.encode(test[:20]).latent_dist.mode()).sample
    sheet(torch.cat([test[:20], back]), 20).save(folder / "reconstruction.png")
    figures = {"reconstruction: dB": float(psnr(pipeline.vae, test).mean())}
    judge = Judge(pipeline.vae, lessons)
    figures |= seen(pipeline, lessons, judge, 200, folder)
    figures |= combined(pipeline, lessons, judge, 100, folder)
    figures |= edited(pipeline, lessons, 20, folder)
    figures = {name: round(figures[name], 3) for name in LEAST}
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--concepts", type=int, default=100)
    parser.add_argument("--write", type=Path, default=BUILD / "evaluation")
    parser.add_argument("--drawings", type=Path, default=KEPT)
    told = parser.parse_args()
    reached = evaluate(told.model, told.concepts, told.write, told.drawings)
    for name, figure in reached.items():
        print(f"{name:45s} {figure:6.2f}  at least {LEAST[name]:5.2f}  {'' if figure >= LEAST[name] else 'NOT REACHED'}")
    if any(figure < LEAST[name] for name, figure in reached.items()):
        raise SystemExit(1)
