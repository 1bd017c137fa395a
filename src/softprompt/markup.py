"""Template texts as pieces: literal text, {column} fields, the {soft} and {bos} markers, and braces written double."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .errors import DataError, TemplateError

SOFT, BOS = "{soft}", "{bos}"
Kind = Literal["text", "field", "soft", "bos"]


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
            raise TemplateError(f"'}}' without its '{{' at character {at + 1} of {text!r}; for a brace write '}}}}'")
        elif text[at] == "{":
            piece, end = _marker(text, at)
            pieces += [Piece("text", literal), piece] if literal else [piece]
            literal, at = "", end
        else:
            literal, at = literal + text[at], at + 1
    return [*pieces, Piece("text", literal)] if literal else pieces


def _marker(text: str, at: int) -> tuple[Piece, int]:
    """The piece whose '{' stands at `at`, and where it ends."""
    end = text.find("}", at)
    name = text[at + 1 : end] if end > 0 else ""
    if not name.strip() or any(letter in name for letter in '{"\n'):
        raise TemplateError(
            f"'{{' at character {at + 1} of {text!r} is not followed by a column and '}}'; for a brace write '{{{{'"
        )
    name = name.strip()
    kind: Kind = "soft" if name == "soft" else "bos" if name == "bos" else "field"
    return Piece(kind, name if kind == "field" else ""), end + 1


def escape(text: str) -> str:
    """Text that `parse` reads back as the literal `text`."""
    return text.replace("{", "{{").replace("}", "}}")


def render(piece: Piece, fields: Mapping[str, Any]) -> str:
    """The text of a piece; soft tokens and BOS are no text. Raises DataError if the column is missing."""
    if piece.kind != "field":
        return piece.value
    if piece.value not in fields:
        raise DataError(f"no column {piece.value!r} in this row; it has {shorten(list(map(str, fields)))}")
    return as_text(fields[piece.value])


def as_text(value: Any) -> str:
    """A cell as text: nothing is "", truth values as JSON writes them, so that files of all formats agree."""
    if value is None or value != value:  # NaN, which tables write for nothing
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def shorten(names: Sequence[str], most: int = 12) -> str:
    """Names for a one-line message."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "none"
