"""A row of fields in its template as one text, with marks for where soft tokens stand and what the row gave."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .errors import TemplateError
from .markup import Piece, as_text, render
from .templates import Template

Fields = Mapping[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True)
class Marks:
    """Characters that stand in a text while it is put together, and in no row (see `Renderer.marks`).

    soft: the place of soft tokens. lead: of the special tokens before the text. begin, end: around what a row gave.
    """

    soft: str = "\ue000"
    lead: str = "\ue001"
    begin: str = "\ue002"
    end: str = "\ue003"

    def around(self, text: str) -> str:
        """Text of a row between its marks; white space stays outside, as chat templates trim it from their turns."""
        core = text.strip()
        at = text.index(core)
        return text[:at] + self.begin + core + self.end + text[at + len(core) :] if core else text

    def remove(self, text: str) -> tuple[str, list[Span]]:
        """Text without begin and end marks, and the spans of it that came from a row.

        A chat template may have cut a turn in two, so either mark may be missing; then the span reaches further.
        """
        plain, data, start, opened = "", [], 0, False
        for part in re.split(f"([{self.begin}{self.end}])", text):
            if part == self.end:
                data.append((start, len(plain)))
            if part in (self.begin, self.end):
                start, opened = len(plain), part == self.begin
            else:
                plain += part
        return plain, [*data, (start, len(plain))] if opened else data


class Renderer:
    """A template with the tokenizer's chat template and worked examples: from fields to marked text.

    Raises TemplateError, and DataError where a row lacks a column.
    """

    def __init__(self, template: Template, tokenizer: Any, shots: Sequence[Fields] = ()):
        if template.chat is not None and not getattr(tokenizer, "chat_template", None):
            raise TemplateError("this model's tokenizer has no chat template; write the turns out in `input`")
        self.template, self.tokenizer, self.shots = template, tokenizer, tuple(shots)

    def context(self, fields: Fields, marks: Marks) -> str:
        """What the model reads."""
        return self._input(fields, marks) if self.template.chat is None else self._chat(fields, marks)

    def answer(self, fields: Fields, marks: Marks) -> str:
        """What the model is to answer. Label words are the template's own text: they may name a control token."""
        texts = [(piece.kind, self.template.render_answer(piece, fields)) for piece in self.template.target_pieces]
        given = self.template.labels is None
        return "".join(marks.around(text) if given and kind == "field" else text for kind, text in texts)

    def end_of_turn(self) -> str:
        """What the chat template writes behind the assistant's turn; "" where it does not write one."""
        said = Marks().soft
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": said}]
        try:
            _, found, tail = self._render(turns, generate=False).rpartition(said)
        except TemplateError:
            return ""
        return tail.lstrip() if found else ""

    def marks(self, fields: Fields) -> Marks:
        """Marks that stand in no text of this row or of the template: private characters, others if they are used."""
        usual = Marks()
        text = self._constant + "".join(as_text(value) for value in fields.values())
        if not any(mark in text for mark in (usual.soft, usual.lead, usual.begin, usual.end)):
            return usual
        free = (chr(code) for code in (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE)) if chr(code) not in text)
        return Marks(next(free), next(free), next(free), next(free))

    # --- input --------------------------------------------------------------------------------------------------

    def _input(self, fields: Fields, marks: Marks) -> str:
        pieces = self.template.pieces
        first = next(i for i, p in enumerate(pieces) if p.kind in ("text", "field"))
        front = self._join(pieces[:first], fields, marks)
        if not any(p.kind == "bos" for p in pieces):
            front += marks.lead
        read = [p for p in pieces if p.kind in ("text", "field")]
        worked = [self._join(read, shot, marks) + self.answer(shot, marks) + "\n\n" for shot in self.shots]
        return "".join([front, *worked, self._join(pieces[first:], fields, marks)])

    def _join(self, pieces: Iterable[Piece], fields: Fields, marks: Marks) -> str:
        return "".join(self._text_of(piece, fields, marks) for piece in pieces)

    def _text_of(self, piece: Piece, fields: Fields, marks: Marks) -> str:
        if piece.kind in ("soft", "bos"):
            return marks.soft if piece.kind == "soft" else marks.lead
        text = render(piece, fields)
        return marks.around(text) if piece.kind == "field" else text

    # --- chat ---------------------------------------------------------------------------------------------------

    def _chat(self, fields: Fields, marks: Marks) -> str:
        text = self._render(self._messages(fields, marks), generate=True)
        text = marks.soft + text if self.template.unmarked else text
        if text.count(marks.soft) != self.template.soft_count:
            raise TemplateError(
                f"the model's chat template writes {text.count(marks.soft)} soft-token places where the turns have "
                f"{self.template.soft_count}; put {{soft}} into another turn"
            )
        return text

    def _messages(self, fields: Fields, marks: Marks) -> list[dict[str, str]]:
        """All turns: the system's, those of the worked examples, and the rest."""
        roles = [role for role, _ in self.template.chat or ()]
        turns = list(zip(roles, self.template.turns, strict=True))
        head = 1 if roles[0] == "system" else 0
        said = [(role, self._join(pieces, fields, marks)) for role, pieces in turns]
        worked: list[tuple[str, str]] = []
        for shot in self.shots:
            for role, pieces in turns[head:]:
                worked.append((role, self._join([p for p in pieces if p.kind != "soft"], shot, marks)))
            worked.append(("assistant", self.answer(shot, marks).strip()))
        return [{"role": role, "content": text} for role, text in [*said[:head], *worked, *said[head:]]]

    def _render(self, messages: list[dict[str, str]], generate: bool) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        except Exception as error:  # whatever the model's own template raises
            raise TemplateError(f"the model's chat template refuses these turns: {error}") from error
        return text

    @cached_property
    def _constant(self) -> str:
        """All text of the template and the worked examples."""
        pieces = (*self.template.pieces, *self.template.target_pieces)
        texts = [p.value for p in pieces if p.kind == "text"]
        return "".join([*texts, *self.template.words, *(as_text(v) for shot in self.shots for v in shot.values())])
