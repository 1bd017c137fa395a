"""Pieces of text to token ids: alike at every seam, and what stands in the data is never read as a control token.

Two things a tokenizer does on its own would make a piece something else than it is in the middle of a text. Tokenizers
made with sentencepiece put a space before the first word of whatever they are given. And all of them read text such as
`<|im_end|>` as the token of that name, also when it comes from a row of data.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from .errors import DataError

Span = tuple[int, int]
ANCHORS = (":", "0", "a", ".", "\n")


class PieceTokenizer:
    """A transformers tokenizer, used a piece of text at a time. It is not changed."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._constant: dict[tuple[str, bool], list[int]] = {}

    def ids(self, text: str, data: Sequence[Span] = (), *, first: bool = False) -> list[int]:
        """Token ids of `text` without special tokens around it.

        first: nothing has been read before it; else it continues other text. data: the parts of `text` that come from a
        row and not from a template; the names of control tokens in them are read as plain text, as long as the
        tokenizer has other tokens for it. Raises DataError for text that is no valid Unicode.
        """
        if data:
            return self._safe_ids(text, data, first)
        if (text, first) not in self._constant:
            if len(self._constant) > 1000:
                self._constant.clear()
            self._constant[text, first] = self._encode(text, first)[0]
        return list(self._constant[text, first])

    def beginning(self, text: str, size: int) -> str:
        """The beginning of `text` of about `size` tokens, but always shorter than `text`, which is not empty."""
        encodings = self._read(text).encodings if size > 0 else None
        if encodings and size <= len(encodings[0].offsets):
            end = encodings[0].offsets[size - 1][1]
        else:
            end = len(text) * max(0, size) // max(1, len(self.ids(text, [(0, len(text))])))
        return text[: min(end, len(text) - 1)]

    @cached_property
    def lead(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text of its own accord, for instance BOS."""
        for probe in ANCHORS:
            bare = [int(i) for i in self.tokenizer(probe, add_special_tokens=False)["input_ids"]]
            full = [int(i) for i in self.tokenizer(probe)["input_ids"]]
            at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), None)
            if bare and at is not None:
                return full[:at]
        return []

    @cached_property
    def control(self) -> dict[int, str]:
        """Tokens that steer the model: the special ones, and others that the chat template writes."""
        template = getattr(self.tokenizer, "chat_template", None) or ""
        written = "".join(template.values()) if isinstance(template, dict) else str(template)
        added = {int(i): t for i, t in self.tokenizer.added_tokens_decoder.items()}
        chosen = {
            i: str(t.content)
            for i, t in added.items()
            if t.special or (t.content in written and not t.content.isspace())
        }
        named = zip(self.tokenizer.all_special_ids, self.tokenizer.all_special_tokens)
        return chosen | {int(i): str(content) for i, content in named}

    # --- seams --------------------------------------------------------------------------------------------------

    def _encode(self, text: str, first: bool) -> tuple[list[int], list[Span]]:
        """Ids of `text`, and where in it the control tokens among them stand."""
        if not first and self._prefixes:
            for anchor in ANCHORS:
                before = self._anchor_ids[anchor]
                ids, places = self._call(anchor + text)
                if before and ids[: len(before)] == before:
                    size = len(anchor)
                    return ids[len(before) :], [(max(0, a - size), b - size) for a, b in places if b > size]
        return self._call(text)

    @cached_property
    def _anchor_ids(self) -> dict[str, list[int]]:
        return {anchor: self._call(anchor)[0] for anchor in ANCHORS}

    @cached_property
    def _prefixes(self) -> bool:
        """Whether the tokenizer does something to the start of a text, as those made with sentencepiece do."""
        before, both = self._anchor_ids[":"], self._call(":x")[0]
        return both[: len(before)] == before and both[len(before) :] != self._call("x")[0]

    # --- control tokens -----------------------------------------------------------------------------------------

    def _safe_ids(self, text: str, data: Sequence[Span], first: bool) -> list[int]:
        ids, places = self._encode(text, first)
        cuts = [a + 1 for a, b in places if b - a > 1 and any(a < end and start < b for start, end in data)]
        if not cuts:
            return ids
        # Nothing but a seam inside of its name keeps a tokenizer from finding a control token; the rest stays whole.
        found: list[int] = []
        for start, end in zip([0, *cuts], [*cuts, len(text)]):
            inside = [(max(a, start) - start, min(b, end) - start) for a, b in data if a < end and start < b]
            found += self._safe_ids(text[start:end], inside, first and start == 0)
        return found

    def _call(self, text: str) -> tuple[list[int], list[Span]]:
        if not text:
            return [], []
        given = self._read(text)
        ids = [int(token) for token in given["input_ids"]]
        if self.control.keys().isdisjoint(ids):
            return ids, []
        if given.encodings:
            return ids, self._named(text, ids, given.encodings[0].offsets)
        return ids, [found.span() for found in self._names.finditer(text)]

    def _read(self, text: str) -> Any:
        try:
            return self.tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise DataError(f"not valid Unicode text (half of a surrogate pair): {text[:40]!r}") from error

    def _named(self, text: str, ids: list[int], offsets: Sequence[Span]) -> list[Span]:
        """Places of control tokens; the unknown token is one only where its name is written."""
        unknown = self.tokenizer.unk_token_id
        return [
            (a, b)
            for token, (a, b) in zip(ids, offsets)
            if token in self.control and (token != unknown or self.control[token] in text[a:b])
        ]

    @cached_property
    def _names(self) -> re.Pattern[str]:
        names = sorted(self.control.values(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)), re.IGNORECASE)
