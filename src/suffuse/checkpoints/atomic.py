"""Folders that are replaced whole or not at all.

The new folder is written beside the old one, every file and folder of it is brought to the disk, and then one rename puts it
in the old one's place. Whoever is killed on the way leaves the old folder and a leftover, which the next save sweeps away.
While the disk is busy, what was written is summed up into a list of checksums, by which a load can verify the folder.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import ctypes
import errno
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from suffuse.checkpoints.checksums import NAME, digest, read_checksums, write_checksums
from suffuse.errors import BusyError, SaveError, SuffuseError

PATIENCE = 30.0
"""Seconds to wait for another writer of the same folder."""


@dataclass(frozen=True)
class Staging:
    """A folder that is being written, and the checksums of its files that are known already."""

    folder: Path
    digests: dict[Path, str] = field(default_factory=dict[Path, str])


_staging: contextvars.ContextVar[Staging | None] = contextvars.ContextVar("_staging", default=None)
"""What this thread is writing."""


def note_digest(path: Path, value: str) -> None:
    """Tell the SHA-256 of a file that was just written, if it is in a staged folder: it need not be read for it again."""
    if (staging := _staging.get()) is not None:
        staging.digests[path] = value


@contextlib.contextmanager
def staged_folder(
    target: str | os.PathLike[str], keep: Callable[[PurePosixPath], bool] = lambda path: False, size: int = 0
) -> Generator[Path]:
    """A new folder to write into, which takes the place of `target` when the block ends without an error.

        with staged_folder("model", keep=lambda path: path.suffix == ".md") as folder:
            (folder / "config.json").write_text("{}")

    Args:
        target: The folder to make or to replace.
        keep: Of the files of the old folder, as relative paths, those to carry over unless there are new ones so called.
        size: Bytes that will be written, to be refused at once if the disk has not as many.

    Inside of another such folder it is a plain new folder: the outer one takes care of it.

    Raises:
        SaveError: Writing failed; the old folder is as it was.
        BusyError: Another writer held the folder for longer than `PATIENCE` seconds.
    """
    if (outer := _staging.get()) is not None and Path(target).is_relative_to(outer.folder):
        Path(target).mkdir(parents=True)
        yield Path(target)
        return
    target = _real(target)
    if target.exists() and not target.is_dir():
        raise SaveError(f"{target} is a file", expected="a folder, or a name that is free")
    if os.path.ismount(target) or _inside(target):
        what = "a mount point" if os.path.ismount(target) else "the folder this process works in"
        raise SaveError(f"{target} is {what} and cannot be replaced", remedy="save to a folder inside it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            _sweep(target)
            _check_space(target.parent, size)
            staged = _beside(target, "staged")
            os.mkdir(staged)
            staging = Staging(staged)
            token = _staging.set(staging)
            try:
                yield staged
                _finish(staging, target, keep)
                _publish(staged, target)
            except BaseException:
                shutil.rmtree(staged, ignore_errors=True)
                raise
            finally:
                _staging.reset(token)
    except SuffuseError:
        raise
    except OSError as error:
        raise SaveError(
            f"{target} could not be written: {error}", remedy="nothing was replaced; the old files are whole"
        ) from error


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file that takes the place of `path` when it is whole and on the disk.

    Raises:
        SaveError: Writing failed; the old file is as it was.
    """
    path = _real(path)
    if path.is_dir():
        raise SaveError(f"{path} is a folder", expected="a file, or a name that is free")
    staged = _beside(path, "staged")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            _sweep(path)
            write(staged)
            if path.exists():
                shutil.copymode(path, staged)
            _fsync(staged)
            os.replace(staged, path)
            _fsync(path.parent)
    except SuffuseError:
        raise
    except OSError as error:
        raise SaveError(f"{path} could not be written: {error}", remedy="nothing was replaced; the old file is whole") from error
    finally:
        with contextlib.suppress(OSError):
            staged.unlink()


def _real(target: str | os.PathLike[str]) -> Path:
    """Where a name leads to."""
    try:
        if not os.fspath(target):
            raise ValueError("it is empty")
        path = Path(os.fsdecode(os.path.realpath(target)))
        path.exists()  # which raises for a name that no file can have
    except (TypeError, ValueError, OSError) as error:
        raise SaveError(f"a place to save to needs a name: {error}", found=target) from None
    return path


def _inside(folder: Path) -> bool:
    """Whether this process works in the folder, or further inside: it would be left in one that has no name."""
    with contextlib.suppress(FileNotFoundError):
        return Path.cwd().is_relative_to(folder)
    return False


