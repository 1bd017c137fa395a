"""Prompts to and from a model hub: two or three small files, JSON and safetensors, and nothing else."""

from __future__ import annotations

import errno
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..atomic import write_folder
from ..errors import HubError, LibraryError, PromptFormatError, SoftPromptError
from ..fileformat import load_prompt
from ..peft_format import CONFIG_FILE
from ..prompt import SoftPrompt
from ..tensorfile import MAX_JSON, TENSOR_FILE, read_bytes
from ..weights import HUB_SECONDS, within
from .library import Library
from .scanning import FILES, Entry, content_hash

CARD = "README.md"
MAX_TENSOR = 2 << 30  # bytes; the largest that is read at all
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_LOCAL = re.compile(r"/[^/\s]|~[/\\]|[A-Za-z]:[/\\]|file://")
Report = Callable[[str], None]


@dataclass(frozen=True)
class Pulled:
    """folder: where the prompt was put. commit: the hub's commit that it was taken from."""

    folder: Path
    commit: str
    prompt: SoftPrompt


def push(
    entry: Entry, repository: str, *, public: bool = False, message: str = "", report: Report = lambda line: None
) -> str:
    """Upload a prompt of a library (see `Library.find`) to the model repository `user/name`; returns its address.

    The repository is made when there is none, private unless `public`. Uploaded are the prompt's own files, as they
    are, and its README.md, or one that says what the prompt is; other files of the repository stay. Raises HubError
    (not reachable, not allowed), PromptFormatError (changed since it was found), LibraryError (not USER/NAME).
    """
    from huggingface_hub import HfApi

    check_repository(repository)
    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary)
        prompt = _stage(entry, staged)
        api = HfApi()
        with _told(repository):
            made = within(
                2 * HUB_SECONDS,
                lambda: api.create_repo(repository, private=not public, repo_type="model", exist_ok=True),
            )
            report(f"uploading {', '.join(sorted(path.name for path in staged.iterdir()))} to {made}")
            api.upload_folder(
                repo_id=repository,
                repo_type="model",
                folder_path=staged,
                allow_patterns=[*FILES, CARD],
                delete_patterns=[name for name in FILES if not (staged / name).exists()],  # of another prompt
                commit_message=message or f"{entry.reference}: {prompt.tokens} soft tokens",
            )
    return str(made)


def pull(
    repository: str,
    library: Library,
    name: str = "",
    *,
    revision: str | None = None,
    new_version: bool = False,
    report: Report = lambda line: None,
) -> Pulled:
    """Download the prompt or PEFT adapter in the model repository `user/name` into the library, as `name`.

    name: by default the repository's own; `new_version` as for `Library.save`. Only the prompt's own files are fetched,
    all of one commit, after their sizes are known; the prompt is checked whole before it appears in the library.
    Raises HubError (not reachable, no such repository, no prompt in it), LibraryError (names), PromptFormatError.
    """
    from huggingface_hub import snapshot_download

    own_name = check_repository(repository)[1]
    name = name or own_name
    library.check_new(name, new_version=new_version)
    with _told(repository):
        commit, wanted = _look(repository, revision)
    got: list[SoftPrompt] = []

    def build(folder: Path) -> None:
        report(f"fetching {', '.join(wanted)} of {repository}")
        with tempfile.TemporaryDirectory() as fetched:
            with _told(repository):
                snapshot_download(repository, revision=commit, local_dir=fetched, allow_patterns=wanted, max_workers=3)
            write_folder(folder, {file: read_bytes(Path(fetched) / file, _limit(file)) for file in wanted})
        got.append(load_prompt(folder))

    made = library.place(build, name, new_version=new_version)
    return Pulled(made, commit, got[0])


def check_repository(text: str) -> tuple[str, str]:
    """User and name of `user/name`. Raises LibraryError."""
    if not _REPOSITORY.fullmatch(text) or ".." in text or "--" in text:
        raise LibraryError(f"{text[:140]!r} is not a repository of a hub; expected USER/NAME, as anna/sentiment")
    user, _, name = text.partition("/")
    return user, name


