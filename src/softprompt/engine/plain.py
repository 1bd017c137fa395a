"""Requests of a model that cannot be computed in slots: each alone, by the model's own forward and cache."""

from __future__ import annotations

from typing import Any

import torch

from ..backbone import Backbone
from ..computation import is_deep, plain_deep_prefill
from ..evaluation.scoring import score_labels
from ..placement import embed_with_soft
from .requests import Event
from .running import Running


class PlainRow:
    """Advance one request by a token at a time. The same answers as the fast path, slower."""

    def __init__(self, backbone: Backbone, row: Running):
        self.backbone, self.row = backbone, row
        self._past: Any = None
        self._begun = False

    def step(self) -> Event:
        row, request = self.row, self.row.request
        if row.tree is not None:
            scores = score_labels(self.backbone, [request.ids], request.labels, request.vectors)
            return row.scored(tuple(scores[0].tolist()))
        assert row.sampler is not None
        return row.take(row.sampler.pick(self._logits()))

    def _logits(self) -> torch.Tensor:
        """Of the next token, [V]."""
        model, row, vectors = self.backbone.model, self.row, self.row.request.vectors
        if not self._begun:
            self._begun = True
            if is_deep(vectors):
                assert vectors is not None
                read, self._past = plain_deep_prefill(self.backbone, row.request.ids, vectors)
                return read[-1]
            out = model(inputs_embeds=self._embeddings(), use_cache=True)
            self._past = getattr(out, "past_key_values", None)
        elif self._past is not None:
            last = torch.tensor([row.ids[-1:]], device=self.backbone.device)
            out = model(input_ids=last, past_key_values=self._past, use_cache=True)
        else:  # another kind of memory, or none: the whole sequence again
            out = model(inputs_embeds=self._embeddings())
        logits: torch.Tensor = out.logits[0, -1]
        return logits

    def _embeddings(self) -> torch.Tensor:
        line = torch.tensor([self.row.ids], device=self.backbone.device)
        return embed_with_soft(line, self.row.request.vectors, self.backbone.embed)
