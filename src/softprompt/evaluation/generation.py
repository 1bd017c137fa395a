"""Continue texts token by token: many rows at once, each with its own keys and values, the prompt's shared by all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..attention import Pass, States
from ..backbone import Backbone
from ..computation import contexts_hidden, is_deep, micro_batches, plain_deep_prefill, shared_states
from ..errors import ConfigError
from ..placement import Row, embed_with_soft, shared_length

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy. top_p: smallest set of tokens with that much probability.

    stop: texts that end the answer (they are not part of it). seed: same seed, same text, same answer, whatever else is
    in the batch. Raises ConfigError for values that make no sense.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = []
        if self.max_new_tokens < 1:
            wrong.append(f"max_new_tokens is {self.max_new_tokens}, expected at least 1")
        if not 0 <= self.temperature < float("inf"):
            wrong.append(f"temperature is {self.temperature}, expected 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            wrong.append(f"top_p is {self.top_p}, expected more than 0 and at most 1")
        if any(not text for text in self.stop):
            wrong.append("a stop text is empty; leave it out")
        if wrong:
            raise ConfigError(wrong)


@dataclass
class _Open:
    """One text being written."""

    index: int
    ids: Ids
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)

    @staticmethod
    def start(index: int, ids: Ids, seed: int) -> _Open:
        # The generator depends on the row itself and not on its place, so that batches cannot change an answer.
        digest = hashlib.sha256(repr((seed, ids)).encode()).digest()
        return _Open(index, ids, torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1))


def generate_tokens(
    backbone: Backbone,
    contexts: Sequence[Ids],
    vectors: torch.Tensor | None,
    sampling: Sampling,
    *,
    ends: Sequence[int] = (),
    start: int | None = None,
    micro_batch_tokens: int = 8192,
) -> Iterator[tuple[int, int]]:
    """Yield (row, token) as they come, for rows of context ids (soft token i is -(i + 1)). End tokens are not yielded.

    ends: tokens that end an answer. start: tokens at the front that all contexts share (default: what they do share).
    A row also ends at the model's context length. The caller may `send(row)` to end that row early (a stop text).
    """
    _check_room(backbone, contexts)
    if not backbone.fast:
        for index, ids in enumerate(contexts):
            yield from _plain_tokens(backbone, index, ids, vectors, sampling, ends)
        return
    rows = [Row(tuple(ids), len(ids)) for ids in contexts]
    start = shared_length(rows) if start is None else start
    places = {id(row): index for index, row in enumerate(rows)}
    for batch in micro_batches(rows, start, micro_batch_tokens, extra=sampling.max_new_tokens):
        opened = [_Open.start(places[id(row)], row.ids, sampling.seed) for row in batch]
        yield from _generate_batch(backbone, batch, opened, start, vectors, sampling, frozenset(ends))


def _check_room(backbone: Backbone, contexts: Sequence[Ids]) -> None:
    longest = max(len(ids) for ids in contexts)
    if longest >= backbone.context_length:
        raise ConfigError(
            f"a text of {longest} tokens leaves no room in a context of {backbone.context_length}; shorten it"
        )


def _generate_batch(
    backbone: Backbone,
    batch: Sequence[Row],
    opened: list[_Open],
    start: int,
    vectors: torch.Tensor | None,
    sampling: Sampling,
    ends: frozenset[int],
) -> Iterator[tuple[int, int]]:
    with torch.no_grad():
        shared = shared_states(backbone, batch[0].ids[:start], vectors, backbone.states)
        hidden, _, rows, starts = contexts_hidden(backbone, batch, start, shared, vectors, record=True)
        logits = backbone.head(hidden)
        slots = _Slots(rows, starts, sampling.max_new_tokens)
    while opened:
        going = []
        for slot, (row, token) in enumerate(zip(opened, _choose_each(logits, sampling, opened), strict=True)):
            if token in ends:
                continue
            row.tokens.append(token)
            stopped = yield row.index, token
            room = len(row.ids) + len(row.tokens) < backbone.context_length
            if not stopped and room and len(row.tokens) < sampling.max_new_tokens:
                going.append(slot)
        opened = [opened[slot] for slot in going]
        if opened:
            slots.keep(going)
            logits = _next_logits(backbone, opened, slots)


@torch.no_grad()
def _next_logits(backbone: Backbone, opened: list[_Open], slots: _Slots) -> torch.Tensor:
    """One more token for each row: [R, V]."""
    ids = torch.tensor([row.tokens[-1] for row in opened], device=backbone.device)
    rows = Pass([1] * len(opened), slots.states(), record=True, device=backbone.device)
    hidden = backbone.hidden(backbone.embed(ids), slots.starts + slots.lengths, rows)
    slots.append(rows)
    return backbone.head(hidden)


class _Slots:
    """Keys and values of each row's own tokens, [R, K, C, D] a layer, with room for the tokens to come.

    before: what stands before them. starts, lengths: [R], position of each row's first own token, and how many it has.
    """

    def __init__(self, first: Pass, starts: Sequence[int], room: int):
        self.before = list(first.before)
        states = first.states()
        shape = states.keys[0].shape
        more = (shape[0], shape[1], room, shape[3])
        self.keys = [torch.cat([k, k.new_zeros(more)], dim=2) for k in states.keys]
        self.values = [torch.cat([v, v.new_zeros(more)], dim=2) for v in states.values]
        self.lengths = torch.tensor(list(first.lengths), device=first.device)
        self.starts = torch.tensor(list(starts), device=first.device)

    def states(self) -> list[States]:
        used = int(self.lengths.max())
        own = States([k[:, :, :used] for k in self.keys], [v[:, :, :used] for v in self.values], self.lengths)
        return [*self.before, own]

    def append(self, rows: Pass) -> None:
        places = torch.arange(len(self.lengths), device=self.lengths.device)
        for layer, (key, value) in rows.recorded.items():  # [1, K, R, D] each
            self.keys[layer][places, :, self.lengths] = key[0].transpose(0, 1)
            self.values[layer][places, :, self.lengths] = value[0].transpose(0, 1)
        self.lengths = self.lengths + 1

    def keep(self, going: list[int]) -> None:
        """Drop the rows that ended."""
        if len(going) < len(self.lengths):
            index = torch.tensor(going, device=self.lengths.device)
            self.keys = [k[index] for k in self.keys]
            self.values = [v[index] for v in self.values]
            self.lengths, self.starts = self.lengths[index], self.starts[index]
            self.before = [states if states.shared else states.of_rows(index) for states in self.before]


def _choose_each(logits: torch.Tensor, sampling: Sampling, rows: Sequence[_Open]) -> list[int]:
    """The next token of each row from logits [R, V]. The greedy ones come at once: a device is waited for only once."""
    if sampling.temperature == 0:
        # The same as argmax, the first of several largest, in a third of its time in bfloat16.
        found: list[int] = logits.max(dim=-1).indices.tolist()
        return found
    return [choose(each, sampling, row.generator) for each, row in zip(logits, rows, strict=True)]


def choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token of one row from its logits [V]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = tempered(logits.cpu().double(), sampling.temperature)
    if sampling.top_p < 1:
        probabilities = nucleus(probabilities, sampling.top_p)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def tempered(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Probabilities of the next token, [V] -> [V], at a temperature above 0."""
    # Less the largest first: a temperature close to zero divides to infinity, which is no distribution.
    return torch.softmax((logits - logits.max()) / temperature, dim=-1)


def nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Only the smallest set of tokens with `top_p` of the probability (Holtzman et al. 2020, arXiv:1904.09751)."""
    for size in (256, len(probabilities)):  # to sort a whole vocabulary takes longer than all the rest
        ordered, index = probabilities.topk(min(size, len(probabilities)))
        before = ordered.cumsum(0) - ordered
        if float(before[-1]) >= top_p or len(index) == len(probabilities):
            break
    kept = index[before < top_p]  # the most probable token always stays
    return torch.zeros_like(probabilities).index_put_((kept,), probabilities[kept])


def _plain_tokens(
    backbone: Backbone, index: int, ids: Ids, vectors: torch.Tensor | None, sampling: Sampling, ends: Sequence[int]
) -> Iterator[tuple[int, int]]:
    """One row at a time through the model's own cache: for architectures without the fast path."""
    row = _Open.start(index, ids, sampling.seed)
    line = torch.tensor(ids, device=backbone.device)[None]
    with torch.no_grad():
        if vectors is not None and is_deep(vectors):
            logits, past = plain_deep_prefill(backbone, ids, vectors)
            logits = logits[None]
        else:
            out = backbone.model(inputs_embeds=embed_with_soft(line, vectors, backbone.embed), use_cache=True)
            logits, past = out.logits, getattr(out, "past_key_values", None)
    while True:
        token = choose(logits[0, -1], sampling, row.generator)
        if token in ends:
            return
        row.tokens.append(token)
        stopped = yield index, token
        full = len(ids) + len(row.tokens) >= backbone.context_length
        if stopped or full or len(row.tokens) >= sampling.max_new_tokens:
            return
        with torch.no_grad():
            last = torch.tensor([[token]], device=backbone.device)
            if past is not None:
                logits = backbone.model(input_ids=last, past_key_values=past, use_cache=True).logits
            else:  # another kind of memory, or none: the whole sequence again
                line = torch.cat([line, last], dim=1)
                logits = backbone.model(inputs_embeds=embed_with_soft(line, vectors, backbone.embed)).logits


class TextStream:
    """Text from tokens as they come: never half a character, and nothing of a stop text."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.tokens: list[int] = []
        self.given = 0  # characters already handed out
        self.stopped = False

    def add(self, token: int) -> str:
        """The new text that `token` makes certain. `stopped` tells whether a stop text has been reached."""
        self.tokens.append(token)
        text = self._decode()
        found = [text.find(stop) for stop in self.stop if stop in text]
        if found:
            self.stopped = True
            return self._give(text, min(found))
        certain = len(text)
        while certain > 0 and text[certain - 1] == "�":  # an unfinished character
            certain -= 1
        for stop in self.stop:  # what could be the beginning of a stop text waits
            for size in range(min(len(stop) - 1, len(text)), 0, -1):
                if text.endswith(stop[:size]):
                    certain = min(certain, len(text) - size)
                    break
        return self._give(text, certain)

    def finish(self) -> str:
        """What was held back and now turns out to belong to the answer."""
        return "" if self.stopped else self._give(text := self._decode(), len(text))

    def _give(self, text: str, until: int) -> str:
        new, self.given = text[self.given : until], max(self.given, until)
        return new

    def _decode(self) -> str:
        decoded: str = self.tokenizer.decode(self.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return decoded
