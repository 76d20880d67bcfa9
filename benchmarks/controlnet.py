"""Time of a denoising step with several ControlNets, peer and suffuse in turn in one process, with the same random weights.

    python benchmarks/controlnet.py [--nets 2] [--size 256] [--steps 4] [--repeats 7] [--guess] [--end 1.0]

`--full` has the shape of Stable Diffusion 1.5; without it the models have a quarter of its channels.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import diffusers
import torch

import suffuse


def pipelines(options: argparse.Namespace):
    shape = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": options.size // 8}
    if not options.full:
        shape |= {"block_out_channels": (80, 160, 320, 320), "norm_num_groups": 16}
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**shape)
    nets = [diffusers.ControlNetModel.from_unet(unet) for _ in range(options.nets)]
    for net in nets:
        for name, parameter in net.named_parameters():
            if name.startswith("controlnet"):
                torch.nn.init.normal_(parameter, std=0.05)
    rest = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    for library in (diffusers, suffuse):
        models = []
        for model in (unet, *nets):
            made = getattr(library, type(model).__name__).from_config(model.config)
            made.load_state_dict(model.state_dict())
            models.append(made.eval())
        vae = library.AutoencoderKL(
            block_out_channels=(8,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=8,
        )
        scheduler = library.DDIMScheduler(clip_sample=False, steps_offset=1)
        parts = {"vae": vae, "unet": models[0], "controlnet": models[1:], "scheduler": scheduler}
        pipe = library.StableDiffusionControlNetPipeline(**parts, **rest, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        yield pipe.to(options.device, getattr(torch, options.dtype))


def seconds(pipe, options: argparse.Namespace) -> tuple[float, torch.Tensor]:
    dtype = getattr(torch, options.dtype)
    embeds = torch.randn(2, 1, 77, 768, generator=torch.Generator().manual_seed(1)).to(options.device, dtype)
    pictures = [torch.rand(1, 3, options.size, options.size, generator=torch.Generator().manual_seed(2))] * options.nets
    began = time.perf_counter()
    latents = pipe(
        prompt_embeds=embeds[0],
        negative_prompt_embeds=embeds[1],
        image=pictures,
        num_inference_steps=options.steps,
        guess_mode=options.guess,
        control_guidance_end=options.end,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images
    if options.device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / options.steps, latents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", type=int, default=2)
    parser.add_argument("--size", type=int, default=256, help="height and width of the pictures")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--guess", action="store_true", help="in guess mode")
    parser.add_argument("--end", type=float, default=1.0, help="the part of the way after which the nets no longer act")
    parser.add_argument("--full", action="store_true", help="as large as Stable Diffusion 1.5")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    diffusers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    pipes = dict(zip(("peer", "suffuse"), pipelines(options), strict=True))
    results = {name: seconds(pipe, options)[1] for name, pipe in pipes.items()}
    times: dict[str, list[float]] = {name: [] for name in pipes}
    for index in range(options.repeats):
        for name in sorted(pipes, reverse=index % 2 == 1):  # who is first alternates
            times[name].append(seconds(pipes[name], options)[0])
    for name, values in times.items():
        print(f"{name:8} {statistics.median(values) * 1e3:10.2f} ms a step, the best {min(values) * 1e3:.2f} ms")
    ratio = statistics.median(ours / theirs for ours, theirs in zip(times["suffuse"], times["peer"], strict=True))
    print(f"ratio    {ratio:10.4f}  (median of {options.repeats} pairs; below 1 suffuse is faster)")
    print(f"largest difference {(results['peer'] - results['suffuse']).abs().max().item()}")


if __name__ == "__main__":
    main()
