"""Line breaks typed in a shell."""

from __future__ import annotations

from softprompt.config import as_typed, load_config, parse_value


def test_typed_line_breaks() -> None:
    assert as_typed(r"a\nb\tc\\nd") == "a\nb\tc\\nd"
    assert parse_value("input", r"{text}\nType:") == "{text}\nType:"
    assert parse_value("model", r"C:\new") == r"C:\new"
    assert as_typed("a\nb") == "a\nb"


def test_a_config_file_is_taken_as_it_is(tmp_path) -> None:
    (tmp_path / "reviews.csv").write_text("text,label\na,x\nb,y\n")
    lines = ["model: m", f"train: {tmp_path}/reviews.csv", r"input: '{text}\n'", "target: ' {label}'", "labels: [x, y]"]
    (tmp_path / "c.yaml").write_text("\n".join([*lines, f"out: {tmp_path}/p"]))
    assert load_config(tmp_path / "c.yaml").input == "{text}\\n"
    assert load_config(tmp_path / "c.yaml", [r"input={text}\n"]).input == "{text}\n"
