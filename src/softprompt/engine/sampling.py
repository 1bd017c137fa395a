"""The choice of the next token of one request, from its logits alone: what else is in the batch cannot change it."""

from __future__ import annotations

import hashlib
import secrets
from collections import Counter

import torch

from ..evaluation.generation import nucleus, tempered
from .requests import Ids, Settings, Token


class Sampler:
    """The draws of one request that reads `ids` (soft tokens are negative and never counted)."""

    def __init__(self, settings: Settings, ids: Ids):
        self.settings = settings
        self.read = sorted({token for token in ids if token >= 0})
        self.written: Counter[int] = Counter()
        seed = secrets.randbits(62) if settings.seed is None else settings.seed
        digest = hashlib.sha256(repr((seed, ids)).encode()).digest()  # as evaluation/generation.py seeds a row
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def pick(self, logits: torch.Tensor) -> Token:
        """The next token from logits [V] (any device), remembered for the penalties."""
        wanted, raw = self.settings, logits
        if not wanted.plain_greedy:
            logits = self._adjusted(logits.detach().cpu().double())
        token = int(logits.argmax()) if wanted.temperature == 0 else self._draw(logits)
        return self.found(token, raw)

    def found(self, token: int, logits: torch.Tensor) -> Token:
        """`token` as chosen, with what was asked for about it."""
        self.written[token] += 1
        if self.settings.logprobs is None:
            return Token(token)
        known = torch.log_softmax(logits.detach().cpu().double(), dim=-1)
        values, index = known.topk(min(self.settings.logprobs, len(known)))
        return Token(token, float(known[token]), tuple(zip(index.tolist(), values.tolist(), strict=True)))

    def _adjusted(self, logits: torch.Tensor) -> torch.Tensor:
        wanted = self.settings
        if wanted.repetition_penalty != 1:
            seen = torch.tensor(sorted({*self.read, *self.written}), dtype=torch.long)
            at = logits[seen]
            penalised = torch.where(at > 0, at / wanted.repetition_penalty, at * wanted.repetition_penalty)
            logits[seen] = penalised.nan_to_num()  # a penalty close to zero divides to infinity
        if self.written and (wanted.presence_penalty or wanted.frequency_penalty):
            tokens = torch.tensor(list(self.written), dtype=torch.long)
            counts = torch.tensor([self.written[int(t)] for t in tokens], dtype=logits.dtype)
            logits[tokens] -= wanted.presence_penalty + wanted.frequency_penalty * counts
        for token, bias in wanted.logit_bias:
            logits[token] += bias
        return logits

    def _draw(self, logits: torch.Tensor) -> int:
        wanted = self.settings
        probabilities = tempered(logits, wanted.temperature)
        if 0 < wanted.top_k < len(probabilities):
            kept = probabilities.topk(wanted.top_k)
            probabilities = torch.zeros_like(probabilities).index_put_((kept.indices,), kept.values / kept.values.sum())
        if wanted.top_p < 1:
            probabilities = nucleus(probabilities, wanted.top_p)
        if wanted.min_p > 0:
            probabilities[probabilities < wanted.min_p * probabilities.max()] = 0
        return int(torch.multinomial(probabilities, 1, generator=self.generator))
