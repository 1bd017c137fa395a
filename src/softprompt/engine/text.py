"""Text from tokens as they come, in time that does not grow with the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..evaluation.generation import TextStream

WINDOW = 24  # tokens that are decoded again for each new one


class GrowingText(TextStream):
    """A TextStream that decodes only its last tokens; what has become certain is kept as text."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        super().__init__(tokenizer, stop)
        self._settled = ""  # text of the tokens before `_from`
        self._from = 0

    def _decode(self) -> str:
        if len(self.tokens) - self._from > 2 * WINDOW:
            self._settle()
        return self._settled + self._text(self._from, len(self.tokens))

    def _settle(self) -> None:
        # How a token is written can depend on the one before it, so the kept text is what the tokens give together
        # less what the window gives alone, and only where that is its ending.
        middle = len(self.tokens) - WINDOW
        whole, window = self._text(self._from, len(self.tokens)), self._text(middle, len(self.tokens))
        if whole.endswith(window) and "�" not in window[:1]:
            self._settled += whole[: len(whole) - len(window)]
            self._from = middle

    def _text(self, begin: int, end: int) -> str:
        decoded: str = self.tokenizer.decode(
            self.tokens[begin:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return decoded
