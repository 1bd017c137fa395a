"""Options that several commands share, and what they make of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config_checks import device_problems, precision_problems
from ..errors import ConfigError, TemplateError

if TYPE_CHECKING:
    from ..backbone import Backbone
    from ..prompt import SoftPrompt
    from ..templates import Template
    from .output import Output

MODEL_PANEL, TEMPLATE_PANEL = "Model", "Template"
MODEL = Annotated[
    str | None,
    typer.Option(help="Hub id, folder, .gguf file or alias; default: the prompt's own.", rich_help_panel=MODEL_PANEL),
]
PRECISION = Annotated[
    str, typer.Option(help="auto, float32, bfloat16, float16 or float64.", rich_help_panel=MODEL_PANEL)
]
DEVICE = Annotated[
    str | None, typer.Option(help="cpu, cuda, mps; default: what there is.", rich_help_panel=MODEL_PANEL)
]
THREADS = Annotated[int | None, typer.Option(min=1, help="Threads on the CPU.", rich_help_panel=MODEL_PANEL)]
FORCE = Annotated[
    bool, typer.Option("--force", help="Use a prompt of another model of the same width.", rich_help_panel=MODEL_PANEL)
]
INPUT = Annotated[
    str | None, typer.Option(help="Text the model reads, with {column} and {soft}.", rich_help_panel=TEMPLATE_PANEL)
]
TARGET = Annotated[
    str | None, typer.Option(help="What it is to answer, as ' {label}'.", rich_help_panel=TEMPLATE_PANEL)
]
LABELS = Annotated[
    str | None,
    typer.Option(help="Classes: 'a,b', or '{0: a, 1: b}' for class: word.", rich_help_panel=TEMPLATE_PANEL),
]
CHAT = Annotated[
    str | None,
    typer.Option(
        help=r"Instead of --input: turns as YAML, \[{role: user, content: '{soft}{text}'}].",
        rich_help_panel=TEMPLATE_PANEL,
    ),
]
FORMAT = Annotated[str | None, typer.Option(help="Format of the file, where its name does not tell.")]


def template_from(input: str | None, chat: str | None, target: str | None, labels: str | None) -> Template | None:
    """The template that was given as options, None if none was. Raises ConfigError."""
    import yaml

    from ..config import parse_labels, parse_value
    from ..templates import Template

    if input is None and chat is None and target is None and labels is None:
        return None
    if target is None or (input is None and chat is None):
        raise ConfigError(
            f"{'target' if target is None else 'input'}: missing; a template needs input or chat, and target"
        )
    try:
        words: Any = None if labels is None else parse_labels(parse_value("labels", labels))
        turns: Any = None if chat is None else parse_value("chat", chat)
        read: Any = None if input is None else parse_value("input", input)
        return Template.make(read, parse_value("target", target), turns, words)
    except yaml.YAMLError as error:
        raise ConfigError(f"template: not YAML: {getattr(error, 'problem', None) or error}") from error
    except (TemplateError, ValueError) as error:
        raise ConfigError(f"template: {error}") from error


def load_backbone(
    out: Output, model: str | None, prompt: SoftPrompt | None, precision: str, device: str | None, threads: int | None
) -> Backbone:
    """The model that was named, or the prompt's own."""
    if wrong := [*precision_problems(precision), *device_problems(device)]:
        raise ConfigError(wrong)
    name = model or (prompt.base_model if prompt is not None else "")
    if not name:
        raise ConfigError("model: missing; the prompt does not say which model it is for, give --model")
    from ..backbone import Backbone

    if threads:
        import torch

        torch.set_num_threads(threads)
    return Backbone.load(name, precision=precision, device=device, report=out.note)
