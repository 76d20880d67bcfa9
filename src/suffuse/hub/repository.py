"""A commit of a repository, kept in the cache that all libraries of the hub share.

    models--org--name/refs/main                  the commit that a branch was at when it was last fetched whole
    models--org--name/trees/COMMIT.json          what files the commit has, with sizes and hashes
    models--org--name/snapshots/COMMIT/…         the files by name: links to
    models--org--name/blobs/HASH                 the files by hash; HASH.incomplete while they come

A branch is resolved by one request, which brings the list of files as well. A commit whose list is here needs none.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import threading
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock, tqdm

from suffuse.errors import ConfigError, HubError, MissingFileError, SuffuseError
from suffuse.files import check_inside, read_json, write_text
from suffuse.hub.options import HubOptions
from suffuse.hub.transfer import LISTING_BYTES, Connection, Download, RemoteFile, Unreachable

COMMIT = re.compile(r"[0-9a-f]{40}")
HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
AT_ONCE = 8
"""Files that come at the same time."""


class Repository:
    """One commit of a repository.

    Args:
        name: "org/name", or "name".
        options: How to fetch.
        kind: "models" or "datasets".
        verify: Hold what is in the cache against the hub's hashes, and fetch again what is not right.

    Attributes:
        commit: The hash of the commit.
        folder: The files of the commit, those that were fetched.

    Raises:
        HubError: There is no such repository or revision, or the hub cannot be reached and the cache holds nothing of it.
    """

    def __init__(self, name: str, options: HubOptions, kind: str = "models", verify: bool = False) -> None:
        self.name, self.kind, self.revision = name, kind, options.revision or "main"
        self._verify, self._force, self._connection, self._fetched = (
            verify,
            options.force_download,
            Connection(options, name),
            set[str](),
        )
        self.storage = Path(options.cache_dir or constants.HF_HUB_CACHE).expanduser() / "--".join([kind, *name.split("/")])
        check_inside(self.storage, self.revision)
        self.commit, self.files = self._resolved()
        self.folder = self.storage / "snapshots" / self.commit

    def names(self, subfolder: str = "") -> list[str]:
        """The names of the files right inside a folder of the repository."""
        prefix = f"{subfolder.strip('/')}/" if subfolder else ""
        inside = (name.removeprefix(prefix) for name in self.files if name.startswith(prefix))
        return sorted(name for name in inside if "/" not in name)

    def size(self, name: str) -> int:
        """Bytes of a file, as the hub told; 0 if it did not."""
        return remote.size if (remote := self.files.get(name)) else 0

    def is_cached(self, name: str) -> bool:
        """Whether a file need not be fetched."""
        return self._is_there(name)

    def fetch(self, names: Iterable[str]) -> None:
        """Bring files into the cache, several at a time; those that are there stay.

        Raises:
            MissingFileError: The commit has no such file.
            PathEscapeError: A name leads out of the folder.
            HubError: The hub did not give them, or asking it is not allowed.
            CorruptFileError: What came is not what was announced.
        """
        names = list(dict.fromkeys(names))
        for name in names:
            check_inside(self.folder, name)
        absent = [name for name in names if not self._is_there(name)]
        unknown = [name for name in absent if name not in self.files]
        if absent and self._connection.offline:
            raise self._not_cached(", ".join(absent[:10]))
        if unknown:
            raise MissingFileError(
                f"{self.name} at {self.revision} has no file {unknown[0]!r}", found=", ".join(sorted(self.files)[:20])
            )
        if absent:
            self._fetch(absent)

    def settle(self) -> None:
        """Note that the revision is at this commit. Done at the end, so that without the hub the last whole one is found."""
        reference = self.storage / "refs" / self.revision
        if self.revision == self.commit or self._connection.offline or self._referenced() == self.commit:
            return
        with contextlib.suppress(OSError):  # a cache that cannot be written can still be read
            reference.parent.mkdir(parents=True, exist_ok=True)
            write_text(reference, self.commit)

    # ------------------------------------------------------------ which commit

    def _resolved(self) -> tuple[str, dict[str, RemoteFile | None]]:
        commit = self.revision if COMMIT.fullmatch(self.revision) else None
        if commit and not self._force and (files := self._listed(commit)) is not None:
            return commit, dict(files)
        if not self._connection.offline:
            try:
                return self._asked()
            except Unreachable as error:
                if not (commit or self._referenced()):
                    raise
                warnings.warn(f"{error.problem}: what is in the cache is used", stacklevel=6)
        if not (commit := commit or self._referenced()):
            raise self._not_cached(f"revision {self.revision!r}")
        self._connection.offline = True
        folder = self.storage / "snapshots" / commit
        there = {path.relative_to(folder).as_posix(): None for path in folder.rglob("*") if path.is_file()}
        files = self._listed(commit) or {}
        if not there and not files:
            raise self._not_cached(f"commit {commit}")
        return commit, {**there, **files}

    def _asked(self) -> tuple[str, dict[str, RemoteFile | None]]:
        """The commit and its files, as the hub tells them."""
        path = f"/api/{self.kind}/{self.name}/revision/{quote(self.revision, safe='')}?blobs=true"
        answer = self._connection.json(path, f"{self.name} at {self.revision}")
        commit = answer.get("sha")
        try:
            entries = {entry["rfilename"]: _entry(entry, entry.get("lfs")) for entry in answer["siblings"]}
            if not COMMIT.fullmatch(str(commit)):
                raise ValueError(f"commit {commit!r}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise HubError(f"{self.name}: the list of files is not the hub's", found=repr(error)) from None
        listing = {"format_version": 1, "files": {name: _written(file) for name, file in sorted(entries.items())}}
        path = self.storage / "trees" / f"{commit}.json"
        if not path.exists():
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, json.dumps(listing, indent=1))
        return str(commit), dict(entries)

    def _listed(self, commit: str) -> dict[str, RemoteFile] | None:
        """The files of a commit, as they were told earlier."""
        with contextlib.suppress(OSError, ConfigError, KeyError, TypeError, ValueError, AttributeError):
            entries = read_json(self.storage / "trees" / f"{commit}.json", LISTING_BYTES)["files"]
            return {name: _entry({**entry, "blobId": entry["blob_id"]}, _lfs(entry)) for name, entry in entries.items()}
        return None

    def _referenced(self) -> str | None:
        """The commit that the revision was at when it was last fetched."""
        with contextlib.suppress(OSError, ValueError):
            commit = (self.storage / "refs" / self.revision).read_text(encoding="ascii").strip()
            return commit if COMMIT.fullmatch(commit) else None
        return None

    def _not_cached(self, what: str) -> HubError:
        return HubError(
            f"{self.name!r} is no folder here, and the cache does not hold all of it: {what}",
            found=f"offline, and the cache at {self.storage}",
            remedy="load it once with a connection, without local_files_only and HF_HUB_OFFLINE",
        )

    # ------------------------------------------------------------ the files

    def _is_there(self, name: str) -> bool:
        if self._force and name not in self._fetched:
            return False
        remote = self.files.get(name)
        try:
            size = os.stat(self.folder / name).st_size
        except OSError:
            return False
        right = remote is None or size == remote.size
        return right and (remote is None or not self._verify or self._is_right(self.folder / name, remote))

    def _is_right(self, path: Path, remote: RemoteFile) -> bool:
        """Whether a file of the cache has its hash; it is put away if not."""
        digest = remote.digest()
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        if digest.hexdigest() != remote.name:
            path.resolve().unlink()
            return False
        return True

    def _fetch(self, names: list[str]) -> None:
        stopped = threading.Event()
        wanted = [(name, file) for name in names if (file := self.files[name]) is not None]
        bar = tqdm(total=sum(file.size for _, file in wanted), desc=self.name, unit="B", unit_scale=True)
        try:
            with bar, ThreadPoolExecutor(min(AT_ONCE, len(wanted))) as pool:
                tasks = [pool.submit(self._fetch_one, name, file, bar.update, stopped.is_set) for name, file in wanted]
                try:
                    for task in tasks:
                        task.result()
                except BaseException:
                    stopped.set()
                    pool.shutdown(cancel_futures=True)
                    raise
        except SuffuseError:
            raise
        except OSError as error:
            raise HubError(
                f"{self.name} could not be stored in {self.storage}: {error}", remedy="free space there, or pass cache_dir=…"
            ) from error
        self._fetched.update(names)

    def _fetch_one(self, name: str, remote: RemoteFile, tell: Callable[[int], Any], stopped: Callable[[], bool]) -> None:
        blob, link = self.storage / "blobs" / remote.name, self.folder / name
        lock = self.storage.parent / ".locks" / self.storage.name / f"{remote.name}.lock"
        for path in (blob, link, lock):
            path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if self._force or not blob.is_file() or blob.stat().st_size != remote.size:
                _check_space(blob.parent, remote.size)
                staged = blob.with_name(f"{blob.name}.incomplete")
                folder = "" if self.kind == "models" else f"{self.kind}/"
                url = f"{self._connection.endpoint}/{folder}{self.name}/resolve/{self.commit}/{quote(name)}"
                Download(self._connection, url, f"{self.name}: {name}", remote, staged, tell, stopped).run()
                os.replace(staged, blob)
            _link(blob, link)


def _entry(entry: dict[str, Any], lfs: dict[str, Any] | None) -> RemoteFile:
    file = RemoteFile(int(lfs["size"] if lfs else entry["size"]), str(entry["blobId"]), str(lfs["sha256"]) if lfs else None)
    if not HASH.fullmatch(file.name):
        raise ValueError(f"hash {file.name!r}")
    return file


def _lfs(entry: dict[str, Any]) -> dict[str, Any] | None:
    sha256 = entry.get("lfs_sha256")
    return {"sha256": sha256, "size": entry.get("lfs_size") or entry["size"]} if sha256 else None


def _written(file: RemoteFile) -> dict[str, Any]:
    large = {"lfs_sha256": file.sha256, "lfs_size": file.size} if file.sha256 else {}
    return {"size": file.size, "blob_id": file.sha1, **large}


def _check_space(folder: Path, size: int) -> None:
    if (free := shutil.disk_usage(folder).free) < size:
        raise HubError(f"no space for {size} bytes in {folder}", found=f"{free} bytes free", remedy="or pass cache_dir=…")


def _link(blob: Path, link: Path) -> None:
    """Let a name stand for a file of the cache: by a link, or by a copy where there are none."""
    staged = link.with_name(f".{link.name}.{secrets.token_hex(4)}")
    try:
        os.symlink(os.path.relpath(blob, link.parent), staged)
    except OSError:
        shutil.copyfile(blob, staged)
    os.replace(staged, link)
