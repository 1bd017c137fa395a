"""What was seen of a prompt, in sentences: the same for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .inspecting import Inspection
from .words import Vocabulary


def facts(found: Inspection) -> list[tuple[str, str]]:
    prompt = found.prompt
    size = f"{prompt.tokens:,} token{'s' if prompt.tokens != 1 else ''}"
    size += (
        f" of width {prompt.width}" if prompt.kind == "embedding" else f" in each of {prompt.vectors.shape[0]} layers"
    )
    facts = [("model", prompt.base_model or "not known"), ("soft prompt", size), ("kind", prompt.kind)]
    if prompt.template is not None:
        facts.append(("place", prompt.template.placement.replace("_", " ")))
    if found.start:
        facts.append(("start known from", found.start))
    return facts


def answers(found: Inspection) -> list[tuple[str, str]]:
    """(question, answer) of all that was measured, the most telling first."""
    return [*_of_importance(found), *_of_attention(found), *_of_words(found), *_of_gradients(found)]


def _of_words(found: Inspection) -> list[tuple[str, str]]:
    said = []
    near, stick = found.near.get("cosine"), found.yardsticks.get("cosine")
    if near and stick:
        best = [row[0].similarity for row in near if row]
        close = sum(value > stick.words[1] for value in best)
        said.append(
            (
                "Is a soft token near a word?",
                f"{close} of {len(near)} soft tokens are nearer to a word than a word usually is to its nearest other "
                f"word (cosine above {stick.words[1]:.2f}); a word by chance is at {stick.chance[1]:.2f}.",
            )
        )
    words = found.vocabulary
    if words is not None and words.survived_share is not None:
        said.append(
            (
                "Is it still the word that it started from?",
                f"For {words.survived_share:.0%} of the tokens the nearest word is still the one they started from"
                f"{_left(found, words)}.",
            )
        )
    if found.clusters and found.clusters.tightness is not None and found.clusters.by_chance is not None:
        tight = found.clusters
        said.append(
            (
                "Do its nearest words belong together?",
                f"The neighbours of one token have a mean cosine of {tight.tightness:.2f} with each other (by chance: "
                f"{tight.by_chance:.2f}), and {tight.same_stem:.0%} of them share a stem with another one.",
            )
        )
    if words is not None:
        said += _of_task(words)
    return said


def _left(found: Inspection, words: Vocabulary) -> str:
    """Which words of the start are still nearest, or which are not: whichever is fewer."""
    stayed = dict(words.survived)
    gone = [i for i in range(found.prompt.tokens) if i not in stayed]
    if not gone or not stayed:
        return ""
    fewer, what = (gone, "no longer") if len(gone) <= len(stayed) else (sorted(stayed), "these")
    begun = found.begun or [""] * found.prompt.tokens
    some = ", ".join(f"token {i} (“{begun[i].strip()}”)" for i in fewer[:8])
    return f"; {what}: {some}" + (f" and {len(fewer) - 8} more" if len(fewer) > 8 else "")


def _of_gradients(found: Inspection) -> list[tuple[str, str]]:
    steps, norms = found.gradient_history()
    if len(steps) < 2 or not np.isfinite(norms).any():
        return []
    tenth = max(1, len(steps) // 10)
    first, last = (float(np.nanmean(part)) for part in (norms[:tenth], norms[-tenth:]))
    of_token = np.nanmean(norms, axis=0)
    most, least = int(np.nanargmax(of_token)), int(np.nanargmin(of_token))
    return [
        (
            "How strongly was it pulled in tuning?",
            f"The gradient of a token was {first:.3g} on average in the first {_steps(tenth)} and {last:.3g} in the "
            f"last, over all {len(steps):,} largest for token {most} ({of_token[most]:.3g}), smallest for token "
            f"{least} ({of_token[least]:.3g}).",
        )
    ]


def _steps(count: int) -> str:
    return f"{count:,} steps" if count > 1 else "step"


def _of_task(words: Vocabulary) -> list[tuple[str, str]]:
    """Words of the task, and words that come up again."""
    said = []
    if words.labels is not None:
        there = [f"“{word}” ({_tokens(tokens)})" for word, tokens in words.labels.items() if tokens]
        more = f" and {len(there) - 8} more" if len(there) > 8 else ""
        said.append(("Does it name the answers?", f"Label words nearby: {', '.join(there[:8]) or 'none'}{more}."))
    if words.frequent:
        some = ", ".join(f"“{word}” ({_tokens(tokens)})" for word, tokens in list(words.frequent.items())[:8])
        said.append(("Does it know the texts?", f"Frequent words of the task's texts nearby: {some}."))
    if words.repeated:
        places: dict[str, set[int]] = {}  # with and without a space before it, a word is one word to a reader
        for word, tokens in words.repeated:
            places.setdefault(word.strip(), set()).update(tokens)
        ranked = sorted(places.items(), key=lambda pair: -len(pair[1]))[:6]
        most = ", ".join(f"“{word}” ({len(tokens)} tokens)" for word, tokens in ranked)
        said.append(("Do several tokens stand near the same word?", f"Words near more than one token: {most}."))
    return said


def _of_importance(found: Inspection) -> list[tuple[str, str]]:
    if not found.importance or not found.importance.left_out:
        return []
    costs, errors = found.importance.of_token, found.importance.errors
    clear = [i for i, (cost, error) in enumerate(zip(costs, errors)) if cost > 2 * error]
    top = max(range(len(costs)), key=costs.__getitem__)
    rows = len(found.importance.whole.losses)
    said = [
        (
            "Which tokens matter?",
            f"Leaving a token out makes the loss clearly higher for {len(clear)} of {len(costs)} tokens; most for "
            f"token {top} ({costs[top]:+.3f} ± {2 * errors[top]:.3f} nats a row, on {rows} rows).",
        )
    ]
    if found.importance.whole.choices is not None:
        whole = found.importance.of_answer
        top = max(range(len(whole)), key=whole.__getitem__)
        said.append(
            (
                "Which token says that a label is wanted?",
                f"The above is the loss among the labels. That the answer is to be a label at all depends most on "
                f"token {top} (loss of the answer {whole[top]:+.3f} nats a row without it).",
            )
        )
    return said


def _of_attention(found: Inspection) -> list[tuple[str, str]]:
    if not found.attention:
        return []
    share = float(found.attention.tokens.sum(dim=1).mean())
    even = found.attention.fair * found.attention.tokens.shape[1]
    return [
        (
            "Where does the answer look?",
            f"From the answer's position {share:.0%} of the attention goes to the soft tokens, mean over layers (if it "
            f"were even: {even:.0%}).",
        )
    ]


def _tokens(tokens: Sequence[int]) -> str:
    shown = ", ".join(map(str, tokens[:8])) + ("…" if len(tokens) > 8 else "")
    return ("token " if len(tokens) == 1 else "tokens ") + shown
