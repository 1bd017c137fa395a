"""Whatever is sent, others are served, no error repeats what was sent, and nothing but OpenAI's shape comes back."""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save
from server_material import SENTIMENT, at_rest, make_backbone, make_prompt, serving, until

from softprompt.engine.engine import EngineLimits
from softprompt.errors import ConfigError
from softprompt.server import schemas
from softprompt.server.guard import known
from softprompt.server.settings import Limits, ServerSettings, hash_key, is_local, read_keys

SECRET = "tell-no-one-7c1f"
KEY, ADMIN = "a-key-of-some-length", "an-admin-key-of-length"


def check_error(response: httpx.Response, status: int | tuple[int, ...]) -> dict:
    assert response.status_code in ((status,) if isinstance(status, int) else status), response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str) and isinstance(body["error"]["code"], str | None)
    assert SECRET not in response.text and "/tmp" not in response.text and len(response.content) < 1000
    return body["error"]


def well(server) -> None:
    """Others are served."""
    found = server.client.post("/v1/completions", json={"model": "sentiment", "prompt": "good"})
    assert found.json()["choices"][0]["text"] in ("negative", "positive")


NAMES = ["../sentiment", "/etc/passwd", "..%2f..%2fetc", "sentiment/../topic", "sentiment\0", "ｓentiment", "SENTIMENT",
         "sentiment@0", "sentiment@3", "sentiment@", "@1", ".", "", " sentiment", "sentiment@1@1", SECRET * 8, "😀",
         "{SECRET}", "base@1"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_only_ever_looked_up(server, name):
    for path, body in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/classify", {"input": "x"}),
    ):
        check_error(server.client.post(path, json={"model": name, **body}), (400, 404))
    if name.strip("."):
        check_error(server.client.get("/v1/models/" + quote(name, safe="")), 404)
    well(server)


BAD = [
    {"max_tokens": 10**400},
    {"max_tokens": -1},
    {"max_tokens": 1.5},
    {"max_tokens": True},
    {"n": 1_000_000},
    {"n": 0},
    {"logprobs": 1_000_000_000},
    {"temperature": "hot" + SECRET},
    {"top_p": 0},
    {"stop": ["a", "b", "c", "d", "e"]},
    {"stop": "x" * 65},
    {"seed": 2**80},
    {"stop": [1]},
    {"stop": {"a": SECRET}},
    {"logit_bias": {SECRET: 1}},
    {"logit_bias": {"1": 1000}},
    {"logit_bias": {str(i): 1 for i in range(301)}},
    {"prompt": [[]]},
    {"prompt": []},
    {"prompt": [10**9]},
    {"prompt": [-1]},
    {"prompt": [["x"]]},
    {"prompt": {"a": SECRET}},
    {"prompt": ["x"] * 65},
    {"prompt": None},
    {"fields": {"text": {"a": 1}}},
    {"fields": {"other": SECRET}, "model": "sentiment"},
    {"stream": "maybe" + SECRET},
    {"model": None},
    {"model": ["base"]},
    {"model": "x" * 201},
    {"prompt": "x", "n": 8, "max_tokens": 10**9, "model": "base", "stop": ["", "", "", "", ""] * 40, "top_k": -7},
]


@pytest.mark.parametrize("body", BAD, ids=lambda body: json.dumps(body)[:40])
def test_values_that_make_no_sense_are_refused(server, body):
    check_error(server.client.post("/v1/completions", json={"model": "base", "prompt": "x", **body}), 400)
    well(server)


MANY = 100_000
ENDLESS = [
    (schemas.CompletionRequest, {"prompt": [1.5] * MANY}),
    (schemas.CompletionRequest, {"prompt": [[]] * MANY + [{}]}),
    (schemas.CompletionRequest, {"prompt": [[{}] * MANY] * 9}),
    (schemas.CompletionRequest, {"prompt": [1] * 300_000}),
    (schemas.CompletionRequest, {"prompt": "x", "stop": [1] * MANY}),
    (schemas.CompletionRequest, {"prompt": "x", "logit_bias": {str(i): "x" for i in range(MANY)}}),
    (schemas.ChatRequest, {"messages": [{}] * MANY}),
    (schemas.ChatRequest, {"messages": [{"role": "user", "content": [{}] * MANY}]}),
    (schemas.ClassifyRequest, {"input": [1] * MANY}),
    (schemas.ClassifyRequest, {"model": [""] * MANY, "input": "x"}),
    (schemas.ClassifyRequest, {"fields": [{"a": 1}] * MANY}),
    (schemas.ClassifyRequest, {"fields": {str(i): 1 for i in range(MANY)}}),
]


