"""Keep the drawings that the evaluation looks at, so that it runs without the downloads.

    python recipes/emoji/keep.py [--concepts 100]

Writes `taught/`: those of the concepts that the diffusion model is taught, and those that the autoencoder never saw, in the order
of `build/`, so that the evaluation chooses the same and says the same.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
from compose import BUILD, KEPT, Drawings, concepts


def keep(count: int) -> None:
    """Write the folder."""
    drawings = Drawings.load(BUILD)
    taught = {row for concept in concepts(drawings, count) for row in concept.rows}
    rows = sorted(taught | {row for row, told in enumerate(drawings.told) if told["split"] == "validation"})
    KEPT.mkdir(exist_ok=True)
    np.savez_compressed(KEPT / "pictures-64.npz", pictures=drawings.pixels[rows].permute(0, 2, 3, 1).numpy())
    told = [{name: drawings.told[row][name] for name in ("name", "style", "split", "held_out")} for row in rows]
    (KEPT / "pictures.json").write_text(json.dumps(told, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{KEPT}: {len(rows)} drawings, {(KEPT / 'pictures-64.npz').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", type=int, default=100)
    keep(parser.parse_args().concepts)
