"""Which prompts are exported, under which names; what cannot go together is told before a model is loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import BackboneMismatchError, ConfigError, OutputError
from ..fileformat import is_prompt_folder, load_prompt
from ..library import list_prompts
from ..prompt import SoftPrompt

Prompts = Mapping[str, SoftPrompt] | Iterable["str | Path"]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,127}")


def collect(sources: Prompts) -> dict[str, SoftPrompt]:
    """The prompts of `sources` by name: a mapping as it is, or folders of prompts and libraries of them.

    A prompt folder is called as the folder, or as NAME where NAME=FOLDER is given; in a library (a folder of prompt
    folders, however deep) each is called as its own folder. Raises ConfigError with every mistake: a name that cannot
    be one, two prompts of one name, no prompts at all; PromptFormatError for a prompt that cannot be read.
    """
    if isinstance(sources, Mapping):
        return _checked([(str(name), "as given", prompt) for name, prompt in sources.items()])
    found: list[tuple[str, str, SoftPrompt]] = []
    for source in [sources] if isinstance(sources, (str, Path)) else sources:
        found += _read(str(source))
    return _checked(found)


def check_one_model(prompts: Mapping[str, SoftPrompt]) -> None:
    """Raise BackboneMismatchError if the prompts say that they are for different models."""
    first: dict[str, tuple[str, SoftPrompt]] = {}
    for name, prompt in prompts.items():
        if prompt.fingerprint:
            first.setdefault(prompt.fingerprint, (name, prompt))
    if len(first) > 1:
        (a, one), (b, other) = list(first.values())[:2]
        raise BackboneMismatchError(
            f"these prompts need different models: '{a}' {_model(one)}, '{b}' {_model(other)}; export each model's "
            "prompts apart"
        )


def needs_embeddings(prompts: Mapping[str, SoftPrompt], what: str) -> None:
    """Raise ConfigError for prompts that are not vectors in the embedding space, which `what` is made of."""
    deep = [name for name, prompt in prompts.items() if prompt.kind != "embedding"]
    if deep:
        raise ConfigError(
            [
                f"{name}: a {prompts[name].kind} prompt has keys and values in each layer, which {what} cannot hold; "
                "leave it out (a deep prompt at the front can go to peft)"
                for name in deep
            ]
        )


def check_new(path: Path, what: str) -> None:
    """Raise OutputError unless `path` is free (an empty folder counts), for the `what` that is to be written there."""
    if path.is_dir() and what != "file":
        held = sorted(os.listdir(path))
        if held:
            raise OutputError(f"{path} is not empty ({', '.join(held[:3])}): choose another folder")
    elif os.path.lexists(path):
        raise OutputError(f"{path} is there already: choose another name, or remove it")


def _read(source: str) -> list[tuple[str, str, SoftPrompt]]:
    name, equals, folder = source.partition("=")
    if equals and not os.path.exists(source):
        return [(name, folder, load_prompt(folder))]
    path = Path(source)
    if is_prompt_folder(path) or not path.is_dir():
        return [(path.resolve().name, source, load_prompt(path))]
    below = list_prompts(path)
    if not below:
        return [(path.name, source, load_prompt(path))]  # raises: it says what the folder holds instead
    return [(Path(each["path"]).name, each["path"], load_prompt(each["path"])) for each in below]


def _checked(found: list[tuple[str, str, SoftPrompt]]) -> dict[str, SoftPrompt]:
    problems = [] if found else ["prompts: none given; name prompt folders, or a folder of them"]
    where: dict[str, str] = {}
    for name, path, _ in found:
        if not NAME.fullmatch(name):
            problems.append(
                f"{path}: '{name}' cannot be a name; it is made of letters, digits and . _ @ -; give NAME=FOLDER"
            )
        elif name in where:
            problems.append(f"{path}: a prompt is called '{name}' already ({where[name]}); give NAME=FOLDER")
        where.setdefault(name, path)
    if problems:
        raise ConfigError(problems)
    return {name: prompt for name, _, prompt in found}


def _model(prompt: SoftPrompt) -> str:
    return f"{prompt.base_model or 'an unnamed one'} (fingerprint {prompt.fingerprint})"
