"""What can be wrong with a config beyond single values: files, template, columns, folders. No torch, no model."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import DataError, OutputError, TemplateError
from .tables import read_table
from .templates import Template

INITIALISERS = ("text", "examples", "labels", "vocabulary", "random")
PRECISIONS = ("auto", "float32", "bfloat16", "float16", "float64")
CHEAP_BYTES = 32 << 20  # a table up to this size is read to check its columns
Values = Mapping[str, Any]


def find_problems(values: Values, run_given: bool) -> list[str]:
    """One line for each mistake. values: every field of RunConfig that is sound by itself; the others are missing."""
    template, problems = _template(values)
    for check in (_model, _files, _initialiser, _lengths, _extras):
        problems += check(values)
    problems += _kind(values, template)
    problems += _columns(values, template)
    problems += _prompt_folder(values)
    if values.get("resume") is None and run_given:
        problems += _run_folder(values)
    return problems


def _template(values: Values) -> tuple[Template | None, list[str]]:
    if values.get("input") is None and values.get("chat") is None:
        return None, ["input: missing; give the text that the model reads, as '{soft}Review: {text}', or chat turns"]
    if values.get("target") is None:
        return None, []  # told already
    try:
        template = Template.make(values.get("input"), values["target"], values.get("chat"), values.get("labels"))
        _ = template.placement  # parses everything, which finds chat turns without {soft}
    except TemplateError as error:
        return None, [f"template: {error}"]
    return template, []


def _model(values: Values) -> Iterator[str]:
    model = values.get("model")
    if (
        model
        and (model.endswith(".gguf") or model.startswith((".", "/", "~")))
        and not Path(model).expanduser().exists()
    ):
        yield f"model: no file or folder {model}"
    yield from device_problems(values.get("device"))


def device_problems(device: str | None) -> list[str]:
    """What is wrong with the name of a device."""
    if device is None or re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        return []
    return [f"device: expected cpu, cuda, cuda:NUMBER or mps, found '{device}'"]


def precision_problems(precision: str) -> list[str]:
    """What is wrong with the name of a precision."""
    return [] if precision in PRECISIONS else [f"precision: expected {', '.join(PRECISIONS)}, found '{precision}'"]


def _files(values: Values) -> Iterator[str]:
    for key in ("train", "validation", "test"):
        source = values.get(key)
        if source is None or Path(source).exists() or values.get("format") == "hub":
            continue
        if Path(source).suffix or source.startswith((".", "/", "~")):
            yield f"{key}: no file {source}{_near(Path(source))}"


def _near(path: Path) -> str:
    """A hint at a file of a similar name."""
    folder = path.parent
    if not folder.is_dir():
        return f"; there is no folder {folder} either"
    near = get_close_matches(path.name, os.listdir(folder), n=1)
    return f"; did you mean {folder / near[0]}?" if near else ""


def _columns(values: Values, template: Template | None) -> Iterator[str]:
    """Columns that the template and the settings need and a file does not have, for tables that are read quickly."""
    needed: dict[str, str] = {}
    if template is not None:
        needed |= dict.fromkeys((*template.fields, *template.target_fields), "the template")
    needed |= {values[key]: key for key in ("group_by", "references") if values.get(key)}
    for key in ("train", "validation", "test"):
        columns = _cheap_columns(values.get(key), values.get("format"))
        wanted = {name: by for name, by in needed.items() if key == "train" or by != "group_by"}
        for name, by in wanted.items() if columns else ():
            if name not in columns:
                near = get_close_matches(name, columns, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                yield f"{key}: no column '{name}' (for {by}) in {values[key]}; it has {', '.join(columns)}{hint}"


def _cheap_columns(source: str | None, kind: str | None) -> list[str]:
    """The columns of a table; none if it is large, elsewhere or broken, which is told when it is read in earnest."""
    if source is None or not Path(source).is_file() or Path(source).stat().st_size > CHEAP_BYTES:
        return []
    try:
        return [str(name) for name in read_table(source, kind)[0]]
    except DataError:
        return []


def _initialiser(values: Values) -> Iterator[str]:
    init = values.get("init") or "text"
    kind, _, path = init.partition(":")
    if kind == "prompt":
        if not path:
            yield "init: 'prompt:' needs the folder of a prompt, as prompt:prompts/sentiment"
        elif not Path(path).is_dir():
            yield f"init: no prompt folder {path}"
    elif kind == "auto":
        if not Path(path).is_dir() or not path:
            yield f"init: no folder {path or 'named'} of prompts to choose from; as auto:prompts"
    elif init not in INITIALISERS:
        near = get_close_matches(init, INITIALISERS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        yield f"init: unknown initialiser '{init}'; expected {', '.join(INITIALISERS)} or prompt:PATH{hint}"
    if values.get("init_text") is not None and init != "text" and kind != "auto":
        yield f"init_text: is only used with init=text, found init={init}"
    if init == "labels" and values.get("labels") is None:
        yield "init: labels needs labels; a task of free text has none"


def _kind(values: Values, template: Template | None) -> Iterator[str]:
    if values.get("kind") != "deep":
        return
    if values.get("reparametrisation") == "residual":
        yield "reparametrisation: residual is for embedding prompts; leave it out with kind=deep"
    if template is not None and template.soft_count > 1:
        yield f"kind: a deep prompt stands in one place, the template has {template.soft_count} {{soft}} markers"


def _lengths(values: Values) -> Iterator[str]:
    tokens, longest = values.get("tokens"), values.get("max_tokens")
    if tokens and longest and tokens >= longest:
        yield f"tokens: {tokens} soft tokens leave no room for text in max_tokens={longest}"


def _extras(values: Values) -> Iterator[str]:
    if values.get("tensorboard") and find_spec("tensorboard") is None:
        yield "tensorboard: not installed; pip install tensorboard, or leave it off"
    yield from _several(values)
    if values.get("auto") and values.get("validation") is None and not values.get("shares", (1, 1, 1))[1]:
        yield "auto: compares by validation rows; give a file or a share of the rows for validation"


def _several(values: Values) -> Iterator[str]:
    """Cross-validation and ensembles."""
    folds = values.get("folds")
    if folds == 1:
        yield "folds: one fold leaves no rows to tune on; give at least 2, or 0 for none"
    if folds and values.get("validation") is not None:
        yield "folds: are for tuning without validation rows; leave out folds or validation"
    if folds and values.get("auto"):
        yield "folds: auto compares by validation rows, folds are for tuning without; leave out one of the two"
    if values.get("ensemble") and values.get("target") is not None and values.get("labels") is None:
        yield "ensemble: prompts vote on labels, and a task of free text has none; leave out ensemble"


def _prompt_folder(values: Values) -> Iterator[str]:
    folder = Path(values["out"])
    if values.get("overwrite") and values.get("new_version"):
        yield "overwrite: replaces the old prompt, new_version keeps it; give one of the two"
    if folder.is_dir() and any(folder.iterdir()):
        from .fileformat import check_output  # loads torch, so only where there is something to look at

        try:
            check_output(folder, bool(values.get("overwrite")))
        except OutputError as error:
            hint = " (--overwrite, or --new-version to keep both)" if "overwritten" in str(error) else ""
            yield f"out: {error}{hint}"
    elif reason := _why_not_writable(folder):
        yield f"out: {reason}"


def _run_folder(values: Values) -> Iterator[str]:
    folder = Path(values["run"])
    if folder.is_dir() and (folder / "run.json").exists():
        yield f"run: {folder} holds a run already; go on with it (--resume {folder}) or choose another run folder"
    elif folder.is_dir() and any(folder.iterdir()):
        yield f"run: {folder} holds something that is not a run; choose another run folder"
    elif reason := _why_not_writable(folder):
        yield f"run: {reason}"


def _why_not_writable(folder: Path) -> str:
    """Why a folder cannot be made or written, or ''."""
    if os.path.lexists(folder) and not folder.is_dir():
        return f"{folder} is a file; choose another folder"
    above = next(path for path in (folder, *folder.parents, Path.cwd()) if os.path.lexists(path))
    if not above.is_dir():
        return f"cannot make {folder}: {above} is a file"
    return "" if os.access(above, os.W_OK | os.X_OK) else f"cannot write to {above}; choose another folder"