@pytest.mark.parametrize(("kind", "body"), ENDLESS, ids=range(len(ENDLESS)))
def test_what_is_wrong_many_times_is_looked_at_once(kind, body):
    """A million things to say about one body would keep the server from all others for a minute."""
    with pytest.raises(ValidationError) as error:
        kind.model_validate({"model": "base", **body})
    assert error.value.error_count() <= 10


RAW = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"x"',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b'{"model":"base","prompt":"x","temperature":NaN}',
    b'{"model":"base","prompt":"x","temperature":1e999}',
    b'{"model":"base","prompt":"x","max_tokens":' + b"9" * 5000 + b"}",
    b'{"model":"base","prompt":"\\ud800 half"}',
    b'{"model":"\\u0000","prompt":"x"}',
]


@pytest.mark.parametrize("data", RAW, ids=range(len(RAW)))
def test_bodies_that_are_no_requests_are_refused(server, data):
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/classify"):
        answer = server.client.post(path, content=data, headers={"content-type": "application/json"})
        check_error(answer, (400, 404))
    well(server)


def test_other_addresses_and_methods(server):
    check_error(server.client.get("/v1/" + SECRET), 404)
    check_error(server.client.get("/v1/completions"), 405)
    check_error(server.client.delete("/v1/models/sentiment"), 405)
    check_error(server.client.post("/admin/prompts/refresh"), 404)
    check_error(server.client.get("/admin"), 404)
    for path in ("/v1/models/..%2f..%2fetc%2fpasswd", "/../../etc/passwd", "//etc/passwd", "/v1/models/%00"):
        check_error(server.client.get(path), 404)


def test_too_large_a_body_is_not_read(server):
    limit = server.service.settings.limits.body_bytes
    check_error(server.client.post("/v1/completions", content=b"x" * (limit + 1)), 413)

    def pieces():
        for _ in range(100):
            yield b"x" * (limit // 10)

    check_error(server.client.post("/v1/completions", content=pieces()), 413)  # chunked: nothing announces its size

    def endless():
        while True:
            yield b"x" * limit

    with suppress(httpx.HTTPError):  # refused while it is still being sent
        check_error(server.client.post("/v1/completions", content=endless()), 413)
    well(server)


def raw(server, data: bytes) -> bytes:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 30) as opened:
        with suppress(OSError):
            opened.sendall(data)
            opened.shutdown(socket.SHUT_WR)
        found = b""
        with suppress(ConnectionError):  # closed before all was read
            while piece := opened.recv(65536):
                found += piece
    return found


