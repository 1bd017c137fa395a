"""The hard text around a soft prompt: input and target texts, chat turns, label words, and where {soft} stands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from .errors import TemplateError

SOFT, BOS = "{soft}", "{bos}"
Kind = Literal["text", "field", "soft", "bos"]
Placement = Literal["front", "after_bos", "inside", "behind"]
Labels = Sequence[str] | Mapping[str, str] | Iterable[tuple[str, str]]
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Piece:
    """A piece of a template: literal text, a field (value: the column), the soft tokens, or the BOS token."""

    kind: Kind
    value: str = ""


def parse(text: str) -> list[Piece]:
    """Split a template text into pieces. `{column}` is a field, `{{` and `}}` are braces. Raises TemplateError."""
    pieces: list[Piece] = []
    literal, at = "", 0
    while at < len(text):
        if text[at : at + 2] in ("{{", "}}"):
            literal, at = literal + text[at], at + 2
        elif text[at] == "}":
            raise TemplateError(f"single '}}' at character {at + 1} of {text!r}; write '}}}}' for a literal brace")
        elif text[at] == "{":
            end = text.find("}", at)
            name = text[at + 1 : end].strip() if end > 0 else ""
            if not name or "{" in name:
                raise TemplateError(f"'{{' without its '}}' at character {at + 1} of {text!r}; write '{{{{' for a brace")
            if literal:
                pieces.append(Piece("text", literal))
            kind: Kind = "soft" if name == "soft" else "bos" if name == "bos" else "field"
            pieces.append(Piece(kind, name if kind == "field" else ""))
            literal, at = "", end + 1
        else:
            literal, at = literal + text[at], at + 1
    return [*pieces, Piece("text", literal)] if literal else pieces


def escape(text: str) -> str:
    """Text that `parse` reads back as the literal `text`."""
    return text.replace("{", "{{").replace("}", "}}")


@dataclass(frozen=True)
class Template:
    """What a model reads and what it is to answer.

    input: text with {column} fields, {soft} where the soft tokens stand (several places divide them; none means the
    very front, before BOS, as in PEFT) and optionally {bos}, so that `{bos}{soft}...` puts them after BOS. chat: instead
    of input, (role, text) turns for the model's own chat template. target: the answer, with fields. labels: (class in
    the column, label word) pairs; None for free text. soft: False for the template as plain text, with no soft tokens.
    Make one with `Template.make`, which checks it. Raises TemplateError.
    """

    input: str | None
    target: str
    chat: tuple[tuple[str, str], ...] | None = None
    labels: tuple[tuple[str, str], ...] | None = None
    soft: bool = True

    def __post_init__(self) -> None:
        if (self.input is None) == (self.chat is None):
            raise TemplateError("a template has either an input text or chat turns, found both or neither")
        if self.chat is not None:
            _check_chat(self.chat)
        if not self.target:
            raise TemplateError("the template has no target; say what is to be answered, for instance ' {label}'")
        pieces = [p for turn in self.turns for p in turn]
        if any(p.kind in ("soft", "bos") for p in parse(self.target)):
            raise TemplateError("{soft} and {bos} cannot stand in the target, which is what the model is to answer")
        if self.chat and any(p.kind == "bos" for p in pieces):
            raise TemplateError("{bos} cannot stand in chat turns; the model's chat template places it")
        at = [i for i, p in enumerate(pieces) if p.kind == "bos"]
        if len(at) > 1 or (at and any(p.kind in ("text", "field") for p in pieces[: at[0]])):
            raise TemplateError("{bos} stands at most once, and before all text")
        if not any(p.kind in ("text", "field") for p in pieces):
            raise TemplateError("the input holds no text and no field; the model needs something to read")
        if self.labels is not None:
            _check_labels(self.labels, self.target_fields)

    @staticmethod
    def make(
        input: str | None = None,
        target: str | None = None,
        chat: Sequence[Mapping[str, str] | Sequence[str]] | None = None,
        labels: Labels | None = None,
    ) -> Template:
        """A checked template. chat: turns as {"role", "content"} or (role, text). labels: words, or class -> word."""
        turns = None
        if chat is not None:
            try:
                turns = tuple(
                    (str(t["role"]), str(t["content"])) if isinstance(t, Mapping) else (str(t[0]), str(t[1])) for t in chat
                )
            except (KeyError, IndexError, TypeError) as error:
                raise TemplateError('a chat turn is {"role": ..., "content": ...} or (role, text)') from error
        pairs = None
        if labels is not None:
            given = labels.items() if isinstance(labels, Mapping) else labels
            pairs = tuple((str(x), str(x)) if not isinstance(x, tuple | list) else (str(x[0]), str(x[1])) for x in given)
        return Template(input, target or "", turns, pairs)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data that `from_dict` reads."""
        return {
            "input": self.input,
            "chat": None if self.chat is None else [{"role": role, "content": text} for role, text in self.chat],
            "target": self.target,
            "labels": None if self.labels is None else [list(pair) for pair in self.labels],
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Template:
        """Read what `to_dict` wrote. Raises TemplateError for anything else."""
        unknown = set(data) - {"input", "chat", "target", "labels"}
        if unknown:
            raise TemplateError(f"a template has input, chat, target and labels, found {sorted(unknown)[0]!r}")
        for key in ("input", "target"):
            if data.get(key) is not None and not isinstance(data[key], str):
                raise TemplateError(f"the template's {key} is {type(data[key]).__name__}, expected text")
        return Template.make(data.get("input"), data.get("target"), data.get("chat"), data.get("labels"))

    # --- what is in it ------------------------------------------------------------------------------------------

    @cached_property
    def turns(self) -> list[list[Piece]]:
        """Pieces of the input (one turn), or of each chat turn; with the default {soft} where no marker stands."""
        turns = [parse(self.input)] if self.input is not None else [parse(text) for _, text in self.chat or ()]
        if not self.soft:
            return [[p for p in turn if p.kind != "soft"] for turn in turns]
        if not any(p.kind == "soft" for turn in turns for p in turn):
            if self.chat is not None:
                raise TemplateError("no {soft} in any chat turn; write it where the soft tokens are to stand")
            turns[0].insert(0, Piece("soft"))
        return turns

    @property
    def fields(self) -> tuple[str, ...]:
        """Columns that the input needs, in order of appearance."""
        return tuple(dict.fromkeys(p.value for turn in self.turns for p in turn if p.kind == "field"))

    @property
    def target_fields(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(p.value for p in parse(self.target) if p.kind == "field"))

    @property
    def label_field(self) -> str | None:
        """The column of the class; None for free text."""
        return self.target_fields[0] if self.labels is not None else None

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.labels or ())

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(word for _, word in self.labels or ())

    @property
    def soft_count(self) -> int:
        """Places where soft tokens stand."""
        return sum(p.kind == "soft" for turn in self.turns for p in turn)

    @property
    def placement(self) -> Placement:
        """front (before BOS), after_bos, behind (no field follows), or inside (anything else, also several places)."""
        kinds = [p.kind for turn in self.turns for p in turn]
        if kinds.count("soft") != 1:
            return "inside"
        place = kinds.index("soft")
        if self.chat is None and place == 0 and "bos" not in kinds:
            return "front"
        if self.chat is None and kinds[:2] == ["bos", "soft"]:
            return "after_bos"
        return "behind" if "field" in kinds[:place] and "field" not in kinds[place:] else "inside"

    def without_soft(self) -> Template:
        """The same template as plain text: no soft tokens anywhere."""
        return replace(self, soft=False)

    # --- plain text ---------------------------------------------------------------------------------------------

    def render_context(self, fields: Mapping[str, Any]) -> str:
        """The input as plain text, without soft tokens and BOS; chat turns one a line."""
        return "\n".join("".join(render(p, fields) for p in turn) for turn in self.turns)

    def render_target(self, fields: Mapping[str, Any]) -> str:
        """The answer as plain text; a class is written as its label word."""
        words = dict(self.labels or ())
        label = self.label_field
        return "".join(
            words.get(str(fields[p.value]), str(fields[p.value])) if p.value == label and p.kind == "field" else render(p, fields)
            for p in parse(self.target)
        )


