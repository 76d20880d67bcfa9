"""What a single file holds, told from the names and shapes of its tensors.

Sizes come from shapes. What shapes do not tell follows the kind of model, as it was published: Stable Diffusion 1 has 8 heads
everywhere, its successors heads of 64 channels; the autoencoder of SDXL has a scale of its own.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from suffuse.checkpoints.reading import Stored
from suffuse.conversion import latent_diffusion
from suffuse.errors import ConfigError, InputError, SuffuseError

Shapes = Mapping[str, Stored]
Config = dict[str, Any]

UNET, EMA, AUTOENCODER, CONTROLNET = "model.diffusion_model.", "model_ema.", "first_stage_model.", "control_model."
CLIP = (
    "cond_stage_model.transformer.text_model.",
    "cond_stage_model.transformer.",
    "conditioner.embedders.0.transformer.text_model.",
)
OPEN_CLIP = ("cond_stage_model.model.", "conditioner.embedders.1.model.", "conditioner.embedders.0.model.")

LEFT_OUT = re.compile(
    r"model_ema\.|betas$|alphas_|sqrt_|log_one_minus|posterior_|logvar$|lvlb_weights$|scale_factor$|global_step$|loss\.|denoiser\."
    r"|first_stage_model\.loss|depth_model\.|noise_augmentor\.|low_scale_model\.|embedder\.|cond_stage_model\.model\.visual"
    r"|.*(position_ids|logit_scale|attn_mask)$"
)
"""Tensors that only training needs, that are computed, or that belong to components which are given otherwise."""

SCHEDULER: Config = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One component of a single file.

    Args:
        kind: Its class.
        config: Its configuration.
        prefix: What stands before its tensors' names.
        modules: Module in the file, behind the prefix → module in the model.
    """

    kind: str
    config: Config
    prefix: str
    modules: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Architecture:
    """What a single file holds.

    Args:
        name: In words.
        parts: Component → how to make it.
        scheduler: The configuration of its noise schedule.
        tokenizers: Component → the token that fills its prompts up.
    """

    name: str
    parts: Mapping[str, Part]
    scheduler: Config
    tokenizers: Mapping[str, str] = field(default_factory=dict[str, str])


def recognise(
    tensors: Shapes,
    *,
    image_size: int | None = None,
    prediction_type: str | None = None,
    upcast_attention: bool | None = None,
    original: Mapping[str, Any] | None = None,
) -> Architecture:
    """The architecture of a file with these tensors.

    Args:
        tensors: Name → shape.
        image_size: What the model was trained on; told by the architecture, if None.
        prediction_type: "epsilon" or "v_prediction"; likewise.
        upcast_attention: Compute attention scores in float32; likewise.
        original: The original configuration (a parsed YAML file), which has the last word on heads and parameterization.

    Raises:
        ConfigError: It is none that is known.
    """
    try:
        return _recognise(tensors, image_size, prediction_type, upcast_attention, _stated(original))
    except SuffuseError:
        raise
    except (KeyError, IndexError, ValueError, StopIteration, ZeroDivisionError, TypeError) as error:
        raise ConfigError(
            "the tensors are not those of a whole model", found=f"{type(error).__name__}: {error}", remedy="fetch the file again"
        ) from error


def _recognise(
    tensors: Shapes, image_size: int | None, prediction_type: str | None, upcast_attention: bool | None, stated: Config
) -> Architecture:
    parts: dict[str, Part] = {}
    xl = any(name.startswith("conditioner.embedders.") for name in tensors)
    if any(name.startswith(UNET) for name in tensors):
        parts["unet"] = _unet(_behind(tensors, UNET), UNET, xl, stated)
    for prefix in (CONTROLNET, ""):
        if f"{prefix}input_hint_block.0.weight" in tensors:
            parts["controlnet"] = _controlnet(_behind(tensors, prefix), prefix, stated)
    for prefix in (AUTOENCODER, ""):
        if f"{prefix}decoder.conv_in.weight" in tensors and "controlnet" not in parts:
            parts["vae"] = _autoencoder(_behind(tensors, prefix), prefix, xl)
    encoders = [_clip(_behind(tensors, prefix), prefix) for prefix in CLIP if f"{prefix}final_layer_norm.weight" in tensors]
    encoders += [
        _open_clip(_behind(tensors, prefix), prefix, xl) for prefix in OPEN_CLIP if f"{prefix}ln_final.weight" in tensors
    ]
    if not parts:
        raise _unknown(tensors)
    refiner = xl and len(encoders) == 1
    for part in encoders:
        parts["text_encoder_2" if part.kind.endswith("Projection") else "text_encoder"] = part
    tokenizers = {name.replace("text_encoder", "tokenizer"): "!" if part.prefix in OPEN_CLIP else "<|endoftext|>"
                  for name, part in parts.items() if name.startswith("text_encoder")}  # fmt: skip
    width = parts["unet"].config["cross_attention_dim"] if "unet" in parts else None
    second = width == 1024 and not xl
    prediction = prediction_type or stated.get("prediction_type")
    if prediction is None:
        prediction = "v_prediction" if second and _in(parts) == 4 else "epsilon"
        if prediction == "v_prediction" and image_size is None:
            warnings.warn(
                "nothing in the file tells Stable Diffusion 2 (768 pixels, predicts v) from its base (512 pixels, predicts "
                'epsilon): the former is assumed; pass prediction_type="epsilon" for the latter, "v_prediction" for this',
                stacklevel=6,
            )
    name = _name(parts, xl, refiner, second)
    if "unet" in parts:
        size = image_size or (1024 if xl else 768 if prediction == "v_prediction" else 512)
        unet, vae = parts["unet"].config, parts.get("vae")
        unet["sample_size"] = size // 2 ** (len(vae.config["block_out_channels"]) - 1 if vae else 3)
        unet["upcast_attention"] = bool(upcast_attention)
        if vae is not None:
            vae.config["sample_size"] = size
    return Architecture(name, parts, SCHEDULER | {"prediction_type": prediction}, tokenizers)


