"""`softprompt export`: what it writes, says and refuses."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers as hf
from cli_material import make_model

from softprompt.prompt import SoftPrompt


@pytest.fixture(scope="module")
def prompt_folder(tuned):
    return tuned / "prompts/reviews"


def test_a_model_that_transformers_uses(cli, prompt_folder):
    called = cli("export", "--to", "model", "out", prompt_folder, f"again={prompt_folder}")
    assert called.code == 0, called.err
    assert "2 prompts in the vocabulary of out, which has 267 tokens now" in called.out
    assert '  again: "<|again|>Review: {text}\\nSentiment:"' in called.out
    tokenizer = hf.AutoTokenizer.from_pretrained("out")
    assert tokenizer("<|again|>").input_ids == [263, 264, 265, 266]
    ids = tokenizer("<|reviews|>Review: film 1 was good\nSentiment:", return_tensors="pt").input_ids
    said = hf.AutoModelForCausalLM.from_pretrained("out").generate(ids, max_new_tokens=5, do_sample=False)
    ours = cli("run", prompt_folder, "film 1 was good", "--json")
    assert ours.code == 0 and int(said.max()) < 267


def test_json_is_one_document(cli, prompt_folder, tmp_path):
    called = cli("export", "--to", "model", "out", prompt_folder, "--json")
    assert called.code == 0, called.err
    assert called.json["vocabulary"] == 263 and called.json["to"] == "model"
    assert called.json["prompts"][0]["ids"] == [259, 262]
    assert called.json["prompts"] == json.loads((tmp_path / "out/softprompt_export.json").read_text())["prompts"]


def test_a_library_goes_to_peft_and_what_cannot_is_told(cli, prompt_folder, tmp_path):
    shutil.copytree(prompt_folder, tmp_path / "library/front")
    prompt = SoftPrompt.load(prompt_folder)
    from softprompt.templates import Template

    behind = SoftPrompt(prompt.vectors, Template.make("{text}{soft}", " {answer}"), prompt.base_model)
    behind.save(tmp_path / "library/behind")
    called = cli("export", "--to", "peft", "out", "library", "--json")
    assert called.code == 0, called.err
    assert list(called.json["written"]) == ["front"]
    assert "PEFT puts them before everything else" in called.json["refused"]["behind"]
    assert "warning: behind: not written" in called.err
    assert (tmp_path / "out/front/adapter_config.json").exists()


def test_gguf_from_a_folder(cli, prompt_folder, tmp_path):
    called = cli("export", "--to", "gguf", "tiny.gguf", prompt_folder, "--json")
    assert called.code == 0, called.err
    assert called.json["vocabulary"] == 263
    assert (tmp_path / "tiny.gguf").read_bytes()[:4] == b"GGUF"
    assert json.loads((tmp_path / "tiny.gguf.json").read_text())["prompts"] == called.json["prompts"]


def test_gguf_from_a_file_of_the_same_model(cli, prompt_folder, tmp_path):
    assert cli("export", "--to", "gguf", "one.gguf", prompt_folder).code == 0
    (tmp_path / "source.gguf").write_bytes((tmp_path / "one.gguf").read_bytes())
    called = cli("export", "--to", "gguf", "two.gguf", prompt_folder, "--gguf", "source.gguf")
    assert called.code == 1 and "263 tokens of width 32) is not the model" in called.err
    called = cli("export", "--to", "model", "out", prompt_folder, "--gguf", "source.gguf")
    assert called.code == 2 and "gguf: is for --to gguf" in called.err


def test_a_request_for_vllm(cli, prompt_folder, tmp_path):
    called = cli("export", "--to", "vllm", "body.json", prompt_folder, "--text", "film 1 was good")
    assert called.code == 0, called.err
    assert "characters of base64: body.json" in called.out
    assert set(json.loads((tmp_path / "body.json").read_text())) >= {"model", "prompt_embeds"}


def test_wrong_use_is_told_before_a_model_is_loaded(cli, prompt_folder, tmp_path, monkeypatch):
    import softprompt.backbone

    monkeypatch.setattr(softprompt.backbone.Backbone, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    deep = SoftPrompt(torch.randn(2, 2, 2, 4, 8))
    deep.save(tmp_path / "deep")
    other = SoftPrompt.load(prompt_folder)
    SoftPrompt(other.vectors, other.template, "else", "f" * 16).save(tmp_path / "other")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("x")
    cases = [
        (("--to", "onnx", "out", prompt_folder), 2, "expected one of peft, model, gguf, vllm, found 'onnx'"),
        (("--to", "model", "out", "deep"), 2, "deep: a deep prompt has keys and values in each layer"),
        (("--to", "model", "out", prompt_folder, prompt_folder), 2, "a prompt is called 'reviews' already"),
        (("--to", "model", "out", prompt_folder, "other"), 1, "need different models"),
        (("--to", "model", "full", prompt_folder), 1, "full is not empty (x)"),
        (("--to", "gguf", "full", prompt_folder), 1, "full is there already"),
        (("--to", "model", "out", prompt_folder, "--text", "x"), 2, "text: is for vllm"),
        (("--to", "vllm", "out", prompt_folder), 2, "takes one prompt and --text; found 1 prompts, 0 texts"),
        (("--to", "peft", "out", "nothing"), 1, "no prompt folder nothing"),
    ]
    for arguments, code, message in cases:
        called = cli("export", *arguments)
        assert (called.code, message in called.err) == (code, True), (arguments, called.err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "full", "other"]


def test_another_model_is_refused_and_can_be_forced(cli, prompt_folder, tmp_path):
    make_model(tmp_path / "second", seed=1)
    called = cli("export", "--to", "model", "out", prompt_folder, "--model", "second")
    assert called.code == 1 and "was tuned for" in called.err
    assert cli("export", "--to", "model", "out", prompt_folder, "--model", "second", "--force").code == 0


def test_weights_keep_the_precision_that_they_are_stored_in(cli, prompt_folder, tmp_path):
    model = hf.AutoModelForCausalLM.from_pretrained(SoftPrompt.load(prompt_folder).base_model, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    hf.AutoTokenizer.from_pretrained(SoftPrompt.load(prompt_folder).base_model).save_pretrained(tmp_path / "half")
    called = cli("export", "--to", "model", "out", prompt_folder, "--model", "half")
    assert called.code == 0, called.err
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
