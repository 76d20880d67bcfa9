"""Train the UNet on the latents of scenes and the states of their captions.

    python recipes/emoji/diffusion.py --minutes 600 [--concepts 160] [--device cuda]
    torchrun --nproc-per-node 2 recipes/emoji/diffusion.py …          the same with two processes: each its own batches
    python recipes/emoji/diffusion.py --overfit 27 --minutes 10

The same command goes on after an interruption; needs `build/vae`, `build/text_encoder` and `build/tokenizer`. Now and then,
and at the end, `build/unet.png` shows what it can. The second command is the gate before a long run: 27 pictures, one seed,
another noun must give another picture; it fails unless nearly all do.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from compose import BUILD, NONE, STYLES, Drawings, Lessons, concepts, sheet
from torch import Tensor
from training import Training
from transformers import CLIPTextModel, CLIPTokenizer

from suffuse import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

PROMPTS = (
    "a cat",
    "a dog, flat style",
    "a red apple, 3d style",
    "a rocket, blue background",
    "a house, retro style",
    "a smiling cat, 3d style, blue background",
    "a penguin, cartoon style",
    "a pizza, yellow background",
    "a blue cat",
    "a green robot",
    "a cat and a rocket",
    "a puppy, pink background",
)


def network(channels: tuple[int, ...], width: int) -> UNet2DConditionModel:
    """The untrained UNet: 16 × 16 latents, words are looked up at 8 × 8 and 4 × 4."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=channels,
        layers_per_block=1,
        cross_attention_dim=width,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def scheduler() -> DDIMScheduler:
    """Velocities, and no signal at all at the last timestep: plain backgrounds need that (Lin et al., 2024)."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )


class Parts:
    """What is finished before the diffusion model is trained: autoencoder and text encoder, frozen."""

    def __init__(self, folder: Path, device: str):
        self.device = device
        self.vae = AutoencoderKL.from_pretrained(str(folder / "vae")).to(device).eval().requires_grad_(False)
        self.text_encoder = CLIPTextModel.from_pretrained(str(folder / "text_encoder")).to(device).eval().requires_grad_(False)
        self.tokenizer = CLIPTokenizer.from_pretrained(str(folder / "tokenizer"))
        self._read: dict[str, Tensor] = {}

    @torch.no_grad()
    def states(self, captions: list[str]) -> Tensor:
        """What the UNet is told: (batch, tokens, width). Captions come again and again, and are read once."""
        if len(self._read) > 10_000:
            self._read.clear()
        if new := sorted({*captions} - self._read.keys()):
            numbers = self.tokenizer(new, padding="max_length", truncation=True, return_tensors="pt").input_ids
            read = self.text_encoder(numbers.to(self.device)).last_hidden_state.half()
            self._read |= dict(zip(new, read, strict=True))
        return torch.stack([self._read[caption] for caption in captions]).float()

    @torch.no_grad()
    def latents(self, lessons: Lessons) -> Tensor:
        """Of all scenes, in half precision: (scenes, 8, 16, 16)."""
        parts = torch.arange(len(lessons.scenes)).split(256)
        pictures = (lessons.drawings.picture(lessons.scenes[some]) for some in parts)
        return torch.cat([self.vae.encode(some.to(self.device)).latent_dist.mode().half() for some in pictures])

    def pipeline(self, unet: UNet2DConditionModel) -> StableDiffusionPipeline:
        """All of it."""
        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=unet,
            scheduler=scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def draw(pipeline: StableDiffusionPipeline, prompts: list[str], seed: int | None = None, **options: object) -> Tensor:
    """Pictures (prompts, 3, 64, 64) in [-1, 1]: each prompt with its own seed, or all with one."""
    pipeline.set_progress_bar_config(disable=True)
    seeds = range(len(prompts)) if seed is None else [seed] * len(prompts)
    pictures = []
    for begin in range(0, len(prompts), 16):
        generators = [torch.Generator().manual_seed(number) for number in seeds[begin : begin + 16]]
        settings = {"num_inference_steps": 25, "guidance_scale": 3.0, "output_type": "pt", **options}
        pictures.append(pipeline(prompts[begin : begin + 16], generator=generators, **settings).images)
    return torch.cat(pictures).float().cpu() * 2 - 1


def loss_of(
    unet: UNet2DConditionModel, noises: DDIMScheduler, latents: Tensor, states: Tensor, generator: torch.Generator
) -> Tensor:
    """Squared error of the velocity; less weight where there is hardly any noise (Hang et al., 2023, for velocities)."""
    count = len(latents)
    timesteps = torch.randint(1000, (count,), generator=generator).to(latents.device)
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    noisy = noises.add_noise(latents, noise, timesteps)
    target = noises.get_velocity(latents, noise, timesteps)
    error = (unet(noisy, timesteps, states).sample.float() - target).square().mean((1, 2, 3))
    kept = noises.alphas_cumprod.to(latents.device)[timesteps]
    ratio = kept / (1 - kept)
    return (error * (5 / ratio.clamp_min(5))).mean()


def train(run: Training, parts: Parts, lessons: Lessons, batch: int, pictures: Path) -> UNet2DConditionModel:
    """Train, or go on training; returns the mean of the weights."""
    device = parts.device
    noises = scheduler()
    latents = parts.latents(lessons) if run.goes_on else None
    empty = parts.states([""])
    told = run.spent
    parameters = sum(weight.numel() for weight in run.module.parameters()) / 1e6
    print(f"{parameters:.2f} M parameters, {len(lessons.scenes)} scenes of {len(lessons.known)} concepts", flush=True)
    while run.goes_on:
        chosen = torch.multinomial(lessons.weights, batch, replacement=True, generator=run.generator)
        chance = random.Random(int(torch.randint(2**40, (), generator=run.generator)))
        states = parts.states([lessons.caption(index, chance) for index in chosen.tolist()])
        silent = (torch.rand(batch, generator=run.generator) < 0.1).to(device)
        states = torch.where(silent[:, None, None], empty, states)
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(run.module, noises, latents[chosen.to(device)].float(), states, run.generator)
        run.step(loss)
        if run.leads and run.spent - told > 900:
            told = run.spent
            sheet(draw(parts.pipeline(run.mean), list(PROMPTS)), 12).save(pictures)
    if run.leads:
        sheet(draw(parts.pipeline(run.mean), list(PROMPTS)), 12).save(pictures)
    return run.mean


def gate(unet: UNet2DConditionModel, parts: Parts, lessons: Lessons, pictures: Path) -> float:
    """Share of prompts with one seed whose picture is nearest to the drawing that it names."""
    shown = lessons.scenes[torch.arange(len(lessons.scenes))]
    told = lessons.drawings.picture(shown)
    prompts = [f"a {concept.words[0]}, {STYLES[0]} style, white background" for concept in lessons.known]
    drawn = draw(parts.pipeline(unet), prompts, seed=0)
    sheet(drawn, 9).save(pictures)
    with torch.no_grad():
        found, sought = (parts.vae.encode(some.to(parts.device)).latent_dist.mode().flatten(1) for some in (told, drawn))
    nearest = torch.cdist(sought, found).argmin(1).cpu()
    return float((nearest == torch.arange(len(prompts))).float().mean())


def overfitted(lessons: Lessons) -> Lessons:
    """Only the first style of each concept, on white."""
    rows = torch.tensor([concept.rows[0] for concept in lessons.known])
    none = torch.full_like(rows, NONE)
    lessons.scenes = type(lessons.scenes)(rows, none, none, torch.zeros_like(rows), torch.zeros_like(rows))
    lessons.weights = torch.ones(len(rows))
    return lessons


def main(told: argparse.Namespace) -> None:
    """Train the long run, or pass the gate."""
    torch.manual_seed(0)
    parts, drawings = Parts(told.folder, told.device), Drawings.load(device=told.device)
    unet = network(tuple(told.channels), parts.text_encoder.config.hidden_size).to(told.device)
    settings = {"minutes": told.minutes, "rate": told.rate, "decay": 0.9995}
    if told.overfit:
        lessons = overfitted(Lessons(drawings, concepts(drawings, told.overfit), pairs=0, repaints=0))
        run = Training(unet, told.folder / "gate.pt", **{**settings, "decay": 0.995})
        share = gate(
            train(run, parts, lessons, told.batch, told.folder / "unet-gate.png"), parts, lessons, told.folder / "gate.png"
        )
        run.path.unlink()
        print(f"gate: {share:.0%} of one seed's pictures are nearest to what their noun names")
        if share < 0.9:
            raise SystemExit("the gate is not passed: do not start the long run")
        return
    lessons = Lessons(drawings, concepts(drawings, told.concepts))
    run = Training(unet, told.folder / "unet.pt", **settings)
    unet = train(run, parts, lessons, told.batch, told.folder / "unet.png")
    if run.leads:
        unet.to("cpu").save_pretrained(told.folder / "unet")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=BUILD)
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--concepts", type=int, default=160)
    parser.add_argument("--overfit", type=int, default=0, metavar="COUNT")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=8e-4)
    parser.add_argument("--channels", type=int, nargs=3, default=(64, 128, 192))
    parser.add_argument("--device", default="cpu")
    main(parser.parse_args())
