"""What a comparison leaves to look at: summary.json, results.csv, figures and report.html, all from the cells alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from .. import __version__
from ..atomic import write_atomic
from .catalogue import METHODS
from .figures import all_figures, as_file
from .store import DONE
from .summary import averages, averages_by_size, document, summarise, to_csv


def write_results(folder: str | Path, cells: Sequence[dict[str, Any]], name: str = "") -> list[dict[str, Any]]:
    """Write summary.json, results.csv, figures/*.svg and report.html into `folder`; returns the lines. OutputError."""
    folder, lines = Path(folder), summarise(cells)
    shown = json.dumps(document(lines), indent=1, ensure_ascii=False, default=str)
    write_atomic(folder / "summary.json", (shown + "\n").encode())
    write_atomic(folder / "results.csv", to_csv(lines).encode())
    figures = all_figures(lines)
    for title, figure in figures.items():
        write_atomic(folder / "figures" / f"{title}.svg", as_file(figure))
    page = render(page_data(lines, cells, figures, name or folder.name))
    write_atomic(folder / "report.html", page.encode("utf-8", "replace"))
    return lines


def page_data(
    lines: Sequence[dict[str, Any]], cells: Sequence[dict[str, Any]], figures: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """Everything that the page shows, as texts."""
    pairs = dict.fromkeys((line["task"], line["model"]) for line in lines)
    several = len({model for _, model in pairs}) > 1
    groups = [
        {
            "title": f"{task} ({model})" if several else task,
            "metric": next(x["metric"] for x in lines if (x["task"], x["model"]) == (task, model)),
            "rows": [shown(x) for x in lines if (x["task"], x["model"]) == (task, model)],
        }
        for task, model in pairs
    ]
    done = [cell for cell in cells if cell["status"] == DONE]
    return {
        "title": name,
        "models": ", ".join(dict.fromkeys(f"{c['model']} ({count(c['model_parameters'])} parameters)" for c in done)),
        "machines": list(dict.fromkeys(in_words(cell["machine"]) for cell in done)),
        "about": [(name, METHODS[name].about) for name in METHODS if any(x["method"] == name for x in lines)],
        "averages": [{**x, **shown_costs(x)} for x in averages(lines)],
        "sizes": averages_by_size(lines) if several else [],
        "groups": groups,
        "figures": list(figures.values()),
        "left_out": [x for x in lines if x["reason"]],
        "trials": [x for x in lines if x.get("trials")],
        "writer": f"softprompt {__version__}",
    }


def shown(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line as texts: score, interval, p and costs."""
    if line["status"] != DONE:
        return {"method": line["method"], "done": False, "reason": f"{line['status']}: {line['reason']}", "best": False}
    return {
        "method": line["method"],
        "done": True,
        "best": line["best"],
        "score": number(line["score"]),
        "interval": "" if line["low"] is None else f"{number(line['low'])} to {number(line['high'])}",
        "seeds": str(line["seeds"]),
        "seed_sd": "" if line["seed_sd"] is None else number(line["seed_sd"]),
        "p": "best" if line["best"] else p_value(line["p"]),
        "rate": ", ".join(filter(None, [f"{line['learning_rate']:g}" if line["learning_rate"] else "", at_edge(line)])),
        **shown_costs(line),
    }


def at_edge(line: Mapping[str, Any]) -> str:
    """Whether the best learning rate was the highest or lowest of several: a better one may lie beyond; "" if not."""
    tried = [trial["learning_rate"] for trial in line.get("trials") or ()]
    if not tried or line["learning_rate"] not in (min(tried), max(tried)):
        return ""
    return "the highest tried" if line["learning_rate"] == max(tried) else "the lowest tried"


def shown_costs(line: Mapping[str, Any]) -> dict[str, str]:
    """What a method costs, as texts; empty where it is not known or nothing was trained."""
    added = line["added_inference_seconds"]
    return {
        "parameters": count(line["trained_parameters"]) if line["trained_parameters"] else "0",
        "disk": size(line["disk_bytes"]),
        "memory": size(line["peak_memory_bytes"]),
        "time": seconds(line["train_seconds"]) if line["train_seconds"] else "",
        "rate_of_examples": f"{line['examples_per_second']:.1f}" if line["examples_per_second"] else "",
        "switch": seconds(line["switch_seconds"]),
        "added": "" if added is None else f"{1000 * added:+.1f} ms",
        "energy": "" if line["energy_joules"] is None else f"{line['energy_joules']:,.0f} J",
    }


def number(value: float) -> str:
    """A score: 0.8473, or 61.35 where it is one of those from 0 to 100."""
    return f"{value:.4f}" if abs(value) <= 1 else f"{value:.2f}"


def p_value(value: float | None) -> str:
    if value is None:
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def count(value: float | None) -> str:
    """11520 -> 11,520; 2442240 -> 2.4 M."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value < 1e6 else f"{value / 1e6:,.1f} M"


def size(value: float | None) -> str:
    """Bytes as B, kB, MB or GB of thousands."""
    if value is None:
        return ""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.1f} {unit}"
    return f"{value:.0f} B"


def seconds(value: float | None) -> str:
    """0.012 -> 12 ms, 3.4 -> 3.4 s, 312 -> 5.2 min, 7000 -> 1.9 h."""
    if value is None:
        return ""
    if value < 1:
        return f"{1000 * value:.0f} ms"
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def in_words(machine: Mapping[str, Any]) -> str:
    threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"
    return f"{machine['gpu'] or machine['processor']}, {threads}, {machine['system']}"


def render(page: Mapping[str, Any]) -> str:
    """The page, in the style of the run report; everything but our own figures is escaped."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    source = resources.files(__package__).joinpath("compare.html.j2").read_text(encoding="utf-8")
    report = resources.files("softprompt.inspection").joinpath("report.html.j2").read_text(encoding="utf-8")
    found = re.search(r"<style>(.*?)</style>", report, re.DOTALL)
    style = Markup(found.group(1) if found else "")  # our own file
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["svg"] = Markup
    return environment.from_string(source).render({**page, "style": style, "number": number, "count": count})
