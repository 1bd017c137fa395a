"""From what a client sends to requests of the engine: limits, defaults, and what is not offered said clearly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..engine.requests import Request, Settings
from ..engine.tasks import AskedWrongError, Task, share_choices, share_documents
from .errors import ApiError
from .schemas import ChatRequest, ClassifyRequest, CompletionRequest, Sampled
from .settings import Limits

COMPLETION_TOKENS = 16  # what OpenAI's completions give where max_tokens is not said


@dataclass(frozen=True)
class Asked:
    """One text to be answered. prompt: the text as sent, where it is to be repeated before the answer."""

    task: Task
    request: Request
    prompt: str = ""


def completion(task: Task, body: CompletionRequest, limits: Limits, group: object) -> list[Asked]:
    """The texts to be completed, each `n` times, in OpenAI's order. Raises ApiError, AskedWrongError, ConfigError."""
    _refuse({"suffix": bool(body.suffix), "best_of": body.best_of not in (None, body.n)})
    if body.echo and body.logprobs is not None:
        raise _unsupported("echo", "echo with logprobs")
    settings = _settings(task, body, body.logprobs, body.max_tokens or COMPLETION_TOKENS, limits)
    prompts = _prompts(body)
    _at_most("prompt", len(prompts), limits.prompts, "texts")
    asked = []
    for index, prompt in enumerate(prompts):
        if body.fields is not None:
            request = task.from_fields(body.fields, settings)
        elif isinstance(prompt, str):
            request = task.from_text(prompt, settings)
        else:
            request = task.from_tokens(prompt, settings)
        said = "" if not body.echo else prompt if isinstance(prompt, str) else task.backbone.tokenizer.decode(prompt)
        asked += _choices(task, request, body.n or 1, (group, index), said)
    return _bounded(asked, limits)


def chat(task: Task, body: ChatRequest, limits: Limits, group: object) -> list[Asked]:
    """The chat to be answered, `n` times. Raises ApiError, AskedWrongError, ConfigError."""
    kind = (body.response_format or {}).get("type", "text")
    _refuse(
        {
            "tools": bool(body.tools),
            "functions": bool(body.functions),
            "audio": bool(body.audio),
            "response_format": kind != "text",
            "modalities": body.modalities not in (None, ["text"]),
        }
    )
    _at_most("messages", len(body.messages), limits.messages, "turns")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs: logprobs must be true with it", "invalid_value", "top_logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    tokens = body.max_completion_tokens or body.max_tokens or limits.default_tokens
    settings = _settings(task, body, logprobs, tokens, limits)
    if body.fields is not None:
        request = task.from_fields(body.fields, settings)
    else:
        request = task.from_chat([(turn.role, turn.text) for turn in body.messages], settings)
    return _bounded(_choices(task, request, body.n or 1, group, ""), limits)


def classification(tasks: Sequence[Task], body: ClassifyRequest, limits: Limits, group: object) -> list[Asked]:
    """Every text with every task; what tasks read alike is computed once. Raises ApiError, AskedWrongError."""
    _at_most("model", len(tasks), limits.tasks, "tasks")
    given = body.input if body.input is not None else body.fields
    texts = given if isinstance(given, list) else [given]
    if not texts:
        raise ApiError(400, "input: at least one text is expected", "invalid_value", "input")
    _at_most("input", len(texts), limits.prompts, "texts")
    _at_most("input", len(texts) * len(tasks), limits.prompts * 4, "texts times tasks")
    asked: list[Asked] = []
    for index, text in enumerate(texts):
        requests = []
        for task in tasks:
            settings = Settings()
            made = task.from_text(text, settings) if isinstance(text, str) else task.from_fields(text or {}, settings)
            requests.append(task.scored(made))
        shared = share_documents(requests, (group, index))
        asked += [Asked(task, request) for task, request in zip(tasks, shared, strict=True)]
    return _bounded(asked, limits)


# --- parts ------------------------------------------------------------------------------------------------------------


def _choices(task: Task, request: Request, count: int, group: object, said: str) -> list[Asked]:
    if task.classes:  # a task with labels answers with the most probable one, which is the same each time
        request = task.scored(request)
    return [Asked(task, each, said) for each in share_choices(request, count, group)]


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    given = body.prompt
    if body.fields is not None:
        return [""]
    if isinstance(given, str):
        return [given]
    if given and isinstance(given[0], int):
        return [given]
    if not given or any(not each for each in given if not isinstance(each, (int, str))):
        raise ApiError(400, "prompt: it is empty", "invalid_value", "prompt")
    return list(given)  # type: ignore[arg-type]


def _settings(task: Task, body: Sampled, logprobs: int | None, tokens: int, limits: Limits) -> Settings:
    """Sampling as asked for, within the limits. What a context cannot hold of max_tokens is not generated."""
    stops = [body.stop] if isinstance(body.stop, str) else [each for each in body.stop or () if each]
    _at_most("stop", len(stops), limits.stops, "texts")
    _at_most("stop", max(map(len, stops), default=0), limits.stop_length, "characters")
    _at_most("n", body.n or 1, limits.choices, "choices")
    _at_most("logprobs", logprobs or 0, limits.logprobs, "tokens")
    _at_most("logit_bias", len(body.logit_bias or ()), limits.biases, "entries")
    most = min(limits.tokens or task.backbone.context_length, task.backbone.context_length)
    return Settings(
        max_new_tokens=min(tokens, most),
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, min(body.top_k or 0, task.backbone.vocab_size)),
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias=_biases(task, body),
        stop=tuple(stop for stop in stops if stop),
        seed=body.seed,
        logprobs=logprobs,
        ignore_end=bool(body.ignore_eos),
    )


def _biases(task: Task, body: Sampled) -> tuple[tuple[int, float], ...]:
    found = []
    for token, bias in (body.logit_bias or {}).items():
        if not token.isascii() or not token.isdigit() or len(token) > 9 or int(token) >= task.backbone.vocab_size:
            raise AskedWrongError("logit_bias: its keys are ids of tokens of the model's vocabulary", "logit_bias")
        found.append((int(token), bias))
    return tuple(found)


def _bounded(asked: list[Asked], limits: Limits) -> list[Asked]:
    """Raises ApiError if the request as a whole is too much."""
    total = sum(len(each.request.ids) for each in asked)
    total += sum(0 if each.request.labels else each.request.settings.max_new_tokens for each in asked)
    if total > limits.total_tokens:
        raise ApiError(
            400,
            f"the request with all its texts and choices may come to {total} tokens, at most {limits.total_tokens} "
            "are served at once; send less in one request, or a smaller max_tokens",
            "too_many_tokens",
        )
    return asked


def _at_most(param: str, found: int, most: int, what: str) -> None:
    if found > most:
        raise ApiError(400, f"{param}: at most {most} {what} are served", "invalid_value", param)


def _refuse(wrong: dict[str, bool]) -> None:
    for param, given in wrong.items():
        if given:
            raise _unsupported(param, param)


def _unsupported(param: str, what: str) -> ApiError:
    return ApiError(400, f"{what} is not offered here", "unsupported_parameter", param)
