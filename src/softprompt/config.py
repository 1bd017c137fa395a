"""The whole configuration of a `softprompt tune`: plain data from a YAML file, `key=value` and flags, checked at once.

Nothing here loads torch or a model, so a config is refused within a moment, with all of its mistakes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ConfigDict, Field, ValidationError, field_validator

from .config_checks import find_problems
from .errors import ConfigError
from .plain_yaml import parse_yaml, read_yaml
from .training.config import TuneConfig

CONFIG_FILE = "config.yaml"  # in a run folder: the config as run, what `--resume` goes on with
# The fields of RunConfig by the panel of `--help` that they stand in; those of TuneConfig make up the rest.
PANELS = {
    "Model": ("model", "precision", "device", "threads"),
    "Data": (
        *("train", "validation", "test", "format", "shares", "stratify", "group_by", "limit", "references"),
        *("test_rows", "max_new_tokens"),
    ),
    "Template": ("input", "target", "chat", "labels"),
    "Files written": ("name", "out", "run", "overwrite", "new_version", "resume"),
    "Soft prompt": ("kind", "tokens", "init", "init_text", "from_prompt", "reparametrisation", "sink"),
}
REST = "Tuning"


class RunConfig(TuneConfig):
    """Everything about a run: what is tuned (model, data, template), how (the fields of TuneConfig), where it goes."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    model: str = Field(description="hub id, local folder, .gguf file, or the alias smollm2-135m")
    precision: Literal["auto", "float32", "bfloat16", "float16", "float64"] = Field(
        "auto", description="precision of the frozen model; auto measures which is faster here"
    )
    device: str | None = Field(None, description="cpu, cuda, cuda:1 or mps; default: what there is")
    threads: int | None = Field(None, ge=1, description="threads on the CPU; default: torch's choice")

    train: str = Field(
        description="training rows: csv, tsv, jsonl, json, parquet (also .gz, .bz2, .xz), a datasets folder or hub id"
    )
    validation: str | None = Field(None, description="validation rows; default: a share of the training rows")
    test: str | None = Field(None, description="test rows; default: a share of the training rows")
    format: Literal["csv", "tsv", "jsonl", "json", "parquet", "datasets", "hub"] | None = Field(
        None, description="format of the files, where their names do not tell"
    )
    shares: tuple[float, float, float] = Field(
        (0.8, 0.1, 0.1), description="shares of train, validation and test where one file is divided"
    )
    stratify: bool = Field(True, description="divide each class by these shares")
    group_by: str | None = Field(None, description="column whose equal values stay in one split")
    limit: int | None = Field(None, ge=1, description="use at most so many training rows, drawn by seed")
    references: str | None = Field(None, description="column with a list of right texts, to score free text against")
    test_rows: int | None = Field(None, ge=1, description="score at most so many test rows at the end, drawn by seed 0")
    max_new_tokens: int = Field(
        64, ge=1, description="longest free-text answer when the test rows are scored, in tokens"
    )

    input: str | None = Field(
        None,
        description="text the model reads, with {column} fields and {soft} for the soft tokens (default: the front)",
    )
    target: str = Field(description="what it is to answer, for instance ' {label}'")
    chat: list[dict[str, str]] | None = Field(
        None, description="instead of input: turns, as [{role: user, content: '{soft}{text}'}]"
    )
    labels: list[str] | dict[str, str] | None = Field(
        None, description="classes, as 'negative,positive' or '{0: negative, 1: positive}'; without them: free text"
    )

    name: str | None = Field(None, description="name of the run; default: that of the prompt folder or training file")
    out: str | None = Field(None, description="prompt folder that is written; default: prompts/NAME")
    run: str | None = Field(None, description="run folder; default: runs/NAME, or runs/NAME-2 if that is taken")
    auto: bool = Field(
        False, description="first try a few learning rates and initialisers in a small sweep, then tune with the best"
    )
    ensemble: int | None = Field(
        None, ge=2, le=32, description="tune so many prompts, with seeds from seed on, that vote in evaluate"
    )
    overwrite: bool = Field(False, description="replace the prompt that the prompt folder holds")
    new_version: bool = Field(
        False,
        description="if the prompt folder is there already: write a further version, NAME@2, and keep the old one",
    )
    from_prompt: str | None = Field(
        None,
        description="start from another task's prompt: its folder, or auto: the one beside out that does best here",
    )
    resume: str | None = Field(None, description="run folder of an earlier run to go on with, with its own config")

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_values(cls, value: Any, info: Any) -> Any:
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError(f"must not be true or false; quote it if it is a text, as '{str(value).lower()}'")
        return value

    @field_validator("labels", mode="before")
    @classmethod
    def _labels(cls, value: Any) -> Any:
        return parse_labels(value)

    @field_validator("shares", mode="before")
    @classmethod
    def _shares(cls, value: Any) -> Any:
        try:
            parts = [float(part) for part in (value.split(",") if isinstance(value, str) else value)]
        except (TypeError, ValueError):
            parts = []
        if len(parts) != 3 or any(not part >= 0 for part in parts) or not parts[0] or abs(sum(parts) - 1) > 0.01:
            raise ValueError("must be three numbers (train, validation, test) that sum to 1, the first above 0")
        return parts

    @field_validator("chat", mode="before")
    @classmethod
    def _chat(cls, value: Any) -> Any:
        wrong = ValueError("must be a list of turns, each {role: ..., content: ...}")
        if value is None:
            return None
        if not isinstance(value, (list, tuple)):
            raise wrong
        turns = []
        for turn in value:
            if isinstance(turn, Mapping) and set(turn) == {"role", "content"}:
                turns.append({key: str(text) for key, text in turn.items()})
            elif isinstance(turn, (list, tuple)) and len(turn) == 2:
                turns.append({"role": str(turn[0]), "content": str(turn[1])})
            else:
                raise wrong
        return turns

    def tuning(self) -> TuneConfig:
        """The part of it that says how to tune."""
        return TuneConfig(**{name: getattr(self, name) for name in TuneConfig.model_fields})

    def task_options(self) -> dict[str, Any]:
        """The part of it that says what to tune on: the arguments of `Task.load`."""
        keys = (
            *("train", "validation", "test", "input", "target", "chat", "labels", "shares", "seed", "stratify"),
            *("group_by", "limit", "format", "references", "name"),
        )
        return {key: getattr(self, key) for key in keys}

    def to_yaml(self) -> str:
        """As a config file that `load_config` reads back to the same."""
        data = self.model_dump(mode="json")
        data = {key: data[key] for keys in fields_by_panel().values() for key in keys if key != "resume"}
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)


