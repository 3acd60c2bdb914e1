"""A loopback server that answers as the Hub does, so that the real client loads and publishes.

Repositories are of two kinds: folders that can only be read, with one commit, and those that the
client creates, with as many commits as it makes. A commit is whole or not there, large files are
taken by LFS (in one piece or in parts), and every answer can be spoilt once or more often.
"""

import base64
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import yaml

TOKEN = "hf_of_a_test"
OWNER = "lab"  # what `TOKEN` may write to


@dataclass
class Fault:
    """What goes wrong with requests of one kind.

    Args:
        method: Of the request.
        path: Part of its path.
        status: What is answered; 0 reads half of the body and hangs up, -1 does what is asked for
            and hangs up before it answers.
        times: How often.
        headers: Of the answer.
    """

    method: str
    path: str
    status: int
    times: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Repository:
    """What the client made.

    Args:
        private: Whether only its owner sees it.
        commits: Files of every commit, in order, by its hash.
        branches: The newest commit of each.
        messages: Of every commit.
    """

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        """Add a commit and return its hash."""
        named = repr((branch, len(self.commits), sorted(files))).encode()
        oid = sha1(named).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Files at a branch or commit."""
        return self.commits[self.branches.get(revision, revision)]


@dataclass
class Hub:
    """What is on the server, and what was asked of it.

    Args:
        folders: The files of each checkpoint, by `owner/name`.
        gated: Checkpoints that need access.
        granted: Those of them to which `TOKEN` has it.
        curt: Those that refuse without saying why.
        broken: `owner/name/file` whose first download ends half-way.
        requests: Method, path and range of every request, in order.
        repositories: What was created here.
        blobs: What LFS holds, by its SHA-256.
        faults: What goes wrong.
        chunk: Bytes of a part, where LFS wants large files in parts.
        sent: Bytes of every body that was read whole, by method and path.
    """

    folders: Mapping[str, Path]
    gated: frozenset[str] = frozenset()
    granted: frozenset[str] = frozenset()
    curt: frozenset[str] = frozenset()
    broken: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    chunk: int | None = None
    sent: list[tuple[str, str, bytes]] = field(default_factory=list)

    def commit(self, hub_id: str) -> str:
        """The only commit of a checkpoint, known as `main` too."""
        return sha1(hub_id.encode()).hexdigest()

    def downloads(self, path: str) -> list[str | None]:
        """The ranges in which a file was downloaded; `None` is from the start."""
        return [
            range_ for method, asked, range_ in self.requests if (method, asked) == ("GET", path)
        ]

    def uploads(self) -> list[str]:
        """The paths of all large files that arrived whole."""
        return [path for method, path, _ in self.sent if method == "PUT"]

    def files(self, hub_id: str, revision: str) -> dict[str, bytes]:
        """The content of a checkpoint or repository."""
        if hub_id in self.repositories:
            return self.repositories[hub_id].files(revision)
        paths = [path for path in self.folders[hub_id].iterdir() if path.is_file()]
        return {path.name: path.read_bytes() for path in sorted(paths)}


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve until the block ends; `hub.url` is the endpoint."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _HangUp(Exception):
    """The server is gone."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    silent = False  # whether the answer is lost

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(self.path.split("?")[0]).strip("/")
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        try:
            if not self._fail(path):
                self._route(path)
        except _HangUp:
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
        self.silent = False

    def _fail(self, path: str) -> bool:
        """Whether a fault answered."""
        for fault in self.hub.faults:
            if fault.times and fault.method == self.command and fault.path in path:
                fault.times -= 1
                if fault.status == 0:
                    self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
                    raise _HangUp
                if fault.status == -1:
                    self.silent = True
                    return False
                self._body(path)
                self._send(b"{}", "application/json", fault.headers, fault.status)
                return True
        return False

    def _body(self, path: str) -> bytes:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if length:
            self.hub.sent.append((self.command, path, body))
        return body

    def _route(self, path: str) -> None:
        parts = path.split("/")
        if self.command in ("POST", "PUT"):
            self._write(path, parts, self._body(path))
        elif parts[:2] == ["api", "models"]:
            self._describe("/".join(parts[2:4]), parts[4:])
        elif parts[2:3] == ["resolve"] and len(parts) > 4:
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._refuse(404, "EntryNotFound")

    # ------------------------------------------------------------------------------ reading

    def _describe(self, hub_id: str, rest: list[str]) -> None:
        """`/api/models/ID`, `.../revision/REVISION` and `.../tree/REVISION`."""
        revision = rest[1] if len(rest) > 1 else "main"
        if not self._is_there(hub_id, revision):
            return
        files = self.hub.files(hub_id, revision)
        made = self.hub.repositories.get(hub_id)
        about: object = {
            "id": hub_id,
            "sha": made.branches.get(revision, revision) if made else self.hub.commit(hub_id),
            "private": bool(made and made.private),
            "gated": hub_id in self.hub.gated,
            "siblings": [{"rfilename": name} for name in files],
        }
        if rest[:1] == ["tree"]:
            about = [
                {"type": "file", "path": name, "size": len(content), "oid": _digest(content)}
                for name, content in files.items()
            ]
        if len(rest) > 2 or rest[:1] not in ([], ["revision"], ["tree"]):
            self._refuse(404, "EntryNotFound")  # no folder that is asked for by name
        else:
            self._send(json.dumps(about).encode(), "application/json")

    def _file(self, hub_id: str, revision: str, name: str) -> None:
        """`/ID/resolve/REVISION/FILE`, whole or from a byte on."""
        if not self._is_there(hub_id, revision):
            return
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if hub_id in self.hub.gated and not (known and hub_id in self.hub.granted):
            self._refuse(403 if known else 401, "" if hub_id in self.hub.curt else "GatedRepo")
            return
        commit = self._commit_of(hub_id, revision)
        content = self.hub.files(hub_id, revision).get(name)
        if content is None:
            self._refuse(404, "EntryNotFound", commit)
            return
        headers = {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": commit}
        asked = (self.headers.get("Range") or "").removeprefix("bytes=").partition("-")
        start = int(asked[0] or 0)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        key = f"{hub_id}/{name}"
        breaks = self.command == "GET" and key in self.hub.broken
        if breaks:
            self.hub.broken.discard(key)
        self._send(
            content[start:], "application/octet-stream", headers, 206 if start else 200, breaks
        )

    def _is_there(self, hub_id: str, revision: str) -> bool:
        made = self.hub.repositories.get(hub_id)
        hidden = made is not None and made.private and not self._may_write(hub_id)
        if (hub_id not in self.hub.folders and made is None) or hidden:
            self._refuse(401, "RepoNotFound")  # as the Hub says it to strangers
        elif made is not None:
            if revision in made.branches or revision in made.commits:
                return True
            self._refuse(404, "RevisionNotFound")
        elif revision not in ("main", self.hub.commit(hub_id)):
            self._refuse(404, "RevisionNotFound")
        else:
            return True
        return False

    def _commit_of(self, hub_id: str, revision: str) -> str:
        made = self.hub.repositories.get(hub_id)
        return made.branches.get(revision, revision) if made else self.hub.commit(hub_id)

    # ------------------------------------------------------------------------------ writing

    def _write(self, path: str, parts: list[str], body: bytes) -> None:
        if parts[:1] == ["lfs"]:  # its addresses are secrets: they need no token
            self._take_blob(parts, body)
            return
        if path == "api/validate-yaml":
            self._validate(json.loads(body)["content"])
            return
        if path == "api/repos/create":
            asked = json.loads(body)
            hub_id = f"{asked['organization']}/{asked['name']}"
        else:
            asked = {}
            hub_id = "/".join(parts[2:4] if parts[0] == "api" else parts[:2]).removesuffix(".git")
        if hub_id in self.hub.folders:
            self._refuse(404, "EntryNotFound")  # nothing is taken, nothing is answered
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._refuse(401, "", message="Invalid credentials in Authorization header")
        elif not self._may_write(hub_id):
            self._refuse(403, "")
        elif path == "api/repos/create":
            self._create(hub_id, asked)
        elif hub_id not in self.hub.repositories:
            self._refuse(404, "RepoNotFound")
        else:
            self._change(hub_id, self.hub.repositories[hub_id], parts, body)

    def _may_write(self, hub_id: str) -> bool:
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        return known and hub_id.split("/")[0] == OWNER

    def _create(self, hub_id: str, asked: Mapping[str, str]) -> None:
        status = 409 if hub_id in self.hub.repositories else 200
        if status == 200:
            made = Repository(private=asked.get("visibility") == "private")
            made.commit("main", {".gitattributes": b"* text\n"}, "initial commit")
            self.hub.repositories[hub_id] = made
        answer = {"url": f"{self.hub.url}/{hub_id}", "id": hub_id}
        self._send(json.dumps(answer).encode(), "application/json", status=status)

    def _validate(self, card: str) -> None:
        try:
            about = yaml.safe_load(card.split("---\n")[1])
            errors = [] if isinstance(about, dict) else [{"message": "no metadata"}]
        except (IndexError, yaml.YAMLError) as error:
            errors = [{"message": str(error)}]
        answer = {"errors": errors, "warnings": []}
        self._send(json.dumps(answer).encode(), "application/json", status=400 if errors else 200)

    def _change(self, hub_id: str, made: Repository, parts: list[str], body: bytes) -> None:
        action = parts[4] if parts[0] == "api" else "lfs"
        revision = unquote(parts[5]) if parts[0] == "api" and len(parts) > 5 else "main"
        answer: object
        if action == "branch":
            taken = revision in made.branches
            made.branches.setdefault(revision, made.branches["main"])
            self._send(b"{}", "application/json", status=409 if taken else 200)
        elif revision not in made.branches:
            self._refuse(404, "RevisionNotFound")
        elif action == "preupload":
            answer = {"files": [self._mode(made, revision, f) for f in json.loads(body)["files"]]}
            self._send(json.dumps(answer).encode(), "application/json")
        elif action == "lfs":
            objects = [self._instruct(found) for found in json.loads(body)["objects"]]
            answer = {"transfer": "multipart" if self.hub.chunk else "basic", "objects": objects}
            self._send(json.dumps(answer).encode(), "application/json")
        elif action == "commit":
            self._commit(hub_id, made, revision, [json.loads(line) for line in body.splitlines()])
        else:
            self._refuse(404, "EntryNotFound")

    def _mode(self, made: Repository, revision: str, asked: Mapping[str, str]) -> object:
        large = asked["path"].endswith((".safetensors", ".png"))
        content = made.files(revision).get(asked["path"])
        oid = None
        if content is not None:
            git = sha1(b"blob %d\0" % len(content) + content).hexdigest()
            oid = _digest(content) if large else git
        mode = "lfs" if large else "regular"
        return {"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _instruct(self, found: Mapping[str, object]) -> object:
        oid, size = str(found["oid"]), int(str(found["size"]))
        if oid in self.hub.blobs:
            return {"oid": oid, "size": size}
        place = f"{self.hub.url}/lfs/{oid}"
        upload: dict[str, object] = {"href": place}
        if self.hub.chunk:
            count = -(-size // self.hub.chunk)
            parts = {str(i): f"{place}/{i}" for i in range(1, count + 1)}
            upload["header"] = {"chunk_size": str(self.hub.chunk), **parts}
        actions = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/verify"}}
        return {"oid": oid, "size": size, "actions": actions}

    def _take_blob(self, parts: list[str], body: bytes) -> None:
        """A large file, one part of it, the word that all parts are there, or a check."""
        blobs, oid = self.hub.blobs, parts[1]
        if oid == "verify":
            known = json.loads(body)["oid"] in blobs
            self._send(b"{}", "application/json", status=200 if known else 404)
            return
        if len(parts) > 2:
            blobs["/".join(parts[1:])] = body
        elif self.command == "PUT":
            blobs[oid] = body
        else:
            count = len(json.loads(body)["parts"])
            blobs[oid] = b"".join(blobs.pop(f"{oid}/{i}") for i in range(1, count + 1))
        if len(parts) == 2 and _digest(blobs[oid]) != oid:
            del blobs[oid]  # half a file is none
            self._send(b"{}", "application/json", status=400)
            return
        self._send(b"{}", "application/json", {"ETag": f'"{_digest(body)}"'})

    def _commit(self, hub_id: str, made: Repository, revision: str, lines: list[dict]) -> None:  # type: ignore[type-arg]
        header = lines[0]["value"]
        parent = header.get("parentCommit")
        if parent is not None and parent != made.branches[revision]:
            self._refuse(412, "")
            return
        files = dict(made.files(revision))
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile" and value["oid"] in self.hub.blobs:
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                self._refuse(400, "")
                return
        oid = made.commit(revision, files, header["summary"])
        url = f"{self.hub.url}/{hub_id}/commit/{oid}"
        answer = {"commitUrl": url, "commitOid": oid, "success": True}
        self._send(json.dumps(answer).encode(), "application/json")

    # ---------------------------------------------------------------------------- answering

    def _refuse(self, status: int, code: str, commit: str = "", message: str = "") -> None:
        headers = {"X-Error-Code": code} if code else {}
        if message:
            headers["X-Error-Message"] = message
        if commit:
            headers["X-Repo-Commit"] = commit
        self._send(b"", "text/plain", headers, status)

    def _send(
        self,
        content: bytes,
        kind: str,
        headers: Mapping[str, str] | None = None,
        status: int = 200,
        breaks: bool = False,
    ) -> None:
        if self.silent:
            raise _HangUp
        self.send_response(status)
        sent = {"Content-Type": kind, "Content-Length": str(len(content)), "Accept-Ranges": "bytes"}
        for name, value in {**sent, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content[: len(content) // 2] if breaks else content)
        if breaks:
            raise _HangUp


def _digest(content: bytes) -> str:
    return sha256(content).hexdigest()
