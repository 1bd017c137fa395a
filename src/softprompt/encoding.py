"""From a row of fields to token ids with soft tokens at their places; what is scored is what generation continues.

Context and answer are tokenised apart, and so is each piece between soft tokens, so that a seam in training is the same
seam in use. Soft token i is the id -(i + 1) (see placement.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .errors import DataError, TemplateError
from .markup import as_text
from .placement import Row
from .rendering import Fields, Renderer
from .templates import Template
from .tokenising import PieceTokenizer

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Context:
    """ids: what the model reads, soft token i as -(i + 1). cut: tokens taken from the longest field to make it fit."""

    ids: Ids
    cut: int = 0


class Encoder:
    """A template bound to a tokenizer and a number of soft tokens.

    tokens: P; 0 for the template as plain text. max_tokens: longest row, soft tokens and answer included. shots: rows
    of worked examples that stand before the text, behind what is at its front (in a chat: as turns of their own).
    Raises TemplateError where the template does not fit the tokenizer or the number of soft tokens.
    """

    def __init__(
        self,
        template: Template,
        tokenizer: Any,
        tokens: int,
        max_tokens: int | None = None,
        shots: Sequence[Fields] = (),
    ):
        self.template = template if tokens else template.without_soft()
        if tokens < self.template.soft_count or (tokens and not template.soft):
            raise TemplateError(
                f"{tokens} soft tokens do not go into a template with {template.soft_count} places for them"
            )
        self.tokenizer, self.tokens, self.max_tokens = tokenizer, tokens, max_tokens
        self.pieces = PieceTokenizer(tokenizer)
        self.renderer = Renderer(self.template, tokenizer, shots)

    def context(self, fields: Fields, room: int | None = None) -> Context:
        """What the model reads for these fields, cut so that `room` tokens of an answer fit behind it.

        room: without it the longest label's tokens, and none for free text. Raises DataError (a missing column) and
        TemplateError (template, soft tokens and answer alone do not fit into max_tokens).
        """
        return self._fit(fields, self._label_room if room is None else room)

    def answer(self, fields: Fields) -> Ids:
        """The target's tokens as they continue the context, with the end where it is scored. Raises DataError."""
        template = self.template
        if template.label_field is None:
            return self._answer_ids(fields) + self.end
        template.render_target(fields)  # raises if the label is not known
        return self._answers[template.classes.index(as_text(fields[template.label_field]))]

    def answers(self) -> list[Ids]:
        """The answer's tokens for each class, in the template's order; [] for free text. Raises TemplateError."""
        return list(self._answers)

    def row(self, fields: Fields) -> tuple[Row, int]:
        """Context and answer as one row, and how many tokens were cut to make it fit. Raises as `context`."""
        answer = self.answer(fields)
        context = self._fit(fields, self._label_room or len(answer))
        return Row(context.ids + answer, len(context.ids)), context.cut

    @cached_property
    def end(self) -> Ids:
        """The tokens with which an answer ends: in a chat as its template ends a turn, else EOS; () if there is none.

        The last of them is the one that ends generation.
        """
        if self.template.chat is not None:
            ids = self.pieces.ids(self.renderer.end_of_turn())
            stop = next((i for i, token in enumerate(ids) if token in self.pieces.control), None)
            if stop is not None:
                return tuple(ids[: stop + 1])
        eos = self.tokenizer.eos_token_id
        return () if eos is None else (int(eos),)

    # --- the parts of a row -------------------------------------------------------------------------------------

    @cached_property
    def _answers(self) -> list[Ids]:
        label = self.template.label_field
        found = [self._answer_ids({label: name}) for name in self.template.classes] if label is not None else []
        if any(a != b and b[: len(a)] == a for a in found for b in found):
            found = [ids + self.end for ids in found]  # else one label could not be told from another one's beginning
        twice = next((i for i, ids in enumerate(found) if ids in found[:i]), None)
        if twice is not None:
            words = self.template.words[found.index(found[twice])], self.template.words[twice]
            raise TemplateError(f"label words {words[0]!r} and {words[1]!r} are the same tokens here; choose others")
        return found

    @cached_property
    def _label_room(self) -> int:
        return max(map(len, self._answers), default=0)

    def _answer_ids(self, fields: Fields) -> Ids:
        marks = self.renderer.marks(fields)
        ids = tuple(self.pieces.ids(*marks.remove(self.renderer.answer(fields, marks))))
        if not ids:
            raise DataError(f"the answer {self.template.render_target(fields)!r} has no tokens; it must not be empty")
        return ids

    def _context_ids(self, fields: Fields) -> Ids:
        """Ids of the whole context, soft tokens numbered in order of appearance."""
        marks = self.renderer.marks(fields)
        places = divide(self.tokens, self.template.soft_count)
        ids: list[int] = []
        given, read = 0, False
        for part in re.split(f"([{marks.soft}{marks.lead}])", self.renderer.context(fields, marks)):
            if part == marks.soft:
                size = places.pop(0)
                ids += range(-given - 1, -given - size - 1, -1)
                given += size
            elif part == marks.lead:
                ids += self._lead
            elif part:
                ids += self.pieces.ids(*marks.remove(part), first=not read)
                read = True
        if not ids:
            raise DataError("a row's context is empty; the model needs at least one token to continue")
        return tuple(ids)

    @cached_property
    def _lead(self) -> list[int]:
        """Special tokens before the first text: BOS where the template says so, else what the tokenizer puts there."""
        if not any(p.kind == "bos" for p in self.template.pieces):
            return self.pieces.lead
        if self.tokenizer.bos_token_id is None:
            raise TemplateError("the template has {bos}, but this model's tokenizer has no BOS token; leave it out")
        return [int(self.tokenizer.bos_token_id)]

    # --- fitting ------------------------------------------------------------------------------------------------

    def _fit(self, fields: Fields, room: int) -> Context:
        ids = self._context_ids(fields)
        if self.max_tokens is None or len(ids) + room <= self.max_tokens:
            return Context(ids)
        before, kept = len(ids), dict(fields)
        while len(ids) + room > self.max_tokens:
            if not self._shorten(kept, len(ids) + room - self.max_tokens):
                raise TemplateError(
                    f"{len(ids)} tokens of template and soft tokens and {room} of the answer do not fit into "
                    f"{self.max_tokens} without any field; use fewer soft tokens, less text, or a larger max_tokens"
                )
            ids = self._context_ids(kept)
        return Context(ids, max(1, before - len(ids)))

    def _shorten(self, fields: dict[str, Any], excess: int) -> bool:
        """Take about `excess` tokens from the end of the longest field; False if there is nothing left to take."""
        texts = {name: as_text(fields[name]) for name in self.template.fields}
        sizes = {name: self._size(text) for name, text in texts.items() if text}
        if not sizes:
            return False
        name = max(sizes, key=lambda key: sizes[key])
        fields[name] = self.pieces.beginning(texts[name], sizes[name] - excess)
        return True

    def _size(self, text: str) -> int:
        return len(self.pieces.ids(text, [(0, len(text))]))


def divide(tokens: int, places: int) -> list[int]:
    """`tokens` soft tokens over `places` as evenly as possible, the first places getting the rest."""
    return [tokens // places + (place < tokens % places) for place in range(places)] if places else []
