"""The vocabulary of CLIP, which every Stable Diffusion reads prompts with: 48,894 merges of byte pairs.

They are those of OpenAI's CLIP (MIT License, Copyright (c) 2021 OpenAI), as the package open_clip_torch 3.3.0 carries them; so a
single file, which holds no tokenizer, is loaded without a network.
"""

from __future__ import annotations

import lzma
from functools import cache
from pathlib import Path
from typing import Any, cast

FILE = Path(__file__).parent / "clip_merges.txt.xz"
START, END = "<|startoftext|>", "<|endoftext|>"


@cache
def merges() -> list[tuple[str, str]]:
    """Pairs of symbols, in the order they are joined."""
    lines = lzma.decompress(FILE.read_bytes()).decode().splitlines()
    return [(first, second) for first, second in (line.split(" ") for line in lines)]


def vocabulary() -> dict[str, int]:
    """Token → number: the bytes, the bytes at the end of a word, what each merge makes, and the two marks."""
    letters = [*_letters().values()]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges()), START, END]
    return {token: number for number, token in enumerate(tokens)}


def clip_tokenizer(padding: str = END) -> Any:
    """A `CLIPTokenizer` of 49,408 tokens, for prompts of 77.

    Args:
        padding: The token that fills prompts up: OpenCLIP's models, of Stable Diffusion 2 and XL, were trained with "!".
    """
    from transformers import CLIPTokenizer

    return CLIPTokenizer(
        vocab=vocabulary(),
        merges=cast(Any, merges()),
        model_max_length=77,
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=padding,
    )


def _letters() -> dict[int, str]:
    """Byte → a letter that can be seen: itself where it can, the letters from 256 on elsewhere (Radford et al., 2019, GPT-2)."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {byte: chr(256 + number) for number, byte in enumerate(unseen)}
