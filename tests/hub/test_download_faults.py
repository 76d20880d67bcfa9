from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hub_server import blob_sha1

from suffuse.errors import CorruptFileError, HubError, SuffuseError
from suffuse.hub.options import HubOptions
from suffuse.hub.sources import opened

NAME, FILE = "org/files", "big.safetensors"
CONTENT = bytes(range(256)) * 2000
FILES = {FILE: CONTENT, "config.json": b'{"a": 1}'}


@pytest.fixture
def files(hub):
    hub.commit(NAME, FILES)
    return hub


def fetched(*names: str, **options) -> Path:
    with opened(NAME, HubOptions(**options)) as source:
        source.fetch(names)
    return source.folder


def incomplete(folder: Path) -> list[Path]:
    return list(folder.parent.parent.glob("blobs/*.incomplete"))


def test_what_is_fetched_is_what_was_stored_and_nothing_is_left_over(files):
    folder = fetched(*FILES)
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert incomplete(folder) == []


def test_a_cut_is_taken_up_from_the_last_byte(files):
    files.misbehave[FILE] = ["cut", "cut", "cut", "cut", "cut", "cut"]
    assert (fetched(FILE) / FILE).read_bytes() == CONTENT
    starts = [int(h["range"][6:-1]) for h in files.headers if "range" in h]
    assert starts == sorted(starts)
    assert starts[0] > 0


def test_a_server_that_ignores_ranges_is_taken_from_the_start(files):
    files.misbehave[FILE] = ["cut", "no ranges"]
    assert (fetched(FILE) / FILE).read_bytes() == CONTENT


@pytest.mark.parametrize("name", list(FILES))
@pytest.mark.parametrize("trick", ["wrong byte", "longer"])
def test_a_wrong_byte_is_found_and_the_next_run_fetches_again(files, name, trick):
    files.misbehave[name] = [trick]
    with pytest.raises(CorruptFileError, match=f"org/files: {name} is not what the hub announced"):
        fetched(name)
    folder = fetched(name)
    assert (folder / name).read_bytes() == FILES[name]


def test_a_part_that_was_wrong_is_thrown_away_within_the_call(files):
    import hashlib

    folder = fetched("config.json")
    part = folder.parent.parent / "blobs" / f"{hashlib.sha256(CONTENT).hexdigest()}.incomplete"
    part.write_bytes(b"not the beginning")
    assert (fetched(FILE) / FILE).read_bytes() == CONTENT


@pytest.mark.parametrize("place", ["/api/", FILE])
@pytest.mark.parametrize("trick", ["503", "silent", "hang up"])
def test_one_failure_is_borne(files, place, trick):
    files.misbehave[place] = [trick]
    assert (fetched(FILE) / FILE).read_bytes() == CONTENT


@pytest.mark.parametrize("place", ["/api/", FILE])
@pytest.mark.parametrize(
    ("trick", "message"),
    [("503", "the hub answered 503"), ("silent", r"was silent for 0\.3 s"), ("hang up", "the connection to .* failed")],
)
def test_a_hub_that_stays_out_of_order_is_told_within_twice_the_time_out(files, place, trick, message):
    files.misbehave[place] = [trick] * 100
    started = time.monotonic()
    with pytest.raises(HubError, match=message):
        fetched(FILE)
    assert time.monotonic() - started < 1.5


@pytest.mark.parametrize(("place", "message"), [("/api/", "took longer than 0.6 s"), (FILE, "fewer than 1024 bytes in 0.6 s")])
def test_a_hub_that_only_drips_is_given_up(files, place, message):
    files.misbehave[place] = ["drip"] * 10
    started = time.monotonic()
    with pytest.raises(HubError, match=re.escape(message)):
        fetched(FILE)
    assert time.monotonic() - started < 1.5


