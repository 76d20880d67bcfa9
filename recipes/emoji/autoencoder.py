"""Train the autoencoder: 64 × 64 pictures to 8 × 16 × 16 latents of mean zero and variance one.

    python recipes/emoji/autoencoder.py --minutes 60 [--device cuda]

The same command goes on after an interruption. Writes `build/vae` and prints the PSNR on drawings it has never seen.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from compose import BUILD, Drawings, any_scenes, sheet
from torch import Tensor
from training import Training

from suffuse import AutoencoderKL

LATENT_CHANNELS = 8


def network(channels: tuple[int, ...]) -> AutoencoderKL:
    """The untrained autoencoder: four pixels to a latent in each direction."""
    levels = len(channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=1.0,
        force_upcast=False,
        mid_block_add_attention=False,
    )


def crops(pictures: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A window of each picture at a random place that is a multiple of four pixels."""
    places = 4 * torch.randint((pictures.shape[-1] - size) // 4 + 1, (len(pictures), 2), generator=generator)
    windows = [picture[:, y : y + size, x : x + size] for picture, (y, x) in zip(pictures, places.tolist(), strict=True)]
    return torch.stack(windows)


def loss_of(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Squared and absolute error, and a little Kullback-Leibler divergence that keeps the latents tame."""
    posterior = vae.encode(pictures).latent_dist
    # A little noise in place of the posterior's: neighbouring latents shall mean neighbouring pictures.
    latents = posterior.mean + 0.03 * torch.randn_like(posterior.mean)
    error = vae.decode(latents).sample.float() - pictures
    tame = 1e-5 * (posterior.mean.float().square().mean() + 0.01 * posterior.logvar.float().square().mean())
    return 4 * error.square().mean() + 0.3 * error.abs().mean() + tame


def psnr(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Peak signal to noise of each reconstruction in dB, as pixels of 256 values have it; shape (batch,)."""
    with torch.no_grad():
        back = torch.cat([vae.decode(vae.encode(some).latent_dist.mode()).sample for some in pictures.split(32)])
    told, shown = (((some.clamp(-1, 1) + 1) * 127.5).round() for some in (pictures, back))
    return 10 * torch.log10(255**2 / (told - shown).square().mean((1, 2, 3)).clamp_min(1e-3))


def held_out(drawings: Drawings, count: int = 256) -> Tensor:
    """Pictures of concepts that were kept back, on all backgrounds."""
    return drawings.picture(any_scenes(drawings.rows("validation"), count, torch.Generator().manual_seed(1)))


@torch.no_grad()
def normalise(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Fold mean and deviation of the latents' channels into the two 1 × 1 convolutions: the scaling factor is then one."""
    means = torch.cat([vae.encode(some).latent_dist.mean for some in pictures.split(64)])
    shift, scale = means.mean((0, 2, 3)), means.std((0, 2, 3))
    into, out = vae.quant_conv, vae.post_quant_conv
    count = len(shift)
    out.bias += out.weight[:, :, 0, 0] @ shift
    out.weight *= scale[None, :, None, None]
    into.bias[:count] = (into.bias[:count] - shift) / scale
    into.weight[:count] /= scale[:, None, None, None]
    into.bias[count:] -= 2 * scale.log()


def train(folder: Path, minutes: float, batch: int, rate: float, channels: tuple[int, ...], device: str) -> None:
    """Train, or go on training, and write the autoencoder."""
    torch.manual_seed(0)
    drawings = Drawings.load(device=device)
    rows = drawings.rows("train")
    vae = network(channels).to(device)
    run = Training(vae, folder / "vae.pt", minutes=minutes, rate=rate)
    print(f"{sum(weight.numel() for weight in vae.parameters()) / 1e6:.2f} M parameters", flush=True)
    test = held_out(drawings)
    told = run.spent
    while run.goes_on:
        # Windows are cheaper; whole pictures at the end, because that is what the normalisations will see.
        whole = run.progress > 0.75
        pictures = drawings.picture(any_scenes(rows, batch // 4 if whole and device == "cpu" else batch, run.generator))
        pictures = pictures if whole else crops(pictures, 32, run.generator)
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(vae, pictures)
        run.step(loss)
        if run.spent - told > 180:
            told = run.spent
            print(f"{run.spent / 60:6.1f} min  {run.steps} steps  held out {psnr(run.mean, test[:64]).mean():.2f} dB", flush=True)
    vae = run.mean.to("cpu").eval()
    normalise(vae, Drawings.load().picture(any_scenes(rows, 512, torch.Generator().manual_seed(2))))
    vae.save_pretrained(folder / "vae")
    figures = psnr(vae, test.cpu())
    print(f"held out: {figures.mean():.2f} dB on average, {figures.median():.2f} median, {figures.min():.2f} worst")
    with torch.no_grad():
        back = vae.decode(vae.encode(test[:24].cpu()).latent_dist.mode()).sample
    sheet(torch.cat([test[:24].cpu(), back]), 12).save(folder / "vae.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=BUILD)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--channels", type=int, nargs=3, default=(16, 32, 64))
    parser.add_argument("--device", default="cpu")
    told = parser.parse_args()
    train(told.folder, told.minutes, told.batch, told.rate, tuple(told.channels), told.device)
