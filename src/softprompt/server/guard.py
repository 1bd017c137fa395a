"""What stands before every route: keys, size and time of the body, a number for each request, a line in the log."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import SAID, ApiError
from .settings import ServerSettings, is_local

log = logging.getLogger("softprompt.server")
OPEN = ("/health", "/ready")  # what needs no key
ADMIN = "/admin"
SPILL = 16  # times the limit


class Guard:
    """ASGI middleware. A body is taken in whole before the application sees it: its limit holds however it is sent."""

    def __init__(self, app: ASGIApp, settings: ServerSettings):
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, number = time.perf_counter(), secrets.token_hex(8)
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", number.encode())]
            await send(message)

        try:
            await self._guarded(scope, receive, answer)
        finally:
            # The route and not the address, in which anything may have been written.
            route = getattr(scope.get("route"), "path", "(none)")
            log.info("%s %s %s %d %.3f s", number, scope["method"], route, status, time.perf_counter() - begun)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check(scope)
            body = await asyncio.wait_for(self._body(scope, receive), self.settings.limits.body_seconds)
        except asyncio.TimeoutError:
            await ApiError(408, SAID[408], headers={"connection": "close"}).response()(scope, receive, send)
        except ApiError as error:
            error.headers.setdefault("connection", "close")  # what is left of the body is never read
            await error.response()(scope, receive, send)
        else:
            if body is not None:
                await self.app(scope, _replay(body, receive), send)

    def _check(self, scope: Scope) -> None:
        path, headers = scope["path"], Headers(scope=scope)
        if path in OPEN:
            return
        given = headers.get("authorization", "")
        kind, _, key = given.partition(" ")
        key = key.strip() if kind.lower() == "bearer" else ""
        if path == ADMIN or path.startswith(ADMIN + "/"):
            if not self.settings.admin_keys:
                raise ApiError(404, SAID[404])
            if not known(key, self.settings.admin_keys):
                raise _unauthorised()
        elif self.settings.keys:
            if not known(key, (*self.settings.keys, *self.settings.admin_keys)):
                raise _unauthorised()
        elif not is_local(_host(headers.get("host", ""))):
            # Without a key only this machine is served: not a web page that had its name point here.
            raise ApiError(403, "without a key this server answers to localhost only", "wrong_host")

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the client is gone. Raises ApiError 413."""
        most, size = self.settings.limits.body_bytes, 0
        parts: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            size += len(message.get("body", b""))
            if size <= most:
                parts.append(message.get("body", b""))
            else:
                parts.clear()
            more = message.get("more_body", False)
            # A client that is still sending would not see the answer: what is a little too large is taken, not kept.
            if size > most and (not more or size > SPILL * most):
                raise ApiError(413, SAID[413], "too_large")
            if not more:
                return b"".join(parts)


def known(key: str, hashes: Iterable[str]) -> bool:
    """Whether the key is one of those with these hashes; takes as long whichever it is, or none."""
    mine = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
    found = False
    for each in hashes:
        found |= hmac.compare_digest(mine, each)
    return found


def _unauthorised() -> ApiError:
    headers = {"WWW-Authenticate": "Bearer"}
    return ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", "invalid_api_key", headers=headers)


def _host(header: str) -> str:
    return header[: header.rfind("]") + 1] if header.startswith("[") else header.partition(":")[0]


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def again() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again
