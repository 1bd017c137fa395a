"""From a row of fields to token ids with soft tokens at their places; what is scored is what generation continues.

Context and answer are tokenised apart, and so is each piece between soft tokens, so that a seam in training is the same
seam in use. Soft token i is the id -(i + 1) (see placement.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .errors import TemplateError
from .placement import Row
from .templates import Piece, Template, render

Ids = tuple[int, ...]
Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Context:
    """ids: what the model reads, soft token i as -(i + 1). cut: tokens taken from the longest field to make it fit."""

    ids: Ids
    cut: int = 0


class Encoder:
    """A template bound to a tokenizer and a number of soft tokens.

    tokens: P; 0 for the template as plain text. max_tokens: longest row, soft tokens and answer included. shots: rows
    of worked examples put before the text (in a chat: as turns of their own). end: tokens that end an answer.
    Raises TemplateError where the template does not fit the tokenizer or the length.
    """

    def __init__(
        self,
        template: Template,
        tokenizer: Any,
        tokens: int,
        max_tokens: int | None = None,
        shots: Sequence[Fields] = (),
    ):
        if bool(tokens) != template.soft:
            template = template if tokens else template.without_soft()
        if tokens and tokens < template.soft_count:
            raise TemplateError(f"{{soft}} stands in {template.soft_count} places, but there are only {tokens} soft tokens")
        self.template, self.tokenizer, self.tokens = template, tokenizer, tokens
        self.max_tokens, self.shots = max_tokens, tuple(shots)
        if template.chat is not None and not getattr(tokenizer, "chat_template", None):
            raise TemplateError("this model's tokenizer has no chat template; write the turns out in `input`")
        # Text that the tokenizer would read as a special token is only that where the template says so.
        specials = sorted(set(tokenizer.all_special_tokens), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, specials))) if specials else None
        self._answers: list[Ids] | None = None

    # --- the public part ----------------------------------------------------------------------------------------

    def context(self, fields: Fields) -> Context:
        """What the model reads for these fields, leaving room for the longest answer known. Raises TemplateError."""
        room = max((len(a) for a in self.answers()), default=0) if self.template.labels else 0
        return self._fit(dict(fields), room)

    def answer(self, fields: Fields) -> Ids:
        """The target's tokens as they continue the context, with the end where it is scored."""
        if self.template.labels is not None:
            return self.answers()[self._class_index(fields)]
        return self._answer_ids(self.template.render_target(fields)) + self.end

    def answers(self) -> list[Ids]:
        """The answer's tokens for each class, in the template's order; [] for free text."""
        if self._answers is None:
            label = self.template.label_field
            texts = [self.template.render_target({label: name}) for name in self.template.classes] if label else []
            found = [self._answer_ids(text) for text in texts]
            if any(a != b and b[: len(a)] == a for a in found for b in found):
                found = [ids + self.end for ids in found]  # else one label's words would begin another's
            self._answers = found
            if len(set(found)) < len(found):
                raise TemplateError("two label words are the same tokens for this tokenizer; choose other words")
        return self._answers

    def row(self, fields: Fields) -> tuple[Row, int]:
        """Context and answer as one row, and how many tokens were cut to make it fit."""
        answer = self.answer(fields)
        context = self._fit(dict(fields), len(answer))
        return Row(context.ids + answer, len(context.ids)), context.cut

    @cached_property
    def end(self) -> Ids:
        """The tokens with which an answer ends: the chat turn's own end, or EOS; () if the tokenizer has neither."""
        eos = self.tokenizer.eos_token_id
        plain = () if eos is None else (int(eos),)
        if self.template.chat is None:
            return plain
        marks = _marks([])
        turns = [*self._messages({name: "x" for name in self.template.fields}, marks, ())]
        said = self._render([*turns, {"role": "assistant", "content": marks[0]}], generate=False)
        tail = said[said.rindex(marks[0]) + 1 :] if marks[0] in said else ""
        ids = self._tokenize(tail, first=False) if tail else []
        stop = next((i for i, token in enumerate(ids) if token in set(self.tokenizer.all_special_ids)), None)
        return plain if stop is None else tuple(ids[: stop + 1])

    # --- fitting ------------------------------------------------------------------------------------------------

    def _fit(self, fields: dict[str, Any], room: int) -> Context:
        ids = self._encode(fields)
        if self.max_tokens is None or len(ids) + room <= self.max_tokens:
            return Context(ids)
        before = len(ids)
        while len(ids) + room > self.max_tokens:
            if not self._shorten(fields, len(ids) + room - self.max_tokens):
                raise TemplateError(
                    f"template, soft tokens and answer alone take {len(ids) + room} tokens, only {self.max_tokens} fit; "
                    "use fewer soft tokens, a shorter template, or a larger max_tokens"
                )
            ids = self._encode(fields)
        return Context(ids, before - len(ids))

    def _shorten(self, fields: dict[str, Any], excess: int) -> bool:
        """Take about `excess` tokens from the end of the longest field; False if there is nothing left to take."""
        sizes = {name: len(self._plain(str(fields[name]))) for name in self.template.fields}
        name = max(sizes, key=lambda key: sizes[key], default=None)
        if name is None or sizes[name] == 0:
            return False
        text, keep = str(fields[name]), max(0, sizes[name] - excess)
        shorter = text[: self._end_of_token(text, keep, sizes[name])]
        fields[name] = shorter if len(shorter) < len(text) else text[:-1]
        return True

    def _end_of_token(self, text: str, keep: int, size: int) -> int:
        """Index in `text` behind its first `keep` tokens."""
        if keep == 0:
            return 0
        if getattr(self.tokenizer, "is_fast", False):
            given = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            return int(given["offset_mapping"][keep - 1][1])
        return len(text) * keep // size

    # --- rendering ----------------------------------------------------------------------------------------------

    def _encode(self, fields: Fields) -> Ids:
        """Ids of the whole context, soft tokens numbered in order of appearance."""
        worked = (str(value) for shot in self.shots for value in shot.values())
        marks = _marks([repr(self.template), *map(str, fields.values()), *worked])
        if self.template.chat is not None:
            text = self._render(self._messages(fields, marks, self.shots), generate=True)
            lead: list[int] = []
        else:
            text, lead = self._input_text(fields, marks)
        ids: list[int] = []
        parts = text.split(marks[0])
        shares = divide(self.tokens, len(parts) - 1)
        given = 0
        read = False  # whether any text has been read
        for number, part in enumerate(parts):
            if part:
                ids.extend([] if read else lead)
                ids.extend(self._tokenize(part, first=not read, guard=marks[1]))
                read = True
            if number < len(shares):
                if number == 0 and not read and self._bos_first:
                    ids.extend(lead)
                    lead = []
                ids.extend(-(i + 1) for i in range(given, given + shares[number]))
                given += shares[number]
        if not read and lead:
            ids.extend(lead)
        if not ids:
            raise TemplateError("a row's context is empty; the model needs at least one token to continue")
        return tuple(ids)

    @cached_property
    def _bos_first(self) -> bool:
        """Whether the template itself puts BOS before its first soft tokens."""
        pieces = [p for turn in self.template.turns for p in turn]
        return bool(pieces) and pieces[0].kind == "bos"

    @cached_property
    def _lead(self) -> list[int]:
        """Special tokens that stand before the first text: {bos} where the template says so, else the tokenizer's own."""
        if any(p.kind == "bos" for turn in self.template.turns for p in turn):
            bos = self.tokenizer.bos_token_id
            if bos is None:
                raise TemplateError("the template has {bos}, but this model's tokenizer has no BOS token; leave it out")
            return [int(bos)]
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self.tokenizer("a")["input_ids"]
        at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        return [int(token) for token in full[:at]]

    def _input_text(self, fields: Fields, marks: tuple[str, str]) -> tuple[str, list[int]]:
        pieces = list(self.template.turns[0])
        place = next((i for i, p in enumerate(pieces) if p.kind in ("text", "field")), len(pieces))
        text = ""
        for number, piece in enumerate(pieces):
            if number == place:
                text += "".join(self._worked(shot, marks) for shot in self.shots)
            text += self._text_of(piece, fields, marks)
        return text, self._lead

    def _worked(self, shot: Fields, marks: tuple[str, str]) -> str:
        plain = self.template.without_soft()
        context = "".join(self._text_of(p, shot, marks) for p in plain.turns[0])
        return context + self._guarded(plain.render_target(shot), marks) + "\n\n"

    def _messages(self, fields: Fields, marks: tuple[str, str], shots: Sequence[Fields]) -> list[dict[str, str]]:
        chat = self.template.chat or ()
        roles = [role for role, _ in chat]
        said = ["".join(self._text_of(p, fields, marks) for p in turn) for turn in self.template.turns]
        turns = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
        plain = self.template.without_soft()
        head = 1 if roles[0] == "system" else 0
        worked: list[dict[str, str]] = []
        for shot in shots:
            for role, turn in zip(roles[head:], plain.turns[head:], strict=True):
                worked.append({"role": role, "content": "".join(self._text_of(p, shot, marks) for p in turn)})
            worked.append({"role": "assistant", "content": self._guarded(plain.render_target(shot), marks)})
        return turns[:head] + worked + turns[head:]

    def _render(self, messages: list[dict[str, str]], generate: bool) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        except Exception as error:  # jinja errors of the model's own template
            raise TemplateError(f"the model's chat template refuses these turns: {error}") from error
        return text

    def _text_of(self, piece: Piece, fields: Fields, marks: tuple[str, str]) -> str:
        if piece.kind == "soft":
            return marks[0]
        text = render(piece, fields)
        return self._guarded(text, marks) if piece.kind == "field" else text

    def _guarded(self, value: str, marks: tuple[str, str]) -> str:
        """A value in which the text of special tokens is broken by a mark, so that data cannot inject them."""
        if self._special is None or not self._special.search(value):
            return value
        return self._special.sub(lambda found: found[0][0] + marks[1] + found[0][1:], value)

    # --- tokenising ---------------------------------------------------------------------------------------------

    def _answer_ids(self, text: str) -> Ids:
        marks = _marks([text])
        ids = tuple(self._tokenize(self._guarded(text, marks), first=False, guard=marks[1]))
        if not ids:
            raise TemplateError(f"the answer {text!r} has no tokens; it must not be empty")
        return ids

    def _tokenize(self, text: str, *, first: bool, guard: str | None = None) -> list[int]:
        """Ids of a piece of text without special tokens around it; `first`: nothing was read before it."""
        if guard is not None and guard in text:
            return self._tokenize_guarded(text, guard, first)
        return self._plain(text) if first else self._continuation(text)

    def _tokenize_guarded(self, text: str, guard: str, first: bool) -> list[int]:
        assert self._special is not None
        ids: list[int] = []
        at = 0
        for found in [*self._special.finditer(text), None]:
            until = found.start() if found else len(text)
            if until > at:
                plain = text[at:until].replace(guard, "")
                ids.extend(self._plain(plain, split_special_tokens=True))
            if found:
                ids.append(int(self.tokenizer.convert_tokens_to_ids(found[0])))
                at = found.end()
        return ids

    def _plain(self, text: str, **more: Any) -> list[int]:
        return [int(token) for token in self.tokenizer(text, add_special_tokens=False, **more)["input_ids"]]

    def _continuation(self, text: str) -> list[int]:
        """Ids of text that stands behind other text: without the space that some tokenizers put before a first word."""
        if not self._prefixes:
            return self._plain(text)
        for anchor in (":", "0", "a", "."):
            before, both = self._plain(anchor), self._plain(anchor + text)
            if both[: len(before)] == before:
                return both[len(before) :]
        return self._plain(text)

    @cached_property
    def _prefixes(self) -> bool:
        """Whether the tokenizer puts a space before the first word, as those made with sentencepiece do."""
        before, both = self._plain(":"), self._plain(":x")
        return both[: len(before)] == before and both[len(before) :] != self._plain("x")

    def _class_index(self, fields: Fields) -> int:
        label = self.template.label_field
        assert label is not None
        if str(fields[label]) not in self.template.classes:
            raise TemplateError(f"label {fields[label]!r} is not in labels: {', '.join(self.template.classes)}")
        return self.template.classes.index(str(fields[label]))


def divide(tokens: int, places: int) -> list[int]:
    """`tokens` soft tokens over `places` as evenly as possible, the first places getting the rest."""
    return [tokens // places + (place < tokens % places) for place in range(places)] if places else []


def _marks(values: Sequence[str]) -> tuple[str, str]:
    """Two private-use characters that stand in none of the values: one for soft tokens, one that breaks specials."""
    text = "".join(values)
    free = (chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)
    return next(free), next(free)


