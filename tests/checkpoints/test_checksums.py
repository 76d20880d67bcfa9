"""The list of checksums that every save writes, and what a load can tell by it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from suffuse.checkpoints.atomic import staged_folder
from suffuse.checkpoints.checksums import read_checksums, verify_folder
from suffuse.errors import CorruptFileError, MissingFileError, PathEscapeError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    with staged_folder(tmp_path / "saved") as folder:
        (folder / "a b.txt").write_text("one")
        (folder / "unet").mkdir()
        (folder / "unet" / "weights").write_bytes(bytes(3 << 20))
    return tmp_path / "saved"


def test_every_file_is_listed_and_verified(saved: Path) -> None:
    assert list(read_checksums(saved)) == ["a b.txt", "unet/weights"]
    verify_folder(saved)
    verify_folder(saved / "unet")


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs the program")
def test_the_list_is_that_of_sha256sum(saved: Path) -> None:
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=saved, check=True, stdout=subprocess.DEVNULL)


def test_one_bit_is_told(saved: Path) -> None:
    with open(saved / "unet" / "weights", "r+b") as file:
        file.seek(2 << 20)
        file.write(b"\1")
    for folder in (saved, saved / "unet"):
        with pytest.raises(CorruptFileError, match=r"1 files of .* are not what was saved: unet/weights"):
            verify_folder(folder)


def test_what_is_gone_is_told(saved: Path) -> None:
    (saved / "a b.txt").unlink()
    verify_folder(saved / "unet")
    with pytest.raises(MissingFileError, match=r"a b\.txt"):
        verify_folder(saved)
    (saved / "SHA256SUMS").unlink()
    with pytest.raises(MissingFileError, match="has no SHA256SUMS to verify it by"):
        verify_folder(saved)


def test_files_that_are_carried_over_keep_their_sums(saved: Path) -> None:
    (saved / "notes.md").write_text("not of a save")
    with staged_folder(saved, keep=lambda path: path.name != "a b.txt") as folder:
        (folder / "new.txt").write_text("new")
    assert list(read_checksums(saved)) == ["new.txt", "unet/weights"]
    assert sorted(os.listdir(saved)) == ["SHA256SUMS", "new.txt", "notes.md", "unet"]
    verify_folder(saved)


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [("hello\n", CorruptFileError, ":1: no checksum"), (f"{'0' * 64}  ../x\n", PathEscapeError, "out of the folder")],
)
def test_a_list_that_is_none_is_refused(text: str, error: type[Exception], says: str, saved: Path) -> None:
    (saved / "SHA256SUMS").write_text(text)
    with pytest.raises(error, match=says):
        verify_folder(saved)


def test_a_file_that_is_not_listed_is_told(saved: Path) -> None:
    (saved / "notes.md").write_text("of no matter")
    verify_folder(saved)
    (saved / "unet" / "other.safetensors").write_bytes(b"x")
    with pytest.raises(CorruptFileError, match=r"does not list 1 files that would be read: unet/other\.safetensors"):
        verify_folder(saved)
    (saved / "unet" / "other.safetensors").unlink()
    (saved / "SHA256SUMS").write_text("")
    with pytest.raises(CorruptFileError, match="does not list"):
        verify_folder(saved)
