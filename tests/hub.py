"""A Hub on loopback with the HTTP endpoints that `huggingface_hub` uses to read and to publish."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import RLock, Thread
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_someone"
"""Whoever has it is `someone`, and may write to what is theirs."""

_REPO = r"(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
READ = {
    "info": re.compile(rf"/api/{_REPO}(/revision/(?P<revision>[^/]+))?"),
    "tree": re.compile(rf"/api/{_REPO}/tree/(?P<revision>[^/]+)/?(?P<folder>.*)"),
    "file": re.compile(r"/((?P<kind>datasets)/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
    "whoami": re.compile(r"/api/whoami-v2"),
}
WRITE = {
    "create": re.compile(r"/api/repos/create"),
    "branch": re.compile(rf"/api/{_REPO}/branch/(?P<revision>[^/]+)"),
    "preupload": re.compile(rf"/api/{_REPO}/preupload/(?P<revision>[^/]+)"),
    "commit": re.compile(rf"/api/{_REPO}/commit/(?P<revision>[^/]+)"),
    "batch": re.compile(r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    "verify": re.compile(r"/lfs/verify/(?P<oid>\w+)"),
    "yaml": re.compile(r"/api/validate-yaml"),
    "upload": re.compile(r"/lfs/(?P<oid>\w+)"),
}


@dataclass
class Repository:
    """Commits by name, each with all of its files, and branches that point to commits."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        name = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        return name

    def files(self, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        """Name and files of the commit that a branch or a commit name refers to."""
        name = self.branches.get(revision or "main", revision)
        return None if name not in self.commits else (name, self.commits[name])


@dataclass
class Hub:
    """Content of a Hub. Folders `models/OWNER/NAME` below `root` are its initial repositories.

    Attributes:
        root: Folder with the repositories.
        url: Value for HF_ENDPOINT.
        repositories: Repositories by kind (`models` or `datasets`) and `OWNER/NAME`.
        objects: Large files that were uploaded completely, by their SHA-256.
        drops: Number of requests that still end with a dropped connection, by kind of request.
        log: Method and path of each request.
    """

    root: Path
    url: str = ""
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    drops: dict[str, int] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    lock: RLock = field(default_factory=RLock)

    def repository(self, kind: str, name: str) -> Repository | None:
        with self.lock:
            folder = self.root / kind / name
            if (kind, name) not in self.repositories and folder.is_dir():
                files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
                found = self.repositories[kind, name] = Repository()
                found.commit("main", {name: path.read_bytes() for name, path in files.items() if path.is_file()})
            return self.repositories.get((kind, name))


class Handler(BaseHTTPRequestHandler):
    """Answers one connection of a client."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(READ)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._answer(WRITE)

    do_PUT = do_POST

    def _answer(self, endpoints: dict[str, re.Pattern]) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append(f"{self.command} {path}")
        what, asked = next(
            ((name, found) for name, pattern in endpoints.items() if (found := pattern.fullmatch(path))), (None, None)
        )
        length = int(self.headers.get("Content-Length") or 0)
        if self.hub.drops.get(what):
            self.hub.drops[what] -= 1
            self.rfile.read(length // 2)  # the rest never arrives
            self.close_connection = True
            self.connection.close()
            return
        self.body = self.rfile.read(length)
        if what is None:
            self._send_error(HTTPStatus.NOT_FOUND)
        elif endpoints is READ:
            self._read(what, asked)
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}" and what not in ("upload", "yaml"):
            self._send_error(HTTPStatus.UNAUTHORIZED)  # where an object goes is known to whoever was told
        else:
            with self.hub.lock:
                getattr(self, f"_{what}")(asked.groupdict())

    def _read(self, what: str, asked: re.Match) -> None:
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if what == "whoami":
            return self._send_json({"type": "user", "name": "someone"}) if known else self._send_error(401)
        repository = self.hub.repository(asked["kind"] or "models", asked["name"])
        if repository is None or (repository.private and not known):
            return self._send_error(HTTPStatus.NOT_FOUND if known or repository is None else 401, "RepoNotFound")
        found = repository.files(asked["revision"])
        if found is None:
            return self._send_error(HTTPStatus.NOT_FOUND, "RevisionNotFound")
        commit, files = found
        if what == "file":
            return self._send_file(commit, files.get(asked["path"]))
        listed = [
            {"type": "file", "path": path, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}
            for path, content in files.items()
        ]
        if what == "tree":
            return self._send_json([file for file in listed if file["path"].startswith(asked["folder"])])
        about = {"id": asked["name"], "sha": commit, "private": repository.private, "tags": []}
        return self._send_json(about | {"siblings": [{"rfilename": file["path"]} for file in listed]})

    def _create(self, asked: dict[str, str]) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted['organization'] or 'someone'}/{wanted['name']}"
        key = (f"{wanted.get('type') or 'model'}s", name)
        if not name.startswith("someone/"):
            return self._send_error(HTTPStatus.FORBIDDEN)
        answer = {"url": f"{self.hub.url}/{name}", "name": name}
        if self.hub.repository(*key) is not None:
            return self._send_json({"error": "You already created this repo", **answer}, HTTPStatus.CONFLICT)
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.hub.repositories[key] = Repository(private=bool(private))
        self.hub.repositories[key].commit("main", {".gitattributes": b""})
        return self._send_json(answer)

    def _branch(self, asked: dict[str, str]) -> None:
        repository = self._own(asked)
        if repository is None:
            return None
        if asked["revision"] in repository.branches:
            return self._send_error(HTTPStatus.CONFLICT)
        repository.branches[asked["revision"]] = repository.branches["main"]
        return self._send_json({})

    def _preupload(self, asked: dict[str, str]) -> None:
        if self._own(asked) is None:
            return
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self._send_json({"files": files})

    def _batch(self, asked: dict[str, str]) -> None:
        if self._own({"kind": "models", **asked}) is None:
            return
        answers = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                places = {"upload": f"/lfs/{wanted['oid']}", "verify": f"/lfs/verify/{wanted['oid']}"}
                answer["actions"] = {action: {"href": self.hub.url + path} for action, path in places.items()}
            answers.append(answer)
        self._send_json({"transfer": "basic", "objects": answers})

    def _upload(self, asked: dict[str, str]) -> None:
        if hashlib.sha256(self.body).hexdigest() != asked["oid"]:
            return self._send_error(HTTPStatus.BAD_REQUEST)
        self.hub.objects[asked["oid"]] = self.body
        return self._send(b"")

    def _verify(self, asked: dict[str, str]) -> None:
        self._send_json({}) if asked["oid"] in self.hub.objects else self._send_error(HTTPStatus.NOT_FOUND)

    def _yaml(self, asked: dict[str, str]) -> None:
        self._send_json({"errors": [], "warnings": []})

    def _commit(self, asked: dict[str, str]) -> None:
        repository = self._own(asked)
        if repository is None:
            return None
        found = repository.files(asked["revision"])
        if found is None:
            return self._send_error(HTTPStatus.NOT_FOUND, "RevisionNotFound")
        files = dict(found[1])
        for line in self.body.splitlines():
            part = json.loads(line)
            value = part["value"]
            if part["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif part["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self._send_error(HTTPStatus.BAD_REQUEST)
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif part["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(asked["revision"], files)
        return self._send_json({"commitUrl": f"{self.hub.url}/{asked['name']}/commit/{commit}", "commitOid": commit})

    def _own(self, asked: dict[str, str]) -> Repository | None:
        """The repository to write to. If it does not exist or has another owner, this answers the request and returns
        None."""
        repository = self.hub.repository(asked["kind"], asked["name"])
        if repository is None:
            self._send_error(HTTPStatus.NOT_FOUND, "RepoNotFound")
        elif not asked["name"].startswith("someone/"):
            self._send_error(HTTPStatus.FORBIDDEN)
            return None
        return repository

    def _send_file(self, commit: str, body: bytes | None) -> None:
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if body is None:
            return self._send(b"", HTTPStatus.NOT_FOUND, {"X-Error-Code": "EntryNotFound", **headers})
        headers["ETag"] = f'"{hashlib.sha1(body).hexdigest()}"'
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self._send(body, headers=headers)
        first, last = int(asked[1]), min(int(asked[2] or len(body)), len(body) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
        return self._send(body[first : last + 1], HTTPStatus.PARTIAL_CONTENT, headers)

    def _send_json(self, tree: object, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(json.dumps(tree).encode(), status, {"Content-Type": "application/json"})

    def _send_error(self, status: int, code: str | None = None) -> None:
        self._send(b"", HTTPStatus(status), {"X-Error-Code": code} if code else None)

    def _send(self, body: bytes, status: HTTPStatus = HTTPStatus.OK, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


@contextmanager
def hub(root: Path) -> Iterator[Hub]:
    """Serve a Hub with the folders below `root` in the `with` block."""
    found = Hub(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": found}))
    found.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
