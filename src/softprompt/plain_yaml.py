"""YAML as plain data without its traps: no key twice, `yes` and `no` are texts, and so is a date."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Safe, with the truth values of YAML 1.2 (true, false), and a list of the keys that stand twice."""

    def __init__(self, stream: Any):
        super().__init__(stream)
        self.repeated: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict)):
                continue  # the parent refuses it
            line = key_node.start_mark.line + 1
            if key in seen:
                self.repeated.append(f"{key}: stands twice, in line {seen[key]} and line {line}; keep one")
            seen[key] = line
        return super().construct_mapping(node, deep=deep)


_TAGS = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag not in _TAGS]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
# YAML 1.1 takes 1e-3 for a text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str, repeated: list[str] | None = None) -> Any:
    """The data in a YAML text; `repeated` gets a line for each key that stands twice. Raises yaml.YAMLError."""
    loader = _Loader(text)
    try:
        data = loader.get_single_data()
    finally:
        loader.dispose()
    if repeated is not None:
        repeated += loader.repeated
    elif loader.repeated:
        raise yaml.YAMLError(loader.repeated[0])
    return data


def read_yaml(path: Path, problems: list[str]) -> dict[str, Any]:
    """The mapping in a YAML file; keys that stand twice go to `problems`. Raises ConfigError if it cannot be read."""
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"), problems)
    except FileNotFoundError:
        raise ConfigError([*problems, f"no config file {path}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([*problems, f"config file {path} is not UTF-8 text: {error.reason}"]) from error
    except OSError as error:
        raise ConfigError([*problems, f"cannot read config file {path}: {error.strerror or error}"]) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError([*problems, f"config file {path}{where}: not YAML: {reason}"]) from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError([*problems, f"config file {path} holds a {type(data).__name__}, expected 'key: value' lines"])
    return {str(key): value for key, value in data.items()}
