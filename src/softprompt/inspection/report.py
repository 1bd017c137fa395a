"""The report of a run: one HTML file that needs nothing else, for people who do not know the code.

Whatever is missing (no validation, no scores, a prompt from elsewhere) is left out, and the report says so at its end.
Texts of the data are escaped; the page holds no script, and its policy forbids the browser to run or fetch anything.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import __version__
from ..atomic import write_atomic
from ..prompt import SoftPrompt
from . import plots, sections
from .history import Event, at_steps
from .nearest import movement

MOST_EXAMPLES = 20


def write_report(
    path: str | Path,
    *,
    title: str,
    config: Mapping[str, Any],
    events: Sequence[Event],
    prompt: SoftPrompt,
    table: Tensor | None = None,
    tokenizer: Any = None,
    initial: Tensor | None = None,
    scores: Mapping[str, Any] | None = None,
    mistakes: Sequence[Mapping[str, Any]] = (),
    examples: Sequence[Mapping[str, Any]] = (),
    baselines: Sequence[Mapping[str, Any]] = (),
    versions: Mapping[str, Any] | None = None,
) -> Path:
    """Write the report of a run as one self-contained HTML file and return its path.

    events: the lines of metrics.jsonl. table: the vocabulary's embeddings [V, H] after the model's own scaling.
    initial: the vectors [P, H] before tuning. scores: ClassificationScores or TextScores as a dict; its "split", if
    there, names the rows that were scored. mistakes: {text, true, predicted, probability}. examples: {text, predicted,
    references}. baselines: {name, score, low, high} in the headline's metric. versions: by default those that the
    prompt's provenance tells. The same arguments give the same bytes. Raises OutputError when it cannot be written.
    """
    path = Path(path)
    words = sections.near_words(prompt, table, tokenizer, initial)
    steps, checks = at_steps(events, "step"), at_steps(events, "validation")
    told = versions or prompt.provenance.get("versions")
    page: dict[str, Any] = {
        "title": title,
        "facts": sections.facts(prompt, steps, events),
        "result": sections.result(scores, baselines),
        "warnings": sections.warnings_of(events, scores),
        "curves": sections.curves(steps, checks, scores or {}),
        "token_figures": sections.token_figures(steps, prompt, words, initial),
        "classes": sections.class_tables(scores),
        "mistakes": sections.surest(mistakes),
        "mistakes_total": len(mistakes),
        "examples": [sections.example(row) for row in examples[:MOST_EXAMPLES]],
        "words": words,
        "template": sections.template_texts(prompt),
        "config": sections.flat(config),
        "versions": sections.flat(told) if isinstance(told, Mapping) else [],
        "writer": f"softprompt {__version__}, Python {platform.python_version()}",
    }
    page["missing"] = _missing(page, checks, bool(movement(prompt.vectors, initial)))
    page["contents"] = _contents(page)
    write_atomic(path, render(page).encode("utf-8", "replace"))
    return path


def _contents(page: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """(section, whether it is there) in the order of the page."""
    return [
        ("Result", bool(page["result"])),
        ("Warnings", bool(page["warnings"])),
        ("Classes", bool(page["classes"])),
        ("Mistakes", bool(page["mistakes"])),
        ("Examples", bool(page["examples"])),
        ("Tuning", bool(page["curves"])),
        ("Soft tokens", bool(page["token_figures"])),
        ("Nearest words", bool(page["words"].rows)),
        ("Settings", bool(page["template"] or page["config"] or page["versions"])),
    ]


def render(page: Mapping[str, Any], template: str = "report.html.j2") -> str:
    """Fill a template of this folder; everything but our own figures is escaped."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    def read(name: str) -> str:
        return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")

    options: dict[str, Any] = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=FunctionLoader(read), undefined=StrictUndefined, **options)
    environment.filters["svg"] = Markup
    environment.filters["seen"] = _seen
    return environment.get_template(template).render(page)


def _seen(text: str) -> str:
    """A token's text with what cannot be seen made visible: spaces as an open box, control characters as escapes."""
    return plots.shorten(text.replace(" ", "\u2423"), 40)


def _missing(page: Mapping[str, Any], checks: Sequence[Event], moved: bool) -> list[str]:
    """What a full report would also hold, and why it is not here."""
    parts = [
        ("scores (nothing was evaluated)", page["result"]),
        ("curves (the run's events are not there)", page["curves"]),
        ("validation (none was measured)", checks),
        ("movement (the vectors before tuning are not known)", moved),
        ("nearest words (the model's vocabulary was not given)", page["words"].rows),
        ("the text around the prompt (it came without a template)", page["template"]),
        ("configuration (how the prompt was made is not known)", page["config"]),
        ("versions (none were recorded)", page["versions"]),
    ]
    return [name for name, there in parts if not there]
