"""Request filter: refuses a file named by its URL, which Gradio would fetch from elsewhere."""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

MAX_JSON = 8 * 2**20  # bytes; images are uploaded, not sent as JSON
SENTENCE = "This page fetches nothing from other servers: upload the file."

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
        """Check the JSON that comes in; everything else passes."""
        headers = dict(scope.get("headers", ()))
        is_json = b"json" in headers.get(b"content-type", b"")
        if scope["type"] != "http" or scope["method"] != "POST" or not is_json:
            await self.app(scope, receive, send)
            return
        body, more = b"", True
        while more and len(body) <= MAX_JSON:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if len(body) > MAX_JSON:
            await _refuse(send, 413, "This request is too large: upload files, do not send them.")
            return
        if names_url(body):
            await _refuse(send, 400, SENTENCE)
            return
        given = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Message:
            return next(given, None) or await receive()

        await self.app(scope, replay, send)


def names_url(body: bytes) -> bool:
    """Whether a request's JSON holds a file whose path is no path; broken JSON is Gradio's."""
    try:
        return _names_url(json.loads(body))
    except (ValueError, RecursionError):
        return False


def _names_url(value: Any) -> bool:
    if isinstance(value, dict):
        path = value.get("path")
        if isinstance(path, str) and "://" in path:
            return True
        return any(map(_names_url, value.values()))
    return isinstance(value, list) and any(map(_names_url, value))


async def _refuse(send: Send, status: int, sentence: str) -> None:
    body = json.dumps({"detail": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
