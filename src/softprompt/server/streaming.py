"""Server-sent events: pieces as they come, a sign of life in between, and an end of all work with the client's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import as_api_error

PING = 15.0  # seconds without an event after which a comment line is sent
HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store", "x-accel-buffering": "no"}


class EventStream(Response):
    """Sends each JSON object of `chunks` as an event, `[DONE]` at the end; an error becomes an event of its own.

    seconds: that the client may take to accept a piece; one that reads more slowly is given up.
    """

    def __init__(self, chunks: AsyncGenerator[dict[str, Any], None], seconds: float):
        super().__init__(headers=HEADERS)
        self._chunks, self._seconds = chunks, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send_all(send))
        gone = asyncio.ensure_future(until_gone(receive))
        try:
            await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in (sending, gone):
                each.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)
            await self._chunks.aclose()

    async def _send_all(self, send: Send) -> None:
        headers = [(k, v) for k, v in self.raw_headers if k != b"content-length"]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with aclosing(self._texts()) as texts:
            async for text in texts:
                body = {"type": "http.response.body", "body": text.encode(), "more_body": True}
                await asyncio.wait_for(send(body), self._seconds)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _texts(self) -> AsyncGenerator[str, None]:
        chunks = self._chunks.__aiter__()
        try:
            while True:
                waiting = asyncio.ensure_future(chunks.__anext__())
                try:
                    while not (await asyncio.wait((waiting,), timeout=PING))[0]:
                        yield ": still here\n\n"
                    chunk = waiting.result()
                except StopAsyncIteration:
                    break
                finally:
                    waiting.cancel()
                    await asyncio.gather(waiting, return_exceptions=True)
                yield f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"
        except Exception as error:
            yield f"data: {json.dumps(as_api_error(error).body)}\n\n"
        yield "data: [DONE]\n\n"


async def until_gone(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
