"""A Hub on loopback: repositories are folders, read through the HTTP endpoints that `huggingface_hub` asks."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
"""The one commit of every repository."""

INFO = re.compile(r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)(/revision/[^/]+)?")
TREE = re.compile(r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)/tree/[^/]+/?(?P<folder>.*)")
FILE = re.compile(r"/((?P<kind>datasets)/)?(?P<name>[^/]+/[^/]+)/resolve/[^/]+/(?P<path>.+)")


class Handler(BaseHTTPRequestHandler):
    """`models/OWNER/NAME` and `datasets/OWNER/NAME` are folders below `root`."""

    root: Path
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        asked = next((found for pattern in (INFO, TREE, FILE) if (found := pattern.fullmatch(path))), None)
        repository = self.root / (asked["kind"] or "models") / asked["name"] if asked else self.root / "none"
        if not repository.is_dir():
            self._send(b"", HTTPStatus.NOT_FOUND, {"X-Error-Code": "RepoNotFound"})
        elif asked.re is FILE:
            self._send_file(repository / asked["path"])
        else:
            files = [
                {
                    "type": "file",
                    "path": path.relative_to(repository).as_posix(),
                    "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
                    "size": path.stat().st_size,
                }
                for path in sorted(repository.rglob("*"))
                if path.is_file()
            ]
            answer = (
                [file for file in files if file["path"].startswith(asked["folder"])]
                if asked.re is TREE
                else {
                    "id": asked["name"],
                    "sha": COMMIT,
                    "private": False,
                    "tags": [],
                    "siblings": [{"rfilename": file["path"]} for file in files],
                }
            )
            self._send(json.dumps(answer).encode(), headers={"Content-Type": "application/json"})

    do_HEAD = do_GET

    def _send_file(self, path: Path) -> None:
        if not path.is_file():
            return self._send(b"", HTTPStatus.NOT_FOUND, {"X-Error-Code": "EntryNotFound"})
        body = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self._send(body, headers=headers)
        first, last = int(asked[1]), min(int(asked[2] or len(body)), len(body) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
        return self._send(body[first : last + 1], HTTPStatus.PARTIAL_CONTENT, headers)

    def _send(self, body: bytes, status: HTTPStatus = HTTPStatus.OK, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Silence: what is asked is no news."""


@contextmanager
def hub(root: Path) -> Iterator[str]:
    """Serve the folders below `root` in the `with` block; yields what HF_ENDPOINT has to be."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"root": root}))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
