"""One file from the hub: within stated time, taken up where it was cut, and checked before anybody sees it.

huggingface_hub finds the cache, the token and the client; what it does not promise is done here (docs/decisions/008-hub.md).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import importlib
import json
import os
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, get_session

from suffuse.errors import CorruptFileError, HubError
from suffuse.hub.options import HubOptions
from suffuse.version import __version__

_Value = TypeVar("_Value")

http: Any = importlib.import_module(type(get_session()).__module__.partition(".")[0])
"""The HTTP library of huggingface_hub: httpx, or what took its place."""

ATTEMPTS = 4
"""How often in a row something may break off without having moved."""
PAUSE = 0.2
"""Seconds before the second attempt; twice as many before each that follows."""
LISTING_BYTES = 64 * 2**20
MOVING = 1024
"""Bytes that must come within twice the time-out: less is no transfer."""

REMEDIES: dict[int | str, str] = {
    "GatedRepo": "accept its terms at {endpoint}/{name}, then pass token=… of that account, or run: hf auth login",
    "RevisionNotFound": "name a branch, a tag or a commit that is there",
    401: "check the spelling; if it is private, pass token=… of an account that may read it, or run: hf auth login",
    403: "pass token=… of an account that may do this; a token has permissions of its own",
    404: "check the spelling; if it is private, pass token=… of an account that may read it, or run: hf auth login",
    429: "wait a few minutes, or pass token=…, which allows more requests",
}
"""Error code or status → what to do."""
LATER = "try again later; local_files_only=True uses what is in the cache"


class Unreachable(HubError):
    """No answer, or none of use, which may be otherwise at the next attempt."""


@dataclass(frozen=True)
class RemoteFile:
    """What the hub says about a file of a commit.

    Attributes:
        size: Bytes.
        sha1: Hash of the git object; of the pointer, for a large file.
        sha256: Hash of a large file.
    """

    size: int
    sha1: str
    sha256: str | None = None

    @property
    def name(self) -> str:
        """The hash, by which the cache names the file."""
        return self.sha256 or self.sha1

    def digest(self) -> Any:
        """A hash object to feed with the content: it comes out as `name`."""
        return hashlib.sha256() if self.sha256 else hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)


class Connection:
    """The hub as one call of ours sees it.

    Args:
        options: How to fetch.
        name: The repository, for messages.
    """

    def __init__(self, options: HubOptions, name: str) -> None:
        self.name, self.offline = name, bool(options.local_files_only) or constants.HF_HUB_OFFLINE
        self.endpoint = (options.mirror or constants.ENDPOINT).rstrip("/")
        token = options.credentials
        if options.mirror and not isinstance(token, str):
            token = False
        self.headers = build_hf_headers(token=token, library_name="suffuse", library_version=__version__)
        # What is compressed on the way can be neither taken up in the middle nor counted.
        self.headers["accept-encoding"] = "identity"
        self._proxies = tuple(sorted((options.proxies or {}).items()))

    @property
    def client(self) -> Any:
        """The client that huggingface_hub shares, or one that goes through the proxies."""
        return _through(self._proxies) if self._proxies else get_session()

    @contextlib.contextmanager
    def answer(self, url: str, what: str, headers: Mapping[str, str] | None = None) -> Generator[Any]:
        """The answer to a GET, its body still to come; a token goes to the hub's own host only.

        Raises:
            Unreachable: None came in time, it broke off, or the hub is out of order.
            HubError: The hub refuses.
        """
        host, limit = urlsplit(url).netloc, timeout()
        try:
            with self.client.stream("GET", url, headers={**self.headers, **(headers or {})}, timeout=limit) as response:
                if response.status_code not in (200, 206):
                    raise self.refusal(response, what)
                yield response
        except OfflineModeIsEnabled:
            raise HubError(f"{what} is needed, and HF_HUB_OFFLINE is set", remedy="unset it, or pass a folder") from None
        except http.TimeoutException:
            raise Unreachable(
                f"{what}: {host} was silent for {limit:g} s", remedy=f"{LATER}; HF_HUB_DOWNLOAD_TIMEOUT gives it longer"
            ) from None
        except (http.HTTPError, http.StreamError, http.InvalidURL) as error:
            found = f"{type(error).__name__}: {error}"
            raise Unreachable(f"{what}: the connection to {host} failed", found=found, remedy=LATER) from None

    def refusal(self, response: Any, what: str) -> HubError:
        """The error for an answer that is no success."""
        status, code = response.status_code, response.headers.get("x-error-code", "")
        said = response.headers.get("x-error-message") or response.reason_phrase
        kind = Unreachable if status >= 500 or status == 408 else HubError
        remedy = REMEDIES.get(code) or REMEDIES.get(status, LATER)
        return kind(
            f"{what}: the hub answered {status}", found=said, remedy=remedy.format(endpoint=self.endpoint, name=self.name)
        )

    def json(self, path: str, what: str) -> dict[str, Any]:
        """The JSON object that the hub answers with, within twice the time-out.

        Raises:
            HubError: It answers with something else, or not at all.
        """
        started = time.monotonic()

        def attempt() -> bytes:
            body = bytearray()
            with self.answer(f"{self.endpoint}{path}", what) as response:
                for chunk in response.iter_bytes():
                    body += chunk
                    if time.monotonic() > started + 2 * timeout():
                        raise Unreachable(f"{what}: the answer took longer than {2 * timeout():g} s", remedy=LATER)
                    if len(body) > LISTING_BYTES:
                        raise HubError(f"{what}: the answer is larger than {LISTING_BYTES} bytes")
            return bytes(body)

        body = insist(attempt)
        try:
            value = json.loads(body)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise HubError(
                f"{what}: the answer is not the hub's",
                found=body[:80].decode(errors="replace"),
                remedy="a proxy or a login page may stand between: open the address in a browser, or set HF_ENDPOINT",
            )
        return value


def timeout() -> float:
    """Seconds of silence to bear: HF_HUB_DOWNLOAD_TIMEOUT, 10 by default."""
    return constants.HF_HUB_DOWNLOAD_TIMEOUT


def insist(attempt: Callable[[], _Value], moved: Callable[[], float] = lambda: 0.0) -> _Value:
    """Repeat what is unreachable, as long as it moves: give up after `ATTEMPTS` in a row, or twice the time-out, without.

    Args:
        attempt: What to do; it raises `Unreachable` for what may be tried again.
        moved: When it last got on.
    """
    tries, since = 0, time.monotonic()
    while True:
        try:
            return attempt()
        except Unreachable:
            if moved() > since:
                tries, since = 0, moved()
            tries += 1
            pause = PAUSE * 2 ** (tries - 1)
            # A little less than twice: two time-outs, one after the other, are enough.
            if tries == ATTEMPTS or time.monotonic() + pause - since > 1.9 * timeout():
                raise
            time.sleep(pause)


class Download:
    """The way of one file into a place of its own, to be moved to the cache when it is whole and right.

    Args:
        connection: The hub.
        url: Where the file is.
        what: The file, for messages.
        remote: Its size and hash.
        path: Where it goes; what is there is taken up.
        tell: Called with the number of bytes that came.
        stopped: Asked in between whether to give up.
    """

    def __init__(
        self,
        connection: Connection,
        url: str,
        what: str,
        remote: RemoteFile,
        path: Path,
        tell: Callable[[int], Any],
        stopped: Callable[[], bool],
    ) -> None:
        self.connection, self.url, self.what, self.remote, self.path = connection, url, what, remote, path
        self.tell, self.stopped = tell, stopped
        self.moved = 0.0
        self._restart()

    def run(self) -> None:
        """Bring the file in.

        Raises:
            HubError: It could not be had; what came is kept for the next attempt.
            CorruptFileError: It is not the file that the hub announced; nothing is kept.
        """
        with open(self.path, "a+b", buffering=0) as file:
            resumed = self._take_up(file)
            insist(lambda: self._attempt(file), lambda: self.moved)
            if resumed and not self._right:  # what was there may have been the part that is wrong
                self._restart(file)
                insist(lambda: self._attempt(file), lambda: self.moved)
            os.fsync(file.fileno())
        if not self._right:
            self.path.unlink()
            raise CorruptFileError(
                f"{self.what} is not what the hub announced: its hash is wrong",
                found=self.digest.hexdigest(),
                expected=self.remote.name,
                remedy="nothing was kept: load it again; if it stays so, something on the way changes files",
            )

    @property
    def _right(self) -> bool:
        return self.digest.hexdigest() == self.remote.name

    def _restart(self, file: BinaryIO | None = None) -> None:
        self.received, self.digest = 0, self.remote.digest()
        if file is not None:
            file.truncate(0)

    def _take_up(self, file: BinaryIO) -> bool:
        """Read what an earlier run left; whether there was something."""
        if os.fstat(file.fileno()).st_size > self.remote.size:
            self._restart(file)
        file.seek(0)
        while chunk := file.read(1 << 20):
            self.digest.update(chunk)
            self.received += len(chunk)
        self.tell(self.received)
        return self.received > 0

    def _attempt(self, file: BinaryIO) -> None:
        size = self.remote.size
        if self.received == size:
            return
        wanted = {"range": f"bytes={self.received}-"} if self.received else {}
        with self.connection.answer(self.url, self.what, wanted) as response:
            if self.received and not str(response.headers.get("content-range", "")).startswith(f"bytes {self.received}-"):
                self._restart(file)  # the whole file comes, whatever part was asked for
            mark, at_mark = time.monotonic(), self.received
            for chunk in response.iter_bytes():
                if self.stopped():
                    raise HubError(f"{self.what}: the download was stopped")
                self._keep(file, chunk, response)
                if (now := time.monotonic()) > mark + 2 * timeout():
                    if self.received < at_mark + MOVING:
                        raise HubError(f"{self.what}: fewer than {MOVING} bytes in {2 * timeout():g} s", remedy=LATER)
                    mark, at_mark = now, self.received
        if self.received < size:
            raise Unreachable(
                f"{self.what} broke off", found=f"{self.received} of {size} bytes", remedy="what came is kept: load it again"
            )

    def _keep(self, file: BinaryIO, chunk: bytes, response: Any) -> None:
        if self.received + len(chunk) > self.remote.size:
            page = "html" in response.headers.get("content-type", "")
            file.truncate(0)
            raise CorruptFileError(
                f"{self.what} is not what the hub announced: " + ("a web page came" if page else "more bytes came"),
                expected=f"{self.remote.size} bytes",
                remedy="a proxy or a login page may stand between" if page else "load it again",
            )
        file.write(chunk)
        self.digest.update(chunk)
        self.received += len(chunk)
        self.moved = time.monotonic()
        self.tell(len(chunk))


@functools.lru_cache(maxsize=4)
def _through(proxies: tuple[tuple[str, str], ...]) -> Any:
    """A client that goes through proxies, one a scheme."""
    mounts = {
        f"{scheme.removesuffix('://')}://": http.HTTPTransport(proxy=address if "://" in address else f"http://{address}")
        for scheme, address in proxies
    }
    client = http.Client(mounts=mounts, follow_redirects=True)
    atexit.register(client.close)
    return client
