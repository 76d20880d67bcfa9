"""A stand-in for the hub: the part of its HTTP API that loading and publishing use, and ways to misbehave."""

from __future__ import annotations

import base64
import functools
import hashlib
import http.server
import json
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_right"
LARGE = (".safetensors", ".bin", ".onnx", ".msgpack")


@dataclass
class Repo:
    commits: dict = field(default_factory=dict)
    branches: dict = field(default_factory=dict)
    private: bool = False
    messages: list = field(default_factory=list)


@dataclass
class Hub:
    """What the server holds, what it was asked, and how it answers: `misbehave[path part]` is a list of tricks, used in turn."""

    repos: dict = field(default_factory=dict)
    requests: list = field(default_factory=list)
    headers: list = field(default_factory=list)
    misbehave: dict = field(default_factory=dict)
    objects: dict = field(default_factory=dict)
    redirect: str = ""
    url: str = ""

    def commit(self, name: str, files: dict[str, bytes], branch: str = "main", kind: str = "models") -> str:
        repo = self.repos.setdefault((kind, name), Repo())
        old = repo.commits.get(repo.branches.get(branch), {})
        tree = {**old, **files}
        commit = hashlib.sha1(repr(sorted((k, hashlib.sha1(v).hexdigest()) for k, v in tree.items())).encode()).hexdigest()
        repo.commits[commit], repo.branches[branch] = tree, commit
        return commit

    def add_folder(self, name: str, folder: Path, **options) -> str:
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return self.commit(name, files, **options)

    def fetched(self) -> set[str]:
        """The names of the files that were asked for."""
        return {path.split("/resolve/")[1].split("/", 1)[1] for path in self.requests if "/resolve/" in path}

    def forget(self) -> None:
        self.requests.clear()
        self.headers.clear()


