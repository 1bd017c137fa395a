"""A mixed batch equals each request alone, token for token, for every architecture; and transformers' generate."""

from __future__ import annotations

import pytest
import torch
from engine_material import (
    LABELS,
    alone,
    digest,
    finish,
    float_backbone,
    make_request,
    requests_of_all_kinds,
    small_limits,
    tokens_of,
)

from softprompt.engine import engine as engine_module
from softprompt.engine.engine import Engine, EngineLimits
from softprompt.engine.requests import EngineError, QueueFullError, Request, Settings, TooLongError, TooManyError
from softprompt.evaluation.scoring import score_labels
from softprompt.placement import embed_with_soft
from tiny_models import ARCHITECTURES, random_ids, random_vectors


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def backbone(request):
    return float_backbone(request.param)


@pytest.fixture(scope="module")
def llama():
    return float_backbone("llama")


@pytest.mark.parametrize("limits", [EngineLimits(), small_limits(), small_limits(rows=2, step_tokens=1)])
def test_a_mixed_batch_equals_each_request_alone(backbone, limits):
    engine = Engine(backbone, limits)
    requests = requests_of_all_kinds(backbone)
    ids = engine.submit(requests)
    found = finish(engine, ids)
    for id, request in zip(ids, requests, strict=True):
        assert tokens_of(found[id]) == alone(backbone, request), request.task
        assert found[id][-1].finish == "length"


def test_requests_that_come_in_the_middle_change_nothing(backbone):
    engine = Engine(backbone, small_limits())
    requests = requests_of_all_kinds(backbone, 9)
    found, ids = {}, []
    for request in requests:
        ids += engine.submit(request)
        for event in engine.step() + engine.step():
            found.setdefault(event.id, []).append(event)
    for id, events in finish(engine, ids).items():
        found.setdefault(id, []).extend(events)
    assert [tokens_of(found[id]) for id in ids] == [alone(backbone, request) for request in requests]


def test_greedy_equals_transformers_generate(backbone):
    kinds = ("front", "after_bos", "inside", "behind", "none")
    requests = [make_request(backbone, kind, i, Settings(max_new_tokens=10)) for i, kind in enumerate(kinds)]
    engine = Engine(backbone, small_limits())
    ids = engine.submit(requests)
    found = finish(engine, ids)
    for id, request in zip(ids, requests, strict=True):
        line = torch.tensor(request.ids)[None]
        theirs = backbone.model.generate(
            inputs_embeds=embed_with_soft(line, request.vectors, backbone.embed),
            attention_mask=torch.ones_like(line),
            max_new_tokens=10,
            do_sample=False,
        )
        assert tokens_of(found[id]) == theirs[0].tolist()


def test_labels_are_scored_in_the_same_batch_as_texts_are_written(backbone):
    texts = requests_of_all_kinds(backbone, 6)
    scored = [
        Request(r.ids, r.vectors, r.digest, r.task, constant=r.constant, labels=LABELS if i % 2 else LABELS[:1])
        for i, r in enumerate(requests_of_all_kinds(backbone, 8))
    ]
    engine = Engine(backbone, small_limits())
    ids = engine.submit([*texts, *scored])
    found = finish(engine, ids)
    assert [tokens_of(found[id]) for id in ids[:6]] == [alone(backbone, request) for request in texts]
    for id, request in zip(ids[6:], scored, strict=True):
        want = score_labels(backbone, [request.ids], request.labels, request.vectors, exact_reference=True)
        torch.testing.assert_close(torch.tensor(found[id][-1].scores).double(), want[0], rtol=0, atol=2e-4)
        assert found[id][-1].finish == "stop" and len(found[id]) == 1


