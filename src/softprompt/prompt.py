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
    """P trained vectors in the embedding space of a frozen model (Lester et al. 2021, arXiv:2104.08691).

    vectors: float32 [P, H] on the CPU, 1 <= P <= 1024. They stand where the embeddings of P ordinary tokens would
    stand, after whatever scaling the model applies to its own embeddings (Gemma multiplies them by sqrt(H)).
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
    kind: str = "embedding"

    def __post_init__(self) -> None:
        self.vectors = check_vectors(self.vectors)

    @property
    def tokens(self) -> int:
        """P, the number of soft tokens."""
        return self.vectors.shape[0]

    @property
    def width(self) -> int:
        """H, the width of the model's embeddings."""
        return self.vectors.shape[1]

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
    """Return `vectors` as a detached contiguous float32 [P, H] tensor on the CPU, or raise PromptFormatError."""
    if vectors.ndim != 2 or not vectors.is_floating_point():
        raise PromptFormatError(
            f"a soft prompt is a floating-point tensor [tokens, width], found {vectors.dtype} {list(vectors.shape)}"
        )
    if not 1 <= vectors.shape[0] <= MAX_TOKENS:
        raise PromptFormatError(f"a soft prompt has 1 to {MAX_TOKENS} tokens, found {vectors.shape[0]}")
    vectors = vectors.detach().to("cpu", torch.float32).contiguous()
    bad = (~torch.isfinite(vectors)).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise PromptFormatError(
            f"{len(bad)} of {vectors.shape[0]} soft tokens hold NaN or infinite numbers (first: token {bad[0]}); "
            "take an earlier checkpoint of the run"
        )
    return vectors
