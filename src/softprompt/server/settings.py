"""What may be set about a server. Plain data, checked as a whole before anything is loaded."""

from __future__ import annotations

import hashlib
import ipaddress
from dataclasses import dataclass

from ..errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """Bounds on one request; what exceeds them is refused with 400 or 413.

    body_bytes: of a request. prompts: texts in one request. tasks: of one classification. choices: n. stops,
    stop_length: number and characters of stop texts. logprobs: of each token. biases: entries of logit_bias. messages:
    of a chat. tokens: generated for one text at most (None: what the context leaves). default_tokens: where a chat does
    not say. total_tokens: that one request with all its texts and choices may come to. seconds: a request may take in
    all. body_seconds: until its body must be there. send_seconds: a client may take to accept a piece of a stream.
    """

    body_bytes: int = 2 << 20
    prompts: int = 64
    tasks: int = 256
    choices: int = 8
    stops: int = 4
    stop_length: int = 64
    logprobs: int = 20
    biases: int = 300
    messages: int = 256
    tokens: int | None = None
    default_tokens: int = 256
    total_tokens: int = 1 << 18
    seconds: float = 600.0
    body_seconds: float = 30.0
    send_seconds: float = 30.0


@dataclass(frozen=True)
class ServerSettings:
    """keys, admin_keys: sha256 (hex) of the keys; none: no key is asked for, or there are no admin routes. watch:
    seconds between looks at the folder; 0: never. drain: seconds that requests under way have to end when the server
    stops. Raises ConfigError."""

    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    watch: float = 2.0
    drain: float = 30.0
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        wrong = []
        if not self.keys and not is_local(self.host):
            wrong.append(f"host: {self.host} can be reached by others, so a key is needed; give --key-file")
        if not 0 <= self.port < 65536:
            wrong.append(f"port: expected 0 to 65535, found {self.port}")
        if set(self.keys) & set(self.admin_keys):
            wrong.append("admin-key-file: an admin key is also a key for everybody; make another one")
        if self.watch < 0 or self.drain < 0:
            wrong.append("watch and drain: expected 0 seconds or more")
        if wrong:
            raise ConfigError(wrong)


def is_local(host: str) -> bool:
    """Whether only this machine reaches the address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(text: str, where: str) -> tuple[str, ...]:
    """Hashes of the keys in `text`, one a line: the key itself, or `sha256:` and its hash. Raises ConfigError."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("sha256:"):
            digest = line.removeprefix("sha256:").strip().lower()
            if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
                raise ConfigError(f"{where}: line {number} is not sha256: and 64 hex digits")
            found.append(digest)
        elif len(line) < 16 or not line.isascii() or any(c.isspace() for c in line):
            raise ConfigError(f"{where}: the key in line {number} needs 16 or more ASCII characters without spaces")
        else:
            found.append(hash_key(line))
    if not found:
        raise ConfigError(f"{where}: holds no key")
    return tuple(dict.fromkeys(found))
