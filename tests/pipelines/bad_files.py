"""The named bad checkpoints: what is done to a good folder, and what loading it must say.

Each row takes a copy of the tiny Stable Diffusion folder and damages it. A row that expects no error expects the same picture.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from suffuse.errors import (
    AmbiguousCheckpointError,
    ConfigError,
    CorruptFileError,
    LimitError,
    MissingFileError,
    NonFiniteError,
    PathEscapeError,
    SuffuseError,
    UnsafePickleError,
    UntrustedCodeError,
    WeightsMismatchError,
)

UNET, VAE, TEXT = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)
FIRST = "conv_in.weight"
MARK = Path(gettempdir(), "suffuse-was-tricked")


@dataclass(frozen=True)
class Row:
    """What is done to the folder, the error that loading must raise (None: it warns, or says nothing), and what it must say."""

    damage: Callable[[Path], Any]
    error: type[SuffuseError] | None
    says: str = ""
    options: dict[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------- damage to bytes


def content(file: str, data: bytes | Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    """Other bytes for a file."""

    def damage(folder: Path) -> None:
        path = folder / file
        path.write_bytes(data(path.read_bytes()) if callable(data) else data)

    return damage


def header(change: Callable[[dict[str, Any]], Any], file: str = UNET) -> Callable[[Path], Any]:
    """Another header for a safetensors file: changed in place, or what `change` returns, as an object or as bytes."""

    def damage(data: bytes) -> bytes:
        length = struct.unpack("<Q", data[:8])[0]
        entries = json.loads(data[8 : 8 + length])
        changed = change(entries)
        text = changed if isinstance(changed, bytes) else json.dumps(entries if changed is None else changed).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return content(file, damage)


def announced(length: int) -> Callable[[Path], Any]:
    """A header that says it is so long."""
    return content(UNET, lambda data: struct.pack("<Q", length) + data[8:])


def tensors(change: Callable[[dict[str, torch.Tensor]], Any], file: str = UNET) -> Callable[[Path], Any]:
    """Other tensors in a safetensors file: changed in place, or those that `change` returns."""

    def damage(folder: Path) -> None:
        held = load_file(folder / file)
        changed = change(held)
        save_file(held if changed is None else changed, folder / file, {"format": "pt"})

    return damage


def second(entries: dict[str, Any]) -> str:
    """The name of the tensor that lies second in the file."""
    return sorted((name for name in entries if name != "__metadata__"), key=lambda name: entries[name]["data_offsets"])[1]


def moved(by: int) -> Callable[[dict[str, Any]], None]:
    """The second tensor lies elsewhere."""

    def change(entries: dict[str, Any]) -> None:
        fields = entries[second(entries)]
        fields["data_offsets"] = [offset + by for offset in fields["data_offsets"]]

    return change


def twice(entries: dict[str, Any]) -> bytes:
    return json.dumps(entries)[:-1].encode() + b', "' + FIRST.encode() + b'": ' + json.dumps(entries[FIRST]).encode() + b"}"


def overflowing(entries: dict[str, Any]) -> None:
    entries[FIRST]["shape"] = [2**40, 2**40, 1, 1]


def value(number: float, name: str = FIRST) -> Callable[[dict[str, torch.Tensor]], None]:
    """One number of a tensor."""

    def change(held: dict[str, torch.Tensor]) -> None:
        held[name].view(-1)[3] = number

    return change


# ---------------------------------------------------------------- damage to names


def shards(weight_map: Callable[[dict[str, str]], Any] = lambda names: names, metadata: bool = True) -> Callable[[Path], Any]:
    """The UNet in two shards, with an index."""

    def damage(folder: Path) -> None:
        held = load_file(folder / UNET)
        names = sorted(held)
        halves = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
        for file, half in halves.items():
            save_file({name: held[name] for name in half}, folder / "unet" / file)
        index: dict[str, Any] = {"metadata": {"total_size": 1}} if metadata else {}
        index["weight_map"] = weight_map({name: file for file, half in halves.items() for name in half})
        (folder / f"{UNET}.index.json").write_text(json.dumps(index))
        (folder / UNET).unlink()

    return damage


def pointing(target: str) -> Callable[[Path], Any]:
    return shards(lambda names: {**names, FIRST: target})


def incomplete_shard(folder: Path) -> None:
    shards()(folder)
    held = load_file(folder / "unet/a.safetensors")
    held.popitem()
    save_file(held, folder / "unet/a.safetensors")


def without(file: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).unlink()


def disagreeing(folder: Path) -> None:
    whole = (folder / UNET).read_bytes()
    shards()(folder)
    (folder / UNET).write_bytes(whole)
    tensors(value(0.5))(folder)


def pickled(payload: Any, file: str, legacy: bool = True) -> Callable[[Path], Any]:
    """The UNet as a pickle that does more than hold tensors, under any name."""

    def damage(folder: Path) -> None:
        (folder / UNET).unlink()
        if legacy:
            (folder / file).write_bytes(pickle.dumps(payload, protocol=2))
        else:
            torch.save(payload, folder / file)

    return damage


class Evil:
    """Leaves a mark if it is ever run."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {MARK}",)