def blob_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@functools.cache
def sibling(name: str, content: bytes) -> dict:
    entry = {"rfilename": name, "size": len(content), "blobId": blob_sha1(content)}
    if name.endswith(LARGE):
        entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    # ------------------------------------------------------------ answering

    def answer(self, body, status=200, headers=None):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def trick(self) -> str | None:
        for part, tricks in self.hub.misbehave.items():
            if part in self.path and tricks:
                return tricks.pop(0)
        return None

    def handle_trick(self, trick) -> bool:
        if trick == "503":
            self.answer(b"out of order", 503)
        elif trick == "html":
            self.answer(b"<html>log in</html>" * 100, headers={"content-type": "text/html"})
        elif trick == "silent":
            time.sleep(3)
            self.close_connection = True
        elif trick == "hang up":
            self.close_connection = True
        else:
            return False
        return True

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urlsplit(self.path).path
        self.hub.requests.append(path)
        self.hub.headers.append(dict(self.headers))
        trick = self.trick()
        if self.handle_trick(trick):
            return
        if trick == "drip" and "/api/" in path:
            self.send_response(200)
            self.end_headers()
            for _ in range(30):
                self.wfile.write(b" ")
                time.sleep(0.1)
            self.close_connection = True
            return
        parts = path.strip("/").split("/")
        if "resolve" in parts:
            kind = parts.pop(0) if parts[0] == "datasets" else "models"
            at = parts.index("resolve")
            name, revision, file = "/".join(parts[:at]), parts[at + 1], unquote("/".join(parts[at + 2 :]))
            self.resolve(kind, name, revision, file, trick)
        elif parts[0] == "api":
            name, _, revision = "/".join(parts[2:]).partition("/revision/")
            self.listing(parts[1], name, unquote(revision) or "main")
        else:
            self.answer({"error": "?"}, 404)

    def repo(self, kind, name):
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and self.headers.get("authorization") != f"Bearer {TOKEN}"):
            self.answer(
                {"error": "Repository not found"},
                404 if repo is None else 401,
                {"x-error-code": "RepoNotFound", "x-error-message": "Repository not found"},
            )
            return None
        return repo

    def listing(self, kind, name, revision):
        repo = self.repo(kind, name)
        if repo is None:
            return
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            headers = {"x-error-code": "RevisionNotFound", "x-error-message": f"Invalid rev id: {revision}"}
            self.answer({"error": "Invalid rev id"}, 404, headers)
            return
        siblings = [sibling(file, content) for file, content in sorted(repo.commits[commit].items())]
        self.answer({"id": name, "sha": commit, "siblings": siblings})

    def resolve(self, kind, name, revision, file, trick):
        repo = self.repo(kind, name)
        if repo is None:
            return
        content = repo.commits.get(repo.branches.get(revision, revision), {}).get(file)
        if content is None:
            self.answer({"error": "Entry not found"}, 404, {"x-error-code": "EntryNotFound"})
            return
        entry = sibling(file, content)
        known = {"etag": f'"{entry["lfs"]["sha256"] if "lfs" in entry else entry["blobId"]}"'}
        known["x-repo-commit"] = repo.branches.get(revision, revision)
        if self.hub.redirect and not self.headers["host"].startswith("localhost"):
            self.answer(b"", 302, {"location": f"{self.hub.redirect}{self.path}"})
            return
        if trick == "wrong byte":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if trick == "longer":
            content += b"more"
        start, status, headers = 0, 200, known
        wanted = self.headers.get("range")
        if wanted and trick != "no ranges":
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            status, headers = 206, {**known, "content-range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        if trick == "drip":
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            for byte in content[:30]:
                self.wfile.write(bytes([byte]))
                time.sleep(0.1)
            self.close_connection = True
            return
        if trick == "cut":
            self.send_response(status)
            for key, value in {"content-length": len(content) - start, **headers}.items():
                self.send_header(key, str(value))
            self.end_headers()
            self.wfile.write(content[start : start + max(1, (len(content) - start) // 2)])
            self.wfile.flush()
            self.close_connection = True
            return
        self.answer(content[start:], status, headers)

    # ------------------------------------------------------------ publishing

    def body(self):
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def do_PUT(self):
        self.hub.requests.append(self.path)
        content = self.body()
        self.hub.objects[hashlib.sha256(content).hexdigest()] = content
        self.answer(b"")

    def do_POST(self):
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        self.hub.requests.append(path)
        body = self.body()
        if self.handle_trick(self.trick()):
            return
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            exists = ("models", name) in self.hub.repos
            self.hub.repos.setdefault(("models", name), Repo(private=wanted.get("visibility") == "private"))
            if not exists:
                self.hub.commit(name, {".gitattributes": b""})
            self.answer({"url": f"{self.hub.url}/{name}", "id": name}, 409 if exists else 200)
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular", "shouldIgnore": False}
                for f in files
            ]
            self.answer({"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [{**o, "actions": {"upload": {"href": f"{self.hub.url}/upload/{o['oid']}", "header": {}}}} for o in objects]
            self.answer({"transfer": "basic", "objects": actions}, headers={"content-type": "application/json"})
        elif "/commit/" in path:
            self.commit(path, query, [json.loads(line) for line in body.splitlines()])
        else:
            self.answer({"error": path}, 404)

    def commit(self, path, query, lines):
        name = path.removeprefix("/api/models/").split("/commit/")[0]
        files, message = {}, ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        branch = "refs/pr/1" if query.get("create_pr") else "main"
        repo = self.hub.repos["models", name]
        repo.branches.setdefault(branch, repo.branches["main"])
        commit = self.hub.commit(name, files, branch)
        repo.messages.append(message)
        url = f"{self.hub.url}/{name}"
        proposed = f"{url}/discussions/1" if query.get("create_pr") else None
        self.answer({"commitUrl": f"{url}/commit/{commit}", "commitOid": commit, "pullRequestUrl": proposed, "success": True})


def serve(hub: Hub) -> http.server.ThreadingHTTPServer:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # clients that break off are part of the tests
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server
