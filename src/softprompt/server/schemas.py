"""What is asked for, as OpenAI's API has it, and what is answered."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Finite = Annotated[float, Field(allow_inf_nan=False)]
NAME_LENGTH = 200
INT64 = (1 << 63) - 1
LONGEST, WIDEST = 1 << 18, 1 << 10  # entries of a list (tokens, mostly) and of an object; Limits are much lower


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is expected")
    return value


Number = Annotated[int, BeforeValidator(_no_bool)]
Real = Annotated[Finite, BeforeValidator(_no_bool)]


def _not_endless(value: Any) -> Any:
    if isinstance(value, (list, dict)) and len(value) > (LONGEST if isinstance(value, list) else WIDEST):
        raise ValueError("it has too many entries")
    return value


# A body of some megabytes may hold a million values that are all wrong: to say what is wrong with each would keep the
# server from everything else for a minute. The first one is enough, and what is too long is not looked at.
T = TypeVar("T")
Many = Annotated[list[T], Field(fail_fast=True), BeforeValidator(_not_endless)]
Named = Annotated[dict[str, T], BeforeValidator(_not_endless)]


class _Asked(BaseModel):
    # Clients send more than there is a use for (user, store, metadata); that is ignored.
    model_config = ConfigDict(extra="ignore", strict=False, hide_input_in_errors=True)


class StreamOptions(_Asked):
    include_usage: bool | None = False


class Sampled(_Asked):
    """What chats and completions have in common."""

    model: Annotated[str, Field(min_length=1, max_length=NAME_LENGTH, description="name, name@version or base")]
    temperature: Annotated[Real, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Real, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Number, Field(ge=-1, le=INT64)] | None = None
    min_p: Annotated[Real, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Real, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Real, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Real, Field(gt=0, le=10)] | None = None
    logit_bias: Named[Annotated[Real, Field(ge=-100, le=100)]] | None = None
    n: Annotated[Number, Field(ge=1)] | None = 1
    stop: str | Many[str] | None = None
    seed: Annotated[Number, Field(ge=-INT64, le=INT64)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[Number, Field(ge=1, le=INT64)] | None = None
    ignore_eos: bool | None = False
    fields: Annotated[
        Named[str] | None, Field(description="A value for each field of the task's template, in place of a text.")
    ] = None


class CompletionRequest(Sampled):
    prompt: str | Many[str] | Many[Number] | Many[Many[Number]] | None = None
    echo: bool | None = False
    logprobs: Annotated[Number, Field(ge=0)] | None = None
    best_of: Number | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _something_to_read(self) -> CompletionRequest:
        if self.prompt is None and self.fields is None:
            raise ValueError("a prompt, or fields, is needed")
        return self


class TextPart(_Asked):
    type: Literal["text"]
    text: str


class Message(_Asked):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Many[TextPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Sampled):
    messages: Many[Message] = []
    logprobs: bool | None = False
    top_logprobs: Annotated[Number, Field(ge=0)] | None = None
    max_completion_tokens: Annotated[Number, Field(ge=1, le=INT64)] | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None
    modalities: Many[str] | None = None
    audio: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _something_to_read(self) -> ChatRequest:
        if not self.messages and self.fields is None:
            raise ValueError("messages, or fields, are needed")
        return self


Reference = Annotated[str, Field(min_length=1, max_length=NAME_LENGTH)]


class ClassifyRequest(_Asked):
    """One text or several, and one task or several: every text is classified by every task."""

    model: Annotated[Reference | Many[Reference], Field(description="A task with labels, or several.")]
    input: str | Many[str] | None = None
    fields: Named[str] | Many[Named[str]] | None = None

    @model_validator(mode="after")
    def _something_to_read(self) -> ClassifyRequest:
        if (self.input is None) == (self.fields is None):
            raise ValueError("either input or fields is needed")
        return self


# --- answers ----------------------------------------------------------------------------------------------------------


class PromptTokensDetails(BaseModel):
    cached_tokens: int
    virtual_tokens: int


class UsageModel(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length", "content_filter"] | None


class CompletionResponse(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageModel | None = None
    system_fingerprint: str


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob] | None
    refusal: None = None


class ChatAnswer(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "content_filter"]


class ChatResponse(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageModel
    system_fingerprint: str


class Classification(BaseModel):
    """label: the most probable class. probabilities: of each class, which sum to 1."""

    index: int
    model: str
    label: str
    probabilities: dict[str, float]
    system_fingerprint: str


class ClassifyResponse(BaseModel):
    id: str
    object: Literal["list"] = "list"
    created: int
    data: list[Classification]
    usage: UsageModel


class ModelCard(BaseModel):
    """root: what computes it; parent: the model that the prompt was tuned for."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "softprompt"
    root: str
    parent: str | None
    max_model_len: int
    kind: str
    tokens: int
    labels: list[str] | None


class SkippedPrompt(BaseModel):
    """A prompt of the folder that cannot be used. served_as_before: it was served before it broke, and still is."""

    id: str
    reason: str
    served_as_before: bool


class FolderHealth(BaseModel):
    """prompts: how many are served. skipped: those that cannot be used. folder: whether it can be read now."""

    prompts: int
    skipped: list[SkippedPrompt]
    folder: Literal["ok", "unreadable"]


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
    health: FolderHealth


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorBody


class Health(BaseModel):
    status: str
    prompts: int | None = None
    skipped: int | None = None


def _names() -> frozenset[str]:
    asked = (CompletionRequest, ChatRequest, ClassifyRequest, Message, TextPart, StreamOptions)
    return frozenset(name for model in asked for name in model.model_fields)


FIELD_NAMES = _names()
