"""The tables of docs/performance.md, of one benchmark's document each."""

from __future__ import annotations

from .tables import Found, deep_lines, machine_of, megabytes, number, ratio_text, speed_lines

SUFFIX_NAMES = {
    "suffix": "soft prompt behind the text, texts kept",
    "deep-suffix": "deep prompt behind the text, texts kept",
    "softprompt": "soft prompt in front, our exact path",
    "peft-prompt": "PEFT prompt tuning",
}
INFERENCE_NAMES = {
    "softprompt": "softprompt",
    "peft-logits": "PEFT, one forward a text, the label words' tokens compared",
    "peft-labels": "PEFT, each label word behind each text",
    "peft": "PEFT `generate`, left-padded batch",
}


def train_lines(found: Found) -> list[str]:
    return [*speed_lines(found), "", "Deep prompts at the front and PEFT's prefix tuning:", "", *deep_lines(found)]


def suffix_lines(found: Found) -> list[str]:
    """An epoch after the first. found: of suffix_speed.py; none where only the goal was measured."""
    if "sides" not in found:
        return []
    lines = [
        f"Reviews of IMDb cut to 256 tokens, {found['tokens']} soft tokens, batches of 16, {found['precision']}",
        f"{machine_of(found)}:",
        "",
        "| | ms a row | texts, once, ms a row | times as fast as our exact path | times as fast as PEFT |",
        "|---|---|---|---|---|",
    ]
    for name, side in found["sides"].items():
        times, wanted = found["times"].get(name, {}), found["targets"].get(name, {})
        said = [f"{times[o]:.1f} (to reach: {wanted[o]})" if o in times else "" for o in ("softprompt", "peft-prompt")]
        once = number(side.get("texts_ms_per_row"), 0) if "texts_ms_per_row" in side else ""
        lines.append(f"| {SUFFIX_NAMES[name]} | {number(side['ms_per_row'], 1)} | {once} | {said[0]} | {said[1]} |")
    return lines


def goal_lines(found: Found) -> list[str]:
    """Time to a validation accuracy. found: of suffix_speed.py with --goal, else nothing."""
    goal = found.get("goal")
    if not goal:
        return []
    lines = [
        f"Validation accuracy {goal['accuracy']} on {goal['validation_rows']} movie reviews, to reach in "
        f"{goal['target_s']} s {machine_of(found)}:",
        "",
        "| | reached after | best | rows seen | time in all |",
        "|---|---|---|---|---|",
    ]
    for name, label in (("softprompt", "deep suffix"), ("peft-prompt", "PEFT with transformers' Trainer, 3e-2")):
        side = goal[name]
        reached = "not reached" if side["reached_after_s"] is None else f"{side['reached_after_s']:.0f} s"
        texts = f", of it {side['texts_s']:.0f} s for the texts" if side.get("texts_s") else ""
        best = number(side["best_accuracy"], 3)
        lines.append(f"| {label} | {reached}{texts} | {best} | {side['rows_seen']} | {side['seconds']:.0f} s |")
    return lines


def inference_lines(found: Found) -> list[str]:
    lines = [
        f"{found['tokens']} soft tokens, {found['precision']} {machine_of(found)}:",
        "",
        "| | side | examples/s | softprompt is so many times as fast (quartiles) | to reach | memory over the model |",
        "|---|---|---|---|---|---|",
    ]
    for what in (name for name in ("evaluation", "generation") if name in found):
        part = found[what]
        for name in (key for key in INFERENCE_NAMES if key in part):
            side, times = part[name], part["times"].get(name)
            said = f"{ratio_text(times)} | {part['target']}" if times else " | "
            memory = megabytes(side["memory_over_model_mb"])
            rate = number(side["examples_per_s"], 2)
            lines.append(f"| {what} | {INFERENCE_NAMES[name]} | {rate} | {said} | {memory} |")
    if "generation" in found:
        part, exact = found["generation"], found["precision"] == "float32"
        asserted = "asserted" if exact else "others differ by rounding; in float32 all are asserted to be"
        lines += [
            "",
            f"Of our generated answers {part['same_as_peft_alone']} are PEFT's to the row alone ({asserted}), and "
            f"{part['same_as_peft_in_its_batch']} those of PEFT's padded batch.",
        ]
    return lines


def curve_lines(found: Found) -> list[str]:
    common = found["common"]
    lines = [
        f"Milliseconds a row, loss and gradient, {found['precision']} {machine_of(found)}; other than what varies:"
    ]
    lines.append(f"{common['tokens']} soft tokens, {common['batch']} rows a step, {common['length']} tokens a row.")
    for axis in found["curves"]:
        lines += ["", f"![cost against {axis}](pictures/speed-{axis}.svg)"]
    return [*lines, "", "![cost against trials](pictures/speed-trials.svg)"]
