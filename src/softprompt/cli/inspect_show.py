"""What `softprompt inspect` shows on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .output import Output

if TYPE_CHECKING:
    from ..inspection.inspecting import Inspection


def show(out: Output, found: Inspection) -> None:
    """All that was seen of a prompt."""
    from ..inspection.findings import answers, facts
    from .scores import table

    out.show(f"{found.name}: " + ", ".join(f"{what} {value}" for what, value in facts(found)))
    out.show(_token_table(found))
    if found.near:
        out.show(_other_measures(found))
    for measure, stick in found.yardsticks.items():
        words, chance = stick.words, stick.chance
        out.show(
            f"near by {measure}: a word and its nearest other word {words[1]:.3g} (nine in ten {words[0]:.3g} to "
            f"{words[2]:.3g}), a soft token and a word by chance {chance[1]:.3g} ({chance[0]:.3g} to {chance[2]:.3g})"
        )
    if found.lengths:
        out.show(f"norm of a word: {found.lengths.mean:.3g} ({found.lengths.low:.3g} to {found.lengths.high:.3g})")
    for _, sentence in answers(found):
        out.show(sentence)
    if found.importance and (found.importance.first or found.importance.shuffled):
        shown = table("what is left", "accuracy", "loss", "difference", "p", "loss of the answer")
        for row in _changed(found):
            shown.add_row(*row)
        out.show(shown)
    if found.attention:
        out.show(_attention_table(found))
    if found.deep:
        out.show(_layer_sizes(found))
    if found.deep and found.deep.words:
        out.show(_layer_table(found))
    if found.projection:
        x, y = found.projection.explained
        out.show(f"in two dimensions (--report draws them, --json gives them) {x + y:.0%} of the variance can be seen")
    if found.notes:
        out.show("not shown: " + "; ".join(found.notes))
    out.show("")


def _token_table(found: Inspection) -> Any:
    from .scores import table

    near = found.near.get("cosine")
    columns = ["token", "norm"]
    columns += ["moved", "cosine with start"] if found.moved else []
    left_out = found.importance is not None and bool(found.importance.left_out)
    choosing = left_out and found.importance is not None and found.importance.whole.choices is not None
    columns += ["loss without it", "+- 2 errors"] if left_out else []
    columns += ["of the answer"] if choosing else []
    columns += ["attention"] if found.attention else []
    columns += ["nearest words (cosine)"] if near else []
    shown = table(*columns)
    if near:
        shown.columns[-1].justify, shown.columns[-1].no_wrap, shown.columns[-1].overflow = "left", False, "fold"
    looked = found.attention.tokens.mean(dim=0).tolist() if found.attention else []
    for token in range(found.prompt.tokens):
        cells = [str(token), f"{float(found.norms[token]):.3g}"]
        if found.moved:
            distance, cosine = found.moved[token]
            cells += [f"{distance:.3g}", "-" if cosine is None else f"{cosine:.3f}"]
        if found.importance is not None and left_out:
            cells += [f"{found.importance.of_token[token]:+.4f}", f"{2 * found.importance.errors[token]:.4f}"]
            cells += [f"{found.importance.of_answer[token]:+.4f}"] if choosing else []
        if looked:
            cells.append(f"{looked[token]:.4f}")
        if near:
            cells.append("  ".join(f"{word.text!r} {word.similarity:.2f}" for word in near[token]))
        shown.add_row(*cells)
    return shown


def _other_measures(found: Inspection) -> Any:
    """The nearest words by the measures that are not in the first table."""
    from .scores import table

    shown = table("token", "by Euclidean distance", "by dot product")
    for column in shown.columns[1:]:
        column.justify, column.no_wrap, column.overflow = "left", False, "fold"
    for token in range(found.prompt.tokens):
        rows = (found.near[measure][token] for measure in ("euclidean", "dot"))
        shown.add_row(str(token), *("  ".join(f"{word.text!r} {word.similarity:.3g}" for word in row) for row in rows))
    return shown


def _attention_table(found: Inspection) -> Any:
    """Layer by layer: how much of the answer's attention the soft tokens get, and which of them the most."""
    from .scores import table

    assert found.attention is not None
    shown = table("layer", "attention to the prompt", "most to")
    shown.columns[-1].justify = "left"
    for number, row in enumerate(found.attention.tokens):
        values, tokens = row.topk(min(3, len(row)))
        most = "  ".join(f"token {token} {value:.3f}" for value, token in zip(values.tolist(), tokens.tolist()))
        shown.add_row(str(number), f"{float(row.sum()):.3f}", most)
    return shown


def _layer_sizes(found: Inspection) -> Any:
    """Norms of the keys and values of a deep prompt, mean over its tokens, and how far they moved."""
    from .scores import table

    assert found.deep is not None
    deep = found.deep
    moved = [] if deep.moved is None else ["keys moved", "values moved"]
    shown = table("layer", "norm of the keys", "norm of the values", *moved)
    for number, sizes in enumerate(deep.norms.mean(dim=2).tolist()):
        cells = [f"{size:.3g}" for size in sizes]
        if deep.moved is not None:
            cells += [f"{share:.1%}" for share in deep.moved[number].mean(dim=1).tolist()]
        shown.add_row(str(number), *cells)
    return shown


def _changed(found: Inspection) -> list[tuple[str, ...]]:
    from ..inspection.inspect_page import changes

    return [
        (row["name"], row["accuracy"], row["loss"], row["difference"], row["p"], row["answer"])
        for row in changes(found.importance)
    ]


def _layer_table(found: Inspection) -> Any:
    """The first word of each token's values, layer by layer, for as many tokens as fit."""
    from .scores import table

    assert found.deep is not None
    most = min(found.prompt.tokens, 8)
    shown = table("layer", *(f"token {token}" for token in range(most)))
    for number, layer in enumerate(found.deep.words):
        shown.add_row(str(number), *(repr(layer[token][0].text) if layer[token] else "-" for token in range(most)))
    return shown
