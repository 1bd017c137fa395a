"""`softprompt`: the entry point. Imports nothing heavy, so that --help answers at once."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from . import (
    cache,
    compare,
    demo,
    diff,
    discretize,
    doctor,
    evaluate,
    export,
    hub,
    import_,
    inspect,
    library,
    list_,
    mix,
    prune,
    run,
    serve,
    similarity,
    sweep,
    tune,
)
from .command import DEBUG, FAILED, INTERRUPTED, JSON, QUIET, WRONG_USE
from .output import Output

app = typer.Typer(
    name="softprompt",
    help="Tune, evaluate and use soft prompts of a frozen language model.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"softprompt {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    ctx: typer.Context,
    as_json: JSON = False,
    quiet: QUIET = False,
    debug: DEBUG = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="The version, and nothing else.")
    ] = False,
) -> None:
    """Options before the command are the same as after it."""
    ctx.obj = {"as_json": as_json, "quiet": quiet, "debug": debug}


for name, function in {
    "tune": tune.tune,
    "evaluate": evaluate.evaluate,
    "run": run.run,
    "compare": compare.compare,
    "sweep": sweep.sweep,
    "mix": mix.mix,
    "list": list_.list_,
    "rename": library.rename,
    "remove": library.remove,
    "copy": library.copy,
    "verify": library.verify,
    "push": hub.push,
    "pull": hub.pull,
    "export": export.export,
    "import": import_.import_,
    "serve": serve.serve,
    "inspect": inspect.inspect,
    "similarity": similarity.similarity,
    "diff": diff.diff,
    "prune": prune.prune,
    "discretize": discretize.discretize,
    "cache": cache.cache,
    "demo": demo.demo,
    "doctor": doctor.doctor,
}.items():
    app.command(name)(function)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong use."""
    arguments = sys.argv[1:] if arguments is None else arguments
    out = Output(json="--json" in arguments, debug="--debug" in arguments)
    try:
        code = app(arguments, prog_name="softprompt", standalone_mode=False)
    except typer.Abort:
        code = INTERRUPTED
    except KeyboardInterrupt:
        out.fail(KeyboardInterrupt(), ["interrupted"])
        code = INTERRUPTED
    except BrokenPipeError:  # `softprompt list | head`: nobody is listening any more
        sys.stderr.close()
        code = FAILED
    except Exception as error:
        usage = getattr(error, "format_message", None)
        if usage is None or out.debug:
            raise
        if message := str(usage()):
            context = getattr(error, "ctx", None)
            where = f"; see {context.command_path} --help" if context is not None else ""
            out.fail(error, [message[0].lower() + message[1:].rstrip(".") + where])
        code = getattr(error, "exit_code", WRONG_USE)
    sys.exit(code if isinstance(code, int) else 0)
