"""A library as PEFT adapters: those at the front load in PEFT, the others are reported."""

from __future__ import annotations

import json
import os

import peft
import pytest
import torch
from export_material import make_prompts, tiny_backbone

import tiny_tokenizers
from softprompt.errors import ConfigError, OutputError, PromptFormatError
from softprompt.export import collect, export_peft


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone("llama", tiny_tokenizers.byte_level())


@pytest.fixture
def library(backbone, tmp_path):
    for name, prompt in make_prompts(backbone).items():
        prompt.save(tmp_path / "library" / name)
    return tmp_path / "library"


def test_prompts_at_the_front_become_adapters_and_others_are_reported(backbone, library, tmp_path):
    told = []
    done = export_peft([library], tmp_path / "out", report=told.append)
    assert list(done.written) == ["front"] == os.listdir(tmp_path / "out")
    assert sorted(done.refused) == ["after_bos", "behind", "divided"]
    assert "stand 'behind'" in done.refused["behind"]
    assert len(told) == 4 and "after_bos: not written, its soft tokens stand 'after_bos'" in told[0]
    assert "{soft}Review: {text}" in (tmp_path / "out/front/README.md").read_text()
    ids = torch.tensor([[5, 6, 7, 8]])
    adapted = peft.PeftModel.from_pretrained(tiny_backbone("llama", backbone.tokenizer).model, tmp_path / "out/front")
    vectors = make_prompts(backbone)["front"].vectors
    with torch.no_grad():
        given = torch.cat([vectors[None], backbone.embed(ids)], dim=1)
        ours = backbone.model(inputs_embeds=given).logits
        torch.testing.assert_close(adapted(input_ids=ids).logits, ours)


def test_nothing_to_write_is_an_error_that_says_why(library, tmp_path):
    with pytest.raises(OutputError, match="nothing to write; behind: its soft tokens stand 'behind'"):
        export_peft([library / "behind"], tmp_path / "out")
    assert os.listdir(tmp_path) == ["library"]


def test_names_and_libraries(library, tmp_path):
    assert list(collect([library])) == ["after_bos", "behind", "divided", "front"]
    assert list(collect([f"other={library / 'front'}", library / "behind"])) == ["other", "behind"]
    assert list(collect(library / "front")) == ["front"]
    with pytest.raises(ConfigError) as error:
        collect([library, library / "front", f"a b={library / 'front'}"])
    assert len(error.value.problems) == 2
    assert "a prompt is called 'front' already" in error.value.problems[0]
    with pytest.raises(PromptFormatError, match="no prompt folder"):
        collect([tmp_path / "nothing"])


def test_a_deep_prompt_at_the_front_is_an_adapter_too(tmp_path):
    from softprompt.prompt import SoftPrompt

    done = export_peft({"deep": SoftPrompt(torch.randn(3, 2, 2, 4, 8))}, tmp_path / "out")
    described = json.loads((done.written["deep"] / "adapter_config.json").read_text())
    assert described["peft_type"] == "PREFIX_TUNING" and described["num_virtual_tokens"] == 4
