"""Request filter: lets pass what the page and its clients send, and nothing else.

Gradio would fetch a file that is named by its URL, forward requests to other servers, and has
routes for what this page does not do. So addresses, media types and the shape of what comes in are
those that are listed here; whatever else a newer Gradio may take is refused until it is listed.
"""

import json
import os
import re
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

MAX_JSON = 8 * 2**20  # bytes; images are uploaded, not sent as JSON
SENTENCE = "This page fetches nothing from other servers: upload the file."
UNKNOWN = "This page knows no such request: see /gradio_api/info for what it answers."
# Addresses by method, whole; `file=` is looked at more closely.
_GET = re.compile(
    r"/(?:|config/?|theme\.css|robots\.txt|favicon\.ico|manifest\.json|pwa_icon(?:/\d+)?)"
    r"|/(?:assets|static|svelte)/[\w./@+-]+"
    r"|/gradio_api/(?:info/?|openapi\.json|app_id/?|token/?|user/?|login_check/?|theme\.css)"
    r"|/gradio_api/(?:startup-events|queue/(?:data|status)|upload_progress)"
    r"|/gradio_api/heartbeat/[\w-]+"
    r"|/gradio_api/call/(?:v2/)?\w+/[\w-]+"
)
_FILE = re.compile(r"/gradio_api/file=(.+)")
_CALL = re.compile(r"/gradio_api/(?:call|run|api)/\w+/?|/gradio_api/queue/join")
_CALL_BY_NAME = re.compile(r"/gradio_api/call/v2/\w+/?")
_END = re.compile(r"/gradio_api/(?:cancel|reset/?)")
_UPLOAD = "/gradio_api/upload"
_KEYS = frozenset(
    {"data", "session_hash", "event_id", "event_data", "fn_index", "trigger_id", "batched"}
)
# What an address begins with, once the characters are gone that are not seen in one.
_URL = re.compile(r"[a-z][a-z0-9+.-]+:[/\\]|//[^/]|data:[\w.+-]+/[\w.+-]+[;,]", re.I)
_UNSEEN = re.compile(r"[\x00-\x1f\x7f\u200b-\u200f\u2060\ufeff]+")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Gate:
    """Request filter: middleware around the page.

    Args:
        app: The page.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Let a known request pass, its JSON as it was checked; refuse any other."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif refused := _refusal(scope):
            await _refuse(send, *refused)
        elif scope["method"] == "POST" and _path(scope) != _UPLOAD:
            await self._check_json(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _check_json(self, scope: Any, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more and len(body) <= MAX_JSON:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if len(body) > MAX_JSON:
            await _refuse(send, 413, "This request is too large: upload files, do not send them.")
            return
        try:
            content = json.loads(body)
            if sentence := _check_body(_path(scope), content):
                await _refuse(send, 400, sentence)
                return
            # What was read here is what is read there, whatever the bytes were.
            body = json.dumps(content).encode()
        except (ValueError, RecursionError):
            await _refuse(send, 400, "Expected JSON, found something else.")
            return
        given = iter([{"type": "http.request", "body": body, "more_body": False}])
        kept = [pair for pair in scope["headers"] if pair[0].lower() != b"content-length"]
        scope = {**scope, "headers": [*kept, (b"content-length", str(len(body)).encode())]}

        async def replay() -> Message:
            return next(given, None) or await receive()

        await self.app(scope, replay, send)


def _path(scope: Any) -> str:
    path = str(scope["path"])
    return path.removeprefix(str(scope.get("root_path") or "")) or "/"


def _refusal(scope: Any) -> tuple[int, str] | None:
    """Status and sentence for a request that is not known by its address, method and headers."""
    method, path = scope["method"], _path(scope)
    query = scope.get("query_string", b"").decode("latin-1")
    if any(_is_url(value) for _, value in parse_qsl(query)):
        return 400, SENTENCE
    if method in ("GET", "HEAD"):
        if file := _FILE.fullmatch(path):
            return None if _is_upload(file[1]) else (403, SENTENCE)
        return None if _GET.fullmatch(path) else (404, UNKNOWN)
    if method != "POST":
        return 405, UNKNOWN
    kinds = [v for k, v in scope.get("headers", ()) if k.lower() == b"content-type"]
    kind = _media_type(kinds[0]) if len(kinds) == 1 else ""
    if path == _UPLOAD:
        return None if kind == "multipart/form-data" else (415, "Expected a form with files.")
    if not any(known.fullmatch(path) for known in (_CALL, _CALL_BY_NAME, _END)):
        return 404, UNKNOWN
    return None if kind == "application/json" else (415, "Expected one JSON body.")


def _media_type(header: bytes) -> str:
    """Media type without its parameters, in small letters; "" for another character set."""
    kind, *parameters = header.decode("latin-1").split(";")
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset" and value.strip(" \"'").lower() != "utf-8":
            return ""
    return kind.strip().lower()


def _check_body(path: str, content: Any) -> str | None:
    """What is wrong with the JSON of a request; `None` for nothing. Files lose their URL."""
    if not isinstance(content, dict):
        return "Expected names and values in the JSON."
    if not _CALL_BY_NAME.fullmatch(path):
        if not set(content) <= _KEYS or not isinstance(content.get("data", []), list):
            return f"Expected the JSON to hold {', '.join(sorted(_KEYS))} alone, with data a list."
        if not _END.fullmatch(path) and "data" not in content:
            return "Expected the JSON to hold data, a list."
    return None if _keeps_inside(content) else SENTENCE


def _keeps_inside(value: Any) -> bool:
    """Whether no value is a URL, and every file one of this machine; those lose their own URL."""
    if isinstance(value, list):
        return all(map(_keeps_inside, value))
    if isinstance(value, dict):
        path, url = value.get("path"), value.get("url")
        if isinstance(path, str) and not _is_path(path):
            return False
        if isinstance(url, str):
            # The page sends where it shows an upload, which is of no use here.
            if not unquote(url).endswith(f"/gradio_api/file={path}"):
                return False
            value["url"] = None
        return all(map(_keeps_inside, [*value, *value.values()]))
    return not (isinstance(value, str) and _is_url(value))


def _is_url(text: str) -> bool:
    """Whether a text is an address, or begins with one."""
    return _URL.match(_UNSEEN.sub("", unquote(text)).strip()) is not None


def _is_path(path: str) -> bool:
    """Whether a text is an absolute path of this machine, and nothing else."""
    plain = "://" not in path and not re.search(r"[\x00-\x1f\x7f]|^\s|^//|^\\\\", path)
    return plain and Path(path).is_absolute()


def _is_upload(path: str) -> bool:
    """Whether a path lies in the folder of uploads and downloads."""
    folder = Path(os.environ.get("GRADIO_TEMP_DIR") or "/nowhere").resolve()
    return _is_path(path) and Path(path).resolve().is_relative_to(folder)


async def _refuse(send: Send, status: int, sentence: str) -> None:
    body = json.dumps({"detail": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
