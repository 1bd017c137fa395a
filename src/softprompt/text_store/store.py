"""What is kept of texts, and where: in memory up to a bound, and on disk where that was asked for or saves time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..attention import StateCache, States, one_at_a_time
from ..backbone import Backbone
from ..errors import BackboneError, OutputError
from ..machine import text_bytes
from . import folders
from .eight_bit import decode, encode, packed
from .folders import size_in_words
from .shards import Ids, Shards, owner_of

if TYPE_CHECKING:
    from ..training.config import TuneConfig

log = logging.getLogger(__name__)

SHARD_BYTES = 64 << 20
SLACK = 1.01  # for what files take besides
WORTH_SECONDS = 10.0  # auto: what takes less to compute is not written
SLOW = 0.5  # auto: a disk that takes more than this share of the time that computing takes is not written to

Say = Callable[[str], None]


def open_texts(backbone: Backbone, config: TuneConfig, say: Say = log.warning, tell: Say = log.info) -> TextStore:
    """Where the texts of a run are kept, as its config has it. Nothing is looked for on disk before it is needed.

    say: called with a line when the disk cannot be used, or what it holds cannot. tell: when something was written.
    """
    return TextStore(
        backbone,
        mode=config.text_cache,
        bits=config.text_cache_bits,
        gigabytes=config.text_cache_gb,
        say=say,
        tell=tell,
    )


class TextStore(StateCache):
    """A StateCache whose texts may also lie on disk, and in 8 bits.

    mode: off (texts are not kept at all), memory, disk (every text is written), or auto: written where computing them
    takes at least `WORTH_SECONDS` and at least twice as long as writing, as measured on the first shard. What lies on
    disk already is used by both. bits: 8 codes texts in memory and on disk alike, so that a run that finds them
    computes what the run that wrote them did. gigabytes: bound of the disk, for all models together.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        mode: str = "auto",
        bits: int | None = None,
        gigabytes: float | None = None,
        max_bytes: int | None = None,
        root: Path | None = None,
        say: Say = log.warning,
        tell: Say = log.info,
    ):
        super().__init__(text_bytes() if max_bytes is None else max_bytes)
        self.backbone, self.mode, self.bits, self.gigabytes, self.say = backbone, mode, bits, gigabytes, say
        self.root, self.tell = root, tell
        self._shards: Shards | None = None
        self._looked = False
        self._said: set[str] = set()
        # Of the texts that are being kept: whether they are written, must be (memory does not hold them), got lost.
        self._writing = self._must = self._lost = False
        self._planned = self._put = 0  # bytes
        self._begun = self._wrote = 0.0  # when, and seconds
        self._written = 0  # bytes
        self._pending: dict[Hashable, States] = {}
        self._pending_bytes = 0

    @property
    def shards(self) -> Shards | None:
        """The texts on disk, None where the disk is not used."""
        if not self._looked:
            self._looked = True
            self._shards = self._open() if self.mode in ("auto", "disk") else None
        return self._shards

    def _open(self) -> Shards | None:
        root = folders.texts_folder() if self.root is None else self.root
        try:
            return Shards(root, owner_of(self.backbone, self.bits), self.say, self.gigabytes)
        except OSError as error:
            why = error.strerror or error
            self.say(f"texts cannot be kept in {root} ({why}); set SOFTPROMPT_CACHE to another place")
        except BackboneError as error:
            log.info("texts are not kept on disk: %s", error)
        return None

    # --- a StateCache -----------------------------------------------------------------------------------------------

    def __contains__(self, key: Hashable) -> bool:
        if super().__contains__(key) or key in self._pending:
            return True
        text = _text(key)
        return text is not None and self.shards is not None and text in self.shards

    def get(self, key: Hashable) -> States | None:
        text = _text(key)
        if text is None:
            return super().get(key)
        with one_at_a_time:
            coded = super().get(key) or self._pending.get(key) or self._from_disk(*text)
        return decode(coded, self.backbone.dtype, self.backbone.device) if coded and self.bits else coded

    def _from_disk(self, start: int, ids: Ids) -> States | None:
        found = self.shards.get(start, ids) if self.shards is not None else None
        if found is None or self.bits:
            return found
        return States.of_packed(packed(found).to(self.backbone.device))

    def put(self, key: Hashable, states: States) -> None:
        if _text(key) is None:
            super().put(key, states)
            return
        with one_at_a_time:
            if self.mode == "off" or key in self:
                return
            coded = encode(states) if self.bits else states
            size = coded.nbytes()
            if size <= self.room:
                super().put(key, coded)
            if self._writing:
                self._pending[key] = coded
                self._pending_bytes += size
            elif not StateCache.__contains__(self, key):
                self._lost = True
            self._put += size

    # --- many texts at once -----------------------------------------------------------------------------------------

    def plan(self, tokens: int, sample: States) -> bool:
        coded = encode(sample) if self.bits else sample
        needed = int(SLACK * tokens * coded.nbytes() / sample.size)
        disk = self.shards.room if self.shards is not None else 0
        self._writing, self._lost = False, False
        if self.mode == "off":
            return False
        if needed > max(self.room, disk):
            places = f"into memory ({size_in_words(self.room)})" + (
                f" or on disk ({size_in_words(disk)})" if self.shards else ""
            )
            self._say_once(
                f"{size_in_words(needed)} of texts do not fit {places}: they are computed at each step{self._advice()}"
            )
            return False
        if self.mode == "disk" and needed > disk and self.shards is not None:
            sizes = f"{size_in_words(needed)} of texts do not fit on disk ({size_in_words(disk)})"
            self._say_once(f"{sizes}: kept in memory for this run only")
        self._writing, self._must = self.shards is not None and needed <= disk, needed > self.room
        self._planned, self._put = needed, 0
        self._begun, self._wrote = time.perf_counter(), 0.0
        return True

    def _advice(self) -> str:
        advice = [] if self.bits else ["text_cache_bits=8 makes them smaller"]
        advice += ["text_cache=auto uses the disk"] if self.mode == "memory" else []
        return "".join(f"; {each}" for each in advice)

    def end_batch(self) -> None:
        if self._pending_bytes >= SHARD_BYTES:
            self._write()

    def finish(self) -> bool:
        if self._pending:
            self._write()
        self._writing = False
        if self._written and self.shards is not None:
            self.tell(
                f"{size_in_words(self._written)} of texts kept on disk for later runs, in {self.shards.folder} "
                "(`softprompt cache clear` removes them, text_cache=memory writes none)"
            )
            self._written = 0
        return not self._lost

    def _write(self) -> None:
        """Write what has come together as a shard, or stop writing."""
        assert self.shards is not None
        spent = self._computed()
        if not (self.mode == "disk" or self._must or spent * self._planned >= WORTH_SECONDS * self._put):
            self._writing = False
        else:
            begun = time.perf_counter()
            try:
                self.shards.write([_entry(key, coded) for key, coded in self._pending.items()])
                self._written += self._pending_bytes
            except OutputError as error:
                self._stop(f"{error}; going on without it")
                self._lost = not all(StateCache.__contains__(self, key) for key in self._pending)
            took = time.perf_counter() - begun
            if self.mode == "auto" and self._writing and not self._wrote and took > SLOW * spent:
                self._stop(f"writing to {self.shards.folder} took {took:.1f} s, computing {spent:.1f} s; given up")
            self._wrote += took
        self._pending, self._pending_bytes = {}, 0

    def _computed(self) -> float:
        """Seconds spent on computing since the plan was made."""
        if self.backbone.device.type == "cuda":
            torch.cuda.synchronize(self.backbone.device)
        return time.perf_counter() - self._begun - self._wrote

    def _stop(self, why: str) -> None:
        self._say_once(f"texts are not kept on disk: {why}")
        self._writing = False

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.say(text)


def _text(key: Hashable) -> tuple[int, Ids] | None:
    """The first token and the ids of a text's key in computation.py; None for other states and for no text."""
    if isinstance(key, tuple) and key[0] == "text" and key[1] < len(key[2]):
        return key[1], key[2]
    return None


def _entry(key: Hashable, coded: States) -> tuple[int, Ids, list[torch.Tensor]]:
    text = _text(key)
    assert text is not None
    return (*text, [*coded.keys, *coded.values] if coded.keys[0].dtype == torch.int8 else [packed(coded)])
