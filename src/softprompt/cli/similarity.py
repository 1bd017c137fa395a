"""`softprompt similarity`: how alike the prompts of a library are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, SoftPromptError
from .command import command
from .looking import LIMIT, stages
from .options import DEVICE, FORMAT, MODEL, PRECISION, THREADS, load_backbone
from .output import Output

if TYPE_CHECKING:
    from ..backbone import Backbone
    from ..data import Split
    from ..prompt import SoftPrompt


@command
def similarity(
    out: Output,
    folder: Annotated[Path, typer.Argument(help="Folder of prompts.")] = Path("prompts"),
    of: Annotated[str | None, typer.Option(help="Only the prompts nearest to this one.")] = None,
    measure: Annotated[str, typer.Option(help="What is shown: matched, pooled, tokens or words.")] = "matched",
    loss: Annotated[
        bool, typer.Option("--loss", help="Score each prompt on each task's rows; this runs the model.")
    ] = False,
    data: Annotated[
        list[str] | None,
        typer.Option(help="NAME=TABLE, the rows of a prompt's task; default: the files it was tuned with."),
    ] = None,
    rows: LIMIT = 100,
    report: Annotated[Path | None, typer.Option(help="Write all matrices as heat maps to this HTML file.")] = None,
    pictures: Annotated[Path | None, typer.Option(help="Write them as SVG files into this folder.")] = None,
    no_model: Annotated[bool, typer.Option("--no-model", help="Without the model: no overlap of words.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the rows.")] = 0,
    format: FORMAT = None,
    model: MODEL = None,
    precision: PRECISION = "auto",
    device: DEVICE = None,
    threads: THREADS = None,
) -> None:
    """Compare all prompts in FOLDER: vectors, nearest words, and with --loss each prompt on each task."""
    from ..inspection.similarity import MEASURES
    from ..inspection.similarity import similarity as compare

    if measure not in MEASURES:
        raise ConfigError(f"measure: expected {', '.join(MEASURES)}, found '{measure}'")
    if not folder.is_dir():
        raise ConfigError(f"no folder {folder}; expected a folder of prompts")
    prompts, unreadable = _load(folder)
    if not prompts:
        raise ConfigError(f"no prompts in {folder} that can be read")
    if of is not None and of not in prompts:
        raise ConfigError(f"of: no prompt '{of}' in {folder}; there are {', '.join(prompts)}")
    splits = _splits(out, prompts, data or [], rows, seed, format) if loss else None
    backbone = None
    if not no_model or loss:
        backbone = _model(out, prompts, model, precision, device, threads, needed=loss or measure == "words")
    if measure == "words" and backbone is None:
        raise ConfigError("measure: the overlap of words needs the model; leave out --no-model")
    with stages(out) as stage:
        found = compare(
            prompts, backbone, data=splits, progress=lambda done, total: stage("each prompt on each task", done, total)
        )
    found.left_out[:0] = unreadable
    _show(out, found, of, measure)
    if report is not None or pictures is not None:
        _write(out, report, pictures, found, prompts, backbone)
    nearest = {"nearest": found.nearest(of, measure)} if of else {}
    out.document({**found.to_dict(), **nearest, "report": report and str(report)})


def _load(folder: Path) -> tuple[dict[str, SoftPrompt], list[tuple[str, str]]]:
    from ..library import list_prompts
    from ..prompt import SoftPrompt

    prompts, wrong = {}, []
    for each in list_prompts(folder):
        try:
            prompts[each["name"]] = SoftPrompt.load(each["path"])
        except SoftPromptError as error:
            wrong.append((each["name"], str(error)))
    return prompts, wrong


def _model(
    out: Output,
    prompts: dict[str, SoftPrompt],
    model: str | None,
    precision: str,
    device: str | None,
    threads: int | None,
    needed: bool,
) -> Backbone | None:
    named = next((prompt for prompt in prompts.values() if prompt.base_model), None)
    try:
        return load_backbone(out, model, named, precision, device, threads)
    except SoftPromptError as error:
        if needed or model is not None:
            raise
        out.warn(f"without the overlap of words: {error}")
        return None


def _splits(
    out: Output, prompts: dict[str, SoftPrompt], given: list[str], rows: int, seed: int, format: str | None
) -> dict[str, Split]:
    """Rows by the prompt's name; of the files that prompts were tuned with, those that are there."""
    from .evaluate import _recorded
    from .looking import rows_of

    files: dict[str, str] = {}
    for pair in given:
        name, _, path = pair.partition("=")
        if name not in prompts or not path:
            raise ConfigError(f"data: expected NAME=TABLE with one of {', '.join(prompts)}, found '{pair}'")
        files[name] = path
    if not given:
        for name, prompt in prompts.items():
            recorded = _recorded(prompt).get("files") or {}
            known = recorded.get("test") or recorded.get("train")
            if isinstance(known, str) and Path(known).is_file():
                files[name] = known
            else:
                out.note(f"{name}: no rows; its files are not here, give --data {name}=TABLE")
    if not files:
        raise ConfigError("data: the files that the prompts were tuned with are not here; give --data NAME=TABLE")
    return {name: rows_of(out, path, None, prompts[name], format).take(rows, seed=seed) for name, path in files.items()}


def _show(out: Output, found: Any, of: str | None, measure: str) -> None:
    from .scores import table

    if of is not None:
        shown = table("prompt", measure)
        for name, value in found.nearest(of, measure):
            shown.add_row(name, f"{value:.3f}")
        out.show(f"the prompts most like {of}", shown)
    else:
        out.show(f"{measure}: similarity of each pair")
        out.show(_matrix(found.names, found.names, found.matrices[measure], found.order))
        if found.loss is not None:
            out.show("loss of each prompt (down) on each task's rows (across)")
            out.show(_matrix(found.names, found.names, found.loss, found.order))
        if found.accuracy is not None:
            out.show("accuracy of each prompt (down) on each task's rows (across)")
            out.show(_matrix(found.names, found.names, found.accuracy, found.order))
    for name, reason in found.left_out:
        out.show(f"{name}: {reason}")


def _matrix(rows: list[str], columns: list[str], values: Any, order: list[int]) -> Any:
    from .scores import table

    shown = table("", *(columns[i] for i in order))
    for i in order:
        shown.add_row(rows[i], *("-" if values[i, j] != values[i, j] else f"{values[i, j]:.3f}" for j in order))
    return shown


def _write(
    out: Output,
    path: Path | None,
    folder: Path | None,
    found: Any,
    prompts: dict[str, SoftPrompt],
    backbone: Backbone | None,
) -> None:
    from ..inspection.inspect_page import write_inspections, write_pictures
    from ..inspection.projection import project

    width = backbone.width if backbone is not None else next(iter(prompts.values())).width
    flat = {n: p.vectors for n, p in prompts.items() if p.kind == "embedding" and p.width == width}
    table = backbone.embedding_table() if backbone is not None else None
    together = project(flat, table, backbone.tokenizer if backbone is not None else None) if len(flat) > 1 else None
    if path is not None:
        write_inspections(path, [], together=together, similarity=found, title="Prompts compared")
        out.show(f"report {path}")
    if folder is not None:
        written = write_pictures(folder, together=together, similarity=found)
        out.show(f"{len(written)} pictures in {folder}")