def render(piece: Piece, fields: Mapping[str, Any]) -> str:
    """The text of a piece; soft tokens and BOS are no text."""
    if piece.kind == "field":
        return str(fields[piece.value])
    return piece.value


def _check_chat(chat: tuple[tuple[str, str], ...]) -> None:
    if not chat:
        raise TemplateError("chat has no turns; give at least one user turn")
    for role, _ in chat:
        if role not in ROLES:
            raise TemplateError(f"unknown chat role {role!r}; expected one of {', '.join(ROLES)}")
    if chat[-1][0] == "assistant":
        raise TemplateError("the last chat turn is the assistant's; leave it out, the target is the assistant's answer")


def _check_labels(labels: tuple[tuple[str, str], ...], target_fields: tuple[str, ...]) -> None:
    if len(target_fields) != 1:
        found = ", ".join(target_fields) or "none"
        raise TemplateError(f"with labels the target has exactly one field, found {found}")
    if len(labels) < 2:
        raise TemplateError(f"labels need at least two classes, found {len(labels)}")
    for what, values in (("class", [c for c, _ in labels]), ("label word", [w for _, w in labels])):
        twice = next((v for v in values if values.count(v) > 1), None)
        if twice is not None:
            raise TemplateError(f"{what} {twice!r} stands twice in labels")
        if any(not v.strip() for v in values):
            raise TemplateError(f"a {what} in labels is empty")
