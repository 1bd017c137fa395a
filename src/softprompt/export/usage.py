"""How a prompt is written for an engine that takes text or token ids, checked against what it was tuned with."""

from __future__ import annotations

from typing import Any

from ..encoding import Encoder
from ..errors import SoftPromptError
from ..templates import Template
from .vocabulary import Entry

# What stands in the fields while texts are compared: words, digits, punctuation, another script, spaces.
VALUES = ("a fine film", "Hello, world! It's 22/7.", "Ünïcödé 中文 русский", "two  spaces ", "x")
# For a prompt from elsewhere that came without a template: soft tokens before the text.
WITHOUT_TEMPLATE = Template.make("{soft}{text}", " {answer}")


def template_of(entry: Entry) -> Template:
    """The prompt's template."""
    return entry.prompt.template or WITHOUT_TEMPLATE


def usage(entry: Entry, before: Any, after: Any, named: bool = True) -> dict[str, Any]:
    """How to write the prompt: plain data for people and programs.

    before, after: the tokenizer as it was, and with soft tokens. named: whether `after` knows the prompts' names, or
    only the tokens of their rows. text: with {field} for each field;
    add_special_tokens: whether the tokenizer is to add its own (BOS). Both are there only if they give, for all of
    VALUES, exactly the ids that the prompt was tuned with; `messages` for a chat likewise. ids: those for the first of
    VALUES, which an engine that takes ids can always be given.
    """
    template = template_of(entry)
    encoder = Encoder(template, before, entry.prompt.tokens)
    rows = [dict.fromkeys(template.fields, value) for value in VALUES]
    wanted = [_ids(encoder, entry, row) for row in rows]
    found: dict[str, Any] = {
        "name": entry.name,
        "mark": next(iter(entry.marks)),
        "parts": list(entry.marks)[1:],
        "rows": [entry.rows[0], entry.rows[-1]],
        "ids": [entry.ids[0], entry.ids[-1]],
        "placement": template.placement,
        "labels": None if template.labels is None else dict(template.labels),
        "example": {"fields": rows[0], "ids": wanted[0]},
    }
    found |= _as_text(encoder, _places(entry, named), rows, wanted, after)
    return found | _as_messages(encoder, _places(entry, True), rows, wanted, after)


def _ids(encoder: Encoder, entry: Entry, row: dict[str, str]) -> list[int]:
    return [token if token >= 0 else entry.first - token - 1 for token in encoder.context(row).ids]


def _as_text(encoder: Encoder, places: list[str], rows: Any, wanted: Any, after: Any) -> dict[str, Any]:
    # A tokenizer that puts a space before the first word does not do so behind a soft token: then it is written.
    for space in ("", " "):
        for special, lead in ((True, ""), (False, _lead_text(encoder, after))):
            said = [_written(encoder, places, row, lead, space) for row in rows]
            if [after(text, add_special_tokens=special)["input_ids"] for text in said] == wanted:
                fields = {name: f"{{{name}}}" for name in encoder.template.fields}
                return {"text": _written(encoder, places, fields, lead, space), "add_special_tokens": special}
    return {"text": None, "add_special_tokens": None}


def _as_messages(encoder: Encoder, places: list[str], rows: Any, wanted: Any, after: Any) -> dict[str, Any]:
    template = encoder.template
    if template.chat is None or template.unmarked:
        return {"messages": None}

    def messages(row: dict[str, str]) -> list[dict[str, str]]:
        marks = encoder.renderer.marks(row)
        names = iter(places)
        said = encoder.renderer._messages(row, marks)
        for turn in said:
            text = marks.remove(turn["content"])[0]
            while marks.soft in text:
                text = text.replace(marks.soft, next(names), 1)
            turn["content"] = text
        return said

    try:
        given = [
            after.apply_chat_template(messages(row), add_generation_prompt=True, return_dict=False) for row in rows
        ]
    except (SoftPromptError, TypeError, ValueError):
        return {"messages": None}
    fields = {name: f"{{{name}}}" for name in template.fields}
    return {"messages": messages(fields) if given == wanted else None}


def _written(encoder: Encoder, places: list[str], row: dict[str, str], lead: str, space: str) -> str:
    """The context as one text, with names where soft tokens stand, and `space` before the first word."""
    marks = encoder.renderer.marks(row)
    text = marks.remove(encoder.renderer.context(row, marks))[0]
    first = len(text) - len(text.lstrip(marks.soft + marks.lead))
    text = (text[:first] + space + text[first:]).replace(marks.lead, lead)
    for place in places:
        text = text.replace(marks.soft, place, 1)
    return text


def _places(entry: Entry, named: bool) -> list[str]:
    """What is written at each place of soft tokens: names, or the rows one by one."""
    found = list(entry.marks) if named else ["".join(rows) for rows in entry.marks.values()]
    return found[1:] or found


def _lead_text(encoder: Encoder, after: Any) -> str:
    return "".join(after.convert_ids_to_tokens(encoder._lead))