def _in(parts: Mapping[str, Part]) -> int:
    return parts["unet"].config["in_channels"]


def _name(parts: Mapping[str, Part], xl: bool, refiner: bool, second: bool) -> str:
    if "unet" not in parts:
        return " and ".join(parts)
    family = (
        "Stable Diffusion XL refiner" if refiner else "Stable Diffusion XL" if xl else f"Stable Diffusion {2 if second else 1}"
    )
    task = {8: " for editing", 9: " for inpainting", 5: " with depth", 7: " for upscaling"}.get(_in(parts), "")
    return family + task


def _behind(tensors: Shapes, prefix: str) -> Shapes:
    return {name.removeprefix(prefix): stored for name, stored in tensors.items() if name.startswith(prefix)}


def _stated(original: Mapping[str, Any] | None) -> Config:
    """What an original configuration says of heads and of what is predicted."""
    if original is None:
        return {}
    try:
        model = original["model"]["params"]
        network = model.get("unet_config") or model.get("network_config") or model["control_stage_config"]
        values = dict(network["params"])
    except (KeyError, TypeError, AttributeError, ValueError):
        raise InputError(
            "the original configuration does not describe a model", found=original, expected="model.params.unet_config.params"
        ) from None
    parameterization = model.get("parameterization")
    return values | ({"prediction_type": "v_prediction" if parameterization == "v" else "epsilon"} if parameterization else {})


