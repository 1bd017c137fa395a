"""The hard text around a soft prompt: input and target texts, chat turns, label words, and where {soft} stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from .errors import DataError, TemplateError
from .markup import BOS as BOS
from .markup import SOFT as SOFT
from .markup import Piece, as_text, parse, render, shorten

ROLES = ("system", "user", "assistant")
Placement = Literal["front", "after_bos", "inside", "behind"]
Turn = Mapping[str, str] | Sequence[str]
Labels = Mapping[Any, str] | Sequence[Any]


@dataclass(frozen=True)
class Template:
    """What a model reads and what it is to answer.

    input: text with {column} fields, {soft} where the soft tokens stand (several places divide them; none means the
    very front, before BOS, as in PEFT) and optionally {bos}, so that `{bos}{soft}...` puts them after BOS. chat:
    instead of input, (role, text) turns for the model's own chat template. target: the answer, with fields. labels:
    (class in the column, label word) pairs; None for free text. soft: False for the template as plain text, with no
    soft tokens. `Template.make` takes looser types. Raises TemplateError.
    """

    input: str | None
    target: str
    chat: tuple[tuple[str, str], ...] | None = None
    labels: tuple[tuple[str, str], ...] | None = None
    soft: bool = True

    def __post_init__(self) -> None:
        if (self.input is None) == (self.chat is None):
            found = "neither" if self.input is None else "both"
            raise TemplateError(f"a template has either an input text or chat turns, found {found}")
        if self.chat is not None:
            _check_chat(self.chat)
        if not self.target:
            raise TemplateError("the template has no target; say what is to be answered, for instance ' {label}'")
        _check_places(self)
        if self.labels is not None:
            _check_labels(self.labels, self.target_fields)

    @staticmethod
    def make(
        input: str | None = None,
        target: str | None = None,
        chat: Sequence[Turn] | None = None,
        labels: Labels | None = None,
    ) -> Template:
        """A checked template.

        chat: turns as {"role": ..., "content": ...} or (role, text). labels: a list of label words that are also what
        the column holds, or a mapping (or pairs) of what the column holds -> label word. Raises TemplateError.
        """
        for name, text in (("input", input), ("target", target)):
            if text is not None and not isinstance(text, str):
                raise TemplateError(f"the template's {name} is of type {type(text).__name__}, expected text")
        return Template(input, target or "", _read_chat(chat), _read_labels(labels))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data that `from_dict` reads."""
        plain: dict[str, Any] = {
            "input": self.input,
            "chat": None if self.chat is None else [{"role": role, "content": text} for role, text in self.chat],
            "target": self.target,
            "labels": None if self.labels is None else [list(pair) for pair in self.labels],
        }
        return plain if self.soft else {**plain, "soft": False}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Template:
        """Read what `to_dict` wrote. Raises TemplateError for anything else."""
        if not isinstance(data, Mapping):
            raise TemplateError(f"a template is an object with input or chat, and target; found {type(data).__name__}")
        unknown = sorted(map(str, set(data) - {"input", "chat", "target", "labels", "soft"}))
        if unknown:
            raise TemplateError(f"a template has input, chat, target and labels, found {unknown[0]!r}")
        made = Template.make(data.get("input"), data.get("target"), data.get("chat"), data.get("labels"))
        return made if data.get("soft", True) else made.without_soft()

    # --- what is in it ------------------------------------------------------------------------------------------

    @cached_property
    def turns(self) -> tuple[tuple[Piece, ...], ...]:
        """Pieces of the input (one turn), or of each chat turn, as written; without soft tokens if `soft` is False."""
        texts = [self.input] if self.input is not None else [text for _, text in self.chat or ()]
        return tuple(tuple(p for p in parse(text) if self.soft or p.kind != "soft") for text in texts)

    @cached_property
    def target_pieces(self) -> tuple[Piece, ...]:
        return tuple(parse(self.target))

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """All pieces of the context in order, with the soft tokens at the very front where no marker says otherwise."""
        written = tuple(p for turn in self.turns for p in turn)
        return (Piece("soft"), *written) if self.unmarked else written

    @property
    def unmarked(self) -> bool:
        """Whether soft tokens stand at the very front because no marker says otherwise."""
        return self.soft and not any(p.kind == "soft" for turn in self.turns for p in turn)

    @property
    def fields(self) -> tuple[str, ...]:
        """Columns that the input needs, in order of appearance."""
        return tuple(dict.fromkeys(p.value for p in self.pieces if p.kind == "field"))

    @property
    def target_fields(self) -> tuple[str, ...]:
        """Columns that the answer needs, in order of appearance."""
        return tuple(dict.fromkeys(p.value for p in self.target_pieces if p.kind == "field"))

    @property
    def label_field(self) -> str | None:
        """The column of the class; None for free text."""
        return self.target_fields[0] if self.labels is not None else None

    @property
    def classes(self) -> tuple[str, ...]:
        """What the label column may hold."""
        return tuple(name for name, _ in self.labels or ())

    @property
    def words(self) -> tuple[str, ...]:
        """The label word of each class."""
        return tuple(word for _, word in self.labels or ())

    @property
    def soft_count(self) -> int:
        """Places where soft tokens stand."""
        return sum(p.kind == "soft" for p in self.pieces)

    @property
    def placement(self) -> Placement:
        """front (before everything), after_bos, behind (no field follows), or inside (else, also several places)."""
        kinds = [p.kind for p in self.pieces]
        place = kinds.index("soft") if "soft" in kinds else -1
        # In a chat even the first turn stands behind what the chat template puts there.
        if kinds.count("soft") == 1 and (self.unmarked or (self.chat is None and place == 0)):
            return "front"
        if kinds.count("soft") == 1 and kinds[:2] == ["bos", "soft"]:
            return "after_bos"
        behind = kinds.count("soft") == 1 and "field" in kinds[:place] and "field" not in kinds[place:]
        return "behind" if behind else "inside"

    def without_soft(self) -> Template:
        """The same template as plain text: no soft tokens anywhere."""
        return replace(self, soft=False)

    # --- plain text ---------------------------------------------------------------------------------------------

    def render_context(self, fields: Mapping[str, Any]) -> str:
        """The input as plain text, without soft tokens and BOS; chat turns one a line. Raises DataError."""
        return "\n".join("".join(render(p, fields) for p in turn) for turn in self.turns)

    def render_target(self, fields: Mapping[str, Any]) -> str:
        """The answer as plain text; a class is written as its label word. Raises DataError."""
        return "".join(self.render_answer(p, fields) for p in self.target_pieces)

    def render_answer(self, piece: Piece, fields: Mapping[str, Any]) -> str:
        """The text of a piece of the target. Raises DataError for a missing column or a label that is not known."""
        text = render(piece, fields)
        if self.labels is None or piece.kind != "field":
            return text
        for name, word in self.labels:
            if name == text:
                return word
        raise DataError(f"label {text!r} is not in labels ({shorten(self.classes)})")


