"""The routes."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Annotated, Any, TypeVar

from fastapi import Body, FastAPI, Request, Response
from fastapi.responses import JSONResponse

from .. import __version__
from ..engine.requests import Event, Usage
from ..engine.tasks import Task
from . import answering, asking, errors, schemas
from .answering import Answer
from .asking import Asked
from .guard import Guard
from .service import ClientGoneError, Service, unless_gone
from .streaming import EventStream, until_gone

T = TypeVar("T")
WHY = {400: "wrong", 401: "no valid key", 404: "no such model", 413: "too large", 429: "full", 503: "stopping"}
RESPONSES: dict[int | str, dict[str, Any]] = {
    code: {"model": schemas.ErrorResponse, "description": why}
    for code, why in {**WHY, 403: "refused", 422: "wrong"}.items()
}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "with `stream: true` a stream of events"}
}


def create_app(service: Service) -> FastAPI:
    """The application over a service, which it starts and stops."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="softprompt",
        version=__version__,
        description="Every task of one frozen language model, by name, in OpenAI's API.",
        lifespan=lifespan,
        docs_url="/docs",
        redoc_url=None,
        responses=RESPONSES,
    )
    errors.install(app)
    app.add_middleware(Guard, settings=service.settings)
    _model_routes(app, service)
    _answer_routes(app, service)
    _state_routes(app, service)
    _admin_routes(app, service)
    return app


def _model_routes(app: FastAPI, service: Service) -> None:
    def card(name: str, task: Task) -> dict[str, Any]:
        prompt = task.prompt
        return {
            "id": name,
            "object": "model",
            "created": service.started,
            "owned_by": "softprompt",
            "root": "base" if prompt is None else f"{task.name}@{task.version}",
            "parent": None if prompt is None else "base",
            "max_model_len": task.backbone.context_length,
            "kind": "model" if prompt is None else prompt.kind,
            "tokens": task.tokens,
            "labels": list(task.classes) or None,
        }

    @app.get("/v1/models", response_model=schemas.ModelList)
    async def models() -> dict[str, Any]:
        now = service.registry.now
        skipped = [
            {"id": name, "reason": why, "served_as_before": name in now.kept} for name, why in sorted(now.told.items())
        ]
        health = {"prompts": now.prompts, "skipped": skipped, "folder": "unreadable" if now.problem else "ok"}
        cards = [card(name, task) for name, task in now.listed()]
        return {"object": "list", "data": cards, "health": health}

    @app.get("/v1/models/{model}", response_model=schemas.ModelCard)
    async def model(model: str) -> dict[str, Any]:
        return card(model, service.task(model))


def _answer_routes(app: FastAPI, service: Service) -> None:
    limits = service.settings.limits

    @app.post("/v1/completions", response_model=schemas.CompletionResponse, responses=STREAMED)
    async def completions(body: schemas.CompletionRequest, request: Request) -> Response:
        task = service.task(body.model)
        make = _maker(asking.completion, task, body, limits)
        return await answer(request, "completion", body, body.logprobs, make)

    @app.post("/v1/chat/completions", response_model=schemas.ChatResponse, responses=STREAMED)
    async def chat(body: schemas.ChatRequest, request: Request) -> Response:
        task = service.task(body.model)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return await answer(request, "chat", body, logprobs, _maker(asking.chat, task, body, limits))

    @app.post("/v1/classify", response_model=schemas.ClassifyResponse)
    async def classify(body: schemas.ClassifyRequest, request: Request) -> Response:
        names = [body.model] if isinstance(body.model, str) else body.model
        if not names:
            raise errors.ApiError(400, "model: at least one task is expected", "invalid_value", "model")
        tasks = [service.task(name) for name in names]
        service.check_open()
        asked = await service.encode(_maker(asking.classification, tasks, body, limits))
        found = await whole(request, asked)
        return JSONResponse(answering.classified(asked, names, found))

    async def whole(request: Request, asked: Sequence[Asked]) -> Any:
        return await unless(request, service.gather([each.request for each in asked]))

    async def unless(request: Request, work: Coroutine[Any, Any, T]) -> T:
        try:
            return await unless_gone(until_gone(request.receive), work)
        except ClientGoneError:
            raise errors.ApiError(499, "the client is gone") from None

    async def answer(
        request: Request,
        kind: str,
        body: schemas.CompletionRequest | schemas.ChatRequest,
        logprobs: int | None,
        make: Callable[[], list[Asked]],
    ) -> Response:
        service.check_open()
        asked = await service.encode(make)
        made = Answer(kind, body.model, asked, logprobs)
        if not body.stream:
            return JSONResponse(made.whole(await whole(request, asked)))
        include = bool(body.stream_options and body.stream_options.include_usage)
        events = service.follow([each.request for each in asked])
        try:
            first = await unless(request, _first(events))  # a refusal is an answer of its own and not a stream
        except BaseException:
            await events.aclose()
            raise
        return EventStream(_chunks(made, first, events, include), limits.send_seconds)


def _maker(function: Callable[..., list[Asked]], *given: Any) -> Callable[[], list[Asked]]:
    return lambda: function(*given, secrets.token_hex(8))


async def _first(events: AsyncGenerator[tuple[int, Event], None]) -> tuple[int, Event]:
    return await anext(events)


async def _chunks(
    made: Answer, first: tuple[int, Event], events: AsyncGenerator[tuple[int, Event], None], include: bool
) -> AsyncGenerator[dict[str, Any], None]:
    usages: list[Usage] = []
    async with aclosing(events):
        index, event = first
        while True:
            for chunk in made.pieces(index, event, include):
                yield chunk
            if event.finish:
                usages.append(made.usage(index, event))
            try:
                index, event = await anext(events)
            except StopAsyncIteration:
                break
    if include:
        yield made.last_piece(usages)


def _state_routes(app: FastAPI, service: Service) -> None:
    def state(good: bool, said: str) -> JSONResponse:
        now = service.registry.now
        content = {"status": said, "prompts": now.prompts, "skipped": len(now.skipped)}
        return JSONResponse(content, 200 if good else 503, headers={} if good else {"Retry-After": "5"})

    @app.get("/health", response_model=schemas.Health, responses={503: {"model": schemas.Health}})
    async def health() -> Response:
        """Whether the process and the engine's thread live."""
        alive = service.worker.alive()
        return state(alive, "ok" if alive else "the engine has stopped")

    @app.get("/ready", response_model=schemas.Health, responses={503: {"model": schemas.Health}})
    async def ready() -> Response:
        """Whether new work is taken."""
        return state(service.ready, "ready" if service.ready else "stopping" if service.draining else "starting")

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _admin_routes(app: FastAPI, service: Service) -> None:
    @app.post("/admin/prompts/refresh")
    async def refresh(_: Annotated[dict[str, Any] | None, Body()] = None) -> dict[str, Any]:
        """Look at the folder now, and say what is served and what is not."""
        await service.encode(service.registry.refresh)
        return listing()

    @app.get("/admin/prompts")
    async def prompts() -> dict[str, Any]:
        """What is served and what is not, with the reasons."""
        return listing()

    def listing() -> dict[str, Any]:
        now = service.registry.now
        served = {name: task.sha256 for name, task in service.registry.listed() if task.prompt is not None}
        return {"served": served, "skipped": now.skipped, "problem": now.problem or None}