def parse_labels(value: Any) -> Any:
    """Labels as a list of classes or class -> word, from these or from 'a,b'. Raises ValueError."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    if isinstance(value, Mapping):
        return {_label(key): _label(word) for key, word in value.items()}
    if isinstance(value, (list, tuple)):
        return [_label(word) for word in value]
    if value is None:
        return None
    raise ValueError("must be a list of classes, or class: label word pairs")


def _label(value: Any) -> str:
    if isinstance(value, bool):
        raise ValueError(
            f"has the truth value {str(value).lower()}; quote it if it is a text, as '{str(value).lower()}'"
        )
    if isinstance(value, (str, int, float)):
        return str(value)
    raise ValueError(f"must be texts, found {value!r}")


# --- from files, key=value and flags ---------------------------------------------------------------------------------


def load_config(
    path: str | Path | None = None, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None
) -> RunConfig:
    """A checked config: the YAML file, over it `key=value` overrides, over those flags (texts as typed, or values).

    With `resume` the file is the config in that run folder. `name`, `out` and `run` are filled in. Raises ConfigError
    with every mistake that can be known before a model is loaded.
    """
    problems: list[str] = []
    return check_config(gather(path, overrides, flags, problems), problems)


def gather(
    path: str | Path | None, overrides: Sequence[str], flags: Mapping[str, Any] | None, problems: list[str]
) -> dict[str, Any]:
    """What a config file, overrides and flags say together, unchecked; mistakes in their form go to `problems`.

    Raises ConfigError where there is no file to read.
    """
    above = _from_texts(overrides, flags or {}, problems)
    resume = above.get("resume")
    if resume is not None:
        if path is not None:
            problems.append("resume: goes on with the run's own config; leave out the config file")
        path = Path(resume) / CONFIG_FILE
        if not path.is_file():
            raise ConfigError(
                [*problems, f"resume: {resume} is not the folder of a run started here: it has no {CONFIG_FILE}"]
            )
    data = {} if path is None else read_yaml(Path(path), problems)
    if resume is not None and "tuning" in data:
        raise ConfigError(f"resume: the run in {resume} was started from Python; go on with tune(..., resume=True)")
    if resume is not None and data.get("run") is not None:
        data["run"] = str(resume)  # the folder may have been moved
    return {**data, **above}


def check_config(data: Mapping[str, Any], problems: Sequence[str] = ()) -> RunConfig:
    """A config from plain data. problems: mistakes found before, raised together with those found here."""
    found = [*problems, *_unknown_keys(data)]
    given = {key: value for key, value in data.items() if key in RunConfig.model_fields}
    try:
        RunConfig(**given)
    except ValidationError as error:
        wrong = {str(each["loc"][0]): each for each in reversed(error.errors())}  # the first mistake of each field
        found += [_in_words(key, wrong[key]) for key in RunConfig.model_fields if key in wrong]
        given = {key: value for key, value in given.items() if key not in wrong}
    defaults = {key: f.get_default() for key, f in RunConfig.model_fields.items() if not f.is_required()}
    settled = settle(defaults | _converted(given))
    found += find_problems(settled, "run" in data)
    if found:
        raise ConfigError(found)
    return RunConfig(**settled)


def _converted(given: Mapping[str, Any]) -> dict[str, Any]:
    """The given values, each of which is sound, as their fields hold them."""
    required = {key: "x" for key, field in RunConfig.model_fields.items() if field.is_required()}
    whole = RunConfig(**{**required, **given})
    return {key: getattr(whole, key) for key in given}


def settle(sound: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in name, prompt folder and run folder."""
    data = dict(sound)
    name = data.get("name") or (Path(data["out"]).name if data.get("out") else _name_of(data.get("train") or "prompt"))
    data["name"] = name
    data["out"] = data.get("out") or f"prompts/{name}"
    if data.get("new_version"):
        from .library.names import next_version  # loads torch, so only where it is asked for

        data["out"] = str(next_version(data["out"]))
    source = data.get("from_prompt")
    if source:  # another way to write init
        data["init"] = f"auto:{Path(data['out']).parent}" if source == "auto" else f"prompt:{source}"
        data["from_prompt"] = None
    data["run"] = data.get("run") or data.get("resume") or free_run(Path("runs") / name)
    return data