def local_paths(prompt: SoftPrompt) -> list[str]:
    """Paths of this machine that the prompt's description names, for whoever may not want to publish them."""
    found = [prompt.base_model, *_texts(prompt.provenance), *_texts(prompt.metrics)]
    return sorted({text for text in found if _LOCAL.match(text)})


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for each in value.values() for text in _texts(each))
    elif isinstance(value, (list, tuple)):
        yield from (text for each in value for text in _texts(each))


def _stage(entry: Entry, folder: Path) -> SoftPrompt:
    """Put what is to be uploaded into `folder`, whole and as it was when the entry was found."""
    if not entry.usable:
        raise PromptFormatError(entry.problems[0])
    for name in FILES:
        if (entry.path / name).is_file():
            (folder / name).write_bytes(read_bytes(entry.path / name))
    prompt = load_prompt(folder)
    if content_hash(folder) != entry.sha256:
        raise PromptFormatError(f"{entry.path} has changed since it was looked at: do it again")
    card = entry.path / CARD
    own = card.is_file() and not card.is_symlink()
    text = read_bytes(card, MAX_JSON) if own else _card(entry.name, prompt, (folder / CONFIG_FILE).exists()).encode()
    (folder / CARD).write_bytes(text)
    return prompt


def _card(name: str, prompt: SoftPrompt, for_peft: bool) -> str:
    """A page for the hub that says what the prompt is."""
    base = prompt.base_model if _REPOSITORY.fullmatch(prompt.base_model) else ""
    head = [f"base_model: {base}"] * bool(base) + [f"library_name: {'peft' if for_peft else 'softprompt'}"]
    lines = ["---", *head, "tags: [soft-prompt]", "---", f"# {name}", ""]
    lines += [f"A soft prompt of {prompt.tokens} tokens for {base or 'a language model'}, which stays frozen.", ""]
    if prompt.template is not None:
        lines += ["It was tuned in this template:", "", *_indented(prompt.template.to_dict()), ""]
    return "\n".join([*lines, f"    softprompt pull USER/{name}", ""])


def _indented(template: Mapping[str, Any]) -> list[str]:
    return [f"    {key}: {value!r}" for key, value in template.items() if value is not None]


def _look(repository: str, revision: str | None) -> tuple[str, list[str]]:
    """The commit to take and the files in it that make up the prompt, none of them larger than can be read."""
    from huggingface_hub import HfApi

    api = HfApi()
    info = within(
        2 * HUB_SECONDS,
        lambda: api.model_info(repository, revision=revision, files_metadata=True, timeout=HUB_SECONDS),
    )
    sizes = {each.rfilename: each.size or 0 for each in info.siblings or ()}
    wanted = [name for name in FILES if name in sizes]
    if TENSOR_FILE not in wanted or len(wanted) < 2:
        held = ", ".join(sorted(sizes)[:5]) or "nothing"
        raise HubError(
            f"{repository} holds no prompt: expected {TENSOR_FILE} and {FILES[0]} or {FILES[2]}, found {held}"
        )
    for name in wanted:
        if sizes[name] > _limit(name):
            raise HubError(f"{name} in {repository} has {sizes[name]} bytes, at most {_limit(name)} are read")
    return str(info.sha), wanted


def _limit(name: str) -> int:
    return MAX_TENSOR if name == TENSOR_FILE else MAX_JSON


@contextmanager
def _told(repository: str) -> Iterator[None]:
    """Errors of the hub's client as HubError, in our words where we know them; those of our own disk as they are."""
    try:
        yield
    except SoftPromptError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and (error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT)):
            raise
        raise HubError(_why(repository, error)) from error


def _why(repository: str, error: Exception) -> str:
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the hub is not asked, because HF_HUB_OFFLINE is set; unset it"
    if isinstance(error, errors.GatedRepoError):
        return f"{repository} is gated; accept its terms on the hub and log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} has no such revision; name a branch, a tag or a commit that it has"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub has no model repository {repository}, or it is private and you are not logged in"
    if isinstance(error, errors.LocalTokenNotFoundError) or status in (401, 403):
        return f"the hub does not allow it for {repository}; log in with `hf auth login` as somebody who may"
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    what = "answered with an error" if status else "cannot be reached"
    return f"the hub ({constants.ENDPOINT}) {what}: {first}"