def test_what_is_no_http(server):
    for data in (
        b"\0" * 1000,
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
    ):
        assert raw(server, data).split(b"\r\n")[0].split()[1] in (b"400", b"403")
    headers = b"".join(b"X-%d: y\r\n" % i for i in range(20_000))
    assert b" 200 " not in raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + headers + b"\r\n")
    raw(server, b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nhalf")
    well(server)


def test_a_request_id_is_made_here(server):
    answer = server.client.get("/health", headers={"X-Request-Id": "evil\tvalue"})
    assert len(answer.headers["x-request-id"]) == 16 and "evil" not in str(answer.headers)


def test_a_web_page_cannot_use_a_server_without_a_key(server):
    body = {"model": "base", "prompt": "x"}
    check_error(server.client.post("/v1/completions", json=body, headers={"Host": "evil.example"}), 403)
    assert server.client.get("/health", headers={"Host": "evil.example"}).status_code == 200
    plain = server.client.post("/v1/completions", content=json.dumps(body), headers={"content-type": "text/plain"})
    check_error(plain, 400)
    assert "access-control-allow-origin" not in server.client.get("/v1/models", headers={"Origin": "http://x"}).headers


# --- keys -------------------------------------------------------------------------------------------------------------


def test_keys(backbone, library):
    keys = {"keys": (hash_key(KEY),), "admin_keys": (hash_key(ADMIN),)}
    with serving(backbone, library, **keys) as server:
        for path in ("/v1/models", "/metrics", "/docs", "/openapi.json"):
            for given in ({}, {"Authorization": "Bearer " + SECRET}, {"Authorization": KEY}, {"X-Api-Key": KEY}):
                error = check_error(server.client.get(path, headers=given), 401)
                assert error["code"] == "invalid_api_key"
            for key in (KEY, ADMIN):
                assert server.client.get(path, headers={"Authorization": f"Bearer {key}"}).status_code == 200
        assert server.client.get("/health").status_code == server.client.get("/ready").status_code == 200
        for key in (KEY, SECRET, "x"):
            check_error(server.client.get("/admin/prompts", headers={"Authorization": f"Bearer {key}"}), 401)
        found = server.client.get("/admin/prompts", headers={"Authorization": f"Bearer {ADMIN}"}).json()
        assert found["served"]["sentiment"] and found["skipped"] == {}
        host = {"Authorization": f"Bearer {KEY}", "Host": "models.example"}
        assert server.client.get("/v1/models", headers=host).status_code == 200


def test_a_key_is_compared_with_every_hash():
    assert known(KEY, [hash_key("x"), hash_key(KEY)]) and not known("", [hash_key(KEY)]) and not known(KEY, [])
    assert known(KEY, read_keys(f"# mine\n\nsha256:{hash_key(KEY)}\n", "keys"))
    assert not known(hash_key(KEY), [hash_key(KEY)])


@pytest.mark.parametrize("text", ["", "# none", "short", "with a space in the key", "sha256:xyz", "clé-avec-un-accent"])
def test_key_files_that_are_wrong(text):
    with pytest.raises(ConfigError, match="keys: "):
        read_keys(text, "keys")


def test_beyond_this_machine_a_key_is_needed():
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org", "127.0.0.1.evil.example"):
        assert not is_local(host)
        with pytest.raises(ConfigError, match="a key is needed"):
            ServerSettings(host=host)
        ServerSettings(host=host, keys=(hash_key(KEY),))
    assert all(is_local(host) for host in ("localhost", "127.0.0.1", "127.3.2.1", "::1", "[::1]"))
    with pytest.raises(ConfigError) as error:
        ServerSettings(host="0.0.0.0", port=70_000, watch=-1, admin_keys=(hash_key(KEY),))
    assert len(error.value.problems) == 3


# --- prompts from strangers -------------------------------------------------------------------------------------------


def bad_prompts(folder: Path, backbone) -> set[str]:
    """Prompt folders that must not be served; their names."""
    good = make_prompt(backbone, SENTIMENT, 1)
    for name in ("pickled", "huge", "truncated", "wide", "nan", "tampered", "stranger", "deepjson", "half"):
        good.save(folder / name)
    tensor = "adapter_model.safetensors"
    (folder / "pickled" / tensor).write_bytes(b"\x80\x04\x95" + b"cposix\nsystem\n(S'touch owned'\ntR." * 9)
    (folder / "huge" / tensor).write_bytes((1 << 60).to_bytes(8, "little") + b"{}" * 100)
    (folder / "truncated" / tensor).write_bytes((folder / "truncated" / tensor).read_bytes()[:-8])
    (folder / "wide" / tensor).write_bytes(save({"prompt_embeddings": torch.zeros(4, backbone.width + 1)}))
    (folder / "nan" / tensor).write_bytes(save({"prompt_embeddings": torch.full((4, backbone.width), float("nan"))}))
    data = bytearray((folder / "tampered" / tensor).read_bytes())
    data[-1] ^= 1
    (folder / "tampered" / tensor).write_bytes(bytes(data))
    make_prompt(make_backbone(seed=5), SENTIMENT, 1).save(folder / "stranger", overwrite=True)
    (folder / "deepjson" / "softprompt.json").write_text("[" * 200_000)
    (folder / "half" / tensor).unlink()
    (folder / "outside").symlink_to("/etc", target_is_directory=True)
    return {"pickled", "huge", "truncated", "wide", "nan", "tampered", "stranger", "deepjson", "half"}


def test_prompts_that_cannot_be_used_are_skipped_and_reported(backbone, tmp_path, caplog):
    bad = bad_prompts(tmp_path / "prompts", backbone)
    make_prompt(backbone, SENTIMENT, 2).save(tmp_path / "prompts" / "sentiment")
    served = serving(backbone, tmp_path / "prompts", admin_keys=(hash_key(ADMIN),))
    with caplog.at_level("WARNING", "softprompt.server"), served as server:
        listed = server.client.get("/v1/models")
        assert [model["id"] for model in listed.json()["data"]] == ["base", "sentiment", "sentiment@1"]
        told = {each["id"]: each["reason"] for each in listed.json()["health"]["skipped"]}
        assert {name + "@1" for name in bad} <= told.keys() and listed.json()["health"]["prompts"] == 1
        assert told["stranger@1"] == "it is for another model" and "cannot be read" in told["half@1"]
        assert str(tmp_path) not in listed.text and backbone.fingerprint not in listed.text
        health = server.client.get("/health").json()
        assert health["prompts"] == 1 and health["skipped"] >= len(bad)
        for name in bad:
            check_error(server.client.post("/v1/completions", json={"model": name, "prompt": "x"}), 404)
        skipped = server.client.get("/admin/prompts", headers={"Authorization": f"Bearer {ADMIN}"}).json()["skipped"]
        assert bad <= {name.partition("@")[0] for name in skipped}
        assert "fingerprint" in skipped["stranger@1"]
        well(server)
    assert all(name in caplog.text for name in bad)
    assert not (tmp_path / "owned").exists() and not Path("owned").exists()


# --- logs and figures -------------------------------------------------------------------------------------------------


def test_logs_and_figures_never_hold_what_was_written(server, caplog):
    with caplog.at_level("DEBUG", "softprompt"):
        for body in (
            {"model": "sentiment", "prompt": SECRET},
            {"model": SECRET, "prompt": SECRET},
            {"model": "base", "prompt": SECRET, "temperature": SECRET},
            {"model": "base", "prompt": SECRET, "max_tokens": 3, "stop": [SECRET]},
        ):
            server.client.post("/v1/completions", json=body)
        server.client.get(f"/v1/{SECRET}")
        server.client.get(f"/v1/models/{SECRET}")
    assert "POST /v1/completions 200" in caplog.text and "GET /v1/models/{model} 404" in caplog.text
    assert SECRET not in caplog.text
    page = server.client.get("/metrics").text
    assert SECRET not in page and 'softprompt:requests_total{model_name="sentiment"}' in page


def test_limits_on_a_whole_request(backbone, library):
    limits = Limits(total_tokens=100, tokens=20, body_bytes=2000, messages=3, tasks=2)
    with serving(backbone, library, limits) as server:
        many = {"model": "base", "prompt": ["x"] * 9, "max_tokens": 99}
        assert check_error(server.client.post("/v1/completions", json=many), 400)["code"] == "too_many_tokens"
        found = server.client.post("/v1/completions", json={"model": "base", "prompt": "x", "max_tokens": 99,
                                                            "ignore_eos": True})  # fmt: skip
        assert found.json()["usage"]["completion_tokens"] == 20
        turns = [{"role": "user", "content": "x"}] * 4
        check_error(server.client.post("/v1/chat/completions", json={"model": "base", "messages": turns}), 400)
        check_error(server.client.post("/v1/classify", json={"model": ["sentiment"] * 3, "input": "x"}), 400)
        check_error(server.client.post("/v1/completions", json={"model": "base", "prompt": "x" * 3000}), 413)


def test_a_request_that_takes_too_long_is_ended(backbone, library):
    limits, engine = Limits(seconds=0.05), EngineLimits(rows=1, step_tokens=1)
    with serving(backbone, library, limits, engine) as server:
        body = {"model": "base", "prompt": "word " * 40, "max_tokens": 200, "ignore_eos": True}
        check_error(server.client.post("/v1/completions", json=body), 504)
        until(lambda: at_rest(server.service))
