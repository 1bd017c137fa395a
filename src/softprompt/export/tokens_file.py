"""A tokenizer that knows soft tokens: a token for each row, and one name that stands for all rows of a prompt.

How the name works: `tokenizer.json` lets a normalizer replace one text by another, and finds added tokens that are
declared `normalized` in what the normalizer gives. So the name is replaced by the texts of the rows, which are then
found as tokens. Nothing is changed for any other text.

transformers 5 builds the tokenizers of some models (Qwen2) with a normalizer of its own, whatever the file says. For
them a row's token is written for each row, or, in a chat, the name: the chat template then replaces it.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import BackboneError
from ..gguf_cache import PROBES
from .vocabulary import Entry

FILES = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")


def save_tokenizer(tokenizer: Any, entries: Sequence[Entry], folder: Path) -> tuple[Any, bool]:
    """Save `tokenizer` with the prompts' tokens into the model's `folder`, chat template included.

    Returns it as it is read from there, and whether it knows the prompts' names or only their rows. Raises
    BackboneError when it is not of the `tokenizers` library, or when what was saved reads any of our probes differently
    or the texts of the rows as anything else than them.
    """
    _check_kind(tokenizer)
    tokenizer.save_pretrained(str(folder))
    unchanged = _read(folder)
    for stale in FILES:  # a loader that preferred one of these would not know the new tokens
        (folder / stale).unlink(missing_ok=True)
    described = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(
        json.dumps(extended(described, entries), ensure_ascii=False), encoding="utf-8"
    )
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    # A class of a model's own may build the parts of its tokenizer anew; this one takes them from the file.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] |= {str(t.pop("id")): t for entry in entries for t in _added(entry)}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
    saved = _read(folder)
    named = all(_reads(saved, mark, _ids(entry, rows)) for entry in entries for mark, rows in entry.marks.items())
    if not named and isinstance(saved.chat_template, str):
        saved.chat_template = naming_chat_template(saved.chat_template, entries)
        (folder / "chat_template.jinja").write_text(saved.chat_template, encoding="utf-8")
        saved = _read(folder)
    _check(tokenizer, unchanged, saved, entries)
    if named and tokenizer.chat_template != saved.chat_template:
        raise BackboneError("the chat template does not survive being saved with the tokenizer")
    return saved, named


def in_memory(tokenizer: Any, entries: Sequence[Entry]) -> Any:
    """The same tokenizer without a folder."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    _check_kind(tokenizer)
    described = extended(json.loads(tokenizer.backend_tokenizer.to_str()), entries)
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)), **tokenizer.special_tokens_map
    )
    made.chat_template = tokenizer.chat_template
    return made


def naming_chat_template(template: str, entries: Sequence[Entry]) -> str:
    """A chat template that writes what `template` writes, with the rows of a prompt where its name stands."""
    changes = "".join(
        f" | replace({json.dumps(mark)}, {json.dumps(''.join(rows))})"
        for entry in entries
        for mark, rows in entry.marks.items()
    )
    return "{% set softprompt_text %}" + template + "{% endset %}{{ softprompt_text" + changes + " }}"


def extended(described: dict[str, Any], entries: Sequence[Entry]) -> dict[str, Any]:
    """The content of a `tokenizer.json` with the prompts in it."""
    marks = [(mark, rows) for entry in entries for mark, rows in entry.marks.items()]
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": mark}, "content": "".join(rows)} for mark, rows in marks
    ]
    own = described.get("normalizer")
    if own is not None:
        steps += own["normalizers"] if own["type"] == "Sequence" else [own]
        # Some put a space before every piece of text. Before a soft token it would be a token that was never trained.
        steps.append(
            {"type": "Replace", "pattern": {"Regex": rf"^[▁ ](?=<\|(?:{_any_row(entries)})\|>)"}, "content": ""}
        )
    tokens = [token for entry in entries for token in _added(entry)]
    return {
        **described,
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "added_tokens": [*described.get("added_tokens", []), *tokens],
    }


def _check_kind(tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise BackboneError(
            f"{type(tokenizer).__name__} is not a tokenizer with a tokenizer.json, which alone can be extended"
        )


def _any_row(entries: Sequence[Entry]) -> str:
    """A regular expression for what stands between `<|` and `|>` in the rows of all prompts."""
    names: dict[int, list[str]] = {}
    for entry in entries:
        names.setdefault(entry.prompt.tokens, []).append(re.escape(entry.name))
    return "|".join(f"(?:{'|'.join(some)}):(?:{'|'.join(map(str, range(size)))})" for size, some in names.items())


def _added(entry: Entry) -> list[dict[str, Any]]:
    fixed = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": True}
    return [{"id": number, "content": text, **fixed} for number, text in zip(entry.ids, entry.rows)]


def _read(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)


def _ids(entry: Entry, rows: Sequence[str]) -> list[int]:
    return [entry.first + entry.rows.index(row) for row in rows]


def _reads(tokenizer: Any, text: str, ids: list[int]) -> bool:
    return bool(tokenizer(text, add_special_tokens=False)["input_ids"] == ids)


def _check(given: Any, unchanged: Any, after: Any, entries: Sequence[Entry]) -> None:
    """given: the tokenizer of the backbone; unchanged: as transformers reads it from a folder, without our tokens."""
    for text in [*PROBES, " ".join(PROBES)]:
        if unchanged(text)["input_ids"] != after(text)["input_ids"]:
            raise BackboneError(f"the tokenizer with soft tokens would read {text!r} in another way: it cannot be used")
        if given(text)["input_ids"] != after(text)["input_ids"]:
            warnings.warn(
                f"transformers reads {text!r} in another way once this tokenizer was saved in a model's folder, with "
                "or without soft tokens: give token ids where that matters",
                stacklevel=2,
            )
    for entry in entries:
        if not _reads(after, "".join(entry.rows), list(entry.ids)):
            raise BackboneError(f"the tokenizer does not read {entry.rows[0]} as one token: it cannot hold soft tokens")
