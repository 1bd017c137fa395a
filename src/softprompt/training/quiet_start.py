"""A start for deep prompts behind the text that does not drown the text.

Twenty tokens of an instruction so near the answer outweigh the text before them: what a model could say without any
prompt is gone before the first step, and thirty steps do not bring it back (docs/log.md). So the keys of such a start
are turned away from what is asked there: to each key is added what lowers its score by ln(P) / 2 with the queries of
the template's tail, so that all soft tokens together weigh like the square root of P of them. Values, and what the
instruction says, stay; training brings the attention back where it helps. Turning further away gives few rows no more,
and costs tasks whose start tells nothing anyway (TREC) what those steps could have taught.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..attention import Pass
from ..backbone import Backbone
from ..computation import prompt_length
from ..placement import Row, first_soft, shared_length
from ..rotary import turned_by

ROWS = 32  # whose tails are looked at
RIDGE = 0.1


def quiet(backbone: Backbone, rows: Sequence[Row], vectors: torch.Tensor) -> torch.Tensor:
    """A deep prompt [L, 2, K, P, D] as the start behind the text of `rows`; as it is where it stands before them."""
    if not backbone.fast:  # its keys cannot be moved behind a text, which the first step says
        return vectors
    if len(rows) < 2 or first_soft(rows[0].ids) < shared_length(rows):
        return vectors
    queries = tail_queries(backbone, rows[:ROWS], prompt_length(vectors)).to(vectors)  # [L, K, n, D]
    found = vectors.clone()
    found[:, 0] += away(queries, math.log(prompt_length(vectors)) / 2)[:, :, None]
    return found


def away(queries: torch.Tensor, much: float) -> torch.Tensor:
    """What lowers a key's score with each of `queries` [..., n, D] by `much`, as near as least squares get: [..., D].

    A little of the queries' mean square is added (ridge), so that what hardly any query asks for is hardly touched.
    """
    square = queries.mT @ queries / queries.shape[-2]
    size = square.diagonal(dim1=-2, dim2=-1).mean(dim=-1).clamp_min(1e-12)
    square = square + RIDGE * size[..., None, None] * torch.eye(queries.shape[-1]).to(queries)
    found: torch.Tensor = torch.linalg.solve(square, queries.mean(dim=-2))
    return -much * found


@torch.no_grad()
def tail_queries(backbone: Backbone, rows: Sequence[Row], tokens: int) -> torch.Tensor:
    """Scaled queries, [L, K, n, D] on the CPU, of the template's tokens between P soft tokens and the answer.

    n: rows, tokens and the query heads that share a key-value head. They are of the model without the prompt, each
    query turned as if the prompt began at position 0, as the keys of a deep prompt are kept.
    """
    of_rows: list[torch.Tensor] = []
    for row in rows:
        place = first_soft(row.ids)
        line = torch.tensor([*row.ids[:place], *row.ids[place + tokens : row.answer]], device=backbone.device)
        back = torch.tensor([tokens - place], device=backbone.device)
        of_layers: list[torch.Tensor] = []

        def see(layer: int, query: torch.Tensor, kv_heads: int) -> None:  # [1, H, N, D]
            tail = turned_by(backbone, layer, query[:, :, place:].float(), back)[0]  # noqa: B023
            of_layers.append(tail.reshape(kv_heads, -1, tail.shape[-1]).cpu())  # noqa: B023

        passed = Pass([len(line)], device=backbone.device, see=see)
        backbone.hidden(backbone.embed(line), torch.arange(len(line), device=backbone.device), passed, line[:0])
        of_rows.append(torch.stack(of_layers))
    return torch.cat(of_rows, dim=2)
