"""Write docs/cli.md, the reference of the command line, from the commands themselves.

`python docs/make_reference.py` writes it; with `--check` it exits with 1 if the page is not up to date.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from softprompt.cli.main import app
from softprompt.config import RunConfig

PAGE = Path(__file__).parent / "cli.md"
SHARED = ("as_json", "quiet", "debug")  # on every command, told once
COMPLETION = ("install_completion", "show_completion")  # typer's own, worded differently from version to version
HEAD = """# The command line

<!-- Written by docs/make_reference.py; change the commands and run it, not this page. -->

    softprompt COMMAND [OPTIONS] ...

`softprompt COMMAND --help` says the same as this page. Options may stand before or after other arguments.

Exit codes: 0 done; 1 failed, or interrupted with what was done kept; 2 wrong use, found before anything was done; 130
interrupted at once. Errors are lower-case lines on the standard error stream.

`softprompt --install-completion` makes the shell complete commands and options.

In texts given as options, `{column}` stands for a field and `{soft}` for the soft tokens. `\\n` typed in them
is a line break, `\\t` a tab, and `\\\\` a backslash.
"""


def reference() -> str:
    """The whole page."""
    group: Any = typer.main.get_command(app)
    first = next(iter(group.commands.values()))
    parts = [HEAD, "## On every command\n", options([p for p in first.params if p.name in SHARED])]
    parts += ["Without a command:\n", options([p for p in group.params if p.name not in (*SHARED, *COMPLETION)])]
    parts += [section(name, command) for name, command in group.commands.items()]
    return "\n".join(parts)


def section(name: str, command: Any) -> str:
    """One command: what it does, its arguments, its options by panel."""
    shown = [p for p in command.params if p.name not in SHARED and not getattr(p, "hidden", False)]
    arguments = [p for p in shown if p.param_type_name == "argument"]
    parts = [f"## {name}\n", f"    softprompt {' '.join([name, *map(placeholder, arguments), '[OPTIONS]'])}\n"]
    parts.append(in_markdown(command.help or "") + "\n")
    if arguments:
        parts.append(table(("argument", ""), [(f"`{placeholder(p)}`", in_markdown(p.help or "")) for p in arguments]))
    panels: dict[str, list[Any]] = {}
    for parameter in shown:
        if parameter not in arguments:
            panels.setdefault(parameter.rich_help_panel or "Options", []).append(parameter)
    for panel, parameters in panels.items():
        parts += [f"{panel}:\n", options(parameters)]
    if name == "tune":
        parts.append(config_note())
    return "\n".join(parts)


def placeholder(argument: Any) -> str:
    text = argument.metavar or argument.name.upper()
    return text if argument.required or text.startswith("[") else f"[{text}]"


def options(parameters: list[Any]) -> str:
    rows = []
    for p in parameters:
        names = ", ".join(f"`{name}`" for name in [*p.opts, *p.secondary_opts])
        value = f" `{p.metavar}`".replace("|", r"\|") if p.metavar and not p.is_flag else ""
        text = in_markdown(p.help or "")
        known = not p.is_flag and p.default is not None and "default" not in text.lower()
        rows.append((names + value, text + (f" Default: {p.default}." if known else "")))
    return table(("option", ""), rows)


def config_note() -> str:
    keys = ", ".join(f"`{key}`" for key in RunConfig.model_fields)
    return f"""The keys of a config file, and of `KEY=VALUE`, are the names of these options with `_` for `-`: {keys}.
A value of `KEY=VALUE` is read as YAML where the key is not a text; `null` is no value.
"""


def table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {left} | {right} |" for left, right in rows)]
    return "\n".join(lines) + "\n"


def in_markdown(text: str) -> str:
    """A help text in one paragraph each, without what is only meant for rich."""
    paragraphs = [" ".join(part.split()) for part in text.replace(r"\[", "[").split("\n\n")]
    return "\n\n".join(paragraphs).replace("|", r"\|").replace("<", "&lt;")


def main() -> int:
    if "--check" in sys.argv[1:]:
        return int(PAGE.read_text(encoding="utf-8") != reference())
    PAGE.write_text(reference(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
