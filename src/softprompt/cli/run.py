"""`softprompt run`: use a prompt on texts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, DataError, TemplateError
from .command import command
from .options import (
    CHAT,
    DEVICE,
    FORCE,
    FORMAT,
    INPUT,
    LABELS,
    MODEL,
    PRECISION,
    TARGET,
    THREADS,
    load_backbone,
    template_from,
)
from .output import Output

if TYPE_CHECKING:
    from ..backbone import Backbone
    from ..evaluation.generation import Sampling
    from ..prompt import SoftPrompt
    from ..templates import Template

CHUNK = 64  # rows of a file that are computed, and shown, together
TABLES = (".csv", ".tsv", ".tab", ".jsonl", ".ndjson", ".json", ".parquet")
SAMPLING_PANEL = "Generated text"


@command
def run(
    out: Output,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Prompt folder.")],
    text: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TEXT]",
            help="The text, or FIELD=VALUE for each field of the template; without it: standard input.",
        ),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            help="One row a line: plain text, or csv, tsv, jsonl, json, parquet with a column for each field; "
            "- reads lines from standard input."
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=SAMPLING_PANEL)] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from so much probability.", rich_help_panel=SAMPLING_PANEL)
    ] = 1.0,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Text that ends the answer; may be repeated.", rich_help_panel=SAMPLING_PANEL),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.", rich_help_panel=SAMPLING_PANEL)] = 0,
    max_new_tokens: Annotated[
        int, typer.Option(help="Longest answer in tokens.", rich_help_panel=SAMPLING_PANEL)
    ] = 256,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Divide by each label's prior.")] = False,
    format: FORMAT = None,
    input: INPUT = None,
    chat: CHAT = None,
    target: TARGET = None,
    labels: LABELS = None,
    model: MODEL = None,
    precision: PRECISION = "auto",
    device: DEVICE = None,
    threads: THREADS = None,
    force: FORCE = False,
) -> None:
    """Classify a text, or generate one, with a prompt.

    Classes come with probabilities; generated text is written as it comes. A prompt made by tune --ensemble classifies
    by the mean of its members' probabilities.
    """
    from ..config import as_typed
    from ..evaluation.generation import Sampling
    from ..prompt import SoftPrompt
    from ..training.ensemble import load_members

    sampling = Sampling(max_new_tokens, temperature, top_p, tuple(as_typed(each) for each in stop or ()), seed)
    loaded = SoftPrompt.load(prompt)
    template = template_from(input, chat, target, labels) or loaded.template
    if template is None:
        raise TemplateError("this prompt came without a template; give --input and --target (and --labels for classes)")
    rows = _rows(template, text or [], file, format)
    members = [] if template.labels is None else list(load_members(prompt).values())
    backbone = load_backbone(out, model, loaded, precision, device, threads)
    backbone.check(loaded, force=force)
    if template.labels is not None:
        if members:
            out.note(f"{len(members)} prompts vote")
        found = _classify(out, backbone, members or loaded, template, rows, calibrate, single=file is None)
    else:
        found = _generate(out, backbone, loaded, template, rows, sampling, single=file is None)
    out.document({"prompt": prompt, "model": backbone.name, "rows": found})


# --- what to read ----------------------------------------------------------------------------------------------------


def _rows(template: Template, texts: list[str], file: str | None, format: str | None) -> list[dict[str, Any]]:
    """The rows of fields that were given, in one of the ways to give them."""
    if file is not None:
        if texts:
            raise ConfigError("give either a text or --file, not both")
        return _file_rows(template, file, format)
    if texts:
        return [argument_row(template, texts)]
    if not template.fields:
        return [{}]
    if sys.stdin.isatty():
        raise ConfigError("there is no text: give it as an argument, on standard input, or with --file")
    field = _only_field(template, "standard input")
    text = sys.stdin.read().rstrip("\n")
    if not text.strip():
        raise DataError("standard input holds no text")
    return [{field: text}]


def argument_row(template: Template, texts: list[str]) -> dict[str, str]:
    """The row that TEXT, or FIELD=VALUE for each field, stands for. Raises ConfigError, DataError."""
    pairs = [text.partition("=") for text in texts]
    named = all(equals and key.strip() in template.fields for key, equals, _ in pairs)
    if not named:
        if len(texts) > 1 or len(template.fields) != 1:
            _only_field(template, "a text")
            raise ConfigError(f"expected one text, found {len(texts)}; put it in quotes")
        if not texts[0].strip():
            raise DataError("the text is empty")
        return {template.fields[0]: texts[0]}
    row = {key.strip(): value for key, _, value in pairs}
    missing = [name for name in template.fields if name not in row]
    if missing:
        raise ConfigError(f"the template also needs {', '.join(f'{name}=...' for name in missing)}")
    return row


def _only_field(template: Template, what: str) -> str:
    if len(template.fields) != 1:
        wanted = " ".join(f'{name}="..."' for name in template.fields) or "no text"
        raise ConfigError(f"{what} cannot fill the fields of this template; give {wanted}")
    return template.fields[0]


def _file_rows(template: Template, file: str, format: str | None) -> list[dict[str, Any]]:
    suffixes = [suffix for suffix in Path(file).suffixes if suffix not in (".gz", ".bz2", ".xz")]
    if format or (suffixes and suffixes[-1].lower() in TABLES):
        from ..tables import read_table

        rows = [{key: "" if value is None else value for key, value in row.items()} for row in read_table(file, format)]
    else:
        field = _only_field(template, "a file of plain lines")
        rows = [{field: line} for line in _lines(file) if line.strip()]
    if not rows:
        raise DataError(f"{file} holds no rows")
    return rows


def _lines(file: str) -> list[str]:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"no such file: {file}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text (byte {error.start}); convert it first") from error
    return text.splitlines()


# --- what to say -----------------------------------------------------------------------------------------------------


def _chunks(rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(rows), CHUNK):
        yield rows[start : start + CHUNK]


def _classify(
    out: Output,
    backbone: Backbone,
    prompt: SoftPrompt | list[SoftPrompt],
    template: Template,
    rows: list[dict[str, Any]],
    calibrate: bool,
    single: bool,
) -> list[dict[str, Any]]:
    from ..inference import classify
    from .scores import table

    found = []
    for chunk in _chunks(rows):
        answers = classify(backbone, prompt, chunk, template=template, calibrate=calibrate, force=True)
        for row, answer in zip(chunk, answers, strict=True):
            found.append({**_fields(template, row), "label": answer.label, "probabilities": answer.probabilities})
            if not single:
                text = " ".join(str(row.get(name, "")) for name in template.fields)
                out.write(f"{answer.label}\t{answer.probabilities[answer.label]:.3f}\t{' '.join(text.split())[:100]}\n")
    if single:
        shown = table("class", "probability")
        for label, probability in sorted(found[0]["probabilities"].items(), key=lambda pair: -pair[1]):
            shown.add_row(label, f"{probability:.3f}")
        out.show(shown)
    return found


def _generate(
    out: Output,
    backbone: Backbone,
    prompt: SoftPrompt,
    template: Template,
    rows: list[dict[str, Any]],
    sampling: Sampling,
    single: bool,
) -> list[dict[str, Any]]:
    from ..inference import generate, stream

    if single:
        pieces: list[str] = []
        for piece in stream(backbone, prompt, rows[0], sampling=sampling, template=template, force=True):
            # Answers commonly begin with the space between input and answer, which is not part of what they say.
            piece = piece if pieces else piece.lstrip()
            if piece:
                pieces.append(piece)
                out.write(piece)
        out.write("\n")
        return [{**_fields(template, rows[0]), "text": "".join(pieces)}]
    found = []
    for chunk in _chunks(rows):
        texts = generate(
            backbone,
            prompt,
            chunk,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop=sampling.stop,
            seed=sampling.seed,
            template=template,
            force=True,
        )
        for row, text in zip(chunk, texts, strict=True):
            found.append({**_fields(template, row), "text": text.strip()})
            out.write(text.strip().replace("\n", r"\n") + "\n")
    return found


def _fields(template: Template, row: dict[str, Any]) -> dict[str, Any]:
    return {"fields": {name: row[name] for name in template.fields if name in row}}