def _read_chat(chat: Sequence[Turn] | None) -> tuple[tuple[str, str], ...] | None:
    if chat is None:
        return None
    turns = []
    for turn in chat if isinstance(chat, Sequence) and not isinstance(chat, str) else [None]:
        pair = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else turn
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(x, str) for x in pair):
            raise TemplateError('chat is a list of turns {"role": ..., "content": ...} or (role, text)')
        turns.append((str(pair[0]), str(pair[1])))
    return tuple(turns)


def _read_labels(labels: Labels | None) -> tuple[tuple[str, str], ...] | None:
    if labels is None:
        return None
    if isinstance(labels, str) or not isinstance(labels, (Mapping, Sequence)):
        raise TemplateError("labels are a list of label words, or a mapping of class -> label word")
    given = list(labels.items()) if isinstance(labels, Mapping) else list(labels)
    return tuple(_read_label(one) for one in given)


def _read_label(given: Any) -> tuple[str, str]:
    pair = tuple(given) if isinstance(given, (list, tuple)) else (given, given)
    if len(pair) != 2 or not isinstance(pair[0], (str, int, float)) or not isinstance(pair[1], (str, int, float)):
        raise TemplateError(f"a label is a word, or a class and its word; found {given!r}")
    if isinstance(pair[1], bool):
        raise TemplateError(f"label word {pair[1]} is a truth value; quote it (YAML reads bare yes, no, on, off so)")
    return as_text(pair[0]), str(pair[1])


def _check_chat(chat: tuple[tuple[str, str], ...]) -> None:
    if not chat:
        raise TemplateError("chat has no turns; give at least one user turn")
    for role, _ in chat:
        if role not in ROLES:
            raise TemplateError(f"unknown chat role {role!r}; expected one of {', '.join(ROLES)}")
    if chat[-1][0] != "user":
        raise TemplateError(f"the last chat turn is of the {chat[-1][0]}, expected the user's; the target answers it")


def _check_places(template: Template) -> None:
    if any(p.kind in ("soft", "bos") for p in template.target_pieces):
        raise TemplateError("{soft} and {bos} cannot stand in the target, which is what the model is to answer")
    kinds = [p.kind for p in template.pieces]
    if template.chat is not None and "bos" in kinds:
        raise TemplateError("{bos} cannot stand in chat turns; the model's chat template places it")
    if kinds.count("bos") > 1 or ("bos" in kinds and {"text", "field"} & set(kinds[: kinds.index("bos")])):
        raise TemplateError("{bos} stands at most once, and before all text")
    if not {"text", "field"} & set(kinds):
        raise TemplateError("the input holds no text and no field; the model needs something to read")


def _check_labels(labels: tuple[tuple[str, str], ...], target_fields: tuple[str, ...]) -> None:
    if len(target_fields) != 1:
        found = ", ".join(target_fields) or "none"
        raise TemplateError(f"with labels the target has exactly one field, the class; found {found}")
    if len(labels) < 2:
        raise TemplateError(f"labels need at least two classes, found {len(labels)}")
    for what, values in (("class", [c for c, _ in labels]), ("label word", [w for _, w in labels])):
        twice = next((v for i, v in enumerate(values) if v in values[:i]), None)
        if twice is not None:
            raise TemplateError(f"{what} {twice!r} stands twice in labels")
        if any(not v.strip() for v in values):
            raise TemplateError(f"a {what} in labels is empty")
