"""Where the vectors of a soft prompt start. Each initialiser gives float32 [P, H] and says in words what it did.

`table` is the model's embedding table [V, H] in float32, after the model's own scaling. Rows that no text uses may hold
zeros or NaN, so none of these functions touches a row that is not finite or is (nearly) zero.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import ConfigError
from .fileformat import load_prompt
from .prompt import MAX_TOKENS, SoftPrompt
from .vocabulary import mean_and_spread, ordinary_tokens, text_ids

if TYPE_CHECKING:
    from .templates import Template

INITIALISERS = ("text", "examples", "labels", "vocabulary", "random")
FREQUENT = 5_000  # how many of the most frequent tokens to draw from, as in Lester et al. 2021 (section 3.2)


def check_init(init: str) -> None:
    """Raise ConfigError unless `init` names an initialiser; needs no model and reads no PATH."""
    kind, _, path = init.partition(":")
    if init in INITIALISERS or (kind in ("prompt", "auto") and path.strip()):
        return
    known = (*INITIALISERS, "prompt:PATH", "auto:LIBRARY")
    if init.startswith("prompt"):
        nearest = ["prompt:PATH"]
    elif init.startswith("auto"):
        nearest = ["auto:LIBRARY"]
    else:
        nearest = difflib.get_close_matches(init.lower(), known, n=1, cutoff=0.5)
    guess = f", did you mean {nearest[0]!r}?" if nearest else ":"
    raise ConfigError(f"unknown initialiser {init!r}{guess} there are {', '.join(known)}")


def initialise(
    init: str,
    *,
    table: Tensor,
    tokenizer: Any,
    tokens: int,
    generator: torch.Generator,
    template: Template | None = None,
    init_text: str | None = None,
    examples: str | None = None,
    load: Callable[[str], SoftPrompt] = load_prompt,
) -> tuple[Tensor, str]:
    """The first vectors [P, H] of a prompt of `tokens` tokens, and what was done, for its provenance.

    examples: a few training rows as text, for init 'examples'. The same state of `generator` (on the CPU) gives the
    same vectors. Raises ConfigError (unknown initialiser, no labels, an empty text, another width) and, for
    prompt:PATH, what `load` raises.
    """
    check_init(init)
    if not 1 <= tokens <= MAX_TOKENS:
        raise ConfigError(f"a soft prompt has 1 to {MAX_TOKENS} tokens, tokens is {tokens}")
    if init_text is not None and init != "text":
        raise ConfigError(f"init_text is only used by init 'text', init is {init!r}: leave one of them out")
    if init == "text":
        vectors, said = from_text(instruction(template) if init_text is None else init_text, table, tokenizer, tokens)
    elif init == "examples":
        if not examples:
            raise ConfigError("init 'examples' needs training rows to start from: use 'text' or 'vocabulary'")
        vectors, said = from_text(examples, table, tokenizer, tokens)
    elif init == "labels":
        vectors, said = from_labels(label_texts(template), table, tokenizer, tokens, generator)
    elif init == "vocabulary":
        vectors, said = from_vocabulary(table, tokenizer, tokens, generator)
    elif init == "random":
        vectors, said = from_random(table, tokens, generator)
    else:
        vectors, said = from_prompt(init.removeprefix("prompt:").strip(), table.shape[1], tokens, load)
    assert vectors.shape == (tokens, table.shape[1]), vectors.shape
    assert bool(torch.isfinite(vectors).all())
    return vectors, said


def from_text(text: str, table: Tensor, tokenizer: Any, tokens: int) -> tuple[Tensor, str]:
    """The embeddings [P, H] of the tokens of `text`, without special ones, repeated or cut to P. Raises ConfigError."""
    ids = text_ids(text, table, tokenizer)
    if not ids:
        raise ConfigError(f"the text {text!r} to start from has no tokens with an embedding: give another init_text")
    if len(ids) == tokens:
        fitted = f"{tokens} tokens"
    else:
        fitted = f"{len(ids)} tokens, {'cut' if len(ids) > tokens else 'repeated'} to {tokens}"
    return _fit(table[ids].float(), tokens), f"embeddings of the text {text!r} ({fitted})"


def from_labels(
    words: Sequence[str], table: Tensor, tokenizer: Any, tokens: int, generator: torch.Generator
) -> tuple[Tensor, str]:
    """One vector for each label word, the mean over its tokens, and ordinary vocabulary for the rest, [P, H].

    The class-label initialisation of Lester et al. 2021, section 3.2. With more words than P the first P are taken.
    Raises ConfigError when a word has no tokens.
    """
    means = []
    for word in words[:tokens]:
        ids = text_ids(word, table, tokenizer)
        # Some tokenizers make the space before the word a token of its own, which says nothing about the class.
        ids = [number for number in ids if tokenizer.decode([number]).strip()] or ids
        if not ids:
            raise ConfigError(
                f"the label word {word!r} has no tokens with an embedding: start from 'text' or 'vocabulary'"
            )
        means.append(table[ids].float().mean(dim=0))  # [H]
    said = f"mean embedding of each of the label words {[word.strip() for word in words[:tokens]]}"
    rest = tokens - len(means)
    if rest == 0:
        return torch.stack(means), said + (f" (the first {tokens} of {len(words)})" if len(words) > tokens else "")
    others, how = from_vocabulary(table, tokenizer, rest, generator)
    return torch.cat([*[mean[None] for mean in means], others]), f"{said}, then {how}"


def from_vocabulary(table: Tensor, tokenizer: Any, tokens: int, generator: torch.Generator) -> tuple[Tensor, str]:
    """The embeddings [P, H] of tokens drawn from the most frequent ordinary ones, without replacement if it can be.

    How often a token occurs is not known to a tokenizer, but its id tells: byte-pair encodings number tokens in the
    order in which they were merged, frequent pairs first, and unigram and WordPiece vocabularies are sorted much alike.
    """
    ids = ordinary_tokens(table, tokenizer, FREQUENT, tokens)
    if not ids:
        raise ConfigError("the vocabulary has no ordinary tokens to start from: use init 'random'")
    if len(ids) >= tokens:
        drawn = torch.randperm(len(ids), generator=generator)[:tokens]
    else:
        drawn = torch.randint(len(ids), (tokens,), generator=generator)
    how = f"embeddings of {tokens} tokens drawn from the {len(ids)} most frequent ordinary ones (by id)"
    return table[torch.tensor(ids)[drawn]].float(), how


def from_random(table: Tensor, tokens: int, generator: torch.Generator) -> tuple[Tensor, str]:
    """Normal numbers [P, H] with the mean and the spread that the embedding table has in each dimension."""
    mean, spread = mean_and_spread(table)
    noise = torch.randn(tokens, table.shape[1], generator=generator)  # [P, H]
    return mean + spread * noise, "normal numbers with the embedding table's mean and spread in each dimension"


def from_prompt(
    path: str, width: int, tokens: int, load: Callable[[str], SoftPrompt] = load_prompt
) -> tuple[Tensor, str]:
    """The vectors of the prompt in the folder `path`, repeated or cut to P: [P, H]. Raises ConfigError (width)."""
    prompt = load(path)
    if prompt.kind != "embedding":
        raise ConfigError(
            f"the prompt {path} is of kind {prompt.kind}: only a deep prompt can start from it (kind=deep)"
        )
    if prompt.width != width:
        raise ConfigError(
            f"the prompt {path} has vectors of width {prompt.width}, the model's embeddings have {width}: start from a "
            f"prompt for this model{f' (that one is for {prompt.base_model})' if prompt.base_model else ''}"
        )
    fitted = "" if prompt.tokens == tokens else f", {'cut' if prompt.tokens > tokens else 'repeated'} to {tokens}"
    origin = f" for {prompt.base_model}" if prompt.base_model else ""
    return _fit(prompt.vectors, tokens), f"the {prompt.tokens} vectors of the prompt {path}{origin}{fitted}"


def instruction(template: Template | None) -> str:
    """A plain sentence that tells the task, made from its columns and label words."""
    if template is None:
        return "Read the text and write the answer."
    fields = _and([field.replace("_", " ") for field in template.fields]) or "text"
    if template.labels:
        return f"Classify the {fields} as {_or(template.words[:20])}."
    targets = _and([field.replace("_", " ") for field in template.target_fields]) or "answer"
    return f"Read the {fields} and write the {targets}."


def label_texts(template: Template | None) -> list[str]:
    """The label words as they stand in the answer, with the space before them if there is one. Raises ConfigError."""
    if template is None or not template.labels:
        raise ConfigError("init 'labels' needs a task with labels, this one has none: use 'text' or 'vocabulary'")
    before = template.target.partition("{" + str(template.label_field))[0]
    space = " " if before[-1:].isspace() else ""
    return [space + word for word in template.words]


def _fit(vectors: Tensor, tokens: int) -> Tensor:
    """The first P rows of `vectors` [N, H], which are repeated as often as it takes: [P, H]."""
    times = -(-tokens // vectors.shape[0])
    return vectors.repeat(times, 1)[:tokens].clone()


def _and(words: Sequence[str]) -> str:
    return " and ".join(words) if len(words) < 3 else ", ".join(words[:-1]) + " and " + words[-1]


def _or(words: Sequence[str]) -> str:
    return " or ".join(words) if len(words) < 3 else ", ".join(words[:-1]) + " or " + words[-1]
