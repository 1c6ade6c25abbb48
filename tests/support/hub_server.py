"""A small server that speaks the Hub's protocol on loopback: create, preupload, LFS, commit, branches, downloads, errors.

It answers what the installed `huggingface_hub` asks, and keeps what it was sent: `server.repos["me/name"].files["main"]`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

TOKEN = "hf_" + "A" * 34
_COMMIT = "0" * 39 + "1"


@dataclass
class Repo:
    """A repository: whether it is private, and its files by branch."""

    private: bool
    files: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})


class HubServer(ThreadingHTTPServer):
    """The server.

    Attributes:
        repos: by id.
        objects: what was uploaded by LFS, by SHA-256.
        fail: (pattern of "METHOD path", status) of answers that are errors; status 0 drops the connection.
        asked: every request, "METHOD path".
        bodies: everything that was sent.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.fail: tuple[str, int] | None = None
        self.asked: list[str] = []
        self.bodies: list[bytes] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def _serve(self) -> None:
        method, path = self.command, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append(f"{method} {path}")
        self.server.bodies.append(body)
        if self.server.fail and re.search(self.server.fail[0], f"{method} {path}"):
            status = self.server.fail[1]
            if not status:
                self.close_connection = True
                self.connection.close()
                return
            self._answer({"error": f"refused with {status}"}, status)
            return
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.startswith("/lfs/"):
            self._answer({"error": "Invalid username or password."}, 401)
            return
        for pattern, answer in _ROUTES:
            if found := re.fullmatch(pattern, f"{method} {path}"):
                answer(self, body, *found.groups())
                return
        self._answer({"error": f"no {method} {path}"}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = _serve

    def _answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def who(self, body: bytes) -> None:
        self._answer({"name": "me", "type": "user", "orgs": []})

    def card(self, body: bytes) -> None:
        self._answer({"errors": [], "warnings": []})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        status = 409 if name in self.server.repos else 200
        self.server.repos.setdefault(name, Repo(asked.get("private") is True or asked.get("visibility") == "private"))
        self._answer({"url": f"{self.server.url}/{name}", "id": name, "name": name}, status)

    def branch(self, body: bytes, repo: str, name: str) -> None:
        files = self.server.repos[repo].files
        status = 409 if name in files else 200
        files.setdefault(name, dict(files["main"]))
        self._answer({}, status)

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        if revision not in self.server.repos[repo].files:
            self._answer({"error": f"Invalid rev id: {revision}"}, 404, {"X-Error-Code": "RevisionNotFound"})
            return
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".pt", ".png")) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._answer({"files": files})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        objects = []
        for entry in json.loads(body)["objects"]:
            done = entry["oid"] in self.server.objects
            upload = {"upload": {"href": f"{self.server.url}/lfs/{entry['oid']}"}}
            objects.append({**entry, **({} if done else {"actions": upload})})
        self._answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self._answer({})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        files = self.server.repos[repo].files[revision]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        self._answer({"success": True, "commitOid": _COMMIT, "commitUrl": f"{self.server.url}/{repo}/commit/{_COMMIT}"})

    def info(self, body: bytes, repo: str, revision: str | None = None) -> None:
        if repo not in self.server.repos:
            self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return
        files = self.server.repos[repo].files[revision or "main"]
        siblings = [{"rfilename": name} for name in sorted(files)]
        self._answer({"id": repo, "modelId": repo, "sha": _COMMIT, "siblings": siblings, "private": False, "tags": []})

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        branch = "main" if revision == _COMMIT else revision
        data = self.server.repos[repo].files[branch].get(path)
        if data is None:
            self._answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": _COMMIT})
            return
        etag = hashlib.sha256(data).hexdigest()
        self._answer(data, 200, {"ETag": f'"{etag}"', "X-Repo-Commit": _COMMIT})


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    (r"GET /api/whoami-v2", _Handler.who),
    (r"POST /api/validate-yaml", _Handler.card),
    (r"POST /api/repos/create", _Handler.create),
    (rf"POST /api/models/{_REPO}/branch/(.+)", _Handler.branch),
    (rf"POST /api/models/{_REPO}/preupload/(.+)", _Handler.preupload),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (r"PUT /lfs/(\w+)", _Handler.lfs_put),
    (rf"POST /api/models/{_REPO}/commit/(.+)", _Handler.commit),
    (rf"GET /api/models/{_REPO}/revision/(.+)", _Handler.info),
    (rf"GET /api/models/{_REPO}", _Handler.info),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
]


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """A running server."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def hub(monkeypatch):
    """The server; the client is online, logged in, and without the Xet protocol, which is not spoken here."""
    with hub_server() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # which remembers its address
        no_wait = SimpleNamespace(sleep=lambda seconds: None, time=time.time)  # between the client's retries
        monkeypatch.setattr("huggingface_hub.utils._http.time", no_wait)
        yield server
