"""What an engine is asked for and what it says: requests, settings, events, errors. Plain data."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import ConfigError, SoftPromptError

if TYPE_CHECKING:
    import torch

Ids = tuple[int, ...]


class EngineError(SoftPromptError, RuntimeError):
    """The engine cannot take or finish a request."""


class QueueFullError(EngineError):
    """As many requests wait as may wait; try again later."""


class TooManyError(EngineError):
    """More requests at once than an idle engine takes; waiting does not help."""


class TooLongError(SoftPromptError, ValueError):
    """A text leaves no room for an answer within the model's context."""


@dataclass(frozen=True)
class Settings:
    """How the next token is chosen, and when a text ends.

    temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 leave all tokens in; they apply in this order, after
    temperature. presence_penalty, frequency_penalty: taken from the logits of generated tokens (OpenAI). repetition_
    penalty: divides the logits of all tokens that were read or generated (Keskar et al. 2019, arXiv:1909.05858); soft
    tokens are no tokens of the vocabulary and never count. logit_bias: (token, what is added). stop: texts that end the
    answer and are no part of it. seed: same seed, same text, same answer, whatever else is in the batch; None: a random
    one. logprobs: also say the log-probability of each token and of so many others; None: say nothing. ignore_end: do
    not stop at an end token. Raises ConfigError with all that makes no sense.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    ignore_end: bool = False

    def __post_init__(self) -> None:
        bounds = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < math.inf, "0 (greedy) or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "min_p": (0 <= self.min_p <= 1, "0 to 1"),
            "presence_penalty": (math.isfinite(self.presence_penalty), "a finite number"),
            "frequency_penalty": (math.isfinite(self.frequency_penalty), "a finite number"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "more than 0"),
            "logprobs": (self.logprobs is None or self.logprobs >= 0, "0 or more"),
        }
        wrong = [
            f"{name} is {getattr(self, name)}, expected {want}" for name, (right, want) in bounds.items() if not right
        ]
        if any(not text for text in self.stop):
            wrong.append("a stop text is empty; leave it out")
        if not all(math.isfinite(bias) for _, bias in self.logit_bias):
            wrong.append("a logit bias is not a finite number")
        if wrong:
            raise ConfigError(wrong)

    @property
    def plain_greedy(self) -> bool:
        """Whether the most probable token is all that is asked for."""
        changed = self.logit_bias or self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        return self.temperature == 0 and self.logprobs is None and not changed


@dataclass(frozen=True, eq=False)
class Request:
    """One text to be continued, or whose labels are to be scored.

    ids: what the model reads; soft token i is -(i + 1). vectors: the prompt's, [P, H] or deep [L, 2, K, P, D]; None if
    ids has no soft token. digest: a hash of the content of `vectors`; states are kept under it and never under a name.
    task: requests of different tasks take turns. constant: so many leading ids are alike in all requests of the task,
    so their states are kept. labels: the tokens of each label; given, they are scored and nothing is generated. group,
    shared: requests with the same group have the first `shared` ids in common, which are computed once for them all
    and dropped after the last. members: how many requests the group has.
    """

    ids: Ids
    vectors: torch.Tensor | None = None
    digest: str = ""
    task: str = ""
    settings: Settings = field(default_factory=Settings)
    ends: frozenset[int] = frozenset()
    constant: int = 0
    labels: tuple[Ids, ...] = ()
    group: Hashable | None = None
    shared: int = 0
    members: int = 1


@dataclass(frozen=True)
class Token:
    """A generated token. logprob: natural logarithm of its probability before temperature and penalties; top: the most
    probable tokens with theirs; both only where asked for."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """read: tokens of the context, soft ones included. cached: those of them whose states were there already. virtual:
    the soft ones. generated: tokens of the answer, an end token not included."""

    read: int
    cached: int
    virtual: int
    generated: int


@dataclass(frozen=True)
class Event:
    """What a step gave to one request.

    text: new text, whole characters. tokens: new tokens. finish: None while it goes on, else stop (an end token, a stop
    text, or all labels scored), length, cancelled or error. scores: log-probability of each label. usage: at the end.
    """

    id: int
    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish: str | None = None
    scores: tuple[float, ...] | None = None
    usage: Usage | None = None
