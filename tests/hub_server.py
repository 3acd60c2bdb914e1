"""A loopback server that answers as the Hub does, so that the real client downloads from it."""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

TOKEN = "hf_of_a_test"


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
    """

    folders: Mapping[str, Path]
    gated: frozenset[str] = frozenset()
    granted: frozenset[str] = frozenset()
    curt: frozenset[str] = frozenset()
    broken: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    url: str = ""

    def commit(self, hub_id: str) -> str:
        """The only commit of a checkpoint, known as `main` too."""
        return sha1(hub_id.encode()).hexdigest()

    def downloads(self, path: str) -> list[str | None]:
        """The ranges in which a file was downloaded; `None` is from the start."""
        return [
            range_ for method, asked, range_ in self.requests if (method, asked) == ("GET", path)
        ]


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


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._refuse(404, "EntryNotFound")

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(self.path.split("?")[0]).strip("/")
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        parts = path.split("/")
        if parts[:2] == ["api", "models"]:
            self._describe("/".join(parts[2:4]), parts[4:])
        elif parts[2:3] == ["resolve"] and len(parts) > 4:
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._refuse(404, "EntryNotFound")

    def _describe(self, hub_id: str, rest: list[str]) -> None:
        """`/api/models/ID`, `.../revision/REVISION` and `.../tree/REVISION`."""
        if not self._is_there(hub_id, rest[1] if len(rest) > 1 else "main"):
            return
        files = sorted(path for path in self.hub.folders[hub_id].iterdir() if path.is_file())
        about: object = {
            "id": hub_id,
            "sha": self.hub.commit(hub_id),
            "private": False,
            "gated": hub_id in self.hub.gated,
            "siblings": [{"rfilename": file.name} for file in files],
        }
        if rest[:1] == ["tree"]:
            about = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _digest(f)}
                for f in files
            ]
        if len(rest) > 2 or rest[:1] not in ([], ["revision"], ["tree"]):
            self._refuse(404, "EntryNotFound")  # there are no folders
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
        file = self.hub.folders[hub_id] / name
        if not file.is_file():
            self._refuse(404, "EntryNotFound", hub_id)
            return
        headers = {"ETag": f'"{_digest(file)}"', "X-Repo-Commit": self.hub.commit(hub_id)}
        content = file.read_bytes()
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
        if hub_id not in self.hub.folders:
            self._refuse(401, "RepoNotFound")  # as the Hub says it to strangers
        elif revision not in ("main", self.hub.commit(hub_id)):
            self._refuse(404, "RevisionNotFound")
        else:
            return True
        return False

    def _refuse(self, status: int, code: str, hub_id: str = "") -> None:
        headers = {"X-Error-Code": code} if code else {}
        if hub_id:
            headers["X-Repo-Commit"] = self.hub.commit(hub_id)
        self._send(b"", "text/plain", headers, status)

    def _send(
        self,
        content: bytes,
        kind: str,
        headers: Mapping[str, str] | None = None,
        status: int = 200,
        breaks: bool = False,
    ) -> None:
        self.send_response(status)
        sent = {"Content-Type": kind, "Content-Length": str(len(content)), "Accept-Ranges": "bytes"}
        for name, value in {**sent, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content[: len(content) // 2] if breaks else content)
        if breaks:
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()


def _digest(file: Path) -> str:
    return sha256(file.read_bytes()).hexdigest()
