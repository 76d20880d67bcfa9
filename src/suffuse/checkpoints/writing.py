"""Large files to the disk: past the page cache where the system can, summed up on the way.

A save ends when its bytes are on the disk: to copy them into the page cache first only costs time, and as much memory as the
model has. Two buffers take turns: one is filled and summed up while the other is written.
"""

from __future__ import annotations

import concurrent.futures
import errno
import hashlib
import mmap
import os
from collections.abc import Generator, Iterable
from pathlib import Path

BUFFER = 8 << 20
"""Bytes of one write; a multiple of every disk's block."""


def write_pieces(path: Path, pieces: Iterable[memoryview]) -> str:
    """Write pieces of bytes, one after the other, as a new file, and return their SHA-256 in hexadecimal."""
    total, size = hashlib.sha256(), 0
    with open(path, "wb", buffering=0) as file, concurrent.futures.ThreadPoolExecutor(1) as writer:
        pending: concurrent.futures.Future[None] | None = None
        for buffer, count in _filled(pieces):
            total.update(buffer[:count])
            size += count
            if pending is not None:
                pending.result()
            elif count == BUFFER:
                _write_past_the_cache(file.fileno(), True)
            pending = writer.submit(_write, file.fileno(), buffer)
        if pending is not None:
            pending.result()
        file.truncate(size)
    return total.hexdigest()


def _filled(pieces: Iterable[memoryview]) -> Generator[tuple[memoryview, int]]:
    """Two buffers in turn, each full but the last; the bytes in them, and how many count."""
    buffers = [memoryview(mmap.mmap(-1, BUFFER)) for _ in range(2)]
    turn = filled = 0
    for piece in pieces:
        while piece:
            count = min(len(piece), BUFFER - filled)
            buffers[turn][filled : filled + count] = piece[:count]
            piece, filled = piece[count:], filled + count
            if filled == BUFFER:
                yield buffers[turn], filled
                turn, filled = 1 - turn, 0
    if filled:
        block = -(-filled // mmap.PAGESIZE) * mmap.PAGESIZE  # past the cache, blocks are written whole; the rest is cut off
        yield buffers[turn][:block], filled


def _write(descriptor: int, view: memoryview) -> None:
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except OSError as error:
            if error.errno != errno.EINVAL or not _write_past_the_cache(descriptor, False):
                raise


if hasattr(os, "O_DIRECT"):
    import fcntl

    def _write_past_the_cache(descriptor: int, wanted: bool) -> bool:
        """Switch the way of a file; whether that changed anything. Not every file system knows the direct one."""
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        changed = flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT
        try:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, changed)
        except OSError:
            return False
        return changed != flags

else:

    def _write_past_the_cache(descriptor: int, wanted: bool) -> bool:
        """Only Linux has a direct way that is worth it."""
        return False
