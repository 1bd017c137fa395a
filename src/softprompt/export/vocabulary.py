"""Soft prompts as vocabulary: new token ids, what stands for them in a text, and their rows in the two tables.

The input row of a new token is the soft token's vector. The output row decides that the token is never said, see
`unlikely_row`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..backbone import Backbone
from ..encoding import divide
from ..errors import BackboneError, ConfigError
from ..gguf_cache import PROBES
from ..prompt import SoftPrompt

AVERAGED = 64  # output rows that make up the one of all new tokens
MANIFEST = "softprompt_export.json"


@dataclass(frozen=True)
class Entry:
    """One prompt in the vocabulary. first: the id of its first row; the others follow."""

    name: str
    prompt: SoftPrompt
    first: int

    @property
    def ids(self) -> range:
        return range(self.first, self.first + self.prompt.tokens)

    @property
    def rows(self) -> list[str]:
        """The token of each row, as it is written in a text."""
        return [f"<|{self.name}:{index}|>" for index in range(self.prompt.tokens)]

    @property
    def marks(self) -> dict[str, list[str]]:
        """What may be written once in a text -> the rows that it stands for.

        `<|name|>` is the whole prompt. One whose template divides it over several places has `<|name/1|>` and so on,
        its part for each place, as well.
        """
        rows, found = self.rows, {f"<|{self.name}|>": self.rows}
        places = self.prompt.template.soft_count if self.prompt.template is not None else 1
        if places > 1:
            for number, size in enumerate(divide(len(rows), places), 1):
                found[f"<|{self.name}/{number}|>"], rows = rows[:size], rows[size:]
        return found


def make_entries(prompts: Mapping[str, SoftPrompt], tokenizer: Any) -> list[Entry]:
    """Ids for all rows of all prompts, behind the last that the tokenizer knows (a table may have room there already).

    Raises ConfigError where a new token would have the name of one that the tokenizer has.
    """
    known = tokenizer.get_vocab()
    following = max(known.values()) + 1
    entries, problems = [], []
    for name, prompt in prompts.items():
        entries.append(Entry(name, prompt, following))
        following += prompt.tokens
        taken = [text for text in (*entries[-1].marks, *entries[-1].rows) if text in known]
        if taken:
            problems.append(f"{name}: the tokenizer has a token {taken[0]} already; give the prompt another name")
    if problems:
        raise ConfigError(problems)
    return entries


def input_rows(backbone: Backbone, entries: Sequence[Entry]) -> torch.Tensor:
    """The new rows of the embedding table, in the model's precision: [N, H].

    Vectors stand after the scaling that some models (Gemma) do when they look a row up, so it is taken out of them.
    """
    scale = embedding_scale(backbone)
    vectors = torch.cat([entry.prompt.vectors for entry in entries])
    return (vectors.double() / scale).to(backbone.dtype).to(backbone.device)


def embedding_scale(backbone: Backbone) -> float:
    """The factor between a row of the embedding table and what the model reads. Raises BackboneError if it is none."""
    table: torch.Tensor = backbone.embed.weight  # type: ignore[assignment]
    ids = torch.arange(min(256, len(table)), device=backbone.device)
    with torch.no_grad():
        read, stored = backbone.embed(ids).cpu().double(), table[ids].cpu().double()
    scale = float((read * stored).sum() / stored.square().sum())
    if not torch.allclose(read, stored * scale, rtol=1e-2, atol=1e-6):
        raise BackboneError(
            f"{backbone.name}: what it reads of a token is no multiple of the token's row, so that no row can be given "
            "that it reads as a soft token"
        )
    return scale


@torch.no_grad()
def unlikely_row(backbone: Backbone) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The row [H] (and bias) of the output table that all new tokens get: the mean of those of the least likely tokens.

    A linear layer without a bias cannot rule a token out, and a row of zeros would give it the logit 0, which is often
    the highest. The mean of rows of other tokens gives it the mean of their logits: whatever the state, that is never
    more than the highest logit, so greedy choice never takes it, and at any temperature its probability is at most the
    mean of theirs. Taking tokens that the model finds least likely makes that tiny (SmolLM2: less than 1e-7).
    """
    head = backbone.model.get_output_embeddings()
    ids = unlikely_tokens(backbone)
    bias = getattr(head, "bias", None)
    mean = head.weight[ids].float().mean(dim=0).to(head.weight.dtype)
    return mean, None if bias is None else bias[ids].float().mean().to(bias.dtype)


@torch.no_grad()
def unlikely_tokens(backbone: Backbone) -> torch.Tensor:
    """Up to 64 ids of ordinary tokens whose mean logit over some texts is lowest: [K]."""
    size = min(backbone.vocab_size, max(backbone.tokenizer.get_vocab().values()) + 1)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.tensor(backbone.tokenizer(text)["input_ids"])[:128] for text in PROBES]
    texts.append(torch.randint(size, (128,), generator=generator))
    total = torch.zeros(size, dtype=torch.float64)
    for ids in texts:
        given = ids[(ids >= 0) & (ids < size)][: backbone.context_length - 1].to(backbone.device)[None]
        logits = backbone.model(input_ids=given, use_cache=False).logits[0, :, :size]
        total += logits.float().mean(dim=0).cpu().double()
    total[~torch.isfinite(total)] = float("inf")
    return total.argsort()[: max(1, min(AVERAGED, size // 16))].to(backbone.device)
