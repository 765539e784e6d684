"""A stand-in for the Hugging Face Hub on loopback: as much of its API as `snapshot_download` uses, and its failures."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
LFS_SUFFIXES = (".safetensors", ".bin")
TOKEN = "hf_good"


@dataclass(frozen=True, slots=True)
class Asked:
    """One request, as it came."""

    method: str
    path: str
    start: int  # of its Range
    token: str | None


@dataclass(slots=True)
class FakeHub:
    """One repository and how it behaves; every field but the first may change while it serves.

    Large files are served as the Hub does it: /resolve answers with a redirect to another host, named by their SHA-256.
    """

    files: Mapping[str, bytes]
    hub_id: str = "somebody/tiny"
    is_gated: bool = False  # files need TOKEN
    status: int | None = None  # of every answer
    headers: Mapping[str, str] = field(default_factory=dict)  # of every error
    sent_instead: Mapping[str, bytes] = field(default_factory=dict)  # content of a file that is not what it should be
    cuts: dict[str, list[int]] = field(default_factory=dict)  # of a file: after so many bytes, one for each request
    asked: list[Asked] = field(default_factory=list)
    num_sent: dict[str, int] = field(default_factory=dict)  # bytes of each file
    _server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        """What HF_ENDPOINT must be."""
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.server_port}"

    def fetched(self) -> dict[str, list[int]]:
        """Return where each request for content began, by file."""
        starts: dict[str, list[int]] = {}
        for one in self.asked:
            if one.method == "GET" and (name := self.name_of(one.path)):
                starts.setdefault(name, []).append(one.start)
        return starts

    def name_of(self, path: str) -> str | None:
        """Return which file a path is about."""
        if match := re.fullmatch(rf"/{self.hub_id}/resolve/{COMMIT}/(.+)", path):
            return unquote(match[1])
        return next((name for name in self.files if path == f"/cdn/{self.sha256(name)}"), None)

    def sha256(self, name: str) -> str:
        """Return the name that the Hub gives a large file."""
        return hashlib.sha256(self.files[name]).hexdigest()

    def git_sha1(self, name: str) -> str:
        """Return the name that git gives a small file."""
        data = self.files[name]
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening: connections are refused from now on."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, format: str, *args: Any) -> None:
        """Keep still: what is asked is in `asked`."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        with suppress(ConnectionError):  # the client has left
            self._answer()

    def _answer(self) -> None:
        hub, path = self.hub, urlsplit(self.path).path
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        token = (self.headers.get("Authorization") or "Bearer ").removeprefix("Bearer ") or None
        hub.asked.append(Asked(self.command, path, int(start[1]) if start else 0, token))
        model, name = f"/api/models/{hub.hub_id}", hub.name_of(path)
        if hub.status is not None:
            self._error(hub.status, "", "the stand-in was told to fail")
        elif path in (model, f"{model}/revision/main"):
            siblings = [{"rfilename": file} for file in hub.files]
            self._json({"id": hub.hub_id, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False})
        elif path == f"{model}/tree/{COMMIT}":
            self._json([self._entry(file) for file in hub.files])
        elif name is None:
            self._error(401 if token is None else 404, "RepoNotFound", "Repository not found")
        elif path.startswith("/cdn/"):
            assert token is None, "a token has left the Hub"
            self._content(name, int(start[1]) if start else 0, {"ETag": f'"{hub.sha256(name)}"'})
        elif hub.is_gated and token != TOKEN:
            self._error(401 if token is None else 403, "GatedRepo", f"Access to model {hub.hub_id} is restricted.")
        elif name.endswith(LFS_SUFFIXES):
            self._redirect(name)
        else:
            etag = f'"{hub.git_sha1(name)}"'
            self._content(name, int(start[1]) if start else 0, {"ETag": etag, "X-Repo-Commit": COMMIT})

    def _entry(self, name: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(self.hub.files[name])}
        entry["oid"] = self.hub.git_sha1(name)
        if name.endswith(LFS_SUFFIXES):
            entry["lfs"] = {"oid": self.hub.sha256(name), "size": entry["size"], "pointerSize": 134}
        return entry

    def _redirect(self, name: str) -> None:
        sha256, port = self.hub.sha256(name), self.server.server_port  # type: ignore[attr-defined]
        self._headers(
            302,
            0,
            {
                "Location": f"http://localhost:{port}/cdn/{sha256}",
                "X-Repo-Commit": COMMIT,
                "X-Linked-Etag": f'"{sha256}"',
                "X-Linked-Size": str(len(self.hub.files[name])),
            },
        )

    def _content(self, name: str, start: int, headers: Mapping[str, str]) -> None:
        """Send a file from `start` on; cut the connection where `cuts` says so."""
        hub = self.hub
        data = hub.sent_instead.get(name, hub.files[name])
        if start:
            headers = {**headers, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        self._headers(206 if start else 200, len(data) - start, headers)
        if self.command == "GET":
            cuts = hub.cuts.get(name)
            end = start + cuts.pop(0) if cuts else len(data)
            self.wfile.write(data[start:end])
            hub.num_sent[name] = hub.num_sent.get(name, 0) + len(data[start:end])
            self.close_connection = end < len(data)

    def _json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self._headers(200, len(body), {"Content-Type": "application/json"})
        self.wfile.write(body)

    def _error(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message, **self.hub.headers}
        self._headers(status, 0, {**headers, "X-Error-Code": code} if code else headers)

    def _headers(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(key, value)
        self.end_headers()
