"""`softprompt cache`: the texts that are kept on disk, and how to be rid of them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError, OutputError
from .command import command
from .output import Output

if TYPE_CHECKING:
    from ..text_store.folders import Kept

ACTIONS = ("show", "clear")


@command
def cache(
    out: Output,
    action: Annotated[str, typer.Argument(metavar="[show|clear]", help="Show what is kept, or remove it.")] = "show",
    model: Annotated[
        str | None, typer.Option(help="Only what is kept of this model: its name, fingerprint or folder.")
    ] = None,
) -> None:
    """The states of texts that are kept on disk for later runs, model by model, or their removal.

    Where they lie and what they are for: docs/text-cache.md. Clearing loses nothing but time.
    """
    from ..text_store import folders

    if action not in ACTIONS:
        raise ConfigError(f"cache: expected show or clear, found {action!r}")
    root = folders.texts_folder()
    kept = folders.kept_models(root)
    if model is not None:
        kept = _of_model(kept, model)
    if action == "clear":
        _clear(out, kept)
        return
    total = sum(each.bytes for each in kept)
    most = _bound()
    _show(out, kept)
    about = "" if most is None else f"; without text_cache_gb at most {folders.size_in_words(most)} of all models"
    out.show(f"{root}: {folders.size_in_words(total)}{about}" if kept else f"no texts are kept in {root}")
    out.document({"folder": str(root), "bytes": total, "most": most, "models": [each.to_dict() for each in kept]})


def _bound() -> int | None:
    from ..text_store import folders

    try:
        return folders.bound(folders.texts_folder())
    except OSError:
        return None


def _show(out: Output, kept: list[Kept]) -> None:
    from ..text_store import folders
    from .scores import table

    shown = table("model", "precision", "device", "texts", "size", "last used", "fingerprint")
    for each in kept:
        precision = f"{each.precision}, 8 bits" if each.bits else each.precision
        used = "" if each.used is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(each.used))
        shown.add_row(
            each.model,
            precision,
            each.device,
            f"{each.texts:,}",
            folders.size_in_words(each.bytes),
            used,
            each.fingerprint,
        )
    if kept:
        out.show(shown)
    for each in kept:
        if each.problem:
            out.show(f"{each.folder}: {each.problem}")


def _of_model(kept: list[Kept], name: str) -> list[Kept]:
    """Those of one model, by whatever it may be called."""
    from ..weights import ALIASES

    names = {name, ALIASES[name].hub_id} if name in ALIASES else {name}
    found = [each for each in kept if names & {each.model, each.fingerprint, each.folder.name}]
    if not found:
        others = ", ".join(sorted({each.model for each in kept})) or "nothing"
        raise ConfigError(f"model: no texts of {name} are kept; there is {others}")
    return found


def _clear(out: Output, kept: list[Kept]) -> None:
    from ..text_store import folders

    try:
        left = folders.clear(kept)
    except OSError as error:
        raise OutputError(f"cannot remove {error.filename}: {error.strerror or error}") from error
    texts, freed = sum(each.texts for each in kept), sum(each.bytes for each in kept)
    out.show(f"removed {texts:,} texts, {folders.size_in_words(freed)}" if kept else "there was nothing to remove")
    for folder in left:
        out.warn(f"{folder} holds files that are not the cache's; they were left")
    removed = [str(each.folder) for each in kept if each.folder not in left]
    out.document({"removed": removed, "texts": texts, "bytes": freed})
