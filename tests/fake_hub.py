"""A model hub on this machine: the requests that huggingface_hub makes, answered as the real hub answers them.

Like the real one it has two hosts (here: ports): the site, and a storage host that large files are redirected to.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

import warm

LARGE = (".safetensors", ".bin", "tokenizer.json")  # kept in large file storage, as on the real hub


@dataclass
class Repo:
    """What one repository holds, and how it turns people away."""

    files: dict[str, bytes]
    private: bool = False
    claimed: dict[str, int] = field(default_factory=dict)  # sizes that are not the files' own
    refusal: tuple[int, str, str] | None = None  # status, X-Error-Code and X-Error-Message
    refuses_files_only: bool = False  # a gated repository can be looked at by everyone

    @property
    def commit(self) -> str:
        return hashlib.sha1(b"".join(name.encode() + data for name, data in sorted(self.files.items()))).hexdigest()

    def size(self, name: str) -> int:
        return self.claimed.get(name, len(self.files[name]))


@dataclass(frozen=True)
class Request:
    """One request as it arrived. `host` is "site" or "storage"."""

    host: str
    method: str
    path: str
    range: str | None
    authorization: str | None


class FakeHub:
    """Use as a context manager; `url` is what HF_ENDPOINT must be. port: of the site; 0 is any."""

    def __init__(self, port: int = 0) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.cut_after: int | None = None  # storage sends no byte of a file beyond this one, and hangs up ...
        self.cuts = 1 << 30  # ... this many times; then it is well again
        self.ignores_ranges = False  # storage always sends whole files
        self.corrupt: str | None = None  # storage changes a byte of this file
        self.stored: dict[str, bytes] = {}  # large files that were uploaded, by their digest
        self.upload_refusal: tuple[int, str, str] | None = None  # as Repo.refusal
        self.silent = False  # every request is accepted and none answered
        self.held = threading.Event()  # set as soon as storage stands still ...
        self.hold_after: int | None = None  # ... after this many bytes, for as long as the hub lives
        self.closing = threading.Event()
        self.site, self.storage = self._server("site", port), self._server("storage", 0)
        self.url = f"http://127.0.0.1:{self.site.server_address[1]}"
        self.storage_url = f"http://127.0.0.1:{self.storage.server_address[1]}"

    def _server(self, host: str, port: int) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"hub": self, "host": host})
        server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return server

    def add(self, name: str, folder: Path, **more: bytes) -> Repo:
        """Publish a folder's files, and `more` of them (`pytorch_model__bin=...` is pytorch_model.bin)."""
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        files.update({key.replace("__", "."): data for key, data in more.items()})
        self.repos[name] = Repo(files)
        return self.repos[name]

    def asked_for(self, file: str) -> list[Request]:
        """The requests for one file's content."""
        return [request for request in self.requests if request.path.endswith("/" + file)]

    def stop(self) -> None:
        """After this nobody listens on `url` any more."""
        self.closing.set()
        for server in (self.site, self.storage):
            server.shutdown()
            server.server_close()

    def __enter__(self) -> FakeHub:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self.closing.is_set():
            self.stop()


@functools.cache
def own_port() -> int:
    """A port for this process's hubs, one after the other: below those that are given to whoever asks for any."""
    for port in range(20000 + os.getpid() % 10000, 32000):
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


