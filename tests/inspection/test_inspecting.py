"""`sp.inspect`: what it finds, that it never crashes, and its page."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from inspect_material import make_model, make_task, prompt_of, renamed, words_prompt
from test_report import EVIL, Page

import softprompt as sp
from softprompt import SoftPrompt, Template
from softprompt.computation import deep_from_tokens
from softprompt.errors import BackboneError, PromptFormatError
from softprompt.inspection import lens
from softprompt.inspection.inspect_page import write_inspections, write_pictures
from softprompt.inspection.inspecting import Inspection
from softprompt.inspection.nearest import nearest_tokens
from softprompt.inspection.similarity import similarity
from softprompt.training.checkpoint import Checkpoint, save_checkpoint
from tiny_models import make_tokenizer, random_vectors


def full(tmp_path: Path) -> Inspection:
    """Everything that can be seen of an embedding prompt."""
    backbone, task = make_model(), make_task()
    result = sp.tune(backbone, task, tokens=4, steps=3, run_folder=tmp_path / "run", init="vocabulary")
    return sp.inspect(result.prompt, backbone, task.test, run=tmp_path / "run", rows=6)


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_a_tuned_prompt_is_seen_whole(tmp_path: Path) -> None:
    found = full(tmp_path)
    assert found.notes == []
    assert found.start == "the run's checkpoint"
    assert len(found.moved) == 4 and all(distance > 0 for distance, _ in found.moved)
    assert found.importance is not None and len(found.importance.of_token) == 4
    assert found.attention is not None and found.attention.tokens.shape == (3, 4)
    assert found.attention.rows == 6
    assert found.projection is not None and set(found.projection.prompts) == {"prompt", "its start"}
    assert json.loads(json.dumps(found.to_dict()))["tokens"] == 4
    starts = nearest_tokens(found.initial, make_model().embedding_table(), make_tokenizer(), 1)
    assert found.begun == [row[0].text for row in starts]
    page = read(found.save(tmp_path / "report.html"))
    for told in (
        "Soft tokens",
        "nearest words",
        "loss without it",
        "attention",
        "The prompt changed",
        "McNemar",
        "In short",
    ):
        assert told in page.text, told
    assert "script" not in page.tags
    assert len(set(page.values("id"))) == len(page.values("id"))
    assert not [link for name in ("src", "href") for link in page.values(name) if not link.startswith("#")]


@pytest.mark.parametrize("init", ["text", "labels", "vocabulary", "random"])
def test_where_it_started_is_made_again_from_its_provenance(init: str) -> None:
    backbone, task = make_model(), make_task()
    result = sp.tune(backbone, task, tokens=5, steps=2, init=init, seed=3)
    found = sp.inspect(result.prompt, backbone)
    assert found.initial is not None and result.initial is not None
    assert torch.equal(found.initial, result.initial.float())
    other = renamed(result.prompt, fingerprint="0" * 16)
    assert sp.inspect(other, backbone).moved == []


def test_a_prompt_from_elsewhere_is_shown_with_what_there_is(tmp_path: Path) -> None:
    backbone = make_model()
    bare = SoftPrompt(torch.randn(3, backbone.width))
    alone = sp.inspect(bare)
    assert alone.norms.tolist() == pytest.approx(bare.vectors.norm(dim=1).tolist())
    assert alone.near == {} and alone.importance is None
    with_model = sp.inspect(bare, backbone, make_task().test, rows=3)
    assert len(with_model.near["cosine"]) == 3 and with_model.importance is not None
    for found in (alone, with_model):
        text = "; ".join(found.notes)
        assert "template" in text and "provenance" in text
        page = read(found.save(tmp_path / "report.html"))
        assert "Not shown" in page.text


def test_what_does_not_fit_is_noted() -> None:
    backbone = make_model()
    wrong_width = sp.inspect(SoftPrompt(torch.randn(2, 7)), backbone, make_task().test)
    assert wrong_width.near == {} and any("does not fit" in note for note in wrong_width.notes)
    other_model = sp.inspect(prompt_of(backbone, torch.randn(2, 32)), make_model("qwen2"))
    assert other_model.near and any("another model" in note for note in other_model.notes)
    wrong_deep = sp.inspect(SoftPrompt(torch.randn(3, 2, 1, 4, 5)), backbone)
    assert wrong_deep.deep is not None and not wrong_deep.deep.words


def test_zero_vectors_one_token_and_strange_run_folders(tmp_path: Path) -> None:
    backbone = make_model()
    (tmp_path / "metrics.jsonl").write_bytes(b'{"event": "step", "step": 1}\n\xff\xfe')
    for vectors in (torch.zeros(2, 32), torch.full((1, 32), 1e20), torch.ones(1, 32)):
        found = sp.inspect(prompt_of(backbone, vectors), backbone, make_task().test, run=tmp_path, rows=2)
        found.save(tmp_path / "report.html")
    assert sp.inspect(prompt_of(backbone, torch.ones(1, 32)), run=tmp_path / "nowhere").events == []


def test_a_failing_part_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr("softprompt.inspection.inspecting.answer_attention", broken)
    backbone = make_model()
    found = sp.inspect(words_prompt(backbone), backbone, make_task().test, rows=2)
    assert found.attention is None and found.importance is not None
    assert "attention: failed (RuntimeError: no such thing)" in found.notes


def test_a_folder_that_is_no_prompt_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PromptFormatError):
        sp.inspect(tmp_path)


def test_texts_in_a_prompt_stay_texts(tmp_path: Path) -> None:
    template = Template.make(
        "{soft}" + EVIL.replace("{", "{{").replace("}", "}}") + "{text}", "{label}", labels=["a", EVIL]
    )
    backbone = make_model()
    prompt = renamed(words_prompt(backbone), template=template, base_model=EVIL, provenance={"run": EVIL, "x": [EVIL]})
    found = sp.inspect(prompt, backbone, name=EVIL)
    page = read(found.save(tmp_path / "report.html"))
    assert "script" not in page.tags and "img" not in page.tags
    assert "alert(1)" in page.text


# --- deep prompts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma3", "qwen3"])
def test_values_say_what_the_model_s_own_output_says(architecture: str) -> None:
    """The lens of the last layer is final norm and head of o_proj's output, taken from the model with hooks."""
    backbone = make_model(architecture)
    deep = deep_from_tokens(backbone, random_vectors(backbone, 3))
    layer = deep.shape[0] - 1
    parts = lens.find_parts(backbone)
    found = lens.value_logits(backbone, deep, layer, parts)
    output = parts.outputs[layer]
    group = backbone.text_config.num_attention_heads // deep.shape[2]
    for token in range(3):
        joined = torch.cat([deep[layer, 1, head // group, token] for head in range(group * deep.shape[2])])
        zero = output(torch.zeros_like(joined)[None])
        hidden = parts.norm(output(joined[None]) - zero)
        hidden = hidden if parts.after is None else parts.after(hidden)
        assert torch.allclose(found[token], backbone.head(hidden)[0].detach().float(), atol=1e-4)


def test_a_value_that_writes_a_word_says_this_word() -> None:
    """With heads that write straight through, a value that is a word's row of the head pushes for that word."""
    backbone = make_model("gpt2")
    parts = lens.find_parts(backbone)
    with torch.no_grad():
        parts.outputs[1].weight.copy_(torch.eye(32))
        parts.norm.weight.fill_(1)
        parts.norm.bias.fill_(0)
        rows = backbone.model.get_output_embeddings().weight
        rows.sub_(rows.mean(dim=1, keepdim=True))
        rows.div_(rows.norm(dim=1, keepdim=True))
    deep = deep_from_tokens(backbone, random_vectors(backbone, 2))
    word = backbone.tokenizer.convert_tokens_to_ids("film")
    deep[1, 1, :, 1] = rows[word].detach().view(4, 8)
    said = lens.value_words(backbone, deep)
    assert said[1][1][0].text == "film"
    assert [len(said), len(said[0]), len(said[0][0])] == [3, 2, 5]


def test_an_unknown_architecture_is_told() -> None:
    backbone = make_model("gpt2")
    for block in backbone.model.transformer.h:
        block.attn.elsewhere = block.attn.c_proj
        del block.attn.c_proj
        block.attn.c_proj = lambda x, block=block: block.attn.elsewhere(x)
    with pytest.raises(BackboneError, match="projection out of the attention heads was not found"):
        lens.find_parts(backbone)


def test_a_deep_prompt_is_seen_by_layer(tmp_path: Path) -> None:
    backbone, task = make_model(), make_task()
    start = deep_from_tokens(backbone, random_vectors(backbone, 3)).float()
    vectors = start.clone()
    vectors[1, 1, :, 2] += 1.0
    save_checkpoint(Checkpoint({"initial": start}, {}), tmp_path / "checkpoints/last.safetensors")
    found = sp.inspect(prompt_of(backbone, vectors), backbone, task.test, run=tmp_path, rows=3)
    assert found.deep is not None and found.deep.norms.shape == (3, 2, 3)
    assert found.deep.norms[2, 0, 1] == pytest.approx(float(vectors[2, 0, :, 1].norm()))
    assert found.deep.moved is not None
    assert (found.deep.moved > 0).nonzero().tolist() == [[1, 1, 2]]
    assert [distance > 0 for distance, _ in found.moved] == [False, False, True]
    assert found.importance is not None and len(found.importance.of_token) == 3
    assert found.attention is not None and found.attention.tokens.shape == (3, 3)
    assert len(found.deep.words) == 3
    page = read(found.save(tmp_path / "report.html"))
    assert "layer by layer" in page.text
    json.dumps(found.to_dict())
    alone = sp.inspect(prompt_of(backbone, vectors), backbone)
    assert alone.deep is not None and alone.deep.moved is None
    assert any("run folder" in note for note in sp.inspect(_known(backbone, vectors), backbone).notes)


def _known(backbone: sp.Backbone, vectors: torch.Tensor) -> SoftPrompt:
    return renamed(prompt_of(backbone, vectors), provenance={"run": {"tuning": {"init": "text", "tokens": 3}}})


# --- in a browser ---------------------------------------------------------------------------------------------------


BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")
# The page in a frame as wide as a phone: a headless window cannot be that narrow.
PHONE = '<body style="margin:0;background:#f0f"><iframe src="report.html" style="width:390px;height:900px;border:0">'


def shot(page: Path, size: str, scheme: int = 1) -> Any:
    """What a browser draws: [height, width, 3]. scheme: 1 light, 0 dark."""
    from matplotlib.image import imread

    folder = page.parent
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-sync", "--no-first-run"]
    command += ["--disable-background-networking", "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}"]
    command += [f"--window-size={size}", f"--blink-settings=preferredColorScheme={scheme}"]
    command += [f"--screenshot={folder / 'shot.png'}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return imread(folder / "shot.png")[:, :, :3]


@pytest.mark.big
@pytest.mark.skipif(not BROWSER, reason="no chromium is installed")
def test_a_browser_draws_the_page_in_light_dark_and_on_a_phone(tmp_path: Path) -> None:
    found = full(tmp_path)
    alike = similarity({"a": found.prompt, "b": renamed(found.prompt, vectors=-found.prompt.vectors)})
    path = write_inspections(tmp_path / "report.html", [found, found], similarity=alike)
    light, dark = shot(path, "1100,3000", 1), shot(path, "1100,3000", 0)
    assert light[2, 2].mean() > 0.95 and dark[2, 2].mean() < 0.2
    assert light.std() > 0.05 and dark.std() > 0.05  # something is drawn
    blue = abs(light - [0, 0x72 / 255, 0xB2 / 255]).max(axis=2) < 0.02
    assert blue.sum() > 1000  # a bar in the first colour, not only texts
    (tmp_path / "phone.html").write_text(PHONE)
    phone = shot(tmp_path / "phone.html", "600,900")
    magenta = abs(phone - [1, 0, 1]).max(axis=2) < 0.02
    assert magenta[:, 400:].all() and not magenta[:, :380].any()
    assert phone[:, 370:388].mean() > 0.9  # the right margin is free: tables scroll in their own frame


def test_pictures_are_files_of_their_own(tmp_path: Path) -> None:
    backbone = make_model()
    found = sp.inspect(words_prompt(backbone), backbone, make_task().test, rows=2, changes=("left_out",), name="a b/1")
    alike = similarity({"a": found.prompt, "b": renamed(found.prompt, vectors=-found.prompt.vectors)})
    written = write_pictures(tmp_path / "pictures", [found], similarity=alike)
    names = {path.name for path in written}
    assert {"a-b-1-importance.svg", "a-b-1-attention.svg", "similar-matched.svg"} <= names
    for path in written:
        picture = ElementTree.fromstring(path.read_bytes())
        assert picture.tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(" not in path.read_text("utf-8")
