"""Training pictures and their captions, made as they are asked for.

A scene is five numbers: a drawing, perhaps a second one beside it, perhaps a paint, a background, perhaps mirrored. Its picture
follows from them alone; its caption is one of the many ways to ask for it.

    python recipes/emoji/compose.py sheet.png
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from palette import BACKGROUNDS, PAINTS
from PIL import Image
from torch import Tensor
from torch.nn import functional

HERE = Path(__file__).parent
BUILD, KEPT = HERE / "build", HERE / "taught"
STYLES = ("3d", "flat", "cartoon", "retro")
GROUNDS = tuple(BACKGROUNDS)
NONE = -1


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes; each field is int64 of shape (batch,), and `NONE` where there is nothing of the kind.

    Attributes:
        first: Row of the drawing.
        second: Row of a drawing to its right; both are then half as large.
        paint: Index into `PAINTS`: the colour the first drawing gets.
        background: Index into `BACKGROUNDS`.
        mirrored: 1 where left and right are swapped.
    """

    first: Tensor
    second: Tensor
    paint: Tensor
    background: Tensor
    mirrored: Tensor

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, rows: Tensor) -> Scenes:
        return Scenes(*(field[rows] for field in vars(self).values()))

    def to(self, device: torch.device) -> Scenes:
        """The same on another device."""
        return Scenes(*(field.to(device) for field in vars(self).values()))


class Drawings(NamedTuple):
    """All drawings: `pixels`, uint8 of shape (rows, 4, 64, 64), and what is `told` of each row."""

    pixels: Tensor
    told: list[dict]

    @classmethod
    def load(cls, folder: Path = BUILD, size: int = 64, device: str = "cpu") -> Drawings:
        """What `data.py` wrote in `build/`, or `keep.py` in `taught/`."""
        pixels = np.load(folder / f"pictures-{size}.npz")["pictures"]
        told = json.loads((folder / "pictures.json").read_text(encoding="utf-8"))
        return cls(torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).contiguous(), told)

    def rows(self, split: str) -> Tensor:
        """Rows of "train" or of "validation"."""
        return torch.tensor([row for row, told in enumerate(self.told) if told["split"] == split])

    def picture(self, scenes: Scenes) -> Tensor:
        """The pictures of the scenes: float32 of shape (batch, 3, 64, 64) in [-1, 1], on the drawings' device."""
        device = self.pixels.device
        scenes = scenes.to(device)
        colours = torch.tensor(list(BACKGROUNDS.values()), device=device) / 255
        first = painted(self.pixels[scenes.first].float() / 255, scenes.paint)
        if bool((scenes.second != NONE).any()):
            second = self.pixels[scenes.second.clamp_min(0)].float() / 255
            first = torch.where((scenes.second != NONE)[:, None, None, None], beside(first, second), first)
        opacity = first[:, 3:]
        ground = colours[scenes.background][:, :, None, None]
        flat = first[:, :3] * opacity + ground * (1 - opacity)
        return torch.where((scenes.mirrored == 1)[:, None, None, None], flat.flip(3), flat) * 2 - 1


