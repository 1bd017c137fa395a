"""Scores of texts: small cases by hand, a slow reference for the fast subsequence, many scripts, nothing at all."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu import corpus_bleu, corpus_chrf

from softprompt.errors import DataError
from softprompt.evaluation.overlap import common_subsequence, normalise, rouge_l, token_f1, words
from softprompt.evaluation.texts import bleu_tokenizer, text_scores


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("The Cat's  hat, 3.5!", ["the", "cat", "s", "hat", "3", "5"]),
        ("今天weather很好。", ["今", "天", "weather", "很", "好"]),
        ("人々はカメラ", ["人", "々", "は", "カ", "メ", "ラ"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),  # vowel signs are marks, not letters
        ("한국어 문장", ["한국어", "문장"]),
        ("Straße ＡＢＣ", ["strasse", "abc"]),
        ("ไทย", ["ไ", "ท", "ย"]),
        ("?! +", ["?", "!", "+"]),
        (" \n", []),
    ],
)
def test_words_of_many_scripts(text: str, tokens: list[str]) -> None:
    assert words(text) == tokens


@given(st.lists(st.sampled_from("abc"), max_size=70), st.lists(st.sampled_from("abcd"), max_size=70))
def test_subsequence_equals_dynamic_programming(first: list[str], second: list[str]) -> None:
    @cache
    def slow(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return 0
        if first[i - 1] == second[j - 1]:
            return slow(i - 1, j - 1) + 1
        return max(slow(i - 1, j), slow(i, j - 1))

    assert common_subsequence(first, second) == slow(len(first), len(second))


def test_overlap_by_hand() -> None:
    assert token_f1(["a", "b", "b", "c"], ["b", "b", "d"]) == pytest.approx(2 * 2 / 7)
    assert rouge_l(["police", "kill", "the", "gunman"], ["police", "killed", "the", "gunman"]) == pytest.approx(0.75)
    assert rouge_l([], []) == token_f1([], []) == 1
    assert rouge_l([], ["a"]) == token_f1(["a"], []) == 0
    assert normalise("  a\n b ") == "a b" != normalise("A b")


def test_best_reference_of_each_row_counts() -> None:
    scores = text_scores(["good dog", "x"], [["bad cat", "good dog"], ["x y"]])
    assert scores.exact_match == 0.5
    assert scores.token_f1 == pytest.approx((1 + 2 / 3) / 2)
    assert scores.bits_per_token is None


def test_chrf_and_bleu_are_sacrebleu_s() -> None:
    predicted = ["the cat sat on the mat today", "a dog runs in the park", ""]
    references = [
        ["the cat sat on a mat"],
        ["a dog ran in the park", "the dog runs in a park"],
        ["nothing at all here"],
    ]
    streams = [[r[0] for r in references], [r[1] if len(r) > 1 else None for r in references]]
    scores = text_scores(predicted, references, bits_per_token=1.5)
    assert scores.bleu == pytest.approx(corpus_bleu(predicted, streams).score)
    assert scores.chrf == pytest.approx(corpus_chrf(predicted, streams).score)
    assert "nrefs:var" in scores.signatures["bleu"]
    assert "tok:13a" in scores.signatures["bleu"]
    for name in ("exact_match", "token_f1", "rouge_l", "chrf", "bleu"):
        low, high = scores.intervals[name] or (0, 0)
        assert low <= getattr(scores, name) <= high, name
    plain = scores.to_dict()
    assert plain == json.loads(json.dumps(plain, allow_nan=False))
    assert plain["score"] == scores.rouge_l


def test_short_answers_have_no_bleu_rather_than_a_false_zero() -> None:
    scores = text_scores(["yes", "no"], [["yes"], ["no"]])
    assert scores.bleu is None
    assert scores.intervals["bleu"] is None
    assert scores.chrf == pytest.approx(100)


def test_chinese_is_scored_by_character() -> None:
    scores = text_scores(["今天天气很好。"], [["今天天气不错。"]])
    assert 0 < scores.token_f1 < 1
    assert 0 < scores.rouge_l < 1
    assert scores.bleu
    assert "tok:zh" in scores.signatures["bleu"]


def test_one_empty_prediction() -> None:
    scores = text_scores([""], [["an answer of five words"]])
    assert (scores.exact_match, scores.token_f1, scores.rouge_l, scores.chrf, scores.bleu) == (0, 0, 0, 0, 0)
    assert scores.intervals["rouge_l"] is None
    assert scores.intervals["exact_match"] is not None
    nothing = text_scores([""], [[""]])
    assert nothing.exact_match == 1
    assert nothing.chrf is None
    assert nothing.bleu is None


def test_the_tokenizer_follows_the_script() -> None:
    assert bleu_tokenizer([["plain English, 100 %"]]) == "13a"
    assert bleu_tokenizer([["今天的 GPU 很快"]]) == "zh"
    assert bleu_tokenizer([["これは日本語の文です"]]) == "char"
    assert bleu_tokenizer([["한국어 문장입니다"]]) == "13a"
    assert bleu_tokenizer([["123"]]) == "13a"


@pytest.mark.parametrize(
    ("predicted", "references", "message"),
    [
        ([], [], "there are no rows to score"),
        (["a"], [["a"], ["b"]], "1 texts but references for 2 rows"),
        (["a", "b"], [["a"], []], "row 1 needs a list of at least one reference text"),
        (["a"], ["a"], "row 0 needs a list"),
    ],
)
def test_mistakes(predicted: list[str], references: list[list[str]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        text_scores(predicted, references)


def test_import_does_not_bring_the_slow_packages() -> None:
    code = (
        "import sys, softprompt.evaluation.metrics, softprompt.inspection.report; "
        "print([m for m in ('sacrebleu', 'sklearn', 'scipy', 'matplotlib', 'jinja2') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
