"""Where the methods of a comparison put the soft tokens of one template."""

from __future__ import annotations

import re
from dataclasses import replace

from ..markup import SOFT, parse
from ..templates import Template

LAST_WORD = re.compile(r"\s*(\{\{|\}\}|\w+|[^\w\s])\s*$")  # a doubled brace is one sign


def behind(template: Template) -> Template | None:
    """The same text with the soft tokens before the last word or sign that follows its last field; None for a chat.

    All that stands before them is computed once, and a step costs what follows them: one token for "Sentiment{soft}:".
    """
    if template.input is None:
        return None
    text = template.input.replace(SOFT, "")
    field = [piece.value for piece in parse(text) if piece.kind == "field"][-1]
    head, mark, tail = text.rpartition("{" + field + "}")
    last = LAST_WORD.search(tail)
    place = last.start() if last else 0
    return replace(template, input=f"{head}{mark}{tail[:place]}{SOFT}{tail[place:]}")


def at_the_front(template: Template) -> Template:
    """The same text with the soft tokens before everything, as PEFT puts them. Chat turns lose their marker."""
    if template.input is not None:
        return replace(template, input=template.input.replace(SOFT, ""))
    turns = tuple((role, text.replace(SOFT, "")) for role, text in template.chat or ())
    return replace(template, chat=turns)