def _encoder_half(tensors: Shapes, stated: Config) -> Config:
    """The configuration that the way down, the middle and the embeddings of a UNet or a ControlNet show."""
    channels, depths, layers = [], [], []
    count = 0
    numbers = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("input_blocks.")} - {0})
    for number in numbers:
        stored = tensors.get(f"input_blocks.{number}.0.in_layers.2.weight")
        if stored is not None:
            if count == 0:
                channels.append(stored.shape[0])
                depths.append(_depth(tensors, f"input_blocks.{number}.1"))
            count += 1
        else:
            layers.append(count)
            count = 0
    layers.append(count)
    middle = _depth(tensors, "middle_block.1")
    first = next(n for n in tensors if n.endswith("attn2.to_k.weight"))
    linear = len(tensors[f"{first.split('.transformer_blocks')[0]}.proj_in.weight"].shape) == 2
    heads = stated.get("num_heads", -1)
    wide = stated.get("num_head_channels", 64 if linear else -1)
    depth = [depth or (middle if level == len(depths) - 1 else 1) for level, depth in enumerate(depths)]
    config: Config = {
        "in_channels": tensors["input_blocks.0.0.weight"].shape[1],
        "block_out_channels": channels,
        "layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "transformer_layers_per_block": depth[0] if len(set(depth)) == 1 else depth,
        "norm_num_groups": math.gcd(32, *channels),
        "cross_attention_dim": tensors[first].shape[1],
        "use_linear_projection": linear,
        "attention_head_dim": heads if heads > 0 else [max(c // wide, 1) for c in channels] if wide > 0 else 8,
    }
    return config


def _depth(tensors: Shapes, attention: str) -> int:
    numbers = (re.match(rf"{re.escape(attention)}\.transformer_blocks\.(\d+)\.", name) for name in tensors)
    return max((int(number[1]) + 1 for number in numbers if number), default=0)


def _embeddings(tensors: Shapes, xl: bool) -> Config:
    if "label_emb.weight" in tensors:
        return {"num_class_embeds": tensors["label_emb.weight"].shape[0]}
    if "label_emb.0.0.weight" not in tensors:
        return {}
    wide = {"projection_class_embeddings_input_dim": tensors["label_emb.0.0.weight"].shape[1]}
    return (
        {"addition_embed_type": "text_time", "addition_time_embed_dim": 256, **wide}
        if xl
        else {"class_embed_type": "projection", **wide}
    )


def _unet(tensors: Shapes, prefix: str, xl: bool, stated: Config) -> Part:
    config = _encoder_half(tensors, stated) | _embeddings(tensors, xl)
    config["out_channels"] = tensors["out.2.weight"].shape[0]
    config["up_block_types"] = [kind.replace("Down", "Up") for kind in reversed(config["down_block_types"])]
    return Part("UNet2DConditionModel", config, prefix, latent_diffusion.unet(config))


def _controlnet(tensors: Shapes, prefix: str, stated: Config) -> Part:
    config = _encoder_half(tensors, stated) | _embeddings(tensors, xl=True)
    hints = sorted(int(name.split(".")[1]) for name in tensors if re.fullmatch(r"input_hint_block\.\d+\.weight", name))
    widths = [tensors[f"input_hint_block.{number}.weight"].shape[0] for number in hints]
    config["conditioning_embedding_out_channels"] = [widths[0], *widths[2:-1:2]]
    return Part("ControlNetModel", config, prefix, latent_diffusion.controlnet(config))


def _autoencoder(tensors: Shapes, prefix: str, xl: bool) -> Part:
    levels = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.down."))
    layers = 1 + max(int(name.split(".")[4]) for name in tensors if name.startswith("encoder.down.0.block."))
    channels = [tensors[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
    config: Config = {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors["decoder.conv_out.weight"].shape[0],
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "block_out_channels": channels,
        "layers_per_block": layers,
        "norm_num_groups": math.gcd(32, *channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "scaling_factor": 0.13025 if xl else 0.18215,
    }
    return Part("AutoencoderKL", config, prefix, latent_diffusion.autoencoder(config))


def _clip(tensors: Shapes, prefix: str) -> Part:
    config = _text(
        tensors, "embeddings.token_embedding.weight", "embeddings.position_embedding.weight", "encoder.layers", "mlp.fc1"
    )
    return Part("CLIPTextModel", config | {"hidden_act": "quick_gelu", "projection_dim": config["hidden_size"]}, prefix)


def _open_clip(tensors: Shapes, prefix: str, xl: bool) -> Part:
    config = _text(tensors, "token_embedding.weight", "positional_embedding", "transformer.resblocks", "mlp.c_fc")
    # Stable Diffusion 2 was trained on the states before the last layer: there it is left out.
    config["num_hidden_layers"] -= not xl
    config |= {"hidden_act": "gelu", "projection_dim": tensors["text_projection"].shape[1] if xl else config["hidden_size"]}
    modules = latent_diffusion.open_clip(config["num_hidden_layers"])
    return Part("CLIPTextModelWithProjection" if xl else "CLIPTextModel", config, prefix, modules)


def _text(tensors: Shapes, tokens: str, positions: str, layers: str, wide: str) -> Config:
    vocabulary, hidden = tensors[tokens].shape
    if min(vocabulary, hidden) < 1:
        raise ConfigError("the text encoder has no tokens", found=f"{tokens}: {list(tensors[tokens].shape)}")
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": tensors[f"{layers}.0.{wide}.weight"].shape[0],
        "num_hidden_layers": 1
        + max(int(n.removeprefix(f"{layers}.").split(".")[0]) for n in tensors if n.startswith(f"{layers}.")),
        "num_attention_heads": max(hidden // 64, 1),
        "max_position_embeddings": tensors[positions].shape[0],
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 1,
    }


def _unknown(tensors: Shapes) -> ConfigError:
    names = list(tensors)
    if any("lora" in name for name in names):
        return ConfigError("this is a LoRA, not a model", found=names[:3], remedy="pipe.load_lora_weights(file)")
    if any(name.startswith(("down_blocks.", "time_embedding.")) for name in names):
        return ConfigError(
            "these are the weights of one model, by the names of diffusers", found=names[:3], remedy="from_pretrained its folder"
        )
    return ConfigError(
        "no architecture that is known has these tensors",
        found=names[:5],
        expected=f"names that begin with {UNET}, {AUTOENCODER}, {CONTROLNET}, or an autoencoder's encoder. and decoder.",
    )
