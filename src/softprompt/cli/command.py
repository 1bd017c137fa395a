"""What all commands share: --json, --quiet, --debug, errors as one line each, and exit codes."""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from ..errors import ConfigError, SoftPromptError
from .output import Output

FAILED, WRONG_USE, INTERRUPTED = 1, 2, 130
PANEL = "Output"
JSON = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.", rich_help_panel=PANEL)]
QUIET = Annotated[bool, typer.Option("--quiet", "-q", help="Results and warnings only.", rich_help_panel=PANEL)]
DEBUG = Annotated[bool, typer.Option("--debug", help="Tracebacks of errors.", rich_help_panel=PANEL)]
SHARED = {"as_json": JSON, "quiet": QUIET, "debug": DEBUG}


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A command for typer out of `function(output, ...)`: adds the shared options and turns errors into lines."""

    @functools.wraps(function)
    def run(ctx: typer.Context, **given: Any) -> None:
        before = ctx.obj or {}
        json_, quiet, debug = (given.pop(name) or before.get(name, False) for name in SHARED)
        out = Output(json_, quiet, debug)
        if not out.debug:
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # what matters of its warnings we say ourselves
        with errors_as_lines(out):
            function(out, **given)

    _, *parameters = _parameters(function)
    _give_signature(run, [p.replace(kind=p.KEYWORD_ONLY) for p in parameters])
    return run


def with_options(function: Callable[..., None], options: dict[str, Any]) -> None:
    """Give `function(..., **options)` one parameter for each of `options` (name -> annotation), default None."""
    kept = [p for p in _parameters(function) if p.kind != p.VAR_KEYWORD]
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in options.items()
    ]
    _set_signature(function, [*kept, *more])


def _parameters(function: Callable[..., None]) -> list[inspect.Parameter]:
    """Parameters with their annotations as types. Not by `get_type_hints`: before Python 3.11 it wraps an annotation
    whose default is None into Optional, where typer does not find it."""
    return list(inspect.signature(function, eval_str=True).parameters.values())


def _give_signature(run: Callable[..., None], own: list[inspect.Parameter]) -> None:
    keyword = inspect.Parameter.KEYWORD_ONLY
    context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    shared = [inspect.Parameter(name, keyword, default=False, annotation=kind) for name, kind in SHARED.items()]
    _set_signature(run, [context, *own, *shared])


def _set_signature(function: Any, parameters: list[inspect.Parameter]) -> None:
    function.__signature__ = inspect.Signature(parameters)
    function.__annotations__ = {p.name: p.annotation for p in parameters}


@contextmanager
def errors_as_lines(out: Output) -> Iterator[None]:
    """Errors raised on purpose become lines on stderr and an exit code; others too, unless --debug asks for more."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _shown_by(out)
            yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        out.fail(KeyboardInterrupt(), ["interrupted"])
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        raise
    except Exception as error:
        if out.debug:
            raise
        out.fail(error, _lines(error))
        raise typer.Exit(WRONG_USE if isinstance(error, ConfigError) else FAILED) from None


def _lines(error: Exception) -> list[str]:
    if isinstance(error, ConfigError):
        return error.problems
    if isinstance(error, SoftPromptError):
        return [str(error)]
    if isinstance(error, OSError) and error.filename is not None:
        return [f"{error.filename}: {str(error.strerror).lower()}"]
    text = " ".join(str(error).split())
    return [
        f"{type(error).__name__}: {text or 'no message'} (not an error that softprompt expects; --debug shows more)"
    ]


def _shown_by(out: Output) -> Callable[..., None]:
    """Warnings of ours as lines; those of the libraries only with --debug."""

    def show(message: Warning | str, category: type[Warning], filename: str, *_: Any) -> None:
        if out.debug or (category is UserWarning and "softprompt" in filename):
            out.warn(str(message))

    return show