def zipped_evil(folder: Path) -> None:
    (folder / UNET).unlink()
    with zipfile.ZipFile(folder / "unet/diffusion_pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil(), protocol=2))
        archive.writestr("archive/version", "3")


def good_pickle(folder: Path) -> None:
    torch.save(load_file(folder / UNET), folder / "unet/diffusion_pytorch_model.bin")
    (folder / UNET).unlink()


# ---------------------------------------------------------------- damage to configurations


def entries(file: str, **changes: Any) -> Callable[[Path], Any]:
    """Other entries in a JSON file; `...` takes one out."""

    def damage(folder: Path) -> None:
        held = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps({name: value for name, value in held.items() if value is not ...}))

    return damage


def component(library: Any, kind: Any) -> Callable[[Path], Any]:
    return entries("model_index.json", unet=[library, kind])


def beside(file: str, *also: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """A Python file that leaves a mark if it is ever run, and other damage."""

    def damage(folder: Path) -> None:
        (folder / file).write_text(f"import os\nos.system('touch {MARK}')\nclass Thing: ...\n")
        for other in also:
            other(folder)

    return damage


def linked_to_itself(folder: Path) -> None:
    (folder / UNET).unlink()
    (folder / UNET).symlink_to(folder / UNET)


def fifo(folder: Path) -> None:
    (folder / UNET).unlink()
    os.mkfifo(folder / UNET)


def endless(folder: Path) -> None:
    (folder / UNET).unlink()
    (folder / UNET).symlink_to("/dev/zero")


def folder_for_a_file(folder: Path) -> None:
    (folder / UNET).unlink()
    (folder / UNET).mkdir()


def chain(*damages: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        for each in damages:
            each(folder)

    return damage


UNET_CONFIG, VAE_CONFIG, TEXT_CONFIG = "unet/config.json", "vae/config.json", "text_encoder/config.json"
SCHEDULER, INDEX = "scheduler/scheduler_config.json", "model_index.json"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
HTML = b"<!DOCTYPE html><html><body>Please log in</body></html>"

ROWS: dict[str, Row] = {
    "1 half a file": Row(content(UNET, lambda data: data[: len(data) // 2]), CorruptFileError, "cut inside tensor|is cut"),
    "2 a cut header": Row(content(UNET, lambda data: data[:100]), CorruptFileError, "100 bytes, of which the header says"),
    "3 an empty file": Row(content(UNET, b""), CorruptFileError, "is empty"),
    "3 an empty file of transformers": Row(content(TEXT, b""), CorruptFileError, "text_encoder/model.safetensors is empty"),
    "4 a header of 2^63 bytes": Row(announced(2**63), CorruptFileError, str(2**63)),
    "5 a header of 101 MB": Row(announced(101_000_000), CorruptFileError, "at most 100000000 bytes"),
    "6 tensors that overlap": Row(header(moved(-4)), CorruptFileError, "tensor '.*' overlaps"),
    "7 a hole": Row(header(moved(4)), CorruptFileError, "tensor '.*' leaves a hole"),
    "8 a tensor twice": Row(header(twice), CorruptFileError, f"a name stands twice(.|\n)*{FIRST}"),
    "9 a header that is not UTF-8": Row(header(lambda _: b'{"\xff": 1}'), CorruptFileError, "not UTF-8"),
    "10 a shape that overflows": Row(header(overflowing), CorruptFileError, f"tensor '{FIRST}' does not fit"),
    "11 a git-lfs pointer": Row(content(UNET, LFS), CorruptFileError, "git-lfs pointer(.|\n)*git lfs pull"),
    "11 a pointer for a tokenizer": Row(content("tokenizer/tokenizer.json", LFS), ConfigError, "tokenizer.json.*not JSON"),
    "12 a web page": Row(content(UNET, HTML), CorruptFileError, "web page"),
    "12 a web page for a configuration": Row(content(UNET_CONFIG, HTML), ConfigError, "config.json:1:1: not JSON"),
    "13 a missing tensor": Row(
        tensors(lambda held: {n: t for n, t in held.items() if n != FIRST}), WeightsMismatchError, f"1 of the .* {FIRST}"
    ),
    "13 a missing tensor of transformers": Row(
        tensors(lambda held: {n: held[n] for n in sorted(held)[1:]}, TEXT),
        WeightsMismatchError,
        "1 tensors of CLIPTextModel are missing",
    ),
    "14 another prefix": Row(
        tensors(lambda held: {f"model.{name}": held[name] for name in held}), WeightsMismatchError, "model.conv_in.weight"
    ),
    "15 the file of another model": Row(
        lambda folder: (folder / UNET).write_bytes((folder / VAE).read_bytes()), WeightsMismatchError, "does not know"
    ),
    "16 a shard that lacks a tensor": Row(incomplete_shard, WeightsMismatchError, "1 of the"),
    "17 another shape": Row(
        tensors(lambda held: {**held, FIRST: torch.zeros(32, 9, 3, 3)}), WeightsMismatchError, r"\[32, 9, 3, 3\], wanted"
    ),
    "17 another shape in transformers": Row(
        tensors(lambda held: {**held, sorted(held)[-1]: torch.zeros(3)}, TEXT), WeightsMismatchError, r"\[3\], wanted"
    ),
    "18 whole numbers": Row(
        tensors(lambda held: {**held, FIRST: held[FIRST].to(torch.int64)}), WeightsMismatchError, "int64 .*wanted float32"
    ),
    "19 an extra tensor": Row(tensors(lambda held: {**held, "extra": torch.zeros(1)}), None, "ignores 1 tensors.*extra"),
    "19 an extra tensor, strictly": Row(
        tensors(lambda held: {**held, "extra": torch.zeros(1)}), WeightsMismatchError, "unknown.*extra", {"strict": True}
    ),
    "20 an extra entry": Row(entries(UNET_CONFIG, chanels=3), None, "does not know these config entries.*chanels"),
    "20 an extra entry, strictly": Row(entries(UNET_CONFIG, chanels=3), ConfigError, "chanels", {"strict": True}),
    "21 an extra component": Row(entries(INDEX, sequel=["diffusers", "UNet2DModel"]), None, "no use for.*sequel"),
    "22 NaN": Row(tensors(value(float("nan"))), NonFiniteError, f"{FIRST}"),
    "22 NaN in transformers": Row(
        tensors(lambda held: value(float("nan"), sorted(held)[0])(held), TEXT), NonFiniteError, "text_encoder"
    ),
    "23 infinity after narrowing": Row(tensors(value(1e6)), NonFiniteError, FIRST, {"torch_dtype": torch.float16}),
    "27 a shard that is not there": Row(
        chain(shards(), without("unet/b.safetensors")), MissingFileError, "b.safetensors(.|\n)*a.safetensors"
    ),
    "27 no weights": Row(without(UNET), MissingFileError, r"no weights in .*unet(.|\n)*config.json"),
    "28 ../ in an index": Row(pointing("../../x.safetensors"), PathEscapeError, r"\.\./\.\./x"),
    "29 an absolute path in an index": Row(pointing("/etc/passwd.safetensors"), PathEscapeError, "/etc/passwd"),
    "29 a path of Windows in an index": Row(pointing(r"C:\x.safetensors"), PathEscapeError, "C:"),
    "30 a component that leads out": Row(entries(INDEX, **{"../x": ["diffusers", "UNet2DModel"]}), None, "no use for"),
    "32 an index without metadata": Row(shards(metadata=False), None),
    "33 a list for an index": Row(shards(list), ConfigError, "is no shard index"),
    "34 an index and a file that disagree": Row(disagreeing, AmbiguousCheckpointError, "two different sets"),
    "36 a pickle that runs a command": Row(pickled(Evil(), "unet/diffusion_pytorch_model.bin"), UnsafePickleError, "system"),
    "36 the same in a zip": Row(zipped_evil, UnsafePickleError, "system"),
    "36 a pickle called .safetensors": Row(pickled(Evil(), UNET), UnsafePickleError, "is a pickle by its content"),
    "36 a zip called .safetensors": Row(pickled({"a": torch.zeros(1)}, UNET, legacy=False), UnsafePickleError, "is a pickle"),
    "36 a suffix in capitals": Row(
        pickled(Evil(), "unet/diffusion_pytorch_model.BIN"), MissingFileError, "diffusion_pytorch_model.BIN"
    ),
    "37 a good pickle": Row(good_pickle, None, "is a pickle"),
    "37 a good pickle, refused": Row(good_pickle, MissingFileError, "no weights", {"use_safetensors": True}),
    "38 no JSON": Row(content(UNET_CONFIG, b'{"a": 1,\n  b}'), ConfigError, r"unet/config.json:2:\d+: not JSON"),
    "39 10^5 levels": Row(content(UNET_CONFIG, b"[" * 10**5 + b"]" * 10**5), ConfigError, "nested too deep"),
    "39 10^5 levels of an index": Row(content(INDEX, b'{"a":' * 10**5 + b"1" + b"}" * 10**5), ConfigError, "nested too deep"),
    "40 300 MB of JSON": Row(lambda folder: os.truncate(folder / UNET_CONFIG, 300 * 10**6), ConfigError, "300000000"),
    "41 a key twice": Row(content(SCHEDULER, b'{"beta_start": 0.1, "beta_start": 0.2}'), ConfigError, "stands twice"),
    "41 UTF-16": Row(content(UNET_CONFIG, lambda data: data.decode().encode("utf-16")), ConfigError, "not UTF-8"),
    "41 a byte order mark": Row(content(UNET_CONFIG, lambda data: b"\xef\xbb\xbf" + data), None),
    "41 a list": Row(content(UNET_CONFIG, b"[1]"), ConfigError, "no JSON object"),
    "42 an unknown class": Row(component("diffusers", "UNet2DConditionModl"), ConfigError, "did you mean 'UNet2DConditionModel'"),
    "42 a class of the wrong kind": Row(component("diffusers", "StableDiffusionPipeline"), ConfigError, "unknown class"),
    "42 no class": Row(component("diffusers", None), ConfigError, "malformed"),
    "42 os.system": Row(component("os", "system"), ConfigError, "unknown class"),
    "42 Popen": Row(component("subprocess", "Popen"), ConfigError, "unknown class"),
    "42 exec": Row(component("builtins", "exec"), ConfigError, "unknown class"),
    "42 a function": Row(component("transformers", "pipeline"), ConfigError, "unknown class"),
    "42 a dotted name": Row(component("os.path", "join"), ConfigError, "unknown class"),
    "43 a module of Python's own": Row(component("json", "JSONDecoder"), ConfigError, "unknown class"),
    "43 a module on the path": Row(
        component("bad_files", "Evil"), UntrustedCodeError, r"bad_files.py(.|\n)*sha256:(.|\n)*trust_remote_code=True"
    ),
    "44 a component of one's own": Row(
        beside("unet/thing.py", component("thing", "Thing")),
        UntrustedCodeError,
        r"thing.py(.|\n)*sha256(.|\n)*trust_remote_code=True",
    ),
    "45 a pipeline of one's own": Row(
        beside("pipeline.py", entries(INDEX, _class_name=["pipeline", "Thing"])),
        UntrustedCodeError,
        r"pipeline.py(.|\n)*sha256:(.|\n)*trust_code",
    ),
    "47 Python files that nobody names": Row(chain(beside("None.py"), beside("unet/stray.py")), None),
    "47 an auto_map": Row(entries(TEXT_CONFIG, auto_map={"AutoModel": "x--y.Thing"}), None),
    "47 attention from elsewhere": Row(
        entries(TEXT_CONFIG, _attn_implementation="someone/kernels"), ConfigError, "_attn_implementation is not allowed"
    ),
    "48 a component that is not there": Row(entries(INDEX, unet=...), ConfigError, "no component 'unet'"),
    "48 a component that is a number": Row(entries(INDEX, unet=3), ConfigError, "malformed"),
    "48 a loop of links": Row(linked_to_itself, MissingFileError, "Too many levels|no weights"),
    "49 text for a number": Row(entries(UNET_CONFIG, in_channels="4"), ConfigError, r"in_channels(.|\n)*'4' \(str\)"),
    "49 NaN": Row(entries(SCHEDULER, beta_start=float("nan")), ConfigError, "beta_start"),
    "49 a negative number": Row(entries(UNET_CONFIG, layers_per_block=-1), ConfigError, "layers_per_block"),
    "49 negative channels": Row(entries(UNET_CONFIG, block_out_channels=[-32, 64]), ConfigError, "block_out_channels"),
    "49 an empty list": Row(entries(UNET_CONFIG, block_out_channels=[]), ConfigError, "block_out_channels"),
    "50 10^9 channels": Row(entries(UNET_CONFIG, block_out_channels=[10**9, 64]), LimitError, "."),
    "50 10^6 layers": Row(entries(UNET_CONFIG, layers_per_block=10**6), LimitError, "layers_per_block"),
    "50 10^6 layers of text": Row(entries(TEXT_CONFIG, num_hidden_layers=10**6), LimitError, "more than the files hold"),
    "51 an entry left out that changes results": Row(entries(SCHEDULER, beta_schedule=...), None, "beta_schedule"),
    "51 scaling left out": Row(entries(VAE_CONFIG, scaling_factor=...), None, "scaling_factor"),
    "51 heads left out": Row(entries(UNET_CONFIG, attention_head_dim=...), None, "attention_head_dim"),
    "51 the configuration of another class": Row(entries(UNET_CONFIG, _class_name="AutoencoderKL"), ConfigError, "another class"),
    "52 channels that disagree": Row(entries(VAE_CONFIG, latent_channels=8), SuffuseError, "."),
    "52 widths that disagree": Row(entries(UNET_CONFIG, cross_attention_dim=64), SuffuseError, "."),
    "52 scaling of 0": Row(entries(VAE_CONFIG, scaling_factor=0.0), ConfigError, "scaling_factor must be positive"),
    "52 no vocabulary": Row(without("tokenizer/tokenizer.json"), MissingFileError, "holds no CLIPTokenizer"),
    "65 a pipe": Row(fifo, MissingFileError, "not a regular file"),
    "65 a device that never ends": Row(endless, MissingFileError, "not a regular file"),
    "65 a folder for a file": Row(folder_for_a_file, MissingFileError, "not a regular file"),
}
