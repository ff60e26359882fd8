"""Refuses requests that are too long for a server: before they are read where they say so, else as soon as they turn out to be."""

from typing import Any

from fastapi.responses import PlainTextResponse

LARGEST_REQUEST_BYTES = 8 << 20
"""Larger requests are refused before they are read, since who sends them is only known then: long messages are cut into chunks of 5 MiB."""


class RequestLimit:
    """Refuses a request that announces, or turns out to have, more than `LARGEST_REQUEST_BYTES`; Flower would read it whole."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Hands a request on whole, or answers it with 413."""
        lengths = [value for name, value in scope.get("headers", ()) if name == b"content-length"]
        is_long = any(not value.isdigit() or int(value) > LARGEST_REQUEST_BYTES for value in lengths)
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif is_long or (body := await _body(receive)) is None:
            await PlainTextResponse("too large", 413, {"connection": "close"})(scope, receive, send)
        else:
            waiting = [{"type": "http.request", "body": body}]

            async def read() -> Any:
                return waiting.pop() if waiting else await receive()

            await self._app(scope, read, send)


async def _body(receive: Any) -> bytes | None:
    """Reads a request; None where it is too long, or whoever sent it has gone: a part of a request is none."""
    body, goes_on = bytearray(), True
    while goes_on:
        message = await receive()
        body += message.get("body", b"")
        goes_on = message.get("more_body", False)
        if message["type"] == "http.disconnect" or len(body) > LARGEST_REQUEST_BYTES:
            return None
    return bytes(body)
