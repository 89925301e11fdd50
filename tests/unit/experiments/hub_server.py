"""A hub in miniature on this machine: what the hub client asks for to lock and download, with faults on demand."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
LARGE = (".safetensors", ".gz", ".zip")  # kept as the hub keeps large files, under their sha256


class MiniHub(ThreadingHTTPServer):
    """repositories: files by `models/org/name` or `datasets/org/name`, then by name.

    gated: repositories that nobody may read. hangs: seconds before every answer. cut: files whose first answer ends in
    the middle. corrupt: files that come with other bytes. asked: every request that was made, with its range.
    """

    daemon_threads = True

    def __init__(self, repositories: dict[str, dict[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.gated: set[str] = set()
        self.cut: set[str] = set()
        self.corrupt: set[str] = set()
        self.hangs = 0.0
        self.asked: list[tuple[str, str, str]] = []

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gave up is no fault of the hub."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def downloads(self) -> list[str]:
        """The files that were asked for, one name for each request."""
        return [path.rpartition("/")[2] for method, path, _ in self.asked if method == "GET" and "/resolve/" in path]


@contextmanager
def serving(repositories: dict[str, dict[str, bytes]]) -> Iterator[MiniHub]:
    """A hub that answers while the context lasts."""
    server = MiniHub(repositories)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def stated(name: str, content: bytes) -> dict[str, object]:
    """What the hub states of a file."""
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    found: dict[str, object] = {"size": len(content), "blobId": blob, "oid": blob}
    if name.endswith(LARGE):
        sha256 = hashlib.sha256(content).hexdigest()
        found["lfs"] = {"sha256": sha256, "oid": sha256, "size": len(content), "pointerSize": 130}
    return found


class _Handler(BaseHTTPRequestHandler):
    server: MiniHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path, self.headers.get("Range", "")))
        threading.Event().wait(self.server.hangs)
        parts = path.strip("/").split("/")
        if parts[0] == "api":
            self.tell("/".join(parts[1:4]), parts[4:])
        elif "resolve" in parts:
            at = parts.index("resolve")
            kind = parts[0] if parts[0] == "datasets" else "models"
            self.send_file("/".join((kind, *parts[at - 2 : at])), "/".join(parts[at + 2 :]))
        else:
            self.refuse(404, "")

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def reply(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def tell(self, repository: str, rest: list[str]) -> None:
        files = self.server.repositories.get(repository)
        if files is None:
            self.refuse(401, "RepoNotFound")
        elif rest[:1] == ["paths-info"]:
            self.reply([{"type": "file", "path": n, **stated(n, c)} for n, c in files.items() if n.endswith(".gz")])
        else:
            siblings = [{"rfilename": name, **stated(name, content)} for name, content in files.items()]
            gated = "manual" if repository in self.server.gated else False
            name = repository.partition("/")[2]
            about = {"license": "mit"}
            self.reply({"id": name, "sha": COMMIT, "gated": gated, "cardData": about, "siblings": siblings})

    def send_file(self, repository: str, name: str) -> None:
        if repository in self.server.gated:
            return self.refuse(403, "GatedRepo")
        if name not in self.server.repositories.get(repository, {}):
            return self.refuse(404, "EntryNotFound")
        content = self.server.repositories[repository][name]
        facts = stated(name, content)
        if name in self.server.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{facts["lfs"]["sha256"] if "lfs" in facts else facts["blobId"]}"')
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return None
        if name in self.server.cut:
            self.server.cut.discard(name)
            self.wfile.write(content[start : start + (len(content) - start) // 2])
            self.wfile.flush()
            self.close_connection = True
            return None
        self.wfile.write(content[start:])
        return None
