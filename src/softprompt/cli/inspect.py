"""`softprompt inspect`: what a prompt has learned, as far as it can be seen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError, SoftPromptError
from .command import command
from .inspect_show import show
from .looking import DATA, LIMIT, SPLIT, load_prompts, rows_of, stages
from .options import DEVICE, FORMAT, MODEL, PRECISION, THREADS, load_backbone
from .output import Output

if TYPE_CHECKING:
    from ..backbone import Backbone
    from ..inspection.inspecting import Inspection
    from ..inspection.projection import Projection
    from ..inspection.similarity import Similarity
    from ..prompt import SoftPrompt

CHANGES = ("left_out", "first", "shuffled")


@command
def inspect(
    out: Output,
    prompts: Annotated[list[str], typer.Argument(help="Prompt folders, or PEFT adapter folders.")],
    report: Annotated[Path | None, typer.Option(help="Write all of it with figures to this HTML file.")] = None,
    pictures: Annotated[Path | None, typer.Option(help="Write its figures as SVG files into this folder.")] = None,
    data: DATA = None,
    split: SPLIT = None,
    rows: LIMIT = 100,
    run: Annotated[Path | None, typer.Option(help="Run folder of the prompt (of one): gradients and start.")] = None,
    neighbours: Annotated[int, typer.Option(min=1, max=50, help="Nearest words a token.")] = 5,
    changes: Annotated[
        str, typer.Option(help="What to score with --data: left_out, first, shuffled, or none.")
    ] = ",".join(CHANGES),
    attention: Annotated[bool, typer.Option(help="With --data: where the answer looks.")] = True,
    no_model: Annotated[
        bool, typer.Option("--no-model", help="Without the model: norms, movement, what is recorded.")
    ] = False,
    max_tokens: Annotated[int | None, typer.Option(min=8, help="Longest row in tokens.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the rows and orders by chance.")] = 0,
    format: FORMAT = None,
    model: MODEL = None,
    precision: PRECISION = "auto",
    device: DEVICE = None,
    threads: THREADS = None,
) -> None:
    """Look into prompts: nearest words, norms, movement; with --data how much each token matters.

    Without --data only the model's embedding table is used, which takes seconds. What is missing is left out and told.
    """
    wanted = _changes(changes)
    if run is not None and len(prompts) > 1:
        raise ConfigError("run: belongs to one prompt; inspect that one alone")
    if run is not None and not run.is_dir():
        raise ConfigError(f"run: no folder {run}; expected the run folder of the prompt")
    loaded = load_prompts(prompts)
    samples = {name: rows_of(out, data, split, one, format) for name, one in loaded.items()} if data is not None else {}
    backbone, why = None, "not asked for"
    if not no_model:
        backbone, why = _model(out, loaded, model, precision, device, threads, needed=data is not None)
    from ..inspection.inspecting import inspect as look

    found = []
    for name, prompt in loaded.items():
        with stages(out) as stage:
            each = look(
                prompt,
                backbone,
                samples.get(name),
                run=run,
                name=name,
                neighbours=neighbours,
                rows=rows,
                attention=attention,
                changes=wanted,
                max_tokens=max_tokens,
                seed=seed,
                progress=stage,
            )
        if backbone is None:
            each.notes = [n.replace("the model was not given", f"no model ({why})") for n in each.notes]
        found.append(each)
        show(out, each)
    together, alike = _compared(found, backbone) if len(found) > 1 else (None, None)
    _write(out, report, pictures, found, together, alike)
    documents = [each.to_dict() for each in found]
    place = {"report": report and str(report)}
    pairs = {"together": together and together.to_dict(), "similarity": alike and alike.to_dict()}
    out.document({**documents[0], **place} if len(documents) == 1 else {"prompts": documents, **pairs, **place})


def _changes(text: str) -> tuple[str, ...]:
    given = tuple(part.strip() for part in text.split(",") if part.strip())
    if given == ("none",):
        return ()
    wrong = [part for part in given if part not in CHANGES]
    if wrong:
        raise ConfigError(f"changes: expected {', '.join(CHANGES)} or none, found '{wrong[0]}'")
    return given


def _model(
    out: Output,
    loaded: dict[str, SoftPrompt],
    model: str | None,
    precision: str,
    device: str | None,
    threads: int | None,
    needed: bool,
) -> tuple[Backbone | None, str]:
    """The model, or why there is none: a prompt can be looked at without, unless a model or data were asked for."""
    named = next((prompt for prompt in loaded.values() if prompt.base_model), None)
    try:
        return load_backbone(out, model, named, precision, device, threads), ""
    except SoftPromptError as error:
        if model is not None or needed:
            raise
        out.warn(f"looking without the model: {error}")
        return None, str(error)


def _compared(found: list[Inspection], backbone: Backbone | None) -> tuple[Projection | None, Similarity]:
    """Several prompts in one projection, if they are of one width, and how alike they are."""
    from ..inspection.projection import project
    from ..inspection.similarity import similarity

    flat = {each.name: each.prompt.vectors for each in found if each.prompt.kind == "embedding"}
    widths = {vectors.shape[1] for vectors in flat.values()}
    together = None
    if len(flat) > 1 and len(widths) == 1:
        fits = backbone is not None and backbone.width in widths
        table = backbone.embedding_table() if backbone is not None and fits else None
        together = project(flat, table, backbone.tokenizer if backbone is not None else None)
    return together, similarity({each.name: each.prompt for each in found}, backbone)


def _write(
    out: Output,
    path: Path | None,
    folder: Path | None,
    found: list[Inspection],
    together: Projection | None,
    alike: Similarity | None,
) -> None:
    from ..inspection.inspect_page import write_inspections, write_pictures

    if path is not None:
        write_inspections(path, found, together=together, similarity=alike)
        out.show(f"report {path}")
    if folder is not None:
        written = write_pictures(folder, found, together=together, similarity=alike)
        out.show(f"{len(written)} pictures in {folder}")
