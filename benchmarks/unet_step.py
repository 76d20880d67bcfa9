"""One step of a UNet shaped as Stable Diffusion 1.5, with random weights: the peer and suffuse in turn, in one process.

python benchmarks/unet_step.py --dtype float32 --size 32 --repeats 5
"""

from __future__ import annotations

import argparse
import statistics
import time

import diffusers
import torch

import suffuse

CONFIG = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--size", type=int, default=64, help="height and width of the latents")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)

    torch.manual_seed(0)
    peer = diffusers.UNet2DConditionModel(**CONFIG).to(options.device, dtype).eval()
    with torch.device("meta"):
        ours = suffuse.UNet2DConditionModel(**CONFIG).eval()
    ours.load_state_dict(peer.state_dict(), assign=True)
    sample = torch.randn(options.batch, 4, options.size, options.size, device=options.device, dtype=dtype)
    context = torch.randn(options.batch, 77, 768, device=options.device, dtype=dtype)

    def seconds(model: torch.nn.Module) -> tuple[float, torch.Tensor]:
        start = time.perf_counter()
        with torch.inference_mode():
            output = model(sample, 501, context, return_dict=False)[0]
        if options.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start, output

    times: dict[str, list[float]] = {"peer": [], "suffuse": []}
    outputs = {"peer": seconds(peer)[1], "suffuse": seconds(ours)[1]}
    for _ in range(options.repeats):
        times["peer"].append(seconds(peer)[0])
        times["suffuse"].append(seconds(ours)[0])
    for name, values in times.items():
        print(f"{name:8} {statistics.median(values) * 1e3:10.2f} ms")
    ratio = statistics.median(ours / theirs for ours, theirs in zip(times["suffuse"], times["peer"], strict=True))
    print(f"ratio    {ratio:10.4f}  (median of {options.repeats} pairs; below 1 suffuse is faster)")
    print(f"largest difference {(outputs['peer'] - outputs['suffuse']).abs().max().item()}")


if __name__ == "__main__":
    main()