def _beside(target: Path, role: str) -> Path:
    return target.with_name(f".{target.name}.{role}-{secrets.token_hex(4)}")


def _sweep(target: Path) -> None:
    """Remove what a killed writer left; put the old folder back if it was killed between two renames."""
    for old in target.parent.glob(f".{_escaped(target.name)}.replaced-*"):
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, target)
    for staged in target.parent.glob(f".{_escaped(target.name)}.staged-*"):
        if staged.is_dir():
            shutil.rmtree(staged, ignore_errors=True)
        else:
            staged.unlink(missing_ok=True)


def _escaped(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise SaveError(f"no space for {size} bytes in {folder}", found=f"{free} bytes free", remedy="nothing was replaced")


def _finish(staging: Staging, old: Path, keep: Callable[[PurePosixPath], bool]) -> None:
    """Bring every new file to the disk and sum it up, carry over what stays, then bring the folders, from the inside out."""
    staged, known = staging.folder, staging.digests
    new = {path.relative_to(staged).as_posix(): path for path in sorted(staged.rglob("*")) if _is_plain(path)}
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        synchronised = [pool.submit(_fsync, path) for path in new.values()]
        sums = dict(zip(new, pool.map(lambda path: known.get(path) or digest(path), new.values()), strict=True))
        for future in synchronised:
            future.result()
    carried = _carry_over(old, staged, keep)
    write_checksums(staged, sums | {name: value for name, value in read_checksums(old).items() if name in carried})
    _fsync(staged / NAME)
    for path in [*carried.values(), *(Path(folder) for folder, _, _ in os.walk(staged, topdown=False))]:
        _fsync(path)


def _carry_over(old: Path, new: Path, keep: Callable[[PurePosixPath], bool]) -> dict[str, Path]:
    """Link, or copy where links are not to be had, the files of the old folder that stay; the plain files among them."""
    carried: dict[str, Path] = {}
    for folder, names, files in os.walk(old):
        for name in [*files, *(name for name in names if os.path.islink(os.path.join(folder, name)))]:
            source = Path(folder, name)
            relative = source.relative_to(old)
            destination = new / relative
            if relative != Path(NAME) and not os.path.lexists(destination) and keep(PurePosixPath(relative.as_posix())):
                destination.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(source, destination, follow_symlinks=False)
                except (OSError, NotImplementedError):
                    shutil.copy2(source, destination, follow_symlinks=False)
                if _is_plain(destination):
                    carried[relative.as_posix()] = destination
    return carried


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _fsync(path: str | os.PathLike[str]) -> None:
    if os.name == "nt" and os.path.isdir(path):
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(staged: Path, target: Path) -> None:
    if not target.exists():
        os.rename(staged, target)
        old = None
    else:
        shutil.copymode(target, staged)
        if _exchange(staged, target):
            old = staged
        else:
            old = _beside(target, "replaced")
            os.rename(target, old)
            try:
                os.rename(staged, target)
            except OSError:
                os.rename(old, target)
                raise
    # The new folder is in place, whole and on the disk: nothing that fails from here on makes the save a failure.
    with contextlib.suppress(OSError):
        _fsync(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where system or disk cannot."""
    name, here, flag = {"linux": ("renameat2", -100, 2), "darwin": ("renameatx_np", -2, 2)}.get(sys.platform, ("", 0, 0))
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None) if name else None
    if function is None:
        return False
    if function(here, os.fsencode(one), here, os.fsencode(other), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


@contextlib.contextmanager
def _locked(target: Path) -> Generator[None]:
    """Keep other writers of `target` out; the system lets go of the lock if this process dies."""
    path = target.with_name(f".{target.name}.lock")
    deadline = time.monotonic() + PATIENCE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if _try_lock(descriptor) and _is_at(descriptor, path):
                break
            holder = os.pread(descriptor, 20, 0).decode(errors="replace") if hasattr(os, "pread") else ""
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if time.monotonic() > deadline:
            raise BusyError(
                f"{target} is being written by another process",
                found=f"process {holder or 'unknown'}",
                remedy=f"waited {PATIENCE:.0f} s: try again when it is done",
            )
        time.sleep(0.05)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the file that is locked is still the one of this name, not one that its last holder removed."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


if os.name == "nt":
    import msvcrt

    def _try_lock(descriptor: int) -> bool:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # pyright: ignore
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
