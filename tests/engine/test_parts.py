"""The parts of the engine by themselves: sampling, text, whose turn it is, settings."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from softprompt.engine.requests import Settings
from softprompt.engine.sampling import Sampler
from softprompt.engine.scheduler import FairQueue, share
from softprompt.engine.text import GrowingText
from softprompt.errors import ConfigError
from tiny_tokenizers import byte_level, llama

SIZE = 300


def some_logits(seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


def draws(settings: dict, count: int = 2000, ids=(1,), logits=None) -> torch.Tensor:
    """How often each token is drawn, [V]."""
    sampler = Sampler(Settings(seed=1, **settings), ids)
    logits = some_logits() if logits is None else logits
    found = torch.zeros(SIZE)
    for _ in range(count):
        found[sampler.pick(logits).id] += 1
        sampler.written.clear()
    return found / count


@pytest.mark.parametrize(
    ("settings", "processors"),
    [
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"temperature": 1.0, "top_k": 5}, [TopKLogitsWarper(5)]),
        ({"temperature": 1.0, "top_p": 0.6}, [TopPLogitsWarper(0.6)]),
        ({"temperature": 1.5, "min_p": 0.1}, [TemperatureLogitsWarper(1.5), MinPLogitsWarper(0.1)]),
        (
            {"temperature": 1.3, "top_k": 9, "top_p": 0.8, "repetition_penalty": 1.4},
            [
                RepetitionPenaltyLogitsProcessor(1.4),
                TemperatureLogitsWarper(1.3),
                TopKLogitsWarper(9),
                TopPLogitsWarper(0.8),
            ],
        ),
    ],
)
def test_draws_have_the_probabilities_that_transformers_gives(settings, processors):
    logits = some_logits()
    read = (1, 5, int(logits.argmax()), -1, -2)
    ids = torch.tensor([[token for token in read if token >= 0]])
    theirs = torch.softmax(LogitsProcessorList(processors)(ids, logits[None].clone()), dim=-1)[0]
    ours = draws(settings, ids=read)
    assert (ours[theirs == 0] == 0).all()
    assert (ours - theirs).abs().max() < 0.05


def test_nucleus_over_more_tokens_than_are_sorted_first():
    flat = torch.zeros(SIZE)
    flat[7] = 0.01
    found = draws({"temperature": 1.0, "top_p": 0.95}, 4000, logits=flat)
    assert 270 < int((found > 0).sum()) <= 286 and found[7] > 0


def test_penalties_count_what_was_written_and_never_soft_tokens():
    logits = torch.zeros(SIZE)
    logits[[4, 5, 6]] = torch.tensor([3.0, 2.5, 2.15])
    sampler = Sampler(Settings(presence_penalty=0.6, frequency_penalty=0.1), (4, 4, -1, -5))
    assert [sampler.pick(logits).id for _ in range(6)] == [4, 5, 4, 4, 6, 4]
    bias = Sampler(Settings(logit_bias=((9, 5.0), (4, -100.0))), (1,))
    assert bias.pick(logits).id == 9
    assert logits[9] == 0  # given logits are not changed


@pytest.mark.parametrize("least", [1e-310, 5e-324])
def test_settings_close_to_zero_are_no_reason_to_fail(least):
    logits = some_logits()
    best = int(logits.argmax())
    assert Sampler(Settings(temperature=least), (1,)).pick(logits).id == best
    for temperature in (0.0, 1.0):  # what was read, with a positive logit, becomes as likely as can be
        sampler = Sampler(Settings(temperature=temperature, repetition_penalty=least), (best,))
        assert [sampler.pick(logits).id for _ in range(3)] == [best] * 3


def test_log_probabilities_are_of_the_model_itself():
    logits = some_logits()
    token = Sampler(Settings(logprobs=3, presence_penalty=1.0), (1,)).pick(logits)
    known = torch.log_softmax(logits.double(), dim=-1)
    assert token.logprob == pytest.approx(float(known[token.id]))
    assert [id for id, _ in token.top] == logits.topk(3).indices.tolist()
    assert Sampler(Settings(logprobs=0), (1,)).pick(logits).top == ()


def test_without_a_seed_texts_differ():
    flat = torch.zeros(SIZE)
    one, two = Sampler(Settings(temperature=1.0), (1,)), Sampler(Settings(temperature=1.0), (1,))
    assert [one.pick(flat).id for _ in range(9)] != [two.pick(flat).id for _ in range(9)]


def test_all_that_makes_no_sense_is_said_at_once():
    with pytest.raises(ConfigError) as error:
        Settings(max_new_tokens=0, temperature=float("nan"), top_p=0, top_k=-1, stop=("",), logit_bias=((1, 1e999),))
    assert len(error.value.problems) == 6


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [byte_level, llama])
@pytest.mark.parametrize("stop", [(), ("ü z",), ("never",)])
def test_growing_text_is_the_text_of_all_tokens(stop, make):
    tokenizer = make()
    text = "Grüße aus Köln – 東京 👩‍👩‍👧 " * 12 + "ü zum Ende"
    stream = GrowingText(tokenizer, stop)
    said = ""
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        piece = stream.add(token)
        assert "�" not in piece
        said += piece
        if stream.stopped:
            break
    said += stream.finish()
    assert said == (text[: text.index("ü z")] if stop == ("ü z",) else text)
    assert stream._from > 100


# --- turns ------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Item:
    task: str
    cost: int = 100


def drain(queue: FairQueue[Item]) -> list[str]:
    found = []
    while queue.peek() is not None:
        found.append(queue.pop().task)
    return found


def test_a_task_with_many_requests_does_not_hold_up_one_with_few():
    queue: FairQueue[Item] = FairQueue()
    for task in ["a"] * 50 + ["b"] * 3:
        queue.push(Item(task))
    order = drain(queue)
    assert len(order) == 53 and max(i for i, task in enumerate(order) if task == "b") < 12
    assert not queue._tasks and not queue._credit


def test_turns_go_by_tokens_and_not_by_requests():
    queue: FairQueue[Item] = FairQueue()
    for _ in range(40):
        queue.push(Item("long", 1000))
        queue.push(Item("short", 100))
    order = drain(queue)[:22]
    assert 14 <= order.count("short") <= 21


def test_a_queue_takes_back_and_removes():
    queue: FairQueue[Item] = FairQueue()
    one, two, three = Item("a"), Item("a"), Item("b", 10_000)
    queue.push(one)
    queue.push(two, front=True)
    queue.push(three)
    assert queue.items() == [two, one, three] and len(queue) == 3
    queue.remove(two)
    queue.remove(two)
    assert queue.pop() is one and queue.pop() is three and queue.peek() is None


@pytest.mark.parametrize(
    ("left", "budget", "given"),
    [
        ([], 10, []),
        ([5], 10, [5]),
        ([500, 8, 40], 128, [42, 8, 40]),
        ([500, 500, 500, 500, 3], 64, [32, 29, 0, 0, 3]),
        ([1000], 7, [7]),
    ],
)
def test_what_is_read_in_a_step(left, budget, given):
    assert share(left, budget) == given
