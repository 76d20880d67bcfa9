"""Write the trained parts as one Stable Diffusion folder in half precision, and draw with it in both libraries.

    python recipes/emoji/export.py FOLDER

Takes `build/unet` if the training is finished, else the mean of the weights in the last checkpoint. The same weights give the
same bytes. Fails if suffuse or diffusers (where installed) cannot draw with what was written, or if it is too large.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import shutil
from pathlib import Path

import torch
from compose import BUILD, HERE
from diffusion import Parts, network

from suffuse import AutoencoderKL, UNet2DConditionModel

LARGEST = 40_000_000


def trained_unet(folder: Path, width: int) -> UNet2DConditionModel:
    """The UNet with the mean of the weights."""
    if (folder / "unet").exists():
        return UNet2DConditionModel.from_pretrained(str(folder / "unet"))
    weights = torch.load(folder / "unet.pt", map_location="cpu", weights_only=True)["mean"]
    channels = tuple(weights[f"down_blocks.{level}.resnets.0.conv2.weight"].shape[0] for level in range(3))
    unet = network(channels, width)
    unet.load_state_dict(weights)
    return unet.eval()


def draws(library: str, target: Path) -> bool:
    """Whether a library loads the folder and draws a picture that is not one colour."""
    if importlib.util.find_spec(library) is None:
        return True
    pipeline = importlib.import_module(library).DiffusionPipeline.from_pretrained(str(target), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(
        "a red apple", num_inference_steps=10, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images[0]
    return picture.shape == (64, 64, 3) and float(picture.std()) > 0.01


@torch.no_grad()
def without_doubt(vae: AutoencoderKL) -> AutoencoderKL:
    """The autoencoder with a posterior that is its mean.

    It was trained on means, and what it says of their variance is far too much: pictures to be redrawn or painted, which are
    sampled, would come back with 22 dB instead of 32.
    """
    count = vae.config["latent_channels"]
    vae.quant_conv.weight[count:] = 0
    vae.quant_conv.bias[count:] = -30
    return vae


def export(folder: Path, target: Path) -> None:
    """Write the folder and check it."""
    parts = Parts(folder, "cpu")
    pipeline = parts.pipeline(trained_unet(folder, parts.text_encoder.config.hidden_size))
    for part in (pipeline.unet, without_doubt(pipeline.vae), pipeline.text_encoder):
        part.half()
    pipeline.save_pretrained(str(target))
    shutil.copy(HERE / "ATTRIBUTION.md", target)
    shutil.copy(HERE / "CARD.md", target / "README.md")
    weights = sum(file.stat().st_size for file in target.rglob("*.safetensors"))
    print(f"{target}: {weights / 1e6:.1f} MB of weights")
    failed = [library for library in ("suffuse", "diffusers") if not draws(library, target)]
    if failed or weights > LARGEST:
        raise SystemExit(f"not fit to be shipped: {weights} bytes of weights (at most {LARGEST}), no picture in {failed}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--folder", type=Path, default=BUILD)
    told = parser.parse_args()
    export(told.folder, told.target)