def painted(drawing: Tensor, paint: Tensor) -> Tensor:
    """The drawings (batch, 4, height, width) in the hue of their paints: shadows darker, lights towards white."""
    paints = torch.tensor(list(PAINTS.values()), device=drawing.device)[paint.clamp_min(0)][:, :, None, None] / 255
    light = (drawing[:, :3] * drawing.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    opacity = drawing[:, 3:]
    middle = (light * opacity).sum((2, 3), keepdim=True) / opacity.sum((2, 3), keepdim=True).clamp_min(1)
    tone = (light - middle).clamp(-0.5, 0.4)
    hued = torch.where(tone < 0, paints * (1 + 1.7 * tone), paints + (1 - paints) * 1.7 * tone).clamp(0, 1)
    return torch.where((paint != NONE)[:, None, None, None], torch.cat([hued, opacity], 1), drawing)


def beside(left: Tensor, right: Tensor) -> Tensor:
    """Two drawings at half size next to each other, in the middle of the height."""

    def half(drawing: Tensor) -> Tensor:
        opacity = functional.avg_pool2d(drawing[:, 3:], 2)
        colour = functional.avg_pool2d(drawing[:, :3] * drawing[:, 3:], 2) / opacity.clamp_min(1e-4)
        return torch.cat([colour, opacity], 1)

    pair = torch.cat([half(left), half(right)], 3)
    margin = pair.shape[2] // 2
    return functional.pad(pair, (0, 0, margin, margin))


def any_scenes(rows: Tensor, count: int, generator: torch.Generator) -> Scenes:
    """Scenes of all kinds from the drawings in `rows`: what the autoencoder learns from."""

    def below(limit: int) -> Tensor:
        return torch.randint(limit, (count,), generator=generator)

    def sometimes(share: float, values: Tensor) -> Tensor:
        return torch.where(torch.rand(count, generator=generator) < share, values, NONE)

    first, second, paint = rows[below(len(rows))], rows[below(len(rows))], below(len(PAINTS))
    return Scenes(first, sometimes(0.15, second), sometimes(0.15, paint), below(len(GROUNDS)), below(2))


class Concept(NamedTuple):
    """A thing with a drawing in every style: the words that ask for it, the first the plainest, and its rows by style."""

    words: list[str]
    rows: list[int]

    @property
    def paintable(self) -> bool:
        """Whether another colour's word would not contradict its name."""
        return not set(self.words[0].split()) & {*GROUNDS, "rainbow", "gold"}


def concepts(drawings: Drawings, count: int) -> list[Concept]:
    """The first `count` concepts of `concepts.txt` that are drawn in all four styles.

    Raises:
        SystemExit: The list names something that the data does not have.
    """
    by_name: dict[str, dict[str, int]] = {}
    for row, told in enumerate(drawings.told):
        by_name.setdefault(told["name"], {})[told["style"]] = row
    found = []
    lines = (HERE / "concepts.txt").read_text(encoding="utf-8").splitlines()
    for line in [line for line in lines if not line.startswith("#")][:count]:
        name, words = line.split(": ")
        rows = by_name.get(name, {})
        if set(rows) != set(STYLES):
            raise SystemExit(f"concepts.txt: {name!r} is not drawn in all of {STYLES}; take it out of the list")
        found.append(Concept(words.split(", "), [rows[style] for style in STYLES]))
    return found


class Lessons:
    """What the diffusion model is taught: scenes of some concepts, and captions for them.

    Args:
        drawings: All drawings.
        known: The concepts.
        seed: Chooses the pairs and the paints.
        pairs: Scenes with two things.
        repaints: Scenes with a thing in another colour.
    """

    def __init__(self, drawings: Drawings, known: list[Concept], seed: int = 0, pairs: int = 2000, repaints: int = 2000):
        self.drawings, self.known = drawings, known
        self.concept_of = {row: (concept, style) for concept in known for style, row in zip(STYLES, concept.rows, strict=True)}
        chance = random.Random(seed)
        singles, self.held_out = [], []
        for concept in known:
            for row in concept.rows:
                for ground, name in enumerate(GROUNDS):
                    kept_back = name in drawings.told[row]["held_out"]
                    (self.held_out if kept_back else singles).append((row, NONE, NONE, ground, 0))
        self.singles = len(singles)
        paintable = [concept for concept in known if concept.paintable]
        for _ in range(repaints if paintable else 0):
            row = chance.choice(chance.choice(paintable).rows)
            paint, ground = chance.randrange(len(PAINTS)), chance.randrange(len(GROUNDS))
            if list(PAINTS)[paint] != GROUNDS[ground] and GROUNDS[ground] not in drawings.told[row]["held_out"]:
                singles.append((row, NONE, paint, ground, 0))
        for _ in range(pairs if len(known) > 1 else 0):
            style = chance.randrange(len(STYLES))
            left, right = (concept.rows[style] for concept in chance.sample(known, 2))
            ground = chance.randrange(len(GROUNDS))
            if all(GROUNDS[ground] not in drawings.told[row]["held_out"] for row in (left, right)):
                singles.append((left, right, NONE, ground, 0))
        self.scenes = Scenes(*torch.tensor(singles).T.contiguous())
        self.weights = self._weights()

    def _weights(self) -> Tensor:
        """How often each scene is shown: things alone and on white most, for that is what prompts ask for most."""
        count, extra = len(self.scenes), len(self.scenes) - self.singles
        weights = torch.ones(count)
        weights[: self.singles][self.scenes.background[: self.singles] == 0] = 4
        weights[self.singles :] = 0.25 * weights[: self.singles].sum() / max(extra, 1)
        return weights

    def caption(self, index: int, chance: random.Random) -> str:
        """One of the ways to ask for a scene; what is not told may be anything, but a background not told is white."""
        first, second, paint, ground, _ = (int(field[index]) for field in vars(self.scenes).values())
        return caption(self.concept_of, (first, second, paint, ground), chance)


def caption(concept_of: dict[int, tuple[Concept, str]], scene: tuple[int, int, int, int], chance: random.Random) -> str:
    """Words for a scene (first, second, paint, background): names or synonyms, with or without article and style."""
    first, second, paint, ground = scene

    def thing(row: int, colour: str = "") -> str:
        words = concept_of[row][0].words
        name = f"{colour} {chance.choice(words) if chance.random() < 0.3 else words[0]}".strip()
        if chance.random() < 0.2 or name.endswith("s"):
            return name
        return f"{'an' if name[0] in 'aeiou' and not name.startswith('uni') else 'a'} {name}"

    text = thing(first, list(PAINTS)[paint] if paint != NONE else "")
    if second != NONE:
        text += f" and {thing(second)}"
    details = []
    if chance.random() < 0.7:
        details.append(f"{concept_of[first][1]} style")
    if ground != 0 or chance.random() < 0.3:
        details.append(f"{GROUNDS[ground]} background")
    if chance.random() < 0.2:
        details.reverse()
    return ", ".join([text, *details])


def sheet(pictures: Tensor, columns: int) -> Image.Image:
    """Pictures (batch, 3, height, width) in [-1, 1] in rows on one page."""
    cells = ((pictures.cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    count, height, width, _ = cells.shape
    page = Image.new("RGB", (columns * (width + 2), -(-count // columns) * (height + 2)), (200, 200, 200))
    for index, cell in enumerate(cells):
        page.paste(Image.fromarray(cell), (index % columns * (width + 2), index // columns * (height + 2)))
    return page


if __name__ == "__main__":
    lessons = Lessons(drawings := Drawings.load(), concepts(drawings, 160))
    chosen = torch.multinomial(lessons.weights, 48, generator=torch.Generator().manual_seed(0))
    sheet(drawings.picture(lessons.scenes[chosen]), 12).save(sys.argv[1])
    for number, index in enumerate(chosen.tolist()):
        print(number, lessons.caption(index, random.Random(number)))