@pytest.mark.parametrize("settings", [Settings(temperature=0.8, seed=3), Settings(temperature=1.2, top_p=0.7, seed=4)])
def test_a_seed_gives_the_same_text_in_any_batch(llama, settings):
    requests = [make_request(llama, kind, 3, settings) for kind in ("front", "behind", "none", "deep")]
    engine = Engine(llama, small_limits())
    ids = engine.submit([*requests_of_all_kinds(llama, 5), *requests])[5:]
    found = finish(engine, ids)
    for id, request in zip(ids, requests, strict=True):
        assert tokens_of(found[id]) == alone(llama, request)


def test_long_rows_move_to_larger_pools_and_short_ones_take_their_places(llama):
    long = [make_request(llama, "front", i, Settings(max_new_tokens=160 + 10 * i)) for i in range(3)]
    short = [make_request(llama, "behind", i, Settings(max_new_tokens=3)) for i in range(12)]
    engine = Engine(llama, small_limits(rows=6))
    requests = [*short[:6], *long, *short[6:]]
    ids = engine.submit(requests)
    found = finish(engine, ids)
    assert [tokens_of(found[id]) for id in ids] == [alone(llama, request) for request in requests]
    assert engine.slots is not None and engine.slots.rows == 0 and engine.slots.used_tokens == 0


def test_a_long_text_does_not_hold_up_those_that_are_written(llama):
    engine = Engine(llama, EngineLimits(step_tokens=8))
    writers = engine.submit([make_request(llama, "front", i, Settings(max_new_tokens=60)) for i in range(3)])
    while not all(engine._rows[id].writing for id in writers):
        engine.step()
    [long] = engine.submit(Request((5,) * 200, settings=Settings(max_new_tokens=1)))
    reading = 0
    while engine._rows.get(long):
        said = {event.id for event in engine.step() if event.tokens}
        assert set(writers) <= said and engine.last.read <= 8
        reading += 1
    assert reading == 25


# --- states that are shared -----------------------------------------------------------------------------------------


def count_read(engine: Engine) -> int:
    read = 0
    while engine.busy:
        engine.step()
        read += engine.last.read
    return read


def test_a_prompt_is_computed_once_for_fifty_requests_at_once(llama):
    first = make_request(llama, "front", 4, Settings(max_new_tokens=2), tokens=20)
    requests = [
        Request((*first.ids[: first.constant], 9, 10 + i), first.vectors, first.digest, "task", first.settings,
                constant=first.constant)
        for i in range(50)
    ]  # fmt: skip
    engine = Engine(llama, EngineLimits(rows=64, step_tokens=64))
    engine.submit(requests)
    assert count_read(engine) == first.constant + 50 * 2
    assert (engine.prefixes.misses, engine.prefixes.hits) == (1, 49)
    [again] = engine.submit(requests[0])
    assert finish(engine, [again])[again][-1].usage.cached == first.constant


def test_many_tasks_take_the_same_steps_as_one(llama):
    """What the clock can only show roughly: forty tasks are no more work than one, once their states are kept."""

    def steps(tasks: int) -> list[tuple[int, int, int]]:
        engine = Engine(llama, small_limits(rows=8, step_tokens=16))
        settings = Settings(max_new_tokens=5, ignore_end=True)
        prompts = [random_vectors(llama, 4, seed).float() for seed in range(tasks)]
        keys = [digest(vectors) for vectors in prompts]

        def ask(number: int) -> Request:
            ids = (-1, -2, -3, -4, 5, *random_ids(3 + number % 7, torch.Generator().manual_seed(number)))
            task = number % tasks
            return Request(ids, prompts[task], keys[task], f"task{task}", settings, constant=5)

        for _ in range(2):  # the first pass leaves the states of the prompts behind
            engine.submit([ask(number) for number in range(40)])
            done = []
            while engine.busy:
                engine.step()
                done.append((engine.last.rows, engine.last.read, engine.last.written))
        return done

    assert steps(40) == steps(1)


