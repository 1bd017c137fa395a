"""Errors in OpenAI's exact shape. Nothing of what was sent, and no path, is ever repeated in one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..engine.requests import EngineError, QueueFullError, TooLongError, TooManyError
from ..engine.tasks import AskedWrongError
from ..errors import ConfigError, SoftPromptError

log = logging.getLogger("softprompt.server")
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
SAID = {
    404: "there is nothing at this address",
    405: "this address does not take that method",
    413: "the request is too large",
    408: "the request did not arrive in time",
}


class ApiError(Exception):
    """An error with its HTTP status; code: a short name for programs; param: which part of the request is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, headers=self.headers)


def unknown_model() -> ApiError:
    return ApiError(404, "there is no model of that name here; GET /v1/models lists them", "model_not_found", "model")


def as_api_error(error: Exception) -> ApiError:
    """What a client is told about an error of ours."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        headers = {"Retry-After": "1"}
        return ApiError(429, "too many requests are waiting; try again later", "queue_full", headers=headers)
    if isinstance(error, TooManyError):  # an error of its own: who tried again would never succeed
        return ApiError(400, "texts times choices are more than can be under way here; send fewer", "too_many_texts")
    if isinstance(error, TooLongError):
        return ApiError(400, str(error), "context_length_exceeded", "messages_or_prompt")
    if isinstance(error, AskedWrongError):
        code = "context_length_exceeded" if error.param == "length" else None
        return ApiError(400, str(error), code, None if code else error.param)
    if isinstance(error, ConfigError):
        return ApiError(400, "; ".join(error.problems))
    if isinstance(error, EngineError):
        return ApiError(400, "this task cannot read such a text")
    if isinstance(error, SoftPromptError):
        return ApiError(400, "the request cannot be served")
    log.error("a request failed: %s", type(error).__name__)
    log.debug("a request failed", exc_info=error)
    return ApiError(500, "the server failed on this request", "internal_error")


def install(app: FastAPI) -> None:
    """Answer every error in the one shape."""

    async def ours(_: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    async def http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        said = SAID.get(error.status_code, "the request cannot be understood")
        return ApiError(error.status_code, said, headers=error.headers).response()

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return validation_error(error.errors()).response()

    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    for kind in (ApiError, SoftPromptError, Exception):
        app.add_exception_handler(kind, ours)


def validation_error(problems: Sequence[Any]) -> ApiError:
    """The first of them in words: which field, and what was expected."""
    first = problems[0]
    place = [str(part) for part in first["loc"] if isinstance(part, int) or (isinstance(part, str) and _own(part))]
    param = ".".join(part for part in place if part != "body")[:100] or None
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON", "invalid_json")
    message = str(first["msg"]).removeprefix("Value error, ")
    said = message if first["type"] not in ("dict_type", "model_attributes_type") else "an object is expected"
    return ApiError(400, f"{param or 'the body'}: {said}{more}", "invalid_value", param)


def _own(part: str) -> bool:
    from .schemas import FIELD_NAMES

    return part in FIELD_NAMES
