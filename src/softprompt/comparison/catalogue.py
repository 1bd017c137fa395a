"""Which methods can be compared, and by which scores. Plain facts: nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches


@dataclass(frozen=True)
class MethodFacts:
    """about: one line for tables. rates: its learning-rate grid when it is searched; () if it trains nothing.

    shipped: the one learning rate that it has without a search, None for baselines, which are always searched (for the
    soft prompts 0 stands for the default of TuneConfig). seeded: whether a seed changes anything.
    """

    about: str
    rates: tuple[float, ...] = ()
    shipped: float | None = None
    seeded: bool = True

    @property
    def trains(self) -> bool:
        return bool(self.rates)


# The learning rates of soft prompts are in units of the embedding RMS (prompt) or of the states' own size (deep), the
# others are absolute. Each grid has the same number of values, so that a search costs every method the same steps.
METHODS: dict[str, MethodFacts] = {
    "zero-shot": MethodFacts("the template as plain text", seeded=False),
    "few-shot": MethodFacts("worked examples before the text, as many as fit"),
    "prompt": MethodFacts("soft prompt among the embeddings", (0.02, 0.05, 0.15), 0.0),
    "prompt-behind": MethodFacts("the same, before the last word of the text", (0.02, 0.05, 0.15), 0.0),
    "deep": MethodFacts("trained keys and values in each layer", (0.02, 0.05, 0.15), 0.0),
    "deep-behind": MethodFacts("the same, before the last word of the text", (0.02, 0.05, 0.15), 0.0),
    "lora": MethodFacts("PEFT's LoRA, rank 8 on all linear layers", (1e-3, 3e-3, 1e-2)),
    "peft-prompt": MethodFacts("PEFT's prompt tuning as its guide sets it", (1e-2, 3e-2, 1e-1), 3e-2),
    "full": MethodFacts("all weights of a copy of the model", (3e-5, 1e-4, 3e-4)),
}
SOFT = ("prompt", "prompt-behind", "deep", "deep-behind")
BEHIND = ("prompt-behind", "deep-behind")
CLASS_METRICS = ("accuracy", "macro_f1", "balanced_accuracy")
TEXT_METRICS = ("rouge_l", "token_f1", "exact_match", "chrf", "bleu")
PERCENT = ("chrf", "bleu")  # from 0 to 100, the others from 0 to 1


def unknown_method(name: str) -> str:
    """One line about a method that does not exist, with the nearest one that does."""
    near = get_close_matches(name, METHODS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(METHODS)}"
    return f"methods: unknown method '{name}'; {hint}"


def wrong_metric(metric: str, has_labels: bool) -> str:
    """One line about a metric that does not fit a task, "" if it does."""
    fitting = CLASS_METRICS if has_labels else TEXT_METRICS
    if metric in fitting:
        return ""
    kind = "with labels" if has_labels else "of free text"
    return f"metric '{metric}' does not fit a task {kind}; expected {', '.join(fitting)}"
