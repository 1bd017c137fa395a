"""A prompt bound to a model: from what somebody asks for to a request of the engine."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from ..backbone import Backbone
from ..encoding import Encoder
from ..errors import SoftPromptError
from ..evaluation.runner import end_tokens
from ..placement import Row, first_soft, shared_length
from ..prompt import SoftPrompt
from ..templates import Template
from .requests import Ids, Request, Settings

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
LONGEST_TOKEN = 128  # characters that no token of a vocabulary exceeds, as far as we know
KEPT_SHAPES = 32


class AskedWrongError(SoftPromptError, ValueError):
    """What was asked for does not fit the task. The text never repeats what was sent; param: which part is wrong."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class Task:
    """What one name stands for: a prompt in its template, or with `prompt` None the model itself.

    name, version: how it is called; they play no part in what is computed. sha256: of the prompt's files. Raises
    SoftPromptError where the prompt does not fit the model.
    """

    def __init__(
        self, backbone: Backbone, prompt: SoftPrompt | None, name: str = "base", version: int = 1, sha256: str = ""
    ):
        self.backbone, self.prompt, self.name, self.version, self.sha256 = backbone, prompt, name, version, sha256
        if prompt is not None:
            backbone.check(prompt)
        self.vectors = None if prompt is None else prompt.vectors
        self.tokens = 0 if prompt is None else prompt.tokens
        self.digest = hashlib.sha256(self.vectors.numpy().tobytes()).hexdigest() if self.vectors is not None else ""
        template = None if prompt is None else prompt.template
        self.encoder = None if template is None else self._encoder(template)
        self._shapes: OrderedDict[tuple[str, ...], Encoder] = OrderedDict()
        if self.encoder is not None and self.classes:
            self.encoder.answers()  # raises now if the label words do not fit this tokenizer

    @property
    def reference(self) -> str:
        """name@version"""
        return f"{self.name}@{self.version}"

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of a task with labels; () if it writes texts."""
        return self.encoder.template.classes if self.encoder is not None else ()

    @property
    def words(self) -> tuple[str, ...]:
        """The label word of each class."""
        return self.encoder.template.words if self.encoder is not None else ()

    @property
    def fields(self) -> tuple[str, ...]:
        return self.encoder.template.fields if self.encoder is not None else ()

    # --- requests -----------------------------------------------------------------------------------------------------

    def from_text(self, text: str, settings: Settings) -> Request:
        """A text in the task's template (as its one field), or behind the bare prompt. Raises AskedWrongError."""
        if self.encoder is None:
            return self._of(self._shape(()), {"text": text}, settings)
        return self._of(self.encoder, self._only_field(text), settings)

    def from_fields(self, fields: Mapping[str, str], settings: Settings) -> Request:
        """A value for each field of the task's template. Raises AskedWrongError."""
        if self.encoder is None:
            raise AskedWrongError("this model has no template with fields; send a text", "fields")
        if missing := [name for name in self.fields if name not in fields]:
            raise AskedWrongError(f"the task needs the fields {_names(self.fields)}; {missing[0]} is missing", "fields")
        return self._of(self.encoder, {name: fields[name] for name in self.fields}, settings)

    def from_tokens(self, ids: Sequence[int], settings: Settings) -> Request:
        """Token ids as they are, behind the bare prompt if there is one. Raises AskedWrongError."""
        if self.encoder is not None:
            raise AskedWrongError("this task has a template, so it takes text and no tokens", "prompt")
        if not all(0 <= token < len(self.backbone.tokenizer) for token in ids):
            raise AskedWrongError("a token is not in the model's vocabulary", "prompt")
        soft = tuple(-(i + 1) for i in range(self.tokens))
        return self._request((*soft, *ids), self._shape(()), settings)

    def from_chat(self, turns: Sequence[tuple[str, str]], settings: Settings) -> Request:
        """Turns (role, text). A task with a template takes one turn of the user; otherwise the model's own chat
        template is used, with the prompt before it. Raises AskedWrongError."""
        roles = tuple(ROLES.get(role, "") for role, _ in turns)
        if not turns or "" in roles or roles[-1] != "user":
            raise AskedWrongError("messages are turns of system, user and assistant, the last of the user", "messages")
        if self.encoder is not None:
            if roles != ("user",):
                raise AskedWrongError(
                    "this task takes one message of the user: the other turns are in its template", "messages"
                )
            return self.from_text(turns[0][1], settings)
        if not getattr(self.backbone.tokenizer, "chat_template", None):
            raise AskedWrongError("this model has no chat template; use completions", "messages")
        return self._of(self._shape(roles), {f"m{i}": text for i, (_, text) in enumerate(turns)}, settings)

    def scored(self, request: Request) -> Request:
        """The same text, of which the labels are scored instead. Raises AskedWrongError for a task without labels."""
        if self.encoder is None or not self.classes:
            raise AskedWrongError("this task has no labels to choose from; use completions")
        return replace(request, labels=tuple(self.encoder.answers()))

    def token_text(self, token: int) -> str:
        decoded: str = self.backbone.tokenizer.decode([token])
        return decoded

    # --- parts --------------------------------------------------------------------------------------------------------

    def _of(self, encoder: Encoder, fields: Mapping[str, str], settings: Settings) -> Request:
        if sum(map(len, fields.values())) > self.backbone.context_length * LONGEST_TOKEN:
            raise AskedWrongError("the text is longer than the model's context", "length")
        try:
            ids = encoder.context(fields, 0).ids
        except SoftPromptError as error:  # its message may tell what the text was
            raise AskedWrongError("the text cannot be put into the task's template") from error
        return self._request(ids, encoder, settings)

    def _request(self, ids: Ids, encoder: Encoder, settings: Settings) -> Request:
        ends = frozenset(end_tokens(self.backbone, encoder))
        constant = self._constant if encoder is self.encoder else next((i for i, t in enumerate(ids) if t >= 0), 0)
        vectors = self.vectors if first_soft(ids) < len(ids) else None
        digest = self.digest if vectors is not None else ""
        return Request(ids, vectors, digest, self.name, settings, ends, constant)

    @cached_property
    def _constant(self) -> int:
        """How many leading tokens are the same whatever the fields say."""
        assert self.encoder is not None
        made_up = [self.encoder.context(dict.fromkeys(self.fields, text), 0).ids for text in ("0", "x")]
        return shared_length([Row(ids, len(ids)) for ids in made_up])

    def _only_field(self, text: str) -> dict[str, str]:
        if len(self.fields) > 1:
            raise AskedWrongError(f"the task has several fields ({_names(self.fields)}); send `fields`", "fields")
        return dict.fromkeys(self.fields, text)

    def _shape(self, roles: tuple[str, ...]) -> Encoder:
        """The encoder of bare text, or of chats with these roles, with the soft tokens at the very front."""
        if roles not in self._shapes:
            if roles:
                template = Template.make(chat=[(role, f"{{m{i}}}") for i, role in enumerate(roles)], target="{answer}")
            else:
                template = Template.make("{text}", "{answer}")
            self._shapes[roles] = self._encoder(template)
            if len(self._shapes) > KEPT_SHAPES:
                self._shapes.popitem(last=False)
        self._shapes.move_to_end(roles)
        return self._shapes[roles]

    def _encoder(self, template: Template) -> Encoder:
        return Encoder(template, self.backbone.tokenizer, self.tokens)


