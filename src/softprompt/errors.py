"""Every error that softprompt raises on purpose.

One root, so that `except SoftPromptError` is enough. Each error is also a ValueError (what was given is wrong) or a
RuntimeError (the machine or the run went wrong). The text says what was found, what was expected and what to do.
"""

from __future__ import annotations


class SoftPromptError(Exception):
    """Root of all errors raised on purpose. The text is meant for the user; no traceback is needed to act on it."""


class ConfigError(SoftPromptError, ValueError):
    """A setting is wrong. `problems` holds every mistake that was found, one line each."""

    def __init__(self, problems: str | list[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("; ".join(self.problems))


class TemplateError(SoftPromptError, ValueError):
    """The input, target or chat text is wrong: unknown field, no target, unbalanced braces."""


class DataError(SoftPromptError, ValueError):
    """A file or its rows are wrong: missing, empty, unparseable, no such column, a label that is not in `labels`."""


class PromptFormatError(SoftPromptError, ValueError):
    """A prompt folder is half-written, tampered with, of another format version, or not a prompt at all."""


class BackboneError(SoftPromptError, ValueError):
    """The model cannot be found, read or used as a frozen causal language model."""


class BackboneMismatchError(BackboneError):
    """A prompt is used with another model than the one it was tuned for."""


class OutputError(SoftPromptError, RuntimeError):
    """A result cannot be written: the folder holds something else, is not writable, or the disk is full."""


class LibraryError(SoftPromptError, ValueError):
    """A folder of prompts has no prompt of that name, has one already, or the name cannot be one."""


class HubError(SoftPromptError, RuntimeError):
    """A model hub cannot be reached, or does not have or take what was asked for."""


class TrainingError(SoftPromptError, RuntimeError):
    """Tuning cannot go on, for instance because the loss is not a finite number."""
