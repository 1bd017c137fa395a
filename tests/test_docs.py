"""What the README and docs/ say is run, looked up, or compared with the code."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from softprompt.cli.demo import REVIEWS
from softprompt.cli.main import main
from softprompt.config import RunConfig

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "docs"), str(ROOT / "benchmarks"), str(ROOT / "tests" / "cli")]
import make_reference  # noqa: E402
import readme_table  # noqa: E402
from cli_material import make_model, reviews, write_rows  # noqa: E402

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
BLOCK = re.compile(r"<!-- (runnable|file: \S+) -->\n```(\w+)\n(.*?)```", re.DOTALL)
SECTIONS = ("sweep", "tasks", "temperature", "cap")  # of the configs of sweep and mix
RUN = [name for name, page in zip(NAMES, PAGES, strict=True) if "<!-- runnable -->" in page.read_text("utf-8")]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def without_blocks(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def code_in(text: str) -> str:
    """All that stands in a code block, fenced or indented, or between backquotes."""
    fenced = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    indented = re.findall(r"^ {4,}(.*)$", text, re.MULTILINE)
    return "\n".join([*fenced, *indented, *re.findall(r"`([^`\n]+)`", without_blocks(text))])


# --- links, paths, names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", without_blocks(read(name))):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), f"{name} links to {link}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads], link


@pytest.mark.parametrize("name", NAMES)
def test_files_of_the_repository_that_are_named_exist(name: str) -> None:
    found = re.findall(r"\b(?:src|docs|tests|benchmarks|recipes)/[\w./-]*\w", read(name))
    assert [path for path in found if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("CONTRIBUTING.md", "docs/log.md")])
def test_options_and_settings_that_are_named_exist(name: str) -> None:
    known = set(re.findall(r"`(--?[\w-]+)`", make_reference.reference())) | {
        "--help",
        "--check",
        "--demo",
        "--install-completion",
        *("--quick", "--only"),  # of the benchmarks, docs/performance.md
        "--keep",  # of docs/results/make_summary.py, docs/accuracy.md
        "--axes",  # of benchmarks/defaults.py, docs/accuracy.md
        "--rows",
        *("--enable-prompt-embeds", "--model-id", "--model-path", "--outfile"),  # of other engines, docs/export.md
    }
    code = code_in(read(name))
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code)) - known == set()
    for line in re.findall(r"softprompt tune .*", code):
        given = re.findall(r"\s([a-z_]+)=", line)
        assert set(given) - set(RunConfig.model_fields) == set(), line
    for yaml in re.findall(r"```yaml\n(.*?)```", read(name), re.DOTALL):
        assert set(re.findall(r"^(\w+):", yaml, re.MULTILINE)) - {*RunConfig.model_fields, *SECTIONS} == set()


def test_public_names_that_are_named_exist() -> None:
    import softprompt

    for name in NAMES:
        for used in re.findall(r"\bsp\.(\w+)", read(name)):
            assert used in softprompt.__all__, f"{name}: sp.{used}"


def test_the_reference_of_the_command_line_is_up_to_date() -> None:
    hint = "run python docs/make_reference.py"
    assert make_reference.PAGE.read_text(encoding="utf-8") == make_reference.reference(), hint


def test_the_keys_of_the_prompt_file_are_documented() -> None:
    from softprompt.description import _KEYS, FORMAT_VERSION

    page = read("docs/file-format.md")
    assert [key for key in _KEYS if f"`{key}`" not in page] == []
    assert f"| `format_version` | integer | {FORMAT_VERSION} |" in page


def test_defaults_that_are_named_are_the_defaults() -> None:
    defaults = {name: field.default for name, field in RunConfig.model_fields.items()}
    assert defaults["learning_rate"] == 0.05  # "about a twentieth" in docs/softprompt.md
    assert defaults["shares"] == (0.8, 0.1, 0.1)  # 80, 10 and 10 % in docs/own-data.md
    assert defaults["schedule"] == "linear" and defaults["validate_every"] is None


# --- the README -----------------------------------------------------------------------------------------------------


def test_the_readme_shows_the_reviews_of_the_demo() -> None:
    assert tuple(re.findall(r"^> (.*)$", read("README.md"), re.MULTILINE)) == REVIEWS


def test_the_readme_names_two_commands_that_make_knows() -> None:
    commands = re.findall(r"^    (make \w+)$", read("README.md"), re.MULTILINE)
    assert commands == ["make demo", "make test"]
    assert all(re.search(rf"^{command.split()[1]}:", read("Makefile"), re.MULTILINE) for command in commands)


def test_figures_go_between_the_markers(tmp_path: Path) -> None:
    side = {"examples_per_s": 10.0, "utilisation": 0.5, "memory_over_model_mb": 512}
    case = {"name": "short-P20-float32", "batch": 16, "softprompt": side, "peft-prompt": {**side, "utilisation": None}}
    case |= {"times_peft_prompt": {"softprompt": {"median": 2.5, "quartiles": [2.25, 2.75]}}}
    facts = {
        name: f"a-{name}" for name in ("model", "data", "device", "cpu", "commit", "torch", "transformers", "peft")
    }
    (tmp_path / "speed.txt").write_text("a table\n" + json.dumps({**facts, "threads": 2, "cases": [case]}) + "\n")
    score = {"accuracy": 0.75, "interval": [0.7, 0.8], "rows": 1000}
    (tmp_path / "demo.json").write_text(json.dumps({"scores": {"zero-shot": score}, "total_seconds": 90.0}, indent=2))

    lines = readme_table.speed_lines(readme_table.read_json(tmp_path / "speed.txt"))
    lines += readme_table.demo_lines(readme_table.read_json(tmp_path / "demo.json"), "abc123", "a-cpu, 2 threads")
    page = readme_table.put(read("README.md"), lines)
    assert "| short-P20-float32 | 10.00 | 10.00 | 2.50 (2.25 to 2.75) | ? | 0.50, ? | 512 MB, 512 MB |" in page
    assert "| zero-shot | 0.750 | 0.700 to 0.800 |" in page and "commit abc123" in page and "commit a-commit" in page
    assert readme_table.put(page, lines) == page
    assert page.replace("\n".join(lines), "") != page
    assert page.split("<!-- /figures -->")[1] == read("README.md").split("<!-- /figures -->")[1]


# --- what is marked runnable ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("model") / "tiny", context=1024))


def write_tables(folder: Path) -> None:
    """The tables that the pages suppose, about as short as they can be without cross-validation (100 rows)."""
    write_csv(folder / "reviews.csv", reviews(100))
    teams = ("billing", "support", "sales")
    tickets = [
        {"subject": f"s{i}", "text": f"{teams[i % 3]} {i}", "team": teams[i % 3], "customer": f"c{i // 2}"}
        for i in range(102)
    ]
    write_csv(folder / "tickets.csv", tickets)
    facts = [{"facts": f"name: The Vaults {i}", "text": f"The Vaults {i} is a place."} for i in range(100)]
    write_rows(folder / "restaurants.jsonl", facts)
    asked = [{"instruction": f"Say {i}.", "output": f"{i}"} for i in range(100)]
    write_rows(folder / "instructions.jsonl", asked)


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def commands(block: str) -> Iterator[tuple[list[str], str]]:
    """Arguments and standard input of each line of a sh block: `softprompt ...` or `echo TEXT | softprompt ...`."""
    for line in block.splitlines():
        line = re.sub(r"\$'(.*?)'", lambda quoted: shlex.quote(quoted[1].replace(r"\n", "\n")), line)
        words, stdin = shlex.split(line, comments=True), ""
        if words[0] == "echo":
            assert words[2] == "|", line
            stdin, words = words[1] + "\n", words[3:]
        assert words[0] == "softprompt" and not {"|", ">", "<", "&&", "\\"} & set(words), f"cannot run this: {line}"
        yield words[1:], stdin


def run_command(arguments: list[str], stdin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    said = io.StringIO()
    with pytest.raises(SystemExit) as ended, contextlib.redirect_stderr(said):
        main(arguments)
    assert not ended.value.code, f"softprompt {shlex.join(arguments)}\n{said.getvalue()}"


@pytest.mark.parametrize("name", RUN)
def test_what_is_marked_runnable_runs(
    name: str, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All blocks of a page in their order, in one folder, with a tiny model in place of the real one."""
    import softprompt.training.run as training

    def no_figures(folder: Path, *_: Any, **__: Any) -> Path:  # they would take most of the time
        (folder / "report.html").write_text("<html></html>")
        return folder / "report.html"

    monkeypatch.setattr(training, "_write_page", no_figures)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    write_tables(tmp_path)
    ran = 0
    for kind, language, block in BLOCK.findall(read(name)):
        block = block.replace("smollm2-135m", tiny)
        if kind.startswith("file: "):
            (tmp_path / kind.removeprefix("file: ")).write_text(block, encoding="utf-8")
        elif language == "python":
            exec(compile(block, name, "exec"), {})
            ran += 1
        else:
            for arguments, stdin in commands(block):
                if arguments[0] != "doctor":  # its exit code tells of this machine
                    run_command(arguments, stdin, monkeypatch)
                ran += 1
    assert ran >= 2
    capsys.readouterr()
