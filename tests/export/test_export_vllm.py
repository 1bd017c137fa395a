"""The payload for vLLM, read by the rules of vLLM's own loader, and what the model says to it."""

from __future__ import annotations

import base64
import io
import json

import pytest
import torch
from export_material import make_prompts, our_tokens, tiny_backbone

import tiny_tokenizers
from softprompt.errors import BackboneError, BackboneMismatchError, ConfigError, DataError, OutputError
from softprompt.export import export_vllm, prompt_embeds
from softprompt.prompt import SoftPrompt


def as_vllm_loads(text: str, hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
    """vLLM's checks, in its order: base64, weights only, a dense tensor, [T, H], the hidden size, a float type."""
    raw = base64.b64decode(text.encode(), validate=True)
    tensor = torch.load(io.BytesIO(raw), weights_only=True, map_location="cpu")
    assert isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
    assert tensor.dim() == 2 and tensor.shape[1] == hidden_size and tensor.is_floating_point()
    assert len(raw) < tensor.nbytes + 4096  # nothing beside the tensor
    return tensor.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_the_model_says_to_the_payload_what_we_say(architecture, dtype):
    backbone = tiny_backbone(architecture, tiny_tokenizers.llama(), dtype=dtype)
    for prompt in make_prompts(backbone).values():
        loaded = as_vllm_loads(prompt_embeds(backbone, prompt, {"text": "a fine film"}), backbone.width, dtype)
        settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones(1, len(loaded))}
        said = backbone.model.generate(inputs_embeds=loaded[None], **settings)[0].tolist()
        if dtype == torch.float32:
            assert said == our_tokens(backbone, prompt, "a fine film", 6)
        assert loaded.dtype == dtype and len(said) == 6


def test_the_body_of_a_request(tmp_path):
    backbone = tiny_backbone("llama", tiny_tokenizers.byte_level())
    prompt = make_prompts(backbone)["front"]
    done = export_vllm(backbone, prompt, {"text": "x"}, tmp_path / "body.json", max_new_tokens=7)
    body = json.loads((tmp_path / "body.json").read_text())
    assert set(body) == {"model", "prompt_embeds", "max_tokens", "temperature"} and body["max_tokens"] == 7
    loaded = as_vllm_loads(body["prompt_embeds"], backbone.width, torch.float32)
    assert len(loaded) == done.tokens and len(body["prompt_embeds"]) == done.characters
    assert torch.equal(loaded[:4], prompt.vectors)
    with pytest.raises(OutputError, match="there already"):
        export_vllm(backbone, prompt, {"text": "x"}, tmp_path / "body.json")


def test_what_it_cannot_do_is_told():
    backbone = tiny_backbone("llama", tiny_tokenizers.byte_level())
    prompt = make_prompts(backbone)["front"]
    with pytest.raises(DataError, match="needs 'text'; given: words"):
        prompt_embeds(backbone, prompt, {"words": "x"})
    with pytest.raises(ConfigError, match="deep prompt"):
        prompt_embeds(backbone, SoftPrompt(torch.randn(3, 2, 2, 4, 8)), {"text": "x"})
    with pytest.raises(BackboneMismatchError):
        prompt_embeds(backbone, SoftPrompt(torch.randn(3, 8)), {"text": "x"})
    narrow = tiny_backbone("opt", tiny_tokenizers.byte_level())
    with pytest.raises(BackboneError, match="width 16 and layers of width 32"):
        prompt_embeds(narrow, make_prompts(narrow)["front"], {"text": "x"})
