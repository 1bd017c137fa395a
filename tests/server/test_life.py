"""Clients that leave, prompts that change, more load than can be served, and the end of the process."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import openai
import pytest
from server_material import (
    MOOD,
    SENTIMENT,
    TOPIC,
    WRITER,
    at_rest,
    make_backbone,
    make_library,
    make_prompt,
    serving,
    until,
)

import softprompt as sp
from softprompt.engine.engine import EngineLimits
from softprompt.server.streaming import EventStream

LONG = {"model": "writer", "prompt": "a long text", "max_tokens": 150, "ignore_eos": True, "temperature": 0}


def post(server, body, path="/v1/completions"):
    return server.client.post(path, json=body)


# --- classify ---------------------------------------------------------------------------------------------------------


def test_one_text_and_many_tasks(server, backbone):
    tasks = {"sentiment": (SENTIMENT, 2), "topic": (TOPIC, 3), "mood": (MOOD, 4), "sentiment@1": (SENTIMENT, 1)}
    text = "it rained on the second day of the match and nobody minded"
    found = post(server, {"model": list(tasks), "input": text}, "/v1/classify").json()
    assert [each["model"] for each in found["data"]] == list(tasks)
    for each, (template, seed) in zip(found["data"], tasks.values(), strict=True):
        [want] = sp.classify(backbone, make_prompt(backbone, template, seed), [{"text": text}])
        assert each["label"] == want.label and each["index"] == 0
        assert each["probabilities"] == pytest.approx(want.probabilities, abs=1e-4)
    # topic and mood stand behind the text, which the second of them does not read again
    assert found["usage"]["prompt_tokens_details"]["cached_tokens"] > len(text) // 4
    until(lambda: at_rest(server.service))


def test_many_texts_in_one_request(server, backbone):
    texts = ["good", "bad and awful", "a plot"]
    found = post(server, {"model": ["sentiment", "deep"], "input": texts}, "/v1/classify").json()["data"]
    assert [(each["index"], each["model"]) for each in found] == [
        (i, m) for i in range(3) for m in ("sentiment", "deep")
    ]
    for name, seed, deep in (("sentiment", 2, False), ("deep", 8, True)):
        prompt = make_prompt(backbone, SENTIMENT, seed, deep)
        want = [each.label for each in sp.classify(backbone, prompt, [{"text": text} for text in texts])]
        assert [each["label"] for each in found if each["model"] == name] == want
    pair = {"first": "x", "second": "y"}
    assert len(post(server, {"model": "pairs", "fields": [pair, pair]}, "/v1/classify").json()["data"]) == 2
    for body in ({"model": "writer", "input": "x"}, {"model": [], "input": "x"}, {"model": "topic"},
                 {"model": "topic", "input": []}, {"model": "topic", "input": "x", "fields": {}}):  # fmt: skip
        assert post(server, body, "/v1/classify").status_code == 400


# --- clients that leave -----------------------------------------------------------------------------------------------


def test_a_client_that_leaves_ends_its_work_in_every_phase(backbone, library):
    with serving(backbone, library, engine=EngineLimits(rows=2, step_tokens=4)) as server:

        async def leave(client, number):
            body = {**LONG, "stream": number % 2 == 0, "n": 1 + number % 3}
            # Every fourth leaves with the first bytes of its answer, the others after a while, wherever they are then.
            patience = 60 if number % 4 == 0 else 0.02 * (number % 9 + 1)
            with suppress(httpx.TimeoutException):
                async with client.stream("POST", "/v1/completions", json=body, timeout=patience) as got:
                    async for _ in got.aiter_bytes():
                        if number % 4 == 0:
                            return

        async def all_leave():
            async with httpx.AsyncClient(base_url=server.url) as client:
                await asyncio.gather(*(leave(client, number) for number in range(40)))

        asyncio.run(all_leave())
        until(lambda: at_rest(server.service))
        assert post(server, {**LONG, "max_tokens": 3}).status_code == 200
        assert b'request_success_total{finished_reason="abort"}' in server.client.get("/metrics").content


@pytest.mark.big
def test_a_thousand_clients_that_leave(backbone, library):
    import psutil

    with serving(backbone, library, engine=EngineLimits(rows=4, waiting=2000)) as server:
        host, port = server.url.removeprefix("http://").split(":")
        draw = random.Random(0)

        def leave():
            body = json.dumps({**LONG, "stream": draw.random() < 0.5, "max_tokens": 60}).encode()
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            data = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
            with socket.create_connection((host, int(port))) as opened:
                opened.sendall(data[: draw.choice((len(data), len(data), len(data) - 5, 60))])
                opened.settimeout(draw.choice((0.001, 0.02, 0.1)))
                with suppress(OSError):
                    opened.recv(draw.choice((1, 500)))

        memory = []
        for _ in range(10):
            for _ in range(100):
                leave()
            until(lambda: at_rest(server.service))
            memory.append(psutil.Process().memory_info().rss / 1e6)
        assert memory[-1] - memory[2] < 30, memory
        assert post(server, {**LONG, "max_tokens": 3}).status_code == 200


# --- prompts that change ----------------------------------------------------------------------------------------------


def test_prompts_appear_change_and_vanish(backbone, tmp_path):
    with serving(backbone, tmp_path, watch=0.02) as server:

        def answer(name):
            got = post(server, {"model": name, "prompt": "good film", "max_tokens": 8, "temperature": 0})
            return got.json()["choices"][0]["text"] if got.status_code == 200 else got.status_code

        def want(seed):
            prompt = make_prompt(backbone, WRITER, seed)
            return sp.generate(backbone, prompt, [{"facts": "good film"}], max_new_tokens=8)[0]

        assert answer("writer") == 404
        make_prompt(backbone, WRITER, 1).save(tmp_path / "writer")
        until(lambda: answer("writer") == want(1))
        make_prompt(backbone, WRITER, 2).save(tmp_path / "writer", overwrite=True)
        until(lambda: answer("writer") == want(2))
        make_prompt(backbone, WRITER, 3).save(tmp_path / "writer@2")
        until(lambda: answer("writer") == want(3))
        assert answer("writer@1") == want(2)
        (tmp_path / "writer@2").rename(tmp_path.parent / "aside")
        until(lambda: answer("writer@2") == 404)
        assert answer("writer") == want(2)


def test_replaced_in_a_loop_under_load_every_answer_is_old_or_new(backbone, tmp_path):
    one, two = make_prompt(backbone, WRITER, 1), make_prompt(backbone, WRITER, 4)
    texts = [f"text number {i}" for i in range(6)]
    allowed = {
        (text, sp.generate(backbone, prompt, [{"facts": text}], max_new_tokens=12)[0])
        for text in texts
        for prompt in (one, two)
    }
    assert len(allowed) == 12
    one.save(tmp_path / "writer")
    with serving(backbone, tmp_path, watch=0.005, engine=EngineLimits(rows=4)) as server:
        stop = threading.Event()

        def replace():
            while not stop.is_set():
                for prompt in (two, one):
                    prompt.save(tmp_path / "writer", overwrite=True)

        thread = threading.Thread(target=replace)
        thread.start()

        async def ask(client, text):
            body = {"model": "writer", "prompt": text, "max_tokens": 12, "temperature": 0}
            got = (await client.post("/v1/completions", json=body)).json()
            return (text, got["choices"][0]["text"]), got["system_fingerprint"]

        async def ask_all():
            found, versions = [], set()
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                for number in range(500):
                    found += await asyncio.gather(*(ask(client, text) for text in texts))
                    versions |= {version for _, version in found}
                    if number >= 11 and len(versions) == 2:  # a slow machine needs longer to see both
                        break
            return found

        try:
            found = asyncio.run(ask_all())
        finally:
            stop.set()
            thread.join()
        assert {answer for answer, _ in found} <= allowed
        by_version = {}
        for answer, version in found:
            by_version.setdefault((answer[0], version), set()).add(answer[1])
        assert all(len(texts) == 1 for texts in by_version.values())
        assert len({version for _, version in found}) == 2


def test_a_request_under_way_ends_with_the_version_that_it_began_with(backbone, tmp_path):
    prompt = make_prompt(backbone, WRITER, 1)
    prompt.save(tmp_path / "writer")
    want = sp.generate(backbone, prompt, [{"facts": "a long text"}], max_new_tokens=150)[0]
    with serving(backbone, tmp_path) as server:
        with server.client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as got:
            lines = got.iter_lines()
            first = next(lines)
            make_prompt(backbone, WRITER, 2).save(tmp_path / "writer", overwrite=True)
            server.service.registry.refresh()
            rest = [line for line in (first, *lines) if line.startswith("data: {")]
        said = "".join(json.loads(line[6:])["choices"][0]["text"] for line in rest)
        assert said.startswith(want) and want


# --- too much ---------------------------------------------------------------------------------------------------------


def test_more_than_can_wait_is_refused_and_tried_again(backbone, library):
    with serving(backbone, library, engine=EngineLimits(rows=2, waiting=2)) as server:

        async def overload():
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                return await asyncio.gather(*(client.post("/v1/completions", json=LONG) for _ in range(40)))

        answers = asyncio.run(overload())
        codes = [answer.status_code for answer in answers]
        assert set(codes) == {200, 429} and codes.count(200) >= 4
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1 and refused.json()["error"]["code"] == "queue_full"
        assert len({a.json()["choices"][0]["text"] for a in answers if a.status_code == 200}) == 1

        async def patient():
            async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="x", max_retries=20) as client:
                calls = (client.completions.create(model="writer", prompt="x", max_tokens=5) for _ in range(8))
                return await asyncio.gather(*calls)

        assert len(asyncio.run(patient())) == 8
        with openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as client:
            with pytest.raises(openai.BadRequestError) as error:  # for which there is never room
                client.completions.create(model="writer", prompt=["x"] * 20)
            assert error.value.code == "too_many_texts"


def test_a_client_that_does_not_read_is_given_up():
    ended = []

    async def chunks():
        try:
            while True:
                yield {"text": "x"}
        finally:
            ended.append(True)

    async def never(*_):
        await asyncio.Event().wait()

    async def send(message):
        if message["type"] == "http.response.body":
            await never()

    asyncio.run(asyncio.wait_for(EventStream(chunks(), 0.01)({}, never, send), 60))
    assert ended == [True]


# --- figures and pages ------------------------------------------------------------------------------------------------


def test_health_figures_and_pages(server):
    post(server, {"model": "sentiment", "prompt": "good"})
    assert server.client.get("/health").json() == {"status": "ok", "prompts": 9, "skipped": 0}
    assert server.client.get("/ready").json()["status"] == "ready"
    page = server.client.get("/metrics").text
    for name in (
        "num_requests_running 0", "num_requests_waiting 0", "prompt_tokens_total", "generation_tokens_total",
        "prompt_kv_cache_hits_total", "prompt_kv_cache_misses_total", "prompt_kv_cache_bytes", "prompts_registered 9.0",
        "time_to_first_token_seconds_bucket", "inter_token_latency_seconds_count", "distinct_tasks_per_step_bucket",
        "e2e_request_latency_seconds_sum", 'request_success_total{finished_reason="stop"}', "prompt_load_seconds_count",
    ):  # fmt: skip
        assert "softprompt:" + name in page, name
    paths = server.client.get("/openapi.json").json()["paths"]
    assert {"/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/classify", "/health"} <= set(paths)


# --- the end --------------------------------------------------------------------------------------------------------


def test_what_was_begun_is_finished_and_nothing_new_is_taken(backbone, library):
    with serving(backbone, library, drain=60) as server:
        with server.client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as got:
            lines = got.iter_lines()
            next(lines)
            server.server.handle_exit(signal.SIGTERM, None)
            with (
                suppress(httpx.TransportError),
                httpx.Client(base_url=server.url, timeout=60) as other,
            ):  # or it has ended
                answer = other.post("/v1/completions", json=LONG)
                assert answer.status_code == 503 and answer.headers["retry-after"]
                assert answer.json()["error"]["code"] == "draining"
                assert other.get("/ready").status_code == 503
            assert [line for line in lines if line][-1] == "data: [DONE]"
        until(lambda: not server.thread.is_alive())


def test_what_is_not_finished_in_time_is_told_so_and_ends(backbone, library):
    body = {**LONG, "max_tokens": 10**6, "model": "base"}
    with serving(make_backbone(context=100_000), library, drain=0) as server:
        with (
            ThreadPoolExecutor(1) as pool,
            server.client.stream("POST", "/v1/completions", json={**body, "stream": True}) as got,
        ):
            lines = got.iter_lines()
            next(lines)
            whole = pool.submit(httpx.post, server.url + "/v1/completions", json=body, timeout=60)
            until(lambda: server.service.active == 2)
            server.server.handle_exit(signal.SIGTERM, None)
            *_, last, done = (line for line in lines if line)
            assert json.loads(last[6:])["error"]["code"] == "draining" and done == "data: [DONE]"
            answer = whole.result()
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "draining"
        until(lambda: not server.thread.is_alive())
        assert not server.service._queues and not server.service.active


def start(folder, model, *more):
    arguments = ["serve", str(folder), "--model", str(model), "--port", "0", "--json", "--precision", "float32", *more]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "softprompt", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith("}"):
            break
    return process, json.loads(said or '{"error": "nothing"}')


def test_the_command_is_killed_started_again_and_ends_in_peace(tmp_path):
    backbone = make_backbone()
    model = tmp_path / "model"
    backbone.model.save_pretrained(model)
    backbone.tokenizer.save_pretrained(model)
    make_library(backbone, tmp_path / "prompts")
    before = {p: p.read_bytes() for p in (tmp_path / "prompts").rglob("*") if p.is_file()}
    answers = []
    for ending in (signal.SIGKILL, signal.SIGTERM):
        process, said = start(tmp_path / "prompts", model)
        assert "sentiment@2" in said["models"], process.stderr.read()
        with httpx.Client(base_url=said["address"], timeout=60) as client:
            found = client.post("/v1/completions", json={**LONG, "max_tokens": 9})
            answers.append(found.json()["choices"][0]["text"])
        process.send_signal(ending)
        _, log = process.communicate(timeout=300)
        assert process.returncode == (-signal.SIGKILL if ending == signal.SIGKILL else 0), log
        assert "a long text" not in log
        assert ending == signal.SIGKILL or "POST /v1/completions 200" in log  # the line comes after the answer
    assert answers[0] == answers[1]
    assert before == {p: p.read_bytes() for p in (tmp_path / "prompts").rglob("*") if p.is_file()}
