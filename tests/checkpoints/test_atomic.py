"""Folders are replaced whole or not at all, whatever fails and whoever is killed."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from suffuse.checkpoints import atomic
from suffuse.checkpoints.atomic import staged_folder
from suffuse.checkpoints.checksums import verify_folder
from suffuse.errors import BusyError, SaveError

OPERATIONS = ("open", "fsync", "rename", "mkdir", "link", "write", "ftruncate")


def contents(folder: Path) -> dict[str, str]:
    """The texts of a folder, which must be what its list of checksums says, if it has one."""
    if (folder / "SHA256SUMS").exists():
        verify_folder(folder)
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "SHA256SUMS")
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


OLD = {"a.txt": "old", "deep/b.txt": "old", "stays.md": "stays"}
NEW = {"a.txt": "new", "deep/c.txt": "new", "stays.md": "stays"}


def write_old(folder: Path) -> None:
    for name, text in OLD.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def save_new(folder: Path) -> None:
    with staged_folder(folder, keep=lambda path: path.name == "stays.md") as staged:
        (staged / "a.txt").write_text("new")
        (staged / "deep").mkdir()
        (staged / "deep" / "c.txt").write_text("new")


def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)


@pytest.fixture(params=["exchange", "two renames"])
def target(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if request.param == "two renames":
        without_exchange(monkeypatch)
    return tmp_path / "sa[v]ed"


def test_a_new_folder_appears_whole(target: Path) -> None:
    with staged_folder(target) as staged:
        (staged / "a.txt").write_text("new")
        assert not target.exists()
    assert contents(target) == {"a.txt": "new"}
    assert os.listdir(target.parent) == [target.name]


def test_an_old_folder_is_replaced_and_what_is_to_stay_stays(target: Path) -> None:
    write_old(target)
    save_new(target)
    assert contents(target) == NEW
    assert os.listdir(target.parent) == [target.name]


def test_an_error_inside_leaves_the_old_folder(target: Path) -> None:
    write_old(target)
    with pytest.raises(KeyboardInterrupt), staged_folder(target) as staged:
        (staged / "a.txt").write_text("new")
        raise KeyboardInterrupt
    assert contents(target) == OLD
    assert os.listdir(target.parent) == [target.name]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_whichever_call_fails_the_folder_is_old_or_new(
    operation: str, code: int, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine: Callable[..., object] = getattr(os, operation)
    for failing in range(100):
        write_old(target)
        calls = iter(range(1000))

        def faulty(*args: object, calls: object = calls, failing: int = failing, **kwargs: object) -> object:
            if next(calls) == failing:
                raise OSError(code, os.strerror(code))
            return genuine(*args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(os, operation, faulty)
            try:
                save_new(target)
                failure = None
            except SaveError as error:
                failure = str(error)
        assert failure is None or "nothing was replaced" in failure
        assert contents(target) == (OLD if failure else NEW)
        # What could not be cleaned up because of the fault is hidden, and the next save sweeps it away.
        assert [name for name in os.listdir(target.parent) if not name.startswith(".")] == [target.name]
        save_new(target)
        assert os.listdir(target.parent) == [target.name]
        if next(calls) <= failing:
            return
        for path in sorted(target.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    pytest.fail("the loop must end with a save in which nothing failed")


@pytest.mark.skipif(sys.platform == "win32", reason="kills by signal")
@pytest.mark.parametrize("moment", range(8))
def test_a_killed_writer_leaves_old_or_new_and_the_next_one_sweeps(moment: int, tmp_path: Path) -> None:
    target = tmp_path / "saved"
    write_old(target)
    child = os.fork()
    if child == 0:
        calls = iter(range(1000))
        genuine = os.fsync

        def deadly(descriptor: int) -> None:
            if next(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            genuine(descriptor)

        os.fsync = deadly
        save_new(target)
        os._exit(0)
    os.waitpid(child, 0)
    assert contents(target) in (OLD, NEW)
    save_new(target)
    assert contents(target) == NEW
    assert os.listdir(tmp_path) == ["saved"]


def test_a_writer_killed_between_two_renames_is_made_good(tmp_path: Path) -> None:
    write_old(tmp_path / ".saved.replaced-0123")
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "saved"):
        raise RuntimeError
    assert contents(tmp_path / "saved") == OLD


def test_two_writers_take_turns(tmp_path: Path) -> None:
    target, inside = tmp_path / "saved", []

    def write(text: str) -> None:
        with staged_folder(target) as staged:
            inside.append(text)
            assert len(inside) == 1
            (staged / "a.txt").write_text(text)
            time.sleep(0.05)
            inside.remove(text)

    writers = [threading.Thread(target=write, args=(str(number),)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert contents(target)["a.txt"] in "0123"
    assert os.listdir(tmp_path) == ["saved"]


def _hold(target: Path, held: object, release: object) -> None:
    with staged_folder(target) as staged:
        (staged / "a.txt").write_text("theirs")
        held.set()
        release.wait(20)


def test_a_writer_that_is_kept_waiting_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "PATIENCE", 0.2)
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "saved", held, release))
    other.start()
    held.wait(20)
    with (
        pytest.raises(BusyError, match=rf"written by another process[\s\S]*process {other.pid}"),
        staged_folder(tmp_path / "saved"),
    ):
        pass
    release.set()
    other.join()
    assert contents(tmp_path / "saved") == {"a.txt": "theirs"}


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="no space for"), staged_folder(tmp_path / "saved", size=2**62):
        pytest.fail("nothing must be written")
    assert os.listdir(tmp_path) == []


def test_links_are_followed_to_the_folder_and_kept_inside_it(tmp_path: Path) -> None:
    write_old(tmp_path / "real")
    (tmp_path / "real" / "stays.md").unlink()
    (tmp_path / "real" / "stays.md").symlink_to("elsewhere")
    (tmp_path / "saved").symlink_to("real")
    save_new(tmp_path / "saved")
    assert (tmp_path / "saved").is_symlink()
    assert (tmp_path / "real" / "stays.md").is_symlink()
    assert (tmp_path / "real" / "a.txt").read_text() == "new"


def test_a_folder_saved_inside_a_staged_folder_leaves_nothing_else(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "pipeline") as outer, staged_folder(outer / "unet") as inner:
        (inner / "a.txt").write_text("new")
    assert contents(tmp_path / "pipeline") == {"unet/a.txt": "new"}
    assert sorted(os.listdir(tmp_path / "pipeline")) == ["SHA256SUMS", "unet"]
    assert os.listdir(tmp_path / "pipeline" / "unet") == ["a.txt"]
