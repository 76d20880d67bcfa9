"""Branches of guidance that are told texts of their own, besides the prompts and what they should not show."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from suffuse.diffusion.conditioning import Conditioning
from suffuse.diffusion.prompts import encode_text
from suffuse.errors import InputError
from suffuse.layers.low_rank import scaled
from suffuse.pipelines.arguments import check_shape


def read_concepts(pipe: Any, texts: list[str], conditioning: Conditioning) -> Tensor:
    """Texts as the text encoder of a pipeline reads them, (texts, tokens, width), as long as the prompts of a run.

    Raises:
        InputError: The pipeline has no text encoder.
    """
    if pipe.text_encoder is None or pipe.tokenizer is None:
        raise InputError(
            "this pipeline has no text encoder to read concepts with", remedy="load it with its text_encoder and tokenizer"
        )
    length = conditioning.tensors["prompt_embeds"].shape[1]
    with scaled(pipe.lora_scale):
        return encode_text(
            pipe.maybe_convert_prompt(texts, pipe.tokenizer),
            pipe.tokenizer,
            pipe.text_encoder,
            pipe._execution_device,
            length=length,
        )


def tell_concepts(name: str, states: Tensor, conditioning: Conditioning) -> Conditioning:
    """Tell the last branches what they are told, after the first two: states (branches · batch, tokens, width).

    Raises:
        InputError: They are not as long, or not as wide, as the prompts.
    """
    told = conditioning.tensors["prompt_embeds"]
    check_shape(name, states, (len(states), *told.shape[1:]))
    conditioning.tensors["prompt_embeds"] = torch.cat([told, states.to(told)])
    return conditioning
