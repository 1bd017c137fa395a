"""`softprompt serve`: every task in a folder under one OpenAI-compatible address."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .command import command
from .options import DEVICE, PRECISION, THREADS, load_backbone
from .output import Output

if TYPE_CHECKING:
    from ..server.service import Service
    from ..server.settings import ServerSettings

LIMITS_PANEL, SAFETY_PANEL = "Limits", "Safety"
KEYS = "SOFTPROMPT_API_KEYS"


@command
def serve(
    out: Output,
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Folder of prompt folders; it is watched.")],
    model: Annotated[
        str | None, typer.Option(help="Hub id, folder, .gguf file or alias; default: the prompts' own.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; beyond this machine a key is needed.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    key_file: Annotated[
        str | None,
        typer.Option(
            help=f"File with the keys that clients may use, one a line (or sha256: and its hash); also {KEYS}.",
            rich_help_panel=SAFETY_PANEL,
        ),
    ] = None,
    admin_key_file: Annotated[
        str | None, typer.Option(help="The same for /admin, which is closed without it.", rich_help_panel=SAFETY_PANEL)
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Texts under way at once.", rich_help_panel=LIMITS_PANEL)] = 64,
    queue: Annotated[int, typer.Option(min=0, help="Texts that may wait.", rich_help_panel=LIMITS_PANEL)] = 256,
    step_tokens: Annotated[
        int,
        typer.Option(min=1, help="Tokens of new texts read between two of running ones.", rich_help_panel=LIMITS_PANEL),
    ] = 128,
    cache_gb: Annotated[
        float, typer.Option(min=0.01, help="Keys and values of texts under way, in GB.", rich_help_panel=LIMITS_PANEL)
    ] = 2.0,
    prompt_cache_gb: Annotated[
        float, typer.Option(min=0.0, help="Keys and values kept for prompts, in GB.", rich_help_panel=LIMITS_PANEL)
    ] = 1.0,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Longest answer; default: what the context leaves.", rich_help_panel=LIMITS_PANEL),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds that a request may take.", rich_help_panel=LIMITS_PANEL)
    ] = 600.0,
    drain: Annotated[
        float, typer.Option(min=0, help="Seconds for requests under way when it stops.", rich_help_panel=LIMITS_PANEL)
    ] = 30.0,
    watch: Annotated[float, typer.Option(min=0, help="Seconds between looks at the folder; 0: never.")] = 2.0,
    precision: PRECISION = "auto",
    device: DEVICE = None,
    threads: THREADS = None,
) -> None:
    """Serve every prompt in a folder from one model, by OpenAI's API.

    `model` in a request is a prompt's name, name@version, or base. Prompts may come, change and go meanwhile.
    """
    wrong = (
        [] if Path(folder).is_dir() else [f"folder: no folder {folder}; make it (it may be empty), or name another one"]
    )
    settings = _settings(wrong, host, port, key_file, admin_key_file, watch, drain, max_tokens, timeout)
    _check_installed()
    from ..engine.engine import EngineLimits

    limits = EngineLimits(rows, queue, step_tokens, int(cache_gb * 1e9), int(prompt_cache_gb * 1e9))
    with _logs_on_stderr(out):
        backbone = load_backbone(out, model or _own_model(folder), None, precision, device, threads)
        from ..server.run import Server, make_service

        service = make_service(backbone, folder, settings, limits)
        server = Server(service)
        with server.bound() as (address, sockets):
            _announce(out, service, address)
            out.document({"address": address, "models": [name for name, _ in service.registry.listed()]})
            server.run(sockets)


def _settings(
    wrong: list[str],
    host: str,
    port: int,
    key_file: str | None,
    admin_key_file: str | None,
    watch: float,
    drain: float,
    max_tokens: int | None,
    timeout: float,
) -> ServerSettings:
    """Raises ConfigError with all that is `wrong`, what is known of it already first."""
    from ..server.settings import Limits, ServerSettings

    keys = _keys(KEYS, os.environ.get(KEYS, "").replace(",", "\n"), wrong) if os.environ.get(KEYS) else ()
    keys += _keys_of("key-file", key_file, wrong)
    admin = _keys_of("admin-key-file", admin_key_file, wrong)
    if key_file and not keys:
        keys = ("",)  # a file that cannot be read has been told; that there is no key is not a second mistake
    limits = Limits(tokens=max_tokens, seconds=timeout)
    try:
        settings = ServerSettings(host, port, tuple(dict.fromkeys(keys)), admin, watch, drain, limits)
    except ConfigError as error:
        wrong += error.problems
    if wrong:
        raise ConfigError(wrong)
    return settings


def _keys_of(option: str, path: str | None, wrong: list[str]) -> tuple[str, ...]:
    """The hashes of the keys in a file; what is wrong with it goes to `wrong`."""
    if not path:
        return ()
    try:
        return _keys(option, Path(path).read_text(encoding="utf-8"), wrong)
    except (OSError, UnicodeDecodeError) as error:
        wrong.append(f"{option}: cannot read {path}: {getattr(error, 'strerror', None) or 'it is not text'}")
    return ()


def _keys(where: str, text: str, wrong: list[str]) -> tuple[str, ...]:
    from ..server.settings import read_keys

    try:
        return read_keys(text, where)
    except ConfigError as error:
        wrong += error.problems
    return ()


def _check_installed() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} is not installed; pip install 'softprompt[serve]'")


def _own_model(folder: str) -> str:
    """The model that the prompts of the folder name, if all that name one name the same."""
    from ..library import Library

    named = {str(entry.summary.get("base_model") or "") for entry in Library(folder).scan() if entry.usable} - {""}
    if len(named) == 1:
        return named.pop()
    found = ", ".join(sorted(named)[:4]) or "none"
    raise ConfigError(f"model: missing; the prompts in {folder} name {found}; give --model")


@contextmanager
def _logs_on_stderr(out: Output) -> Iterator[None]:
    """What the server logs, on standard error while it runs; afterwards the logger is as it was."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("softprompt")
    before = (logger.handlers, logger.propagate, logger.level)
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.DEBUG if out.debug else logging.WARNING if out.quiet else logging.INFO)
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before[:2]
        logger.setLevel(before[2])


def _announce(out: Output, service: Service, address: str) -> None:
    now: Any = service.registry.now
    for name, why in now.skipped.items():
        out.warn(f"{name} is not served: {why}")
    out.show(f"serving {now.prompts} prompts and base at {address}/v1")