def test_states_are_kept_by_content_and_never_by_name(llama):
    one, two = (make_request(llama, "front", seed, Settings(max_new_tokens=6), tokens=6) for seed in (1, 2))
    two = Request(one.ids, two.vectors, two.digest, one.task, one.settings, constant=one.constant)
    engine = Engine(llama)
    for request in (one, two, one):
        [id] = engine.submit(request)
        assert tokens_of(finish(engine, [id])[id]) == alone(llama, request)
    assert engine.prefixes.misses == 2
    assert alone(llama, one) != alone(llama, two)


def test_what_is_kept_is_bounded_and_the_oldest_goes_first(llama):
    requests = [make_request(llama, "front", i, Settings(max_new_tokens=1), tokens=10) for i in range(4)]
    engine = Engine(llama)
    one = engine.slots.token_bytes * requests[0].constant
    engine = Engine(llama, EngineLimits(prompt_bytes=3 * one))
    for index in (0, 1, 2, 0, 3):  # 1 is the least recently used when 3 comes
        engine.submit(requests[index])
        count_read(engine)
    assert (engine.prefixes.bytes, engine.prefixes.evictions, engine.prefixes.misses) == (3 * one, 1, 4)
    engine.submit(requests[0])
    count_read(engine)
    assert engine.prefixes.misses == 4
    engine.submit(requests[1])
    count_read(engine)
    assert engine.prefixes.misses == 5


def test_nothing_is_kept_that_does_not_fit_and_answers_are_the_same(llama):
    engine = Engine(llama, small_limits(prompt_bytes=1))
    first = make_request(llama, "front", 4, Settings(max_new_tokens=5))
    ids = engine.submit([first] * 6)
    found = finish(engine, ids)
    assert {tuple(tokens_of(found[id])) for id in ids} == {tuple(alone(llama, first))}
    assert engine.prefixes.bytes == 0


def test_requests_under_way_take_no_more_memory_than_they_may(llama):
    # Each needs a row of 128 tokens, however few of them it fills: there is room for two such rows.
    one = Engine(llama).slots.token_bytes * 128
    engine = Engine(llama, EngineLimits(rows=8, cache_bytes=2 * one + 1))
    ids = engine.submit([make_request(llama, "front", i, Settings(max_new_tokens=4)) for i in range(5)])
    most = 0
    while engine.busy:
        engine.step()
        most = max(most, engine.slots.rows)
    assert most == 2 and len(ids) == 5


def document_of_tasks(backbone, count: int) -> list[Request]:
    """One text read by many tasks whose prompts stand behind it."""
    text = make_request(backbone, "none", 8, Settings()).ids
    return [
        Request((*text, *make_request(backbone, "behind", i, Settings()).ids[-(1 + i % 5) :], 11),
                make_request(backbone, "behind", i, Settings()).vectors, f"digest-{i}", f"task-{i}", labels=LABELS,
                group="document", shared=len(text), members=count)
        for i in range(count)
    ]  # fmt: skip


def test_a_document_is_read_once_for_all_tasks(backbone):
    requests = document_of_tasks(backbone, 7)
    engine = Engine(backbone, small_limits())
    ids = engine.submit(requests)
    read, found = 0, {}
    while engine.busy:
        found |= {event.id: event for event in engine.step()}
        read += engine.last.read
    if backbone.fast:
        assert read == requests[0].shared + sum(len(r.ids) - r.shared for r in requests)
        assert not engine.prefixes._of_groups and not engine.prefixes._members
    for id, request in zip(ids, requests, strict=True):
        want = score_labels(backbone, [request.ids], request.labels, request.vectors, exact_reference=True)
        torch.testing.assert_close(torch.tensor(found[id].scores).double(), want[0], rtol=0, atol=2e-4)


def test_when_the_one_that_computes_is_cancelled_another_does_it(llama):
    engine = Engine(llama, small_limits(step_tokens=2))
    requests = document_of_tasks(llama, 4)
    ids = engine.submit(requests)
    engine.step()
    engine.cancel(ids[:1])
    found = finish(engine, ids)
    assert [found[id][-1].finish for id in ids] == ["cancelled", "stop", "stop", "stop"]
    assert not engine.prefixes._of_groups and not engine._parked


