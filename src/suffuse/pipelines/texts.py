"""Branches of guidance that are told texts of their own, besides the prompts and what they should not show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from suffuse.diffusion.conditioning import Conditioning
from suffuse.errors import InputError
from suffuse.pipelines.arguments import check_shape


def tell_texts(pipe: Any, conditioning: Conditioning) -> Conditioning:
    """Tell branches of the run of a pipeline what its guidance says, beside those that are told the prompts.

    Raises:
        InputError: The pipeline has no text encoder, a branch is told neither one text nor one for each prompt, or an embedding
            is none of this pipeline.
    """
    texts, batch = pipe._run.guidance.texts, conditioning.batch
    if not texts:
        return conditioning
    words = {branch: [text] if isinstance(text, str) else text for branch, text in texts.items() if isinstance(text, (str, list))}
    prompts = batch // pipe._run.arguments["num_images_per_prompt"]
    for branch, said in words.items():
        if len(said) not in (1, prompts):
            raise InputError(f"guidance: {branch} is told {len(said)} texts", expected=f"one, or {prompts}, one for each prompt")
    told = {branch: {"prompt_embeds": text[None]} for branch, text in texts.items() if isinstance(text, Tensor)}
    told |= _read(pipe, words, conditioning.tensors["prompt_embeds"].shape[1]) if words else {}
    for branch, states in told.items():
        for name in pipe._told_by_text:
            if name not in states:
                raise InputError(f"guidance: {branch} is told an embedding, and this pipeline needs more", remedy="pass the text")
            rows, prompt = states[name], conditioning.tensors[name]
            check_shape(f"what {branch} is told", rows, (len(rows), *prompt.shape[1:]))
            states[name] = rows.repeat_interleave(batch // len(rows), dim=0).to(prompt)
    conditioning.further |= told
    return conditioning


def _read(pipe: Any, words: Mapping[str, list[str]], length: int) -> dict[str, dict[str, Tensor]]:
    """Branch → name → what the UNet is told of its texts; all are read at once."""
    read = pipe.read_texts([text for said in words.values() for text in said], length)
    counts = [len(said) for said in words.values()]
    parts = zip(*(read[name].split(counts) for name in pipe._told_by_text), strict=True)
    return {branch: dict(zip(pipe._told_by_text, part, strict=True)) for branch, part in zip(words, parts, strict=True)}
