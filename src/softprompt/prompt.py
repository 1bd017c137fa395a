"""A soft prompt: the vectors, and where they came from. No reading or writing here (see fileformat.py)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .errors import PromptFormatError

if TYPE_CHECKING:
    from .templates import Template

MAX_TOKENS = 1024


@dataclass
class SoftPrompt:
    """P trained vectors in the embedding space of a frozen model (Lester et al. 2021, arXiv:2104.08691), or P trained
    keys and values in each of its layers (prefix tuning, Li and Liang 2021, arXiv:2101.00190).

    vectors: float32 on the CPU, 1 <= P <= 1024. Kind "embedding": [P, H]; they stand where the embeddings of P ordinary
    tokens would stand, after whatever scaling the model applies to its own embeddings (Gemma multiplies them by
    sqrt(H)). Kind "deep": [L, 2, K, P, D], keys then values of P tokens in each layer and key-value head, the keys as
    the model caches them at positions 0 to P - 1. The kind is told by the shape.
    template: the hard text around them and the labels; None for a prompt from elsewhere that came without one.
    base_model, fingerprint, tokenizer_hash: the backbone that it was tuned for; empty strings when unknown.
    provenance: how it was made (settings, data, versions, date). metrics: scores measured when it was made.

    Raises PromptFormatError when the vectors have the wrong shape, length or type, or are not finite.
    """

    vectors: torch.Tensor
    template: Template | None = None
    base_model: str = ""
    fingerprint: str = ""
    tokenizer_hash: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.vectors = check_vectors(self.vectors)

    @property
    def kind(self) -> str:
        """embedding or deep."""
        return "deep" if self.vectors.ndim == 5 else "embedding"

    @property
    def tokens(self) -> int:
        """P, the number of soft tokens."""
        return self.vectors.shape[3 if self.vectors.ndim == 5 else 0]

    @property
    def width(self) -> int:
        """Numbers of a token in one place: H, the width of the model's embeddings; K * D for a deep prompt."""
        return self.vectors.shape[1] if self.vectors.ndim == 2 else self.vectors.shape[2] * self.vectors.shape[4]

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write a prompt folder (`softprompt.json`, `adapter_model.safetensors`) and return its path.

        Raises OutputError when the folder holds something else, or holds a prompt and `overwrite` is False.
        """
        from .fileformat import save_prompt

        return save_prompt(self, folder, overwrite=overwrite)

    @staticmethod
    def load(folder: str | Path) -> SoftPrompt:
        """Read a prompt folder, or any PEFT prompt-tuning or P-tuning adapter folder of a causal model.

        Runs no code from the folder and never unpickles. Raises PromptFormatError.
        """
        from .fileformat import load_prompt

        return load_prompt(folder)


def check_vectors(vectors: torch.Tensor) -> torch.Tensor:
    """Return `vectors` as a detached contiguous float32 tensor on the CPU, or raise PromptFormatError."""
    deep = vectors.ndim == 5 and vectors.shape[1] == 2
    if not (vectors.ndim == 2 or deep) or not vectors.is_floating_point():
        raise PromptFormatError(
            "a soft prompt is a floating-point tensor [tokens, width], or [layers, 2, heads, tokens, size] for a deep "
            f"one, found {vectors.dtype} {list(vectors.shape)}"
        )
    tokens = vectors.shape[3 if deep else 0]
    if not 1 <= tokens <= MAX_TOKENS:
        raise PromptFormatError(f"a soft prompt has 1 to {MAX_TOKENS} tokens, found {tokens}")
    vectors = vectors.detach().to("cpu", torch.float32).contiguous()
    bad = (~torch.isfinite(by_token(vectors))).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise PromptFormatError(
            f"{len(bad)} of {tokens} soft tokens hold NaN or infinite numbers (first: token {bad[0]}); "
            "take an earlier checkpoint of the run"
        )
    return vectors


def by_token(vectors: torch.Tensor) -> torch.Tensor:
    """All numbers of each soft token in a row: [P, H] as it is, [L, 2, K, P, D] as [P, L * 2 * K * D]."""
    return vectors if vectors.ndim == 2 else vectors.permute(3, 0, 1, 2, 4).flatten(1)


def from_tokens(flat: torch.Tensor, layers: int, heads: int) -> torch.Tensor:
    """The inverse of `by_token` for a deep prompt: [P, L * 2 * K * D] -> [L, 2, K, P, D]."""
    return flat.reshape(len(flat), layers, 2, heads, -1).permute(1, 2, 3, 0, 4)