def share_documents(requests: Sequence[Request], group: Hashable) -> list[Request]:
    """Mark what several requests (of different tasks) read before their soft tokens, so that it is computed once.

    group: something that no other call is given.
    """
    clusters: list[tuple[Ids, list[int]]] = []
    for index, request in enumerate(requests):
        own = request.ids[: min(first_soft(request.ids), len(request.ids) - 1)]
        for place, (prefix, members) in enumerate(clusters):
            common = _common(prefix, own)
            if common >= max(8, len(prefix) // 2):
                clusters[place] = (prefix[:common], [*members, index])
                break
        else:
            clusters.append((own, [index]))
    found = list(requests)
    for number, (prefix, members) in enumerate(clusters):
        if len(members) > 1 and prefix:
            for index in members:
                key = (group, number)
                found[index] = replace(found[index], group=key, shared=len(prefix), members=len(members))
    return found


def share_choices(request: Request, count: int, group: Hashable) -> list[Request]:
    """`count` requests for the same text, which is read once; each has its own seed if one is given."""
    if count == 1:
        return [request]
    seed = request.settings.seed
    return [
        replace(
            request,
            settings=replace(request.settings, seed=None if seed is None else seed + i),
            group=group,
            shared=len(request.ids) - 1,
            members=count,
        )
        for i in range(count)
    ]


def _common(one: Ids, two: Ids) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, two)) if a != b), min(len(one), len(two)))


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:12])