# --- ends -------------------------------------------------------------------------------------------------------------


def test_an_end_token_ends_and_is_not_said(llama):
    request = make_request(llama, "front", 3, Settings(max_new_tokens=9))
    tokens = alone(llama, request)
    assert len(set(tokens)) > 2
    stop = next(token for token in tokens if token != tokens[0])
    before = tokens.index(stop)
    for ignored in (False, True):
        ended = make_request(llama, "front", 3, Settings(max_new_tokens=9, ignore_end=ignored), ends=frozenset([stop]))
        engine = Engine(llama)
        [id] = engine.submit(ended)
        events = finish(engine, [id])[id]
        assert tokens_of(events) == (tokens if ignored else tokens[:before])
        assert events[-1].finish == ("length" if ignored else "stop")
        assert events[-1].usage.generated == (9 if ignored else before)


def test_a_stop_text_ends_and_is_not_said(llama):
    request = make_request(llama, "front", 3, Settings(max_new_tokens=9))
    engine = Engine(llama)
    [id] = engine.submit(request)
    text = "".join(event.text for event in finish(engine, [id])[id])
    assert len(text) > 6
    for stop in (text[2:5], text[-2:]):
        [id] = engine.submit(make_request(llama, "front", 3, Settings(max_new_tokens=9, stop=(stop,))))
        events = finish(engine, [id])[id]
        assert "".join(event.text for event in events) == text[: text.index(stop)]
        assert events[-1].finish == "stop"


def test_a_text_ends_with_the_context_of_the_model(llama):
    request = make_request(llama, "front", 3, Settings(max_new_tokens=1000))
    engine = Engine(llama)
    [id] = engine.submit(request)
    events = finish(engine, [id])[id]
    assert events[-1].finish == "length"
    assert len(request.ids) + len(tokens_of(events)) == llama.context_length


def test_usage_counts_soft_tokens_and_those_that_were_there(llama):
    request = make_request(llama, "deep", 3, Settings(max_new_tokens=3), tokens=4)
    engine = Engine(llama)
    for cached in (0, request.constant):
        [id] = engine.submit(request)
        usage = finish(engine, [id])[id][-1].usage
        assert (usage.read, usage.cached, usage.virtual, usage.generated) == (len(request.ids), cached, 4, 3)


# --- refusals and cancelling ------------------------------------------------------------------------------------------


def test_cancelled_in_every_phase_nothing_is_left(llama):
    requests = requests_of_all_kinds(llama, 12)
    wanted = [alone(llama, request) for request in requests]
    for steps in range(9):
        engine = Engine(llama, small_limits(rows=3, step_tokens=3))
        ids = engine.submit(requests)
        early = [event for _ in range(steps) for event in engine.step()]
        engine.cancel(ids[::2])
        found = finish(engine, ids)
        for event in reversed(early):
            found[event.id].insert(0, event)
        engine.cancel(ids)  # long ended
        assert [tokens_of(found[id]) for id in ids[1::2]] == wanted[1::2]
        assert (engine.slots.rows, engine.running, engine.waiting, len(engine._queue)) == (0, 0, 0, 0)
        assert not engine._parked and not engine.prefixes._building


def test_the_queue_is_bounded_and_takes_all_or_none(llama):
    engine = Engine(llama, EngineLimits(rows=2, waiting=3))
    request = make_request(llama, "front", 1, Settings(max_new_tokens=2))
    engine.submit([request] * 4)
    with pytest.raises(QueueFullError, match="4 requests wait already, at most 3 may"):
        engine.submit([request] * 2)
    with pytest.raises(TooManyError, match="6 requests at once, at most 5 are taken"):
        engine.submit([request] * 6)
    assert engine.waiting == 4
    finish(engine, [])
    engine.submit([request] * 5)


