"""Tiny real checkpoints, made with the peer's classes: every component real, random and small."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    DPTConfig,
    DPTForDepthEstimation,
    DPTImageProcessorPil,
)

WIDTH = 32
LETTERS = [*"abcdefghijklmnopqrstuvwxyz0123456789,.!?'-"]


def unet(in_channels: int = 4, **options) -> diffusers.UNet2DConditionModel:
    torch.manual_seed(in_channels)
    return diffusers.UNet2DConditionModel(
        **{
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "sample_size": 32,
            "in_channels": in_channels,
            "out_channels": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": WIDTH,
            "attention_head_dim": 8,
            **options,
        }
    ).eval()


def controlnet(seed: int = 16, **options) -> diffusers.ControlNetModel:
    made = diffusers.ControlNetModel.from_unet(unet(**options), conditioning_embedding_out_channels=(8, 16)).eval()
    torch.manual_seed(seed)
    for name, parameter in made.named_parameters():
        if not parameter.any() and name.startswith("controlnet"):
            torch.nn.init.normal_(parameter, std=0.3)
    return made


def vae() -> diffusers.AutoencoderKL:
    torch.manual_seed(11)
    return diffusers.AutoencoderKL(
        block_out_channels=[32, 64],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
    ).eval()


def asymmetric_vae() -> diffusers.AsymmetricAutoencoderKL:
    torch.manual_seed(12)
    return diffusers.AsymmetricAutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        down_block_out_channels=[32, 64],
        up_block_types=["UpDecoderBlock2D"] * 2,
        up_block_out_channels=[32, 64],
        layers_per_up_block=1,
        latent_channels=4,
    ).eval()


def text_encoder() -> CLIPTextModel:
    torch.manual_seed(13)
    config = CLIPTextConfig(
        hidden_size=WIDTH,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=3,
        vocab_size=len(vocabulary()),
        bos_token_id=len(vocabulary()) - 2,
        eos_token_id=len(vocabulary()) - 1,
        pad_token_id=len(vocabulary()) - 1,
    )
    return CLIPTextModel(config).eval()


def vocabulary() -> list[str]:
    return [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]


def tokenizer(folder: Path) -> CLIPTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary())}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        vocab=json.loads((folder / "vocab.json").read_text()), merges=[], model_max_length=77, unk_token="<|endoftext|>"
    )


def scheduler(**options) -> diffusers.DDIMScheduler:
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    return diffusers.DDIMScheduler(**{**settings, "set_alpha_to_one": False, "steps_offset": 1, **options})


def safety_checker():
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    torch.manual_seed(14)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    config = CLIPConfig(vision_config=vision.to_dict(), text_config=CLIPTextConfig(hidden_size=32).to_dict(), projection_dim=32)
    checker = StableDiffusionSafetyChecker(config).eval()
    checker.concept_embeds.data = torch.randn(17, 32)
    checker.special_care_embeds.data = torch.randn(3, 32)
    return checker


def image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def depth_estimator() -> DPTForDepthEstimation:
    torch.manual_seed(15)
    config = DPTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=37,
        image_size=32,
        patch_size=16,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16, 16, 32, 32],
        reassemble_factors=[4, 2, 1, 0.5],
        fusion_hidden_size=16,
        is_hybrid=False,
    )
    return DPTForDepthEstimation(config).eval()


def depth_processor() -> DPTImageProcessorPil:
    return DPTImageProcessorPil(size={"height": 32, "width": 32})


def stable_diffusion(folder: Path) -> dict:
    """Components of a text-to-image pipeline."""
    return {
        "vae": vae(),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(folder),
        "unet": unet(),
        "scheduler": scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
    }


def text_encoder_2() -> CLIPTextModelWithProjection:
    torch.manual_seed(17)
    config = CLIPTextConfig(**{**text_encoder().config.to_dict(), "hidden_act": "gelu", "projection_dim": WIDTH})
    return CLIPTextModelWithProjection(config).eval()


def xl_options(refiner: bool = False) -> dict:
    """What the UNet of a Stable Diffusion XL is told."""
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": WIDTH + 8 * (5 if refiner else 6),
        "cross_attention_dim": WIDTH * (1 if refiner else 2),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
    }


def stable_diffusion_xl(folder: Path, refiner: bool = False, channels: int = 4) -> dict:
    """Components of a Stable Diffusion XL pipeline; a refiner has one text encoder, and is told how much people like pictures."""
    return {
        "vae": vae(),
        "text_encoder": None if refiner else text_encoder(),
        "text_encoder_2": text_encoder_2(),
        "tokenizer": None if refiner else tokenizer(folder),
        "tokenizer_2": tokenizer(folder.with_name("tokenizer_2")),
        "unet": unet(channels, **xl_options(refiner)),
        "scheduler": scheduler(),
    }


def unconditional_unet(**options) -> diffusers.UNet2DModel:
    torch.manual_seed(18)
    return diffusers.UNet2DModel(
        **{
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "sample_size": 32,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            **options,
        }
    ).eval()


def vq_model(**options) -> diffusers.VQModel:
    torch.manual_seed(19)
    return diffusers.VQModel(
        **{
            "block_out_channels": [32, 64],
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
            "num_vq_embeddings": 32,
            **options,
        }
    ).eval()


DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "num_layers": 2,
    "sample_size": 16,
    "patch_size": 2,
    "norm_type": "ada_norm_zero",
    "num_embeds_ada_norm": 1000,
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}
"""A transformer over patches, by either of its names."""


def transformer(**options) -> diffusers.DiTTransformer2DModel:
    torch.manual_seed(20)
    return diffusers.DiTTransformer2DModel(**DIT | options).eval()


def bert():
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    torch.manual_seed(21)
    sizes = {"encoder_layers": 2, "encoder_ffn_dim": 64, "encoder_attention_heads": 4, "head_dim": 6, "d_model": WIDTH}
    return LDMBertModel(LDMBertConfig(vocab_size=100, **sizes)).eval()


def bert_tokenizer(folder: Path):
    from transformers import BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *("##" + letter for letter in LETTERS)]
    (folder / "vocab.txt").write_text("\n".join(tokens))
    return BertTokenizer(str(folder / "vocab.txt"))


def controlnet_xs(unet: diffusers.UNet2DConditionModel, **options) -> diffusers.ControlNetXSAdapter:
    """A control side that adds something."""
    torch.manual_seed(23)
    sizes = {"block_out_channels": [8, 16], "num_attention_heads": [2, 4], "conditioning_embedding_out_channels": (8, 16)}
    made = diffusers.ControlNetXSAdapter.from_unet(unet, **sizes | options).eval()
    for parameter in made.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return made
