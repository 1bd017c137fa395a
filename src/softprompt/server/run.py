"""A server as a process: uvicorn, signals, and an end that finishes what was begun."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from ..engine.engine import Engine, EngineLimits
from ..errors import ConfigError
from ..library import Library
from .app import create_app
from .metrics import Metrics
from .registry import Registry
from .service import Service
from .settings import ServerSettings

if TYPE_CHECKING:
    from ..backbone import Backbone

log = logging.getLogger("softprompt.server")
LAST_WORDS = 2  # seconds in which a client takes what is left of its answer when the server has ended it


def make_service(
    backbone: Backbone, folder: str, settings: ServerSettings | None = None, limits: EngineLimits | None = None
) -> Service:
    """Engine, prompts and figures together; the folder has been looked at once."""
    metrics = Metrics()
    registry = Registry(backbone, Library(folder), metrics.loaded)
    registry.refresh()
    return Service(Engine(backbone, limits), registry, settings or ServerSettings(), metrics)


class Server(uvicorn.Server):
    """uvicorn that ends in two steps: at the first signal no new work is taken, and it leaves when the rest is done.
    What is not done after `settings.drain` seconds is ended, with an error. At the second signal it leaves at once."""

    def __init__(self, service: Service):
        settings = service.settings
        self.service = service
        super().__init__(
            uvicorn.Config(
                create_app(service),
                host=settings.host,
                port=settings.port,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=LAST_WORDS,
                h11_max_incomplete_event_size=32 << 10,
                limit_concurrency=2048,
                http="h11",
                ws="none",
            )
        )
        self._draining: asyncio.Task[Any] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.draining or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        self.service.draining = True
        self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        log.info("stopping: %d requests are finished first", self.service.active)
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        await self._rest(self.service.settings.drain)
        if self.service.active:
            log.warning("%d requests are not finished and end here", self.service.active)
            self.service.end_all()
            await self._rest(LAST_WORDS)
        self.should_exit = True

    async def _rest(self, seconds: float) -> None:
        """Returns when nothing is being answered any more, or after so many seconds."""
        end = time.monotonic() + seconds
        while self.service.active and time.monotonic() < end:
            await asyncio.sleep(0.05)

    @contextmanager
    def bound(self) -> Iterator[tuple[str, list[socket.socket]]]:
        """The address, http://HOST:PORT, and its socket, opened before anything is served, so that port 0 is known.

        Raises ConfigError if the address cannot be had.
        """
        host, port = self.service.settings.host, self.service.settings.port
        try:
            [(family, *_, place), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            opened = socket.socket(family)
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(place)
            opened.listen(1024)
        except OSError as error:
            raise ConfigError(f"host, port: cannot listen at {host}:{port}: {error.strerror or error}") from error
        with opened:
            shown = f"[{host}]" if ":" in host else host
            yield f"http://{shown}:{opened.getsockname()[1]}", [opened]
