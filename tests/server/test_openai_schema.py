"""Every kind of answer against the schema that OpenAI publishes, which is not kept here.

git clone https://github.com/openai/openai-openapi
OPENAI_SCHEMA=openai-openapi/openapi.json pytest tests/server/test_openai_schema.py -m big
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.big,
    pytest.mark.skipif(not os.environ.get("OPENAI_SCHEMA"), reason="OPENAI_SCHEMA: where OpenAI's openapi.json lies"),
]
SAMPLED = {"max_tokens": 4, "seed": 1}
CHAT = {"messages": [{"role": "user", "content": "x"}], **SAMPLED}
TEXTS = [
    {"model": "writer", "prompt": "x"},
    {"model": "writer", "prompt": ["x", "y"], "n": 2, "echo": True},
    {"model": "base", "prompt": "x", "logprobs": 3},
    {"model": "sentiment", "prompt": "x"},
    {"model": "base", "prompt": "x", "stop": "e"},
]
CHATS = [{"model": "base"}, {"model": "chatty", "n": 2}, {"model": "bare", "logprobs": True, "top_logprobs": 2}]
WRONG = [
    ({"model": "nobody", "prompt": "x"}, 404),
    ({"model": "base"}, 400),
    ({"model": "base", "prompt": "x" * 100_000}, 400),
    ({"model": "base", "prompt": "x" * 3_000_000}, 413),
]


def with_nulls(schema: Any) -> Any:
    """`nullable`, a word of OpenAPI 3.0 that the page still uses, as JSON schema says it."""
    if isinstance(schema, list):
        return [with_nulls(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: with_nulls(value) for key, value in schema.items()}
    return {"anyOf": [made, {"type": "null"}]} if made.get("nullable") is True else made


@pytest.fixture(scope="module")
def check():
    import jsonschema_rs

    page = with_nulls(json.loads(Path(os.environ["OPENAI_SCHEMA"]).read_text(encoding="utf-8")))
    made = {}

    def validate(name: str, value: object) -> None:
        if name not in made:
            schema = {"$ref": f"#/components/schemas/{name}", "components": page["components"]}
            made[name] = jsonschema_rs.validator_for(schema)
        made[name].validate(value)

    return validate


def chunks(server, path: str, body: dict) -> list[dict]:
    more = {**body, "stream": True, "stream_options": {"include_usage": True}}
    lines = server.client.post(path, json=more).text.splitlines()
    found = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert len(found) > 2 and "data: [DONE]" in lines
    return found


@pytest.mark.parametrize("body", TEXTS, ids=range(len(TEXTS)))
def test_completions(server, check, body):
    body = {**SAMPLED, **body}
    check("CreateCompletionResponse", server.client.post("/v1/completions", json=body).json())
    for chunk in chunks(server, "/v1/completions", body):
        for choice in chunk["choices"]:  # the schema has no null here, which OpenAI sends while it goes on
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        check("CreateCompletionResponse", chunk)


@pytest.mark.parametrize("body", CHATS, ids=range(len(CHATS)))
def test_chats(server, check, body):
    check("CreateChatCompletionResponse", server.client.post("/v1/chat/completions", json={**CHAT, **body}).json())
    for chunk in chunks(server, "/v1/chat/completions", {**CHAT, **body}):
        check("CreateChatCompletionStreamResponse", chunk)


def test_models_and_errors(server, check):
    listed = server.client.get("/v1/models").json()
    check("ListModelsResponse", listed)
    for model in listed["data"]:
        check("Model", server.client.get("/v1/models/" + model["id"]).json())
    for body, status in WRONG:
        answer = server.client.post("/v1/completions", json=body)
        assert answer.status_code == status
        check("ErrorResponse", answer.json())
