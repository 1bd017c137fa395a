"""Label scores and generated tokens: equal to plain concatenation and to transformers' own generate, row by row."""

from __future__ import annotations

import pytest
import torch

from softprompt.evaluation.generation import Sampling, TextStream, choose, generate_tokens
from softprompt.evaluation.scoring import label_tree, score_labels
from softprompt.placement import embed_with_soft
from tiny_models import ARCHITECTURES, make_backbone, make_rows, random_vectors


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def backbone(request):
    return make_backbone(request.param)


def contexts(placement: str) -> list[tuple[int, ...]]:
    return [row.ids[: row.answer] for row in make_rows(placement)]


ANSWERS = [(5,), (6, 7), (6, 8, 9), (6, 8, 10), (20, 21, 22, 23)]


@pytest.mark.parametrize("placement", ["front", "divided", "behind"])
def test_label_scores_equal_plain_concatenation(backbone, placement):
    vectors = random_vectors(backbone)
    plain = score_labels(backbone, contexts(placement), ANSWERS, vectors, exact_reference=True)
    for budget in (1000, 20):
        fast = score_labels(backbone, contexts(placement), ANSWERS, vectors, micro_batch_tokens=budget)
        torch.testing.assert_close(fast, plain, rtol=0, atol=1e-9)
    alone = torch.cat([score_labels(backbone, [ids], ANSWERS, vectors) for ids in contexts(placement)])
    torch.testing.assert_close(alone, plain, rtol=0, atol=1e-9)


def test_label_tree_shares_what_labels_have_in_common():
    tree = label_tree(ANSWERS)
    assert tree.tokens == (6, 8, 20, 21, 22)
    assert tree.parents == (-1, 0, -1, 2, 3)
    assert tree.steps[2] == ((-1, 6), (0, 8), (1, 9))


def collect(backbone, ids, vectors, sampling, **more):
    found: list[list[int]] = [[] for _ in ids]
    for index, token in generate_tokens(backbone, ids, vectors, sampling, **more):
        found[index].append(token)
    return found


@pytest.mark.parametrize("placement", ["front", "divided", "behind"])
def test_greedy_equals_transformers_generate(backbone, placement):
    vectors, ids = random_vectors(backbone), contexts(placement)
    ours = collect(backbone, ids, vectors, Sampling(max_new_tokens=12))
    for row, tokens in zip(ids, ours, strict=True):
        embeddings = embed_with_soft(torch.tensor(row)[None], vectors, backbone.embed)
        theirs = backbone.model.generate(
            inputs_embeds=embeddings,
            attention_mask=torch.ones(1, len(row), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
        )
        assert tokens == theirs[0].tolist()


def test_order_and_batch_never_change_an_answer(backbone):
    vectors, ids = random_vectors(backbone), contexts("front")
    sampling = Sampling(max_new_tokens=8, temperature=1.0, top_p=0.9, seed=5)
    together = collect(backbone, ids, vectors, sampling)
    assert collect(backbone, ids[::-1], vectors, sampling, micro_batch_tokens=30) == together[::-1]
    assert [collect(backbone, [row], vectors, sampling)[0] for row in ids] == together
    assert collect(backbone, ids, vectors, Sampling(8, 1.0, 0.9, seed=6)) != together


def test_a_row_ends_at_an_end_token_or_when_told(backbone):
    vectors, ids = random_vectors(backbone), contexts("front")
    free = collect(backbone, ids, vectors, Sampling(max_new_tokens=6))
    end = free[0][2]
    ended = collect(backbone, ids, vectors, Sampling(max_new_tokens=6), ends=[end])
    assert ended == [row[: row.index(end)] if end in row else row for row in free]
    stream = generate_tokens(backbone, ids[:1], vectors, Sampling(max_new_tokens=6))
    next(stream)
    with pytest.raises(StopIteration):
        stream.send(True)


def test_no_prompt_at_all(backbone):
    ids = [(5, 6, 7), (8, 9, 10, 11)]
    plain = score_labels(backbone, ids, ANSWERS, None, exact_reference=True)
    torch.testing.assert_close(score_labels(backbone, ids, ANSWERS, None), plain, rtol=0, atol=1e-9)


def test_top_p_keeps_the_smallest_set():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    generator = torch.Generator().manual_seed(0)
    drawn = {choose(logits, Sampling(temperature=1.0, top_p=0.7), generator) for _ in range(200)}
    assert drawn == {0, 1}
    assert {choose(logits, Sampling(temperature=1.0, top_p=0.01), generator) for _ in range(20)} == {0}
    assert choose(logits, Sampling(temperature=1e-310), generator) == 0  # divides to infinity


class Letters:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids, **_):
        return bytes(ids).decode("utf-8", "replace")


def test_text_stream_gives_whole_characters_and_no_stop_text():
    stream = TextStream(Letters(), stop=["END"])
    pieces = [stream.add(byte) for byte in "aé日EN".encode()]
    assert "�" not in "".join(pieces) and "".join(pieces) == "aé日"
    assert stream.add(ord("X")) == "ENX"
    pieces.extend(stream.add(byte) for byte in b"bEND")
    assert stream.stopped and "".join(pieces).endswith("b") and stream.finish() == ""


def test_text_stream_gives_back_what_was_no_stop_text():
    stream = TextStream(Letters(), stop=["END"])
    assert "".join(stream.add(byte) for byte in b"theE") == "the"
    assert stream.finish() == "E"
