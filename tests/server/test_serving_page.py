"""What docs/serving.md shows is sent to a server, and its figures are those of the code."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from softprompt.server.asking import COMPLETION_TOKENS
from softprompt.server.settings import Limits

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"<!-- served -->\n```(\w+)\n(.*?)```", PAGE, re.DOTALL)
CURLS = [line for language, block in BLOCKS if language == "sh" for line in block.splitlines()]
ADDRESS = "http://127.0.0.1:8000"


@pytest.mark.parametrize("line", CURLS, ids=range(len(CURLS)))
def test_each_curl_command_is_answered(server, line):
    command, *words = shlex.split(line)
    assert command == "curl"
    [url] = [word for word in words if word.startswith(ADDRESS)]
    given = {word: words[i + 1] for i, word in enumerate(words) if word in ("-H", "-d")}
    path = url.removeprefix(ADDRESS)
    if "-d" not in given:
        answer = server.client.get(path)
        assert {"sentiment", "sentiment@2", "base"} <= {model["id"] for model in answer.json()["data"]}
        return
    name, _, value = given["-H"].partition(": ")
    answer = server.client.post(path, content=given["-d"], headers={name: value})
    assert answer.status_code == 200, answer.text
    if json.loads(given["-d"]).get("stream"):
        pieces = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        assert pieces[-1]["usage"]["completion_tokens"] > 0 and "data: [DONE]" in answer.text
    else:
        assert answer.json().get("choices") or [each["label"] for each in answer.json()["data"]]


def test_the_python_examples_run(server, capsys):
    names: dict = {}
    for block in [block for language, block in BLOCKS if language == "python"]:
        exec(compile(block.replace(ADDRESS, server.url), "docs/serving.md", "exec"), names)
    names["client"].close()
    assert capsys.readouterr().out.split()[0] in ("negative", "positive")


def test_metrics_that_are_named_are_there(server):
    server.client.post("/v1/completions", json={"model": "sentiment", "prompt": "x"})
    server.client.post("/v1/completions", json={"model": "writer", "prompt": "x", "max_tokens": 2})
    found = server.client.get("/metrics").text
    part = PAGE.split("## Metrics")[1].split("## ")[0]
    for name in re.findall(r"`([a-z]+_[a-z_]+)`", part):
        assert name in ("finished_reason", "model_name") or f"softprompt:{name}" in found, name


def test_limits_that_are_named_are_the_defaults():
    limits = Limits()
    part = PAGE.split("## Limits")[1].split("## ")[0]
    assert limits.body_bytes == 2 << 20 and limits.body_seconds == limits.send_seconds == 30
    assert f"| {limits.prompts}, {limits.tasks}, {limits.prompts * 4} |" in part
    counts = (limits.choices, f"{limits.stops} ({limits.stop_length})", limits.logprobs, limits.biases, limits.messages)
    assert f"| {', '.join(map(str, counts))} |" in part
    assert f"{limits.total_tokens:,}" in part
    assert f"{COMPLETION_TOKENS} for a completion and {limits.default_tokens} for a chat" in part
