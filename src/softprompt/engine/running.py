"""One request under way: what it has read, what it has written, and what is to be said of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..attention import States
from ..computation import is_deep, prompt_length
from ..evaluation.scoring import LabelTree, label_tree
from ..placement import first_soft
from .prefixes import Key
from .requests import Event, Request, Token, Usage
from .sampling import Sampler
from .slots import Slot
from .text import GrowingText


@dataclass(eq=False)
class Running:
    """A request from its submission to its end.

    ids: the context and what has been generated; the first `slot.length` of them are in the slot. builds: beginnings
    that this request computes for others. given: states that were computed while it waited for them.
    """

    id: int
    request: Request
    tokenizer: Any
    context_length: int
    slot: Slot | None = None
    cached: int = 0
    generated: int = 0
    builds: list[tuple[int, Key]] = field(default_factory=list)
    given: dict[Key, States] = field(default_factory=dict)
    parked: Key | None = None

    def __post_init__(self) -> None:
        request = self.request
        self.ids = list(request.ids)
        self.deep = is_deep(request.vectors)
        self.first_soft = first_soft(request.ids)
        self.tree: LabelTree | None = label_tree(request.labels) if request.labels else None
        self.sampler = Sampler(request.settings, request.ids) if self.tree is None else None
        self.text = GrowingText(self.tokenizer, request.settings.stop)
        answer = len(self.tree.tokens) if self.tree else request.settings.max_new_tokens
        self.needed = min(len(request.ids) + answer, max(self.context_length, len(request.ids)) + answer)

    @property
    def task(self) -> str:
        return self.request.task

    @property
    def cost(self) -> int:
        """Tokens that it will take at most, for fairness."""
        return self.needed

    @property
    def done(self) -> int:
        return self.slot.length if self.slot else 0

    @property
    def writing(self) -> bool:
        """Whether its context has been read and it goes on token by token."""
        return self.generated > 0

    @property
    def left(self) -> int:
        """Tokens to be read before the next one can be chosen, up to a deep prompt that stands among them."""
        end = self.first_soft if self.deep and self.done < self.first_soft < len(self.request.ids) else len(self.ids)
        return end - self.done

    @property
    def at_deep(self) -> bool:
        return self.deep and self.done == self.first_soft < len(self.request.ids)

    @property
    def reads_all(self) -> bool:
        """Whether the next stretch of `left` tokens ends the context."""
        return self.done + self.left == len(self.ids)

    def usage(self) -> Usage:
        request = self.request
        virtual = prompt_length(request.vectors) if self.first_soft < len(request.ids) else 0
        return Usage(len(request.ids), self.cached, virtual, self.generated)

    def take(self, token: Token) -> Event:
        """Go on with `token`."""
        request = self.request
        if token.id in request.ends and not request.settings.ignore_end:
            self.generated = max(self.generated, 0)
            return self.end("stop")
        self.generated += 1
        self.ids.append(token.id)
        text = self.text.add(token.id)
        if self.text.stopped:
            return Event(self.id, text, (token,), "stop", usage=self.usage())
        if self.generated >= request.settings.max_new_tokens or len(self.ids) >= self.context_length:
            return Event(self.id, text + self.text.finish(), (token,), "length", usage=self.usage())
        return Event(self.id, text, (token,))

    def end(self, why: str) -> Event:
        return Event(self.id, self.text.finish(), finish=why, usage=self.usage())

    def scored(self, scores: tuple[float, ...]) -> Event:
        return Event(self.id, finish="stop", scores=scores, usage=self.usage())
