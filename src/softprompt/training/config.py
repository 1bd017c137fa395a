"""Everything that can be set about tuning, as plain data with one description per field."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class TuneConfig(BaseModel):
    """How a soft prompt is tuned. Every default is meant to do; the descriptions are what `--help` shows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["embedding", "deep"] = Field(
        "embedding",
        description="embedding: P vectors before the first layer, which others run too; deep: keys and values in "
        "each layer, more accurate, and behind the text tuned several times as fast",
    )
    tokens: int = Field(20, ge=1, le=1024, description="soft tokens P")
    init: str = Field(
        "text",
        description="where the vectors start: text, examples, labels, vocabulary, random, prompt:PATH, auto:LIBRARY",
    )
    init_text: str | None = Field(None, description="text for init=text; without it an instruction made from the task")
    learning_rate: float = Field(
        0.05, gt=0, description="in units of the embedding table's RMS, so that one value serves models of any scale"
    )
    optimizer: Literal["adamw", "adafactor"] = Field("adamw", description="optimiser")
    sink: int = Field(
        1, ge=0, description="first tokens of a deep prompt at the front that never move: attention rests on them"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    warmup: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of the steps with rising learning rate; default: 0.05, for a deep prompt 0.3",
    )
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="decay after the warm-up")
    clip: float = Field(1.0, ge=0, description="largest gradient norm of the whole prompt; 0 does not clip")
    norm_guard: float = Field(
        0.25, ge=0, description="how far a deep prompt may move from its start, in units of learning_rate; 0: anywhere"
    )
    rescue: bool = Field(
        True,
        description="where the loss has risen far above its lowest, go on from the vectors that it had there, with "
        "half of the learning rate",
    )
    average: float = Field(
        0.25,
        ge=0,
        lt=1,
        description="share of the steps, the last ones, whose vectors are averaged into the prompt; 0: the last step's",
    )
    epochs: float | None = Field(
        None,
        gt=0,
        description="passes over the training rows; default: 2, or up to 6 (deep: 8) for 250 steps; 100 steps at least",
    )
    steps: int | None = Field(None, ge=1, description="optimiser steps; overrides epochs")
    batch_size: int = Field(16, ge=1, description="examples an optimiser step")
    micro_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens computed at once: bounds the memory and changes no result; default: 1,024, on an "
        "accelerator 4,096",
    )
    reparametrisation: Literal["none", "residual"] = Field(
        "none", description="residual: learn through a small network, folded away at save (Razdaibiedina et al. 2023)"
    )
    validate_every: int | None = Field(
        None, ge=1, description="optimiser steps between validations; default: four in a run"
    )
    validation_rows: int = Field(500, ge=1, description="rows of the validation split that are used at most")
    folds: int | None = Field(
        None,
        ge=0,
        description="cross-validate the number of steps in so many folds, then tune on all rows; default: 5 where "
        "there are fewer than 100 rows and none are given for validation; 0: never",
    )
    patience: int | None = Field(None, ge=1, description="stop after so many validations without a better score")
    checkpoint_every: int = Field(25, ge=1, description="optimiser steps between checkpoints")
    max_tokens: int | None = Field(None, ge=8, description="longest row in tokens; default: the model's context")
    text_cache: Literal["auto", "off", "memory", "disk"] = Field(
        "auto",
        description="where the states of texts before the soft tokens are kept, once computed; auto: in memory, and on "
        "disk for later runs where that saves at least ten seconds of them",
    )
    text_cache_bits: int | None = Field(
        None, ge=8, le=8, description="8: keep them in 8 bits, a half to a quarter of the size; default: as the model"
    )
    text_cache_gb: float | None = Field(
        None, gt=0, description="GB of disk for all kept texts; default: 20, or a fifth of what is free if that is less"
    )
    seed: int = Field(0, ge=0, description="seed of the order of rows and of the initialiser")
    tensorboard: bool = Field(False, description="also write TensorBoard events")