@contextlib.contextmanager
def environment(folder: Path, **more: str) -> Iterator[dict[str, str]]:
    """What a user's environment says of the hub: that it is at `own_port`, and the folder of its cache.

    It stays the same for all tests of a file, so that their commands can be forked.
    """
    site = f"http://127.0.0.1:{own_port()}"
    found = {"HF_ENDPOINT": site, "HF_HOME": str(folder), "HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "0"}
    found = {**found, "HF_TOKEN": "", "NO_PROXY": "*", "no_proxy": "*", **more}
    warm.begin_in({**os.environ, **found})
    yield found
    warm.end({**os.environ, **found})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub
    host: str

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._take()

    def do_PUT(self) -> None:
        self._take()

    def _take(self) -> None:
        """An upload, as the real hub takes one: make the repository, ask which files are large, store them, commit."""
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.hub.requests.append(Request(self.host, self.command, path, None, self.headers["Authorization"]))
        if self.host == "storage":
            self.hub.stored[path.rpartition("/")[2]] = body
            return self._send(200, b"", {})
        if self.hub.upload_refusal:
            return self._refuse(*self.hub.upload_refusal)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.hub.repos.setdefault(
                name,
                Repo(
                    {}, private="private" in (asked.get("visibility"), *(["private"] if asked.get("private") else []))
                ),
            )
            return self._json({"url": f"{self.hub.url}/{name}", "id": name})
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/preupload/[^/]+", path):
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular"} for f in files
            ]
            return self._json({"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.hub.storage_url}/upload/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        match = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/commit/[^/]+", path)
        assert match, path
        repo = self.hub.repos[match[1]]
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                repo.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                repo.files[entry["value"]["path"]] = self.hub.stored[entry["value"]["oid"]]
        url = f"{self.hub.url}/{match[1]}"
        return self._json({"commitUrl": f"{url}/commit/{repo.commit}", "commitOid": repo.commit, "success": True})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def log_message(self, *_: Any) -> None:
        """Quiet: the tests look at `FakeHub.requests`."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        headers = self.headers
        self.hub.requests.append(Request(self.host, self.command, path, headers["Range"], headers["Authorization"]))
        if self.hub.silent:
            self.hub.closing.wait()
            self.close_connection = True
        elif self.host == "storage":
            _, name, _, file = re.fullmatch(r"(/([\w.-]+/[\w.-]+))/(\w+)/(.+)", path).groups()  # type: ignore[union-attr]
            self._content(self.hub.repos[name].files[file], {})
        elif match := re.fullmatch(r"/api/(?:models/|(datasets/))([\w.-]+/[\w.-]+)(/revision/[^/]+|/tree/.+)?", path):
            self._about((match[1] or "") + match[2], tree=(match[3] or "").startswith("/tree/"))
        elif match := re.fullmatch(r"/((?:datasets/)?[\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            self._file(match[1], match[3])
        else:
            self._send(404, b"", {})

    def _about(self, name: str, tree: bool) -> None:
        """What is in a repository: /api/models/NAME with ?blobs=true, or its listing."""
        repo = self.hub.repos.get(name)
        if repo is None:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        if repo.refusal and not repo.refuses_files_only:
            return self._refuse(*repo.refusal)
        listing: list[dict[str, Any]] = []
        siblings: list[dict[str, Any]] = []
        for file, data in sorted(repo.files.items()):
            size, blob = repo.size(file), _git_id(data)
            entry: dict[str, Any] = {"type": "file", "path": file, "size": size, "oid": blob}
            sibling: dict[str, Any] = {"rfilename": file, "size": size, "blobId": blob}
            if file.endswith(LARGE):
                sha256 = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": size, "pointerSize": 134}
                sibling["lfs"] = {"sha256": sha256, "size": size, "pointerSize": 134}
            listing.append(entry)
            siblings.append(sibling)
        about = {"id": name, "modelId": name, "sha": repo.commit, "tags": [], "siblings": siblings}
        about["private"] = repo.private
        return self._send(200, json.dumps(listing if tree else about).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str, file: str) -> None:
        """/NAME/resolve/REVISION/FILE: the content of a small file, the way to a large one."""
        repo = self.hub.repos.get(name)
        if repo is None:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        if repo.refusal:
            return self._refuse(*repo.refusal)
        if file not in repo.files:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        data, commit = repo.files[file], {"X-Repo-Commit": repo.commit}
        if not file.endswith(LARGE):
            return self._content(data, {**commit, "ETag": f'"{_git_id(data)}"'})
        linked = {"X-Linked-Size": str(repo.size(file)), "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"'}
        return self._send(302, b"", {**commit, **linked, "Location": f"{self.hub.storage_url}/{name}/large/{file}"})

    def _content(self, data: bytes, headers: dict[str, str]) -> None:
        """The bytes of a file, or the range that was asked for."""
        start = 0
        headers = {**headers, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        whole_only = self.host == "storage" and self.hub.ignores_ranges
        if not whole_only and (match := re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")):
            start = int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if start and start >= len(data):
            return self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        if self.host == "storage" and self.command == "GET":
            if self.hub.corrupt and self.path.endswith("/" + self.hub.corrupt):
                data = data[:-1] + bytes([data[-1] ^ 1])
            stop = self.hub.cut_after if self.hub.hold_after is None else self.hub.hold_after
            if stop is not None and stop < len(data) and self.hub.cuts:
                self.hub.cuts -= 1
                return self._break_off(data[start:stop], len(data) - start, 206 if start else 200, headers)
        return self._send(206 if start else 200, data[start:], headers)

    def _break_off(self, data: bytes, promised: int, status: int, headers: dict[str, str]) -> None:
        """Promise more than is sent."""
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(promised)}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()
        if self.hub.hold_after is not None:
            self.hub.held.set()
            self.hub.closing.wait()
        self.close_connection = True

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message, "Content-Type": "application/json"}
        self._send(
            status, json.dumps({"error": message}).encode(), {**headers, **({"X-Error-Code": code} if code else {})}
        )

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