def test_what_cannot_be_computed_is_refused_at_once(llama):
    engine = Engine(llama)
    request = make_request(llama, "front", 1, Settings())
    deep = make_request(llama, "deep", 1, Settings())
    for ids, vectors, message in (
        ((), None, "nothing to read"),
        ((3,) * 256, None, "256 tokens leaves no room in a context of 256"),
        ((-1, -9, 4), request.vectors, "soft token 8, the prompt only 2"),
        ((4, -1), None, "soft token 0, the prompt only 0"),
        ((4, -1, -2), deep.vectors, "no token to answer from"),
        ((-1, 4, -2, 4), deep.vectors, "in one place"),
    ):
        with pytest.raises((EngineError, TooLongError), match=message):
            engine.submit(Request(ids, vectors))
    assert not engine.busy


def test_a_step_that_fails_ends_only_what_it_was_about(llama, monkeypatch):
    engine = Engine(llama, small_limits())
    ids = engine.submit(requests_of_all_kinds(llama, 8))
    engine.step()
    monkeypatch.setattr(engine_module, "logits_in_pieces", lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
    with pytest.raises(RuntimeError, match="no memory"):
        finish(engine, ids)
    failed = engine.fail()
    assert {event.finish for event in failed} == {"error"} and engine.slots.rows == 0
    monkeypatch.undo()
    found = finish(engine, ids)
    rest = [id for id in ids if found[id]]
    assert len(rest) + len(failed) == 8 and all(found[id][-1].finish == "length" for id in rest)


def test_without_memory_for_a_slot_the_request_ends_and_nothing_is_left(llama, monkeypatch):
    engine = Engine(llama, small_limits())
    request = make_request(llama, "front", 1, Settings(max_new_tokens=3))
    with monkeypatch.context() as patch:
        patch.setattr(engine.slots, "new", lambda tokens: (_ for _ in ()).throw(RuntimeError("no memory")))
        ids = engine.submit([request] * 3)
        failed = []
        for _ in ids:  # as the worker does, step by step
            with pytest.raises(RuntimeError, match="no memory"):
                engine.step()
            failed += engine.fail()
    assert [event.finish for event in failed] == ["error"] * 3 and not engine.busy
    assert not engine.prefixes._building and not engine._parked
    [id] = engine.submit(request)
    assert tokens_of(finish(engine, [id])[id]) == alone(llama, request)


def steps_under_load(backbone, every: float, count: int) -> tuple[list[int], int]:
    """Steps from submission to end of each accepted request when one comes `every` so many steps; how many were not."""
    engine = Engine(backbone, EngineLimits(rows=4, waiting=4))
    request = make_request(backbone, "front", 1, Settings(max_new_tokens=8))
    came: dict[int, int] = {}
    took, refused, step, sent = [], 0, 0, 0
    while sent < count or engine.busy:
        while sent < count and sent * every <= step:
            sent += 1
            try:
                [id] = engine.submit(request)
                came[id] = step
            except QueueFullError:
                refused += 1
        step += 1
        took += [step - came[event.id] for event in engine.step() if event.finish]
    return sorted(took), refused


def test_ten_times_too_much_load_does_not_lengthen_what_is_accepted(llama):
    """In steps, so that no clock decides: four rows that take eight steps each end one request in two steps."""
    at_capacity, none = steps_under_load(llama, 2.0, 60)
    assert none == 0 and at_capacity[-1] <= 10
    twice, some = steps_under_load(llama, 1.0, 80)
    ten_times, most = steps_under_load(llama, 0.2, 400)
    p95 = [took[int(0.95 * len(took))] for took in (twice, ten_times)]
    assert p95[1] <= p95[0] + 1 and ten_times[-1] <= 2 * 8 + 2  # a queue as long as the rows: twice the time alone
    assert some and most > 0.8 * 400 and len(ten_times) + most == 400
