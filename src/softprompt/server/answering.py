"""From the engine's events to OpenAI's answers, whole or in pieces."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Sequence
from typing import Any

from ..engine.requests import Event, Token, Usage
from ..engine.tasks import Task
from .asking import Asked


class Answer:
    """The answer to one call. kind: chat or completion. name: the model as it was asked for."""

    def __init__(self, kind: str, name: str, asked: Sequence[Asked], logprobs: int | None = None):
        self.kind, self.asked = kind, asked
        self.chat = kind == "chat"
        self.logprobs = logprobs
        self._head = {
            "id": ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12),
            "created": int(time.time()),
            "model": name,
            "system_fingerprint": fingerprint(asked[0].task),
        }
        self._offsets = [0] * len(asked)
        self._begun = [False] * len(asked)

    # --- whole --------------------------------------------------------------------------------------------------------

    def whole(self, found: Sequence[Sequence[Event]]) -> dict[str, Any]:
        choices = [self._choice(index, events) for index, events in enumerate(found)]
        name = "chat.completion" if self.chat else "text_completion"
        return {**self._head, "object": name, "choices": choices, "usage": usage_of(self.usages(found))}

    def _choice(self, index: int, events: Sequence[Event]) -> dict[str, Any]:
        asked = self.asked[index]
        text = asked.prompt + "".join(self.text(index, event) for event in events)
        tokens = [token for event in events for token in event.tokens]
        logs = None if self.logprobs is None or asked.request.labels else self._logs(index, tokens)
        choice: dict[str, Any] = {"index": index, "logprobs": logs, "finish_reason": events[-1].finish}
        if self.chat:
            return {**choice, "message": {"role": "assistant", "content": text, "refusal": None}}
        return {**choice, "text": text}

    def text(self, index: int, event: Event) -> str:
        """The new text of an event; of scored labels the word of the most probable one."""
        if event.scores is None:
            return event.text
        best = max(range(len(event.scores)), key=lambda c: event.scores[c])  # type: ignore[index]
        return self.asked[index].task.words[best]

    def usages(self, found: Sequence[Sequence[Event]]) -> list[Usage]:
        """Of each choice, the label's tokens counted as generated."""
        made = []
        for index, events in enumerate(found):
            last = events[-1]
            assert last.usage is not None
            made.append(self.usage(index, last))
        return made

    def usage(self, index: int, last: Event) -> Usage:
        assert last.usage is not None
        if last.scores is None:
            return last.usage
        labels = self.asked[index].request.labels
        best = max(range(len(last.scores)), key=lambda c: last.scores[c])  # type: ignore[index]
        return Usage(last.usage.read, last.usage.cached, last.usage.virtual, len(labels[best]))

    # --- in pieces ----------------------------------------------------------------------------------------------------

    def pieces(self, index: int, event: Event, include_usage: bool) -> list[dict[str, Any]]:
        """The chunks that say what an event brought; none if it brought nothing to say yet."""
        asked, chunks = self.asked[index], []
        text = self.text(index, event)
        if not self._begun[index]:
            self._begun[index] = True
            if self.chat:
                chunks.append(self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, include_usage))
            text = asked.prompt + text
        logs = None
        if self.logprobs is not None and event.tokens and not asked.request.labels:
            logs = self._logs(index, event.tokens)
        if text or logs:
            said: dict[str, Any] = {"delta": {"content": text}} if self.chat else {"text": text}
            chunks.append(self._chunk(index, {**said, "logprobs": logs}, include_usage))
        if event.finish:
            said = {"delta": {}} if self.chat else {"text": ""}
            chunks.append(self._chunk(index, {**said, "finish_reason": event.finish}, include_usage))
        return chunks

    def _chunk(self, index: int, choice: dict[str, Any], include_usage: bool) -> dict[str, Any]:
        name = "chat.completion.chunk" if self.chat else "text_completion"
        made = {"index": index, "logprobs": None, "finish_reason": None, **choice}
        # OpenAI's schema has null for the usage of a chat's chunk only.
        usage = {"usage": None} if include_usage and self.chat else {}
        return {**self._head, "object": name, "choices": [made], **usage}

    def last_piece(self, usages: Sequence[Usage]) -> dict[str, Any]:
        """The chunk with the usage that `stream_options.include_usage` asks for."""
        name = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._head, "object": name, "choices": [], "usage": usage_of(usages)}

    # --- log-probabilities --------------------------------------------------------------------------------------------

    def _logs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        task = self.asked[index].task
        if self.chat:
            return {"content": [_chat_log(task, token) for token in tokens], "refusal": None}
        texts = [task.token_text(token.id) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(len(self.asked[index].prompt) + self._offsets[index])
            self._offsets[index] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [{task.token_text(i): _finite(p) for i, p in token.top} for token in tokens],
            "text_offset": offsets,
        }


def _chat_log(task: Task, token: Token) -> dict[str, Any]:
    top = [_one_log(task, other, logprob) for other, logprob in token.top]
    return {**_one_log(task, token.id, token.logprob), "top_logprobs": top}


def _one_log(task: Task, token: int, logprob: float | None) -> dict[str, Any]:
    text = task.token_text(token)
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode("utf-8", "replace"))}


def _finite(logprob: float | None) -> float:
    return -9999.0 if logprob is None or not math.isfinite(logprob) else logprob


def usage_of(usages: Sequence[Usage]) -> dict[str, Any]:
    """Texts are counted as often as they are asked for; what `n` choices share is then among the cached tokens."""
    read, generated = sum(u.read for u in usages), sum(u.generated for u in usages)
    return {
        "prompt_tokens": read,
        "completion_tokens": generated,
        "total_tokens": read + generated,
        "prompt_tokens_details": {
            "cached_tokens": sum(u.cached for u in usages),
            "virtual_tokens": sum(u.virtual for u in usages),
        },
    }


def classified(asked: Sequence[Asked], names: Sequence[str], found: Sequence[Sequence[Event]]) -> dict[str, Any]:
    """The answer to a classification: names: of the tasks, as asked for; texts are the outer order."""
    data, usages = [], []
    for place, (each, events) in enumerate(zip(asked, found, strict=True)):
        last = events[-1]
        assert last.scores is not None and last.usage is not None
        usages.append(last.usage)
        probabilities = _softmax(last.scores)
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        data.append(
            {
                "index": place // len(names),
                "model": names[place % len(names)],
                "label": each.task.classes[best],
                "probabilities": dict(zip(each.task.classes, probabilities, strict=True)),
                "system_fingerprint": fingerprint(each.task),
            }
        )
    head = {"id": "cls-" + secrets.token_hex(12), "object": "list", "created": int(time.time())}
    return {**head, "data": data, "usage": usage_of(usages)}


def _softmax(scores: Sequence[float]) -> list[float]:
    most = max(scores)
    weights = [math.exp(score - most) for score in scores]
    return [weight / sum(weights) for weight in weights]


def fingerprint(task: Task) -> str:
    """Tells one version of a prompt, on one model, from all others."""
    return f"fp_{(task.sha256 or 'base')[:12]}_{task.backbone.fingerprint[:8]}"
