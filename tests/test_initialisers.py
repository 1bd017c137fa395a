"""Initialisers: what they start from, that they are deterministic, and that no unused row gets in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from softprompt.errors import ConfigError, PromptFormatError
from softprompt.initialisers import (
    check_init,
    from_labels,
    from_prompt,
    from_random,
    from_text,
    from_vocabulary,
    initialise,
    instruction,
    label_texts,
)
from softprompt.prompt import SoftPrompt
from softprompt.templates import Template
from softprompt.vocabulary import ordinary_tokens, text_ids

H = 16
CORPUS = [
    "the good film and the bad film were both shown in the old house by the sea",
    "a positive answer is better than a negative answer when the question is good",
    "Classify the text as negative or positive. Read the text and write the answer.",
] * 4


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Byte-level pairs as in GPT-2 and Llama 3, which adds BOS by itself, with a special and an added token."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<s>", "</s>", "<unused0>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    inner.add_tokens([AddedToken("sentinel", normalized=False)])
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def sentencepiece_like() -> Any:
    """Pieces with a dummy space before the text and single bytes, as Llama 2's."""
    letters = sorted(set("".join(CORPUS)) - {" "})
    words = sorted({"\u2581" + word for line in CORPUS for word in line.split()})
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "[unused1]",
        *words,
        "\u2581",
        *letters,
    ]
    inner = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], 0, byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def wordpiece() -> Any:
    """As BERT's: unused places first, pieces inside a word marked by ##."""
    words = sorted({word.strip(".,").lower() for line in CORPUS for word in line.split()} - {"a"})
    pieces = [
        "[PAD]",
        *(f"[unused{i}]" for i in range(20)),
        "[UNK]",
        *"abcdefghijklmnopqrstuvwxyz",
        "##ing",
        "##a",
        *words,
    ]
    inner = Tokenizer(models.WordPiece(dict(zip(pieces, range(len(pieces)))), unk_token="[UNK]"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


@pytest.mark.parametrize("build", [sentencepiece_like, wordpiece])
def test_other_kinds_of_tokenizer(build: Any) -> None:
    tokenizer = build()
    table = torch.randn(len(tokenizer), H, generator=generator(3))
    pieces = tokenizer.convert_ids_to_tokens(ordinary_tokens(table, tokenizer, 5000))
    assert any("good" in piece for piece in pieces)
    assert not any(piece.startswith(("<", "[")) or len(piece.strip("\u2581#")) == 1 for piece in pieces)
    for init in ("text", "labels", "vocabulary"):
        assert torch.isfinite(start(init, table, tokenizer)[0]).all()


def test_a_dummy_space_is_no_part_of_a_label() -> None:
    tokenizer = sentencepiece_like()
    table = torch.randn(len(tokenizer), H, generator=generator(3))
    vectors, _ = from_labels([" positive"], table, tokenizer, 1, generator())
    assert torch.equal(vectors[0], table[tokenizer.convert_tokens_to_ids("\u2581positive")])


@pytest.fixture
def table(tokenizer: Any) -> Tensor:
    """A table with padding rows at its end, as models have whose vocabulary was rounded up: zeros, NaN, infinite."""
    rows = torch.randn(len(tokenizer) + 6, H, generator=generator(9)) * torch.linspace(0.1, 2, H) + torch.arange(H)
    rows[len(tokenizer) :] = 0.0
    rows[len(tokenizer) + 1] = float("nan")
    rows[len(tokenizer) + 2, 3] = float("inf")
    return rows


def labelled() -> Template:
    return Template.make(input="{soft}{movie_review}\n", target=" {label}", labels=["negative", "positive"])


def start(init: str, table: Tensor, tokenizer: Any, tokens: int = 20, **options: Any) -> tuple[Tensor, str]:
    options = {"generator": generator(), "template": labelled(), **options}
    return initialise(init, table=table, tokenizer=tokenizer, tokens=tokens, **options)


@pytest.mark.parametrize("init", ["text", "labels", "vocabulary", "random", "prompt"])
@pytest.mark.parametrize("tokens", [1, 20, 300])
def test_shape_finite_and_deterministic(init: str, tokens: int, table: Tensor, tokenizer: Any, tmp_path: Path) -> None:
    if init == "prompt":
        init = f"prompt:{SoftPrompt(torch.ones(3, H)).save(tmp_path / 'p')}"
    vectors, said = start(init, table, tokenizer, tokens)
    again, also = start(init, table, tokenizer, tokens)
    assert vectors.shape == (tokens, H)
    assert vectors.dtype == torch.float32
    assert torch.isfinite(vectors).all()
    assert torch.equal(vectors, again)
    assert said == also
    if init in ("vocabulary", "random"):
        assert not torch.equal(vectors, start(init, table, tokenizer, tokens, generator=generator(1))[0])


@pytest.mark.parametrize("init", ["text", "labels", "vocabulary", "random"])
def test_the_result_shares_no_memory_with_the_table(init: str, table: Tensor, tokenizer: Any) -> None:
    before = table.clone()
    start(init, table, tokenizer)[0].add_(1)
    assert torch.equal(table.nan_to_num(), before.nan_to_num())


def test_text_is_cut_repeated_and_has_no_special_tokens(table: Tensor, tokenizer: Any) -> None:
    ids = tokenizer("the good film", add_special_tokens=False)["input_ids"]
    assert tokenizer("the good film")["input_ids"] == [0, *ids]
    n = len(ids)
    exact, _ = from_text("the good film", table, tokenizer, n)
    assert torch.equal(exact, table[ids])
    long, said = from_text("the good film", table, tokenizer, 2 * n + 1)
    assert torch.equal(long, torch.cat([exact, exact, exact[:1]]))
    assert f"{n} tokens, repeated to {2 * n + 1}" in said
    short, said = from_text("the good film", table, tokenizer, 2)
    assert torch.equal(short, exact[:2])
    assert "cut to 2" in said
    assert torch.equal(from_text("<s>the good film</s>", table, tokenizer, n)[0], exact)


def test_text_without_tokens(table: Tensor, tokenizer: Any) -> None:
    for text in ("", "<s></s>"):
        with pytest.raises(ConfigError, match="has no tokens with an embedding: give another init_text"):
            start("text", table, tokenizer, init_text=text)


def test_text_skips_rows_without_an_embedding(table: Tensor, tokenizer: Any) -> None:
    ids = text_ids("the good film", table, tokenizer)
    table[ids[0]] = float("nan")
    assert text_ids("the good film", table, tokenizer) == ids[1:]


def test_instruction() -> None:
    free = Template.make(input="{question} {some_context}", target="{answer}")
    assert instruction(labelled()) == "Classify the movie review as negative or positive."
    assert instruction(free) == "Read the question and some context and write the answer."
    assert instruction(None) == "Read the text and write the answer."


def test_instruction_is_the_default_and_is_told(table: Tensor, tokenizer: Any) -> None:
    vectors, said = start("text", table, tokenizer)
    assert instruction(labelled()) in said
    assert torch.equal(vectors, start("text", table, tokenizer, init_text=instruction(labelled()))[0])


def test_labels_are_means_over_their_tokens(table: Tensor, tokenizer: Any) -> None:
    vectors, said = start("labels", table, tokenizer, 5)
    for row, word in enumerate([" negative", " positive"]):
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        torch.testing.assert_close(vectors[row], table[ids].mean(dim=0))
    ordinary = table[ordinary_tokens(table, tokenizer, 5000)]
    assert all((ordinary == row).all(dim=1).any() for row in vectors[2:])
    assert "['negative', 'positive'], then embeddings of 3 tokens" in said
    one, said = start("labels", table, tokenizer, 1)
    assert torch.equal(one[0], vectors[0])
    assert "the first 1 of 2" in said


def test_label_words_as_they_stand_in_the_answer() -> None:
    for target, first in ((" {label}", " a"), ("{label}", "a"), ("Mood: {label}.", " a"), ("It's a{label}", "a")):
        assert label_texts(Template.make(input="{text}", target=target, labels=["a", "b"]))[0] == first


def test_label_of_several_tokens(table: Tensor, tokenizer: Any) -> None:
    ids = tokenizer("xqz", add_special_tokens=False)["input_ids"]
    assert len(ids) == 3
    vectors, _ = from_labels(["xqz"], table, tokenizer, 1, generator())
    torch.testing.assert_close(vectors[0], table[ids].mean(dim=0))


def test_labels_need_labels(table: Tensor, tokenizer: Any) -> None:
    free = Template.make(input="{question}", target="{answer}")
    for template in (free, None):
        with pytest.raises(ConfigError, match="init 'labels' needs a task with labels"):
            start("labels", table, tokenizer, template=template)


def test_vocabulary_is_ordinary_and_without_replacement(table: Tensor, tokenizer: Any) -> None:
    ids = ordinary_tokens(table, tokenizer, 5000)
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert not {"<s>", "</s>", "<unused0>", "sentinel"} & set(pieces)
    assert all(len(tokenizer.decode([number]).strip()) > 1 for number in ids)
    assert "\ufffd" not in "".join(tokenizer.decode([number]) for number in ids)
    assert ids == sorted(ids)
    assert ordinary_tokens(table, tokenizer, 7) == ids[:7]
    vectors, _ = from_vocabulary(table, tokenizer, len(ids), generator())
    assert len(vectors.unique(dim=0)) == len(ids)


def test_vocabulary_smaller_than_the_prompt(table: Tensor, tokenizer: Any) -> None:
    words = ordinary_tokens(table, tokenizer, 5000)
    all_of_it = ordinary_tokens(table, tokenizer, 5000, least=1000)
    assert len(all_of_it) > len(words)
    vectors, _ = from_vocabulary(table, tokenizer, 1000, generator())
    assert len(vectors.unique(dim=0)) > len(words) // 2


def test_vocabulary_never_takes_dead_rows(table: Tensor, tokenizer: Any) -> None:
    ids = ordinary_tokens(table, tokenizer, 5000)
    table[ids[0]], table[ids[1]], table[ids[2]] = 0.0, float("nan"), 1e-9
    assert ordinary_tokens(table, tokenizer, 5000) == ids[3:]


def test_random_has_the_mean_and_spread_of_each_dimension(table: Tensor, tokenizer: Any) -> None:
    alive = table[: len(tokenizer)]
    vectors, _ = from_random(table, 1000, generator())
    torch.testing.assert_close(vectors.mean(dim=0), alive.mean(dim=0), atol=0.3, rtol=0)
    torch.testing.assert_close(vectors.std(dim=0), alive.std(dim=0), atol=0.02, rtol=0.1)


def test_a_table_without_any_usable_row(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="holds no usable row"):
        start("random", torch.full((len(tokenizer), H), float("nan")), tokenizer)
    with pytest.raises(ConfigError, match="holds no usable row"):
        start("vocabulary", torch.zeros(len(tokenizer), H), tokenizer)


def test_half_precision_tables(table: Tensor, tokenizer: Any) -> None:
    for init in ("text", "labels", "vocabulary", "random"):
        assert start(init, table.bfloat16(), tokenizer)[0].dtype == torch.float32


def test_another_prompt(tmp_path: Path, table: Tensor, tokenizer: Any) -> None:
    other = SoftPrompt(torch.randn(3, H, generator=generator()), base_model="someone/model")
    path = f"prompt:{other.save(tmp_path / 'other')}"
    assert torch.equal(start(path, table, tokenizer, 3)[0], other.vectors)
    assert torch.equal(start(path, table, tokenizer, 2)[0], other.vectors[:2])
    longer, said = start(path, table, tokenizer, 7)
    assert torch.equal(longer, torch.cat([other.vectors, other.vectors, other.vectors[:1]]))
    assert "for someone/model, repeated to 7" in said
    with pytest.raises(PromptFormatError, match="no prompt folder"):
        start("prompt:nowhere/at/all", table, tokenizer)


def test_another_prompt_of_another_width() -> None:
    other = SoftPrompt(torch.ones(3, 8), base_model="someone/small")
    with pytest.raises(ConfigError, match=r"vectors of width 8, the model's embeddings have 16: .*someone/small"):
        from_prompt("p", H, 4, load=lambda _: other)


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("lables", "unknown initialiser 'lables', did you mean 'labels'? there are text, examples, labels"),
        ("Text", "did you mean 'text'?"),
        ("vocab", "did you mean 'vocabulary'?"),
        ("prompt:", "did you mean 'prompt:PATH'?"),
        ("prompts/mood", "did you mean 'prompt:PATH'?"),
        ("zzz", "unknown initialiser 'zzz': there are text, examples"),
        ("", "unknown initialiser '': there are"),
    ],
)  # fmt: skip
def test_unknown_initialisers(init: str, message: str, table: Tensor, tokenizer: Any) -> None:
    with pytest.raises(ConfigError) as told:
        check_init(init)
    assert message in str(told.value)
    with pytest.raises(ConfigError):
        start(init, table, tokenizer)


def test_settings_that_contradict(table: Tensor, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="init_text is only used by init 'text', init is 'random'"):
        start("random", table, tokenizer, init_text="hello")
    for tokens in (0, 1025):
        with pytest.raises(ConfigError, match="a soft prompt has 1 to 1024 tokens"):
            start("random", table, tokenizer, tokens)