@pytest.mark.parametrize(("place", "message"), [("/api/", "the answer is not the hub's"), ("config.json", "a web page came")])
def test_a_login_page_is_told_from_the_hub(files, place, message):
    files.misbehave[place] = ["html"] * 5
    with pytest.raises(SuffuseError, match=message):
        fetched("config.json")


@pytest.mark.parametrize("trick", ["503", "silent", "hang up"])
def test_a_hub_that_is_out_of_order_leaves_the_cache_in_use(files, trick):
    folder = fetched(FILE)
    files.misbehave["/api/"] = [trick] * 100
    with pytest.warns(UserWarning, match="what is in the cache is used"):
        assert fetched(FILE) == folder


def test_a_cut_in_a_new_commit_leaves_the_old_one_whole_offline(files):
    old = fetched(FILE)
    files.commit(NAME, {FILE: CONTENT + b"new"})
    files.misbehave[FILE] = ["503"] * 100
    with pytest.raises(HubError, match="503"):
        fetched(FILE)
    assert fetched(FILE, local_files_only=True) == old
    files.misbehave.clear()
    assert (fetched(FILE) / FILE).read_bytes() == CONTENT + b"new"


def test_a_truncated_blob_is_fetched_again(files):
    folder = fetched(FILE)
    (folder / FILE).resolve().write_bytes(CONTENT[:1000])
    assert (fetched(FILE) / FILE).read_bytes() == CONTENT


def test_three_at_once_make_one_download(files):
    results: list[bytes] = []
    threads = [threading.Thread(target=lambda: results.append((fetched(FILE) / FILE).read_bytes())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [CONTENT] * 3
    assert len([path for path in files.requests if FILE in path]) == 1


SCRIPT = f"""
import sys
from suffuse.hub.options import HubOptions
from suffuse.hub.sources import opened
with opened({NAME!r}, HubOptions(cache_dir=sys.argv[1])) as source:
    source.fetch([{FILE!r}])
print((source.folder / {FILE!r}).stat().st_size)
"""


def test_a_killed_download_is_taken_up_by_the_next_process(files, tmp_path):
    files.misbehave[FILE] = ["cut", "silent", "silent"]
    environment = {**os.environ, "HF_ENDPOINT": files.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DOWNLOAD_TIMEOUT": "5"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "shared")]
    process = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 20
    while not any(path.stat().st_size for path in tmp_path.glob("shared/*/blobs/*.incomplete")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    files.misbehave.clear()
    files.forget()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(CONTENT)
    assert any("range" in headers for headers in files.headers)


@pytest.mark.parametrize("call", ["open", "os.replace", "os.fsync", "os.symlink"])
def test_a_disk_that_fails_at_any_call_is_told_and_the_next_run_succeeds(files, monkeypatch, call):
    module, _, name = call.rpartition(".")
    target = __import__("builtins") if not module else os
    real = getattr(target, name)
    for number in range(1, 30):
        count = 0

        def failing(*args, **kwargs):
            nonlocal count
            if call == "open" and not (args[0:1] and str(args[0]).endswith(".incomplete")):
                return real(*args, **kwargs)
            count += 1
            if count == number:  # noqa: B023
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(target, name, failing)
            try:
                folder = fetched(FILE, "config.json", force_download=True)
            except HubError as error:
                assert "could not be stored" in str(error)  # noqa: PT017
                continue
        if count < number:
            break
    assert (fetched(FILE) / FILE).read_bytes() == CONTENT
    assert folder


def test_the_cache_may_be_read_only_once_it_is_full(files, monkeypatch):
    folder = fetched(*FILES)
    storage = folder.parent.parent
    for path in [storage, *storage.rglob("*")]:
        if path.is_dir():
            path.chmod(0o555)
    try:
        assert fetched(*FILES) == folder
    finally:
        for path in [storage, *storage.rglob("*")]:
            if path.is_dir():
                path.chmod(0o755)


def test_small_files_are_known_by_the_hash_git_gives_them(files):
    folder = fetched("config.json")
    assert (folder / "config.json").resolve().name == blob_sha1(FILES["config.json"])
