"""Write a small Stable Diffusion checkpoint with random weights, to try the whole way from a folder to a picture offline.

    python examples/random_checkpoint.py FOLDER [--channels 9] [--depth]

It draws noise, and everything else is real: the files, the classes, the speed of a small model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
import transformers

import suffuse

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.!?'-"


def text_parts(width: int) -> dict:
    """A text encoder and a tokenizer that spells."""
    words = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=77, unk_token="<|endoftext|>")
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    return {"tokenizer": tokenizer, "text_encoder": transformers.CLIPTextModel(config)}


def depth_parts() -> dict:
    """A depth estimator and the processor of its pictures."""
    config = transformers.DPTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=64,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16, 16, 32, 32],
        fusion_hidden_size=16,
        is_hybrid=False,
    )
    processor = transformers.DPTImageProcessorPil(size={"height": 64, "width": 64})
    return {"depth_estimator": transformers.DPTForDepthEstimation(config), "feature_extractor": processor}


def make(folder: Path, channels: int = 4, depth: bool = False) -> None:
    """Write the checkpoint into `folder`."""
    torch.manual_seed(0)
    parts = {
        "unet": suffuse.UNet2DConditionModel(
            sample_size=16,
            in_channels=5 if depth else channels,
            block_out_channels=(32, 64),
            layers_per_block=1,
            cross_attention_dim=32,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        "vae": suffuse.AutoencoderKL(
            block_out_channels=(16, 16, 32, 32),
            norm_num_groups=16,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        "scheduler": suffuse.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        **text_parts(32),
    }
    if depth:
        pipe = suffuse.StableDiffusionDepth2ImgPipeline(**parts, **depth_parts())
    else:
        kind = suffuse.StableDiffusionPipeline if channels == 4 else suffuse.StableDiffusionInpaintPipeline
        pipe = kind(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--channels", type=int, default=4, choices=(4, 9), help="9: an inpainting model")
    parser.add_argument("--depth", action="store_true", help="a depth-to-image model")
    arguments = parser.parse_args()
    make(arguments.folder, arguments.channels, arguments.depth)
    print(f"wrote {arguments.folder}")