def _name_of(train: str) -> str:
    """reviews.csv.gz -> reviews; data/sst2/train.jsonl -> sst2."""
    path = Path(train)
    stem = path.name.split(".")[0]
    return path.parent.name if stem == "train" and path.parent.name else stem or "prompt"


def free_run(folder: Path) -> str:
    """The folder, or the first of folder-2, folder-3, ... that does not exist."""
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return str(free)


def _from_texts(overrides: Sequence[str], flags: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """`key=value` texts and flags as values; mistakes are added to `problems`."""
    given: list[tuple[str, Any]] = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if equals:
            given.append((key.strip().replace("-", "_"), value))
        else:
            problems.append(f"{text}: expected key=value, as tokens=20")
    given += [(key, value) for key, value in flags.items() if value is not None]
    data = {}
    for key, value in given:
        try:
            data[key] = parse_value(key, value) if isinstance(value, str) else value
        except yaml.YAMLError as error:
            problems.append(f"{key}: cannot read {value!r} as YAML: {getattr(error, 'problem', None) or error}")
    return data


def parse_value(key: str, text: str) -> Any:
    """What a text given for `key` on the command line means: a text field takes it as it is, others read YAML."""
    if text.strip() == "null":
        return None
    if key in TYPED:
        return as_typed(text)
    field = RunConfig.model_fields.get(key)
    if field is None or key == "shares" or _is_text(field.annotation):
        return text
    return parse_yaml(text)


# Texts in which line breaks are common and backslashes are not.
TYPED = ("input", "target", "init_text")


def as_typed(text: str) -> str:
    r"""A text as meant by somebody who typed it in a shell: `\n` is a line break, `\t` a tab, `\\` a backslash."""
    meant = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
    return re.sub(r"\\[nt\\]", lambda found: meant[found[0]], text)


def _is_text(annotation: Any) -> bool:
    """Whether a field holds a text: str or one of some texts, or None."""
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    return annotation is str or get_origin(annotation) is Literal or (len(kinds) == 1 and _is_text(kinds[0]))


def _unknown_keys(data: Mapping[str, Any]) -> list[str]:
    found = []
    for key in data:
        if key == "sweep":
            found.append("sweep: is a section for `softprompt sweep`; leave it out, or use that command")
        elif key in ("tasks", "temperature", "cap"):
            found.append(f"{key}: is for several tasks at once, `softprompt mix`; leave it out, or use that command")
        elif key not in RunConfig.model_fields:
            near = get_close_matches(str(key), RunConfig.model_fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(RunConfig.model_fields)}"
            found.append(f"{key}: unknown key; {hint}")
    return found


def _in_words(key: str, error: Mapping[str, Any]) -> str:
    """One of pydantic's mistakes as a line of ours."""
    if error["type"] == "missing":
        return f"{key}: missing; expected {RunConfig.model_fields[key].description}"
    text = str(error["msg"]).removeprefix("Value error, ").replace("Input should be", "must be").split(", unable")[0]
    text = text[0].lower() + text[1:]
    hint = ""
    if error["type"] == "literal_error":
        choices = re.findall(r"'([^']+)'", str(error["msg"]))
        near = get_close_matches(str(error["input"]), choices, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
    return f"{key}: {text}, found {error['input']!r:.120}{hint}"


def fields_by_panel() -> dict[str, list[str]]:
    """All fields of RunConfig under the panels that `--help` and the docs show them in."""
    panels = {panel: list(keys) for panel, keys in PANELS.items()}
    placed = {key for keys in panels.values() for key in keys}
    panels[REST] = [key for key in RunConfig.model_fields if key not in placed]
    return panels
