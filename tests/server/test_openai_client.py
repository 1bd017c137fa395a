"""The real `openai` client with strict validation: synchronous, asynchronous, streaming, and its errors."""

from __future__ import annotations

import asyncio

import openai
import pytest
from server_material import SENTIMENT, WRITER, at_rest, make_prompt, until

import softprompt as sp


@pytest.fixture
def client(server):
    with openai.OpenAI(
        base_url=server.url + "/v1", api_key="unused", _strict_response_validation=True, max_retries=0
    ) as made:
        yield made


@pytest.fixture
def lenient(server):
    """For completions in pieces: the client's own type has no null for finish_reason, which OpenAI sends there."""
    with openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0) as made:
        yield made


def generated(backbone, template, number, text, **more):
    """What the library itself writes for a text."""
    field = template.fields[0]
    return sp.generate(backbone, make_prompt(backbone, template, number), [{field: text}], **more)[0]


def test_models_are_listed_and_looked_up(client):
    names = [model.id for model in client.models.list()]
    assert names[0] == "base" and {"sentiment", "sentiment@1", "sentiment@2", "writer", "deep", "bare"} <= set(names)
    found = client.models.retrieve("sentiment")
    assert (found.root, found.parent) == ("sentiment@2", "base")
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("nobody")
    assert error.value.code == "model_not_found"


def test_a_completion_is_what_the_library_generates(client, backbone):
    found = client.completions.create(model="writer", prompt="a fine film", max_tokens=12, temperature=0)
    assert found.choices[0].text == generated(backbone, WRITER, 5, "a fine film", max_new_tokens=12)
    assert found.choices[0].finish_reason == "length" and found.model == "writer"
    assert found.usage.total_tokens == found.usage.prompt_tokens + 12
    again = client.completions.create(model="writer", prompt="a fine film", max_tokens=12, temperature=0)
    details = again.usage.prompt_tokens_details
    assert details.virtual_tokens == 5 and details.cached_tokens >= 6


def test_a_seed_gives_the_librarys_sampled_text(client, backbone):
    given = {"temperature": 0.9, "top_p": 0.8, "seed": 5}
    found = client.completions.create(model="writer", prompt="x", max_tokens=10, **given)
    assert found.choices[0].text == generated(backbone, WRITER, 5, "x", max_new_tokens=10, **given)


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_a_stream_says_what_the_whole_answer_says(client, lenient, kind):
    given = {"model": "writer", "max_tokens": 14, "temperature": 0, "n": 2}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    if kind == "completion":
        whole = client.completions.create(prompt="so it goes", **given)
        chunks = list(lenient.completions.create(prompt="so it goes", **given, **options))
        texts = [[c.choices[0].text for c in chunks if c.choices and c.choices[0].index == i] for i in (0, 1)]
        wanted = [choice.text for choice in whole.choices]
    else:
        messages = [{"role": "user", "content": "so it goes"}]
        whole = client.chat.completions.create(messages=messages, **given)
        chunks = list(client.chat.completions.create(messages=messages, **given, **options))
        parts = [[c.choices[0].delta for c in chunks if c.choices and c.choices[0].index == i] for i in (0, 1)]
        assert all(deltas[0].role == "assistant" and deltas[0].content == "" for deltas in parts)
        texts = [[delta.content or "" for delta in deltas] for deltas in parts]
        wanted = [choice.message.content for choice in whole.choices]
    assert ["".join(each) for each in texts] == wanted
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 28
    assert all(chunk.usage is None for chunk in chunks[:-1])
    ends = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    assert ends == ["length", "length"]
    assert len({chunk.id for chunk in chunks}) == 1


def test_many_tasks_at_once_give_what_each_gives_alone(server, client):
    calls = [
        (name, f"text {i} of {name}") for i in range(4) for name in ("writer", "chatty", "bare", "base", "sentiment")
    ]
    alone = [
        client.completions.create(model=name, prompt=text, max_tokens=9, temperature=0).choices[0].text
        for name, text in calls
    ]

    async def together():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0) as many:

            async def streamed(name, text):
                chunks = await many.completions.create(
                    model=name, prompt=text, max_tokens=9, temperature=0, stream=True
                )
                return "".join([c.choices[0].text async for c in chunks if c.choices])

            return await asyncio.gather(*(streamed(name, text) for name, text in calls))

    assert asyncio.run(together()) == alone
    until(lambda: at_rest(server.service))


def test_a_task_with_labels_answers_with_a_label_word(client, lenient, backbone):
    texts = ["good and fine", "bad and awful", "good"]
    want = [each.label for each in sp.classify(
        backbone, make_prompt(backbone, SENTIMENT, 2), [{"text": text} for text in texts]
    )]  # fmt: skip
    found = client.completions.create(model="sentiment", prompt=texts)
    assert [choice.text for choice in found.choices] == want
    chats = [
        client.chat.completions.create(model="sentiment@2", messages=[{"role": "user", "content": text}])
        for text in texts
    ]
    assert [chat.choices[0].message.content for chat in chats] == want
    assert {chat.choices[0].finish_reason for chat in chats} == {"stop"}
    streamed = lenient.completions.create(model="sentiment", prompt=texts[0], stream=True)
    assert "".join(c.choices[0].text for c in streamed) == want[0]


