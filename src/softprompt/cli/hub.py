"""`softprompt push` and `softprompt pull`: prompts to and from a model hub."""

from __future__ import annotations

from typing import Annotated

import typer

from .command import command
from .library import DEFAULT, LIBRARY, NAME, NEW_VERSION, located
from .output import Output

REPOSITORY = Annotated[str, typer.Argument(metavar="USER/REPO", help="Model repository on the hub.")]


@command
def push(
    out: Output,
    name: NAME,
    repository: REPOSITORY,
    library: LIBRARY = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    message: Annotated[str, typer.Option(help="Commit message.")] = "",
) -> None:
    """Upload a prompt to a model hub.

    Its own files are uploaded and a README.md, nothing else that the folder holds. A new repository is private. Log in
    before with `hf auth login`.
    """
    from ..library import Library
    from ..library.hub import check_repository, local_paths
    from ..library.hub import push as push_prompt

    check_repository(repository)
    folder, wanted = located(name, library)
    made = Library(folder)
    entry = made.find(wanted)
    if paths := local_paths(made.load(entry)):
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        out.warn(f"softprompt.json names paths of this machine, which readers will see: {', '.join(paths[:3])}{more}")
    address = push_prompt(entry, repository, public=public, message=message, report=out.note)
    out.show(f"{entry.path} is at {address}")
    out.document({"prompt": str(entry.path), "sha256": entry.sha256, "address": address})


@command
def pull(
    out: Output,
    repository: REPOSITORY,
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="NAME it gets, also with a path; default: prompts/REPO.")
    ] = "",
    library: LIBRARY = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    new_version: NEW_VERSION = False,
) -> None:
    """Download a prompt, or an adapter of PEFT's, from a model hub into a library.

    Only JSON and safetensors are fetched, and the prompt is checked before it appears in the library.
    """
    from ..library import Library
    from ..library.hub import pull as pull_prompt

    folder, wanted = located(name, library) if name else (library or DEFAULT, "")
    got = pull_prompt(repository, Library(folder), wanted, revision=revision, new_version=new_version, report=out.note)
    model = got.prompt.base_model or "an unnamed model"
    out.show(f"{got.prompt.tokens} soft tokens for {model}: {got.folder}")
    if got.prompt.template is None:
        out.note("it has no template; `softprompt import` gives it one")
    out.document({"prompt": str(got.folder), "commit": got.commit, "tokens": got.prompt.tokens, "model": model})
