"""Our OpenAPI page and what is answered: schemathesis sends whatever the page allows, and what it does not allow."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from server_material import at_rest, serving, until

from softprompt.engine.engine import EngineLimits
from softprompt.server.settings import Limits

CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)
NAMES = ("base", "sentiment", "writer", "chatty", "topic@1", "deep", "nobody")


@pytest.fixture(scope="module")
def small(backbone, library):
    """Short answers, so that many can be asked for."""
    with serving(backbone, library, Limits(tokens=3), EngineLimits(rows=8)) as running:
        yield running


def run(server, count: int) -> int:
    """So many cases for each route, of both modes; how many were sent."""
    page = schemathesis.openapi.from_dict(server.client.get("/openapi.json").json())
    page.config.update(base_url=server.url)
    sent = 0
    for result in page.get_all_operations():
        operation = result.ok()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            takes = operation.method == "post"  # else there is nothing that could be wrong
            if not operation.path.startswith("/admin") and (takes or mode == GenerationMode.POSITIVE):
                sent += send_cases(operation, mode, count)
    return sent


def send_cases(operation, mode: GenerationMode, count: int) -> int:
    sent = 0

    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), name=st.sampled_from(NAMES))
    def send(case, name):
        nonlocal sent
        if mode == GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body = {**case.body, "model": name}  # one that exists, more often than chance would have it
        sent += 1
        response = case.call()
        case.validate_response(response, checks=CHECKS)
        if response.status_code >= 400 and case.path not in ("/health", "/ready"):
            assert set(response.json()) == {"error"}

    send()
    return sent


def test_the_page_tells_of_streams(small):
    paths = small.client.get("/openapi.json").json()["paths"]
    for path in ("/v1/completions", "/v1/chat/completions"):
        content = paths[path]["post"]["responses"]["200"]["content"]
        assert set(content) == {"application/json", "text/event-stream"} and content["application/json"]["schema"]


def test_nothing_that_is_sent_makes_the_server_fail(small):
    assert run(small, 8) > 80
    until(lambda: at_rest(small.service))


@pytest.mark.big
def test_nothing_of_much_that_is_sent_makes_the_server_fail(small):
    assert run(small, 400) > 2500
    until(lambda: at_rest(small.service))