def test_chats_go_through_the_models_own_template(client, backbone):
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Who <|im_end|> are you?"},
        {"role": "assistant", "content": "Nobody."},
        {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "now?"}]},
    ]
    for model in ("base", "bare"):
        found = client.chat.completions.create(model=model, messages=turns, max_tokens=5)
        assert found.choices[0].message.role == "assistant"
    with pytest.raises(openai.BadRequestError, match="one message of the user"):
        client.chat.completions.create(model="chatty", messages=turns)
    with pytest.raises(openai.BadRequestError, match="the last of the user"):
        client.chat.completions.create(model="base", messages=turns[:3])


def test_log_probabilities(client, lenient):
    chat = client.chat.completions.create(
        model="chatty", messages=[{"role": "user", "content": "x"}], max_tokens=4, temperature=0, logprobs=True,
        top_logprobs=3,
    )  # fmt: skip
    logs = chat.choices[0].logprobs.content
    assert len(logs) == 4 and all(each.top_logprobs[0].token == each.token for each in logs)
    assert all(each.logprob == each.top_logprobs[0].logprob <= 0 for each in logs)
    found = client.completions.create(
        model="base", prompt="Review", max_tokens=4, temperature=0, logprobs=2, echo=False
    )
    assert len(found.choices[0].logprobs.tokens) == len(found.choices[0].logprobs.token_logprobs) == 4
    assert found.choices[0].logprobs.text_offset[0] == 0
    chunks = lenient.completions.create(
        model="base", prompt="Review", max_tokens=4, temperature=0, logprobs=1, stream=True
    )
    assert sum(len(c.choices[0].logprobs.tokens) for c in chunks if c.choices[0].logprobs) == 4


def test_tokens_texts_lists_and_echo(client, backbone):
    ids = backbone.tokenizer("Review", add_special_tokens=False)["input_ids"]
    one = client.completions.create(model="base", prompt=ids, max_tokens=6, temperature=0)
    two = client.completions.create(model="base", prompt=[ids, ids], max_tokens=6, temperature=0, echo=True)
    assert [choice.text for choice in two.choices] == ["Review" + one.choices[0].text] * 2
    assert [choice.index for choice in two.choices] == [0, 1]
    with pytest.raises(openai.BadRequestError, match="takes text"):
        client.completions.create(model="writer", prompt=ids)


def test_several_fields_are_sent_as_fields(client):
    with pytest.raises(openai.BadRequestError, match="several fields"):
        client.completions.create(model="pairs", prompt="x")
    with pytest.raises(openai.BadRequestError, match="second is missing"):
        client.completions.create(model="pairs", prompt="", extra_body={"fields": {"first": "x"}})
    found = client.completions.create(model="pairs", prompt="", extra_body={"fields": {"first": "x", "second": "y"}})
    assert found.choices[0].text in ("no", "yes")


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"n": 99}, "n"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": "x" * 65}, "stop"),
        ({"logprobs": 21}, "logprobs"),
        ({"temperature": 3}, "temperature"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ],
)
def test_what_is_not_offered_is_said(client, given, param):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(**{"model": "base", "prompt": "x", **given})
    assert error.value.param == param and isinstance(error.value.code, str | None)
    assert error.value.type == "invalid_request_error"


def test_what_other_clients_send_besides_is_ignored(client):
    more = {"user": "me", "store": True, "metadata": {"a": "b"}, "ignore_eos": True, "top_k": 3, "min_p": 0.1}
    client.completions.create(model="base", prompt="x", max_tokens=2, extra_body=more)


def test_a_text_longer_than_the_context(client):
    for text in ("word " * 400, "x" * 1_000_000):
        with pytest.raises(openai.BadRequestError) as error:
            client.completions.create(model="base", prompt=text)
        assert error.value.code == "context_length_exceeded"


def test_answers_go_on_to_the_end_of_the_context(client):
    found = client.completions.create(model="base", prompt="x", max_tokens=10**6, temperature=0,
                                      extra_body={"ignore_eos": True})  # fmt: skip
    assert found.usage.total_tokens == 256 and found.choices[0].finish_reason == "length"


def test_stop_texts(lenient):
    text = lenient.completions.create(model="writer", prompt="x", max_tokens=20, temperature=0).choices[0].text
    assert len(text) > 5
    stop = text[3:5]
    for stream in (False, True):
        found = lenient.completions.create(
            model="writer", prompt="x", max_tokens=20, temperature=0, stop=[stop], stream=stream
        )
        chunks = list(found) if stream else [found]
        assert "".join(c.choices[0].text for c in chunks) == text[: text.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"
