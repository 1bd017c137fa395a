"""Templates: what they hold, where soft tokens stand, and what is refused with which words."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softprompt.errors import DataError, TemplateError
from softprompt.markup import Piece, as_text, escape, parse
from softprompt.templates import Template

CHAT = [{"role": "system", "content": "{soft} Be {mood}."}, {"role": "user", "content": "{text}"}]


def make(input: str | None = "Review: {text}\nSentiment:", target: str | None = " {label}", **more: Any) -> Template:
    return Template.make(input, target, **more)


def test_pieces_in_order() -> None:
    assert parse("a{soft}{ x }{{b}}") == [Piece("text", "a"), Piece("soft"), Piece("field", "x"), Piece("text", "{b}")]
    assert parse("{{{x}}}") == [Piece("text", "{"), Piece("field", "x"), Piece("text", "}")]
    assert parse("") == []


@given(st.text())
def test_escaped_text_is_literal(text: str) -> None:
    assert parse(escape(text)) == ([Piece("text", text)] if text else [])


@given(st.text(alphabet="{}ab \n", max_size=12))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        pieces = parse(text)
    except TemplateError:
        return
    written = "".join(escape(p.value) if p.kind == "text" else "{" + p.value + "}" for p in pieces)
    assert parse(written) == pieces


@pytest.mark.parametrize(
    ("text", "where"),
    [("a } b", 3), ("a { b", 3), ("{}", 1), ('{"a": 1}', 1), ("{a{b}", 1), ("{a\n}", 1)],
)
def test_single_braces_are_refused(text: str, where: int) -> None:
    with pytest.raises(TemplateError, match=rf"character {where} .*for a brace write"):
        make(text)


def test_fields_in_order_of_appearance() -> None:
    template = make("{b} {soft}{a} {b}", "{c} and {a}")
    assert template.fields == ("b", "a")
    assert template.target_fields == ("c", "a")
    assert template.label_field is None
    assert template.classes == template.words == ()


def test_labels_as_list_pairs_or_mapping() -> None:
    assert make(labels=["bad", "good"]).labels == (("bad", "bad"), ("good", "good"))
    assert make(labels={0: "bad", 1: "good"}).labels == (("0", "bad"), ("1", "good"))
    assert make(labels=[["0", "bad"], ("1", "good")]).words == ("bad", "good")
    assert make(labels={True: "bad", False: "good"}).classes == ("true", "false")
    assert make(labels={"0": "bad", "1": "good"}).label_field == "label"


@pytest.mark.parametrize(
    ("input", "chat", "placement", "count"),
    [
        ("{text}", None, "front", 1),
        ("{soft}{text}", None, "front", 1),
        ("{bos}{text}", None, "front", 1),
        ("{soft}{bos}{text}", None, "front", 1),
        ("{bos}{soft}{text}", None, "after_bos", 1),
        (" {soft}{text}", None, "inside", 1),
        ("Review: {soft}{text}", None, "inside", 1),
        ("{text}{soft}", None, "behind", 1),
        ("{text}{soft}\nMood:", None, "behind", 1),
        ("{soft}{text}{soft}", None, "inside", 2),
        (None, CHAT, "inside", 1),
        (None, [("user", "{text}{soft}")], "behind", 1),
        (None, [("user", "{soft}{text}")], "inside", 1),
        (None, [("user", "{text}")], "front", 1),
    ],
)
def test_placement(input: str | None, chat: Any, placement: str, count: int) -> None:
    template = make(input, chat=chat)
    assert (template.placement, template.soft_count) == (placement, count)
    plain = template.without_soft()
    assert plain.soft_count == 0
    assert plain.fields == template.fields
    assert plain.without_soft() == plain


def test_plain_text() -> None:
    template = make("{bos}{soft}{{Review}}: {text}", "{{{label}}}", labels={"0": "bad", "1": "good"})
    assert template.render_context({"text": "a {film}"}) == "{Review}: a {film}"
    assert template.render_target({"label": 1}) == "{good}"
    assert make(None, chat=CHAT).render_context({"mood": "kind", "text": "Hi"}) == " Be kind.\nHi"
    with pytest.raises(DataError, match=r"label '2' is not in labels \(0, 1\)"):
        template.render_target({"label": 2})
    with pytest.raises(DataError, match="no column 'text' in this row; it has label"):
        template.render_context({"label": 1})


def test_cells_as_text() -> None:
    cells = {None: "", float("nan"): "", True: "true", 3: "3", 1.5: "1.5", " x ": " x "}
    assert [as_text(value) for value in cells] == list(cells.values())


@pytest.mark.parametrize(
    "template",
    [
        make(),
        make("{{x}} 评论{soft}{text}", labels={"0": "差", "1": "好"}),
        make(None, chat=CHAT),
        make().without_soft(),
    ],
)
def test_round_trip_through_json(template: Template) -> None:
    assert Template.from_dict(json.loads(json.dumps(template.to_dict()))) == template


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": None}, "no target; say what is to be answered"),
        ({"target": ""}, "no target"),
        ({"input": None}, "either an input text or chat turns, found neither"),
        ({"chat": CHAT}, "found both"),
        ({"input": "{soft}"}, "holds no text and no field"),
        ({"input": "{soft}{bos}"}, "holds no text and no field"),
        ({"input": 5}, "input is of type int, expected text"),
        ({"target": ["x"]}, "target is of type list, expected text"),
        ({"target": "{soft}{label}"}, "cannot stand in the target"),
        ({"input": "Text {bos}{text}"}, "before all text"),
        ({"input": "{bos}{bos}{text}"}, "at most once"),
        ({"input": None, "chat": []}, "no turns"),
        ({"input": None, "chat": [("user", "{bos}{text}")]}, "chat template places it"),
        ({"input": None, "chat": [("robot", "{text}")]}, "unknown chat role 'robot'"),
        ({"input": None, "chat": [("user", "{text}"), ("assistant", "Sure")]}, "expected the user's"),
        ({"input": None, "chat": "hello"}, "chat is a list of turns"),
        ({"input": None, "chat": {"role": "user"}}, "chat is a list of turns"),
        ({"input": None, "chat": [{"role": "user"}]}, "chat is a list of turns"),
        ({"input": None, "chat": [("user", "a", "b")]}, "chat is a list of turns"),
        ({"labels": "good"}, "labels are a list of label words"),
        ({"labels": 3}, "labels are a list of label words"),
        ({"labels": []}, "at least two classes, found 0"),
        ({"labels": ["one"]}, "at least two classes, found 1"),
        ({"labels": ["a", "a"]}, "class 'a' stands twice"),
        ({"labels": {"0": "a", "1": "a"}}, "label word 'a' stands twice"),
        ({"labels": ["a", " "]}, "a class in labels is empty"),
        ({"labels": [True, False]}, "label word True is a truth value; quote it"),
        ({"labels": [["a", "b", "c"], "d"]}, "a label is a word, or a class and its word"),
        ({"labels": {"a": None, "b": "c"}}, "a label is a word"),
        ({"labels": ["a", "b"], "target": "{x}{y}"}, "exactly one field, the class; found x, y"),
        ({"labels": ["a", "b"], "target": "yes"}, "exactly one field, the class; found none"),
    ],
)
def test_mistakes_are_told(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        make(**arguments)


@pytest.mark.parametrize("data", [None, [], "x", {"input": "{x}", "target": "y", "nonsense": 1}, {"target": 3}, {}])
def test_damaged_data_is_refused(data: Any) -> None:
    with pytest.raises(TemplateError):
        Template.from_dict(data)


@given(
    st.dictionaries(
        st.sampled_from(["input", "target", "chat", "labels", "soft"]),
        st.recursive(st.none() | st.booleans() | st.text("{}ab ", max_size=5) | st.integers(), st.lists, max_leaves=6),
    )
)
def test_nothing_but_template_errors(data: dict[str, Any]) -> None:
    with suppress(TemplateError):
        Template.from_dict(data)
