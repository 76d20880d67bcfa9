"""Headers: what a damaged or disguised file is told to be."""

from __future__ import annotations

import json
import os
import resource
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from suffuse.checkpoints.safetensors_file import read_header
from suffuse.errors import CorruptFileError, MissingFileError, SuffuseError, UnsafePickleError


def file_of(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def f32(start: int, end: int, *shape: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}


DAMAGED = {
    "empty": (b"", "is empty"),
    "seven bytes": (b"\x01\0\0\0\0\0\0", "is cut or is no safetensors file"),
    "header of 2^63 bytes": (file_of({}, length=2**63), "9223372036854775808"),
    "header of 101 MB": (file_of({}, length=101_000_000), "101000000"),
    "cut inside the header": (file_of({"a": f32(0, 4, 1)})[:20], "is cut or is no"),
    "cut inside a tensor": (file_of({"a": f32(0, 4, 1)}, b"ab"), r"cut inside tensor 'a'[\s\S]*found: \d+ bytes[\s\S]*at least"),
    "bytes at the end": (file_of({"a": f32(0, 4, 1)}, b"abcdef"), "bytes follow the last tensor"),
    "overlap": (file_of({"a": f32(0, 8, 2), "b": f32(4, 12, 2)}, bytes(12)), "'b' overlaps"),
    "hole": (file_of({"a": f32(0, 4, 1), "b": f32(8, 12, 1)}, bytes(12)), "'b' leaves a hole"),
    "a name twice": (
        file_of(b'{"a":' + json.dumps(f32(0, 4, 1)).encode() + b',"a":' + json.dumps(f32(0, 4, 1)).encode() + b"}", bytes(4)),
        r"stands twice[\s\S]*'a'",
    ),
    "not UTF-8": (file_of(b'{"\xff":1}'), "not UTF-8"),
    "not JSON": (file_of(b"{,}    "), "not JSON"),
    "a number of thousands of digits": (file_of(b'{"a":' + b"9" * 5000 + b"}"), "not JSON"),
    "nested": (file_of(b'{"a":' + b"[" * 100_000), "nested too deep"),
    "a list": (file_of(b"[1, 2, 3]"), "no JSON object"),
    "a shape that overflows": (file_of({"a": f32(0, 4, 2**40, 2**40)}, bytes(4)), "'a' does not fit its place"),
    "a negative shape": (file_of({"a": f32(0, 4, -1)}, bytes(4)), "'a' is not described"),
    "no offsets": (file_of({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "'a' is not described"),
    "backward offsets": (file_of({"a": f32(4, 0, 1)}, bytes(4)), "'a' does not fit"),
    "unknown type": (file_of({"a": {"dtype": "F7", "shape": [], "data_offsets": [0, 4]}}, bytes(4)), "unknown type"),
    "metadata that is no text": (file_of({"__metadata__": {"a": 1}}), "metadata"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"git-lfs pointer[\s\S]*git lfs pull"),
    "web page": (b"<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_named_with_what_is_wrong(case: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    content, message = DAMAGED[case]
    path.write_bytes(content)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(CorruptFileError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert time.perf_counter() - began < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


@pytest.mark.parametrize("content", [b"PK\x03\x04" + bytes(60), b"\x80\x02}q\x00." + bytes(60)])
def test_a_pickle_under_a_wrong_name_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UnsafePickleError, match="is a pickle by its content; nothing of it was run"):
        read_header(tmp_path / "model.safetensors")


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (tmp_path, tmp_path / "pipe.safetensors", Path("/dev/zero")):
        with pytest.raises(MissingFileError, match="not a regular file"):
            read_header(path)
    with pytest.raises(MissingFileError, match=r"pipe\.safetensors"):
        read_header(tmp_path / "absent.safetensors")


def test_a_header_of_sixty_bytes_is_not_taken_for_a_web_page(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    (tmp_path / "m.safetensors").write_bytes(file_of(header.ljust(0x3C), b"x"))
    assert read_header(tmp_path / "m.safetensors").tensors["a"].shape == (1,)


def test_the_header_is_that_of_the_reference_implementation(tmp_path: Path) -> None:
    arrays = {"scalar": np.array(1, np.float32), "empty": np.zeros((0, 3), np.int64), "ünï": np.ones((2, 5), np.float16)}
    save_file(arrays, tmp_path / "m.safetensors", metadata={"format": "np"})
    header = read_header(tmp_path / "m.safetensors")
    assert header.metadata == {"format": "np"}
    assert {name: entry.shape for name, entry in header.tensors.items()} == {n: a.shape for n, a in arrays.items()}
    data = (tmp_path / "m.safetensors").read_bytes()
    entry = header.tensors["ünï"]
    assert data[entry.start : entry.end] == arrays["ünï"].tobytes()


@settings(max_examples=300, deadline=1000)
@given(st.data())
def test_any_damage_is_an_error_of_ours_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    content = bytearray(file_of({"a": f32(0, 8, 2), "b": f32(8, 12, 1)}, bytes(12)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        header = read_header(path)
    except SuffuseError:
        return
    assert all(entry.end <= header.size for entry in header.tensors.values())
