"""Nearest vocabulary tokens: against a plain computation, and the rows of a table that are no words."""

from __future__ import annotations

import pytest
import torch

from softprompt.inspection.nearest import movement, nearest_tokens, token_text, vocabulary_lengths


class Tokenizer:
    """Just enough of a tokenizer: names and texts of the first few ids."""

    def __init__(self, texts: list[str], names: list[str] | None = None):
        self.texts, self.names = texts, names or texts

    def __len__(self) -> int:
        return len(self.texts)

    def decode(self, ids: list[int]) -> str:
        return self.texts[ids[0]]

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.names[token]


def test_equals_a_plain_search() -> None:
    generator = torch.Generator().manual_seed(0)
    table, vectors = torch.randn(500, 8, generator=generator), torch.randn(70, 8, generator=generator)
    cosine = torch.nn.functional.cosine_similarity(vectors[:, None], table[None], dim=2)
    distance = (vectors[:, None] - table[None]).norm(dim=2)
    for measure, expected in (("cosine", cosine), ("dot", vectors @ table.T), ("euclidean", distance)):
        found = nearest_tokens(vectors, table, None, k=3, measure=measure)
        best = expected.topk(3, largest=measure != "euclidean")
        assert [[n.id for n in row] for row in found] == best.indices.tolist()
        assert torch.allclose(torch.tensor([[n.similarity for n in row] for row in found]), best.values, atol=1e-4)
        assert found[0][0].text == f"#{found[0][0].id}"


def test_a_word_s_own_vector_is_nearest_to_that_word_in_any_scale() -> None:
    table = torch.eye(4)
    found = nearest_tokens(table[[2, 0]] * 9, table, Tokenizer(["a", " b", " c", "d"]), k=1)
    assert found == [[(" c", 2, 1.0)], [("a", 0, 1.0)]]


def test_rows_that_are_no_words_are_left_out() -> None:
    table = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # a zero row, a word, a row beyond the tokenizer
    found = nearest_tokens(torch.tensor([[0.1, 0.9], [0.0, 0.0]]), table, Tokenizer(["zero", "word"]), k=5)
    assert [[n.text for n in row] for row in found] == [["word"], []]


def test_texts_of_tokens() -> None:
    tokenizer = Tokenizer(["movie", "\ufffd", " good", ""], ["\u2581movie", "\u00e2\u0122", "\u0120good", "<pad>"])
    assert [token_text(tokenizer, i) for i in range(4)] == [" movie", "\u00e2\u0122", " good", "<pad>"]


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="one of cosine, dot, euclidean, found 'l1'"):
        nearest_tokens(torch.ones(1, 2), torch.ones(1, 2), None, measure="l1")
    with pytest.raises(ValueError, match=r"vectors \[1, 2\] and table \[1, 3\]"):
        nearest_tokens(torch.ones(1, 2), torch.ones(1, 3), None)


def test_lengths_of_the_vocabulary() -> None:
    table = torch.cat([torch.zeros(50, 1), torch.arange(1, 102)[:, None].float()])
    assert vocabulary_lengths(table) == pytest.approx((51, 6, 96))
    assert vocabulary_lengths(torch.zeros(3, 2)) == (0, 0, 0)


def test_movement() -> None:
    assert movement(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [1.0, 0.0]])) == [
        (3.0, pytest.approx(0.8)),
        (1.0, None),
    ]
    assert movement(torch.ones(2, 2), None) == movement(torch.ones(2, 2), torch.ones(1, 2)) == []
