"""PEFT's adapters: theirs are read, ours load there with the same logits, and tensors go round byte for byte."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from softprompt.errors import PromptFormatError
from softprompt.fileformat import load_prompt, verify_prompt
from softprompt.prompt import SoftPrompt
from softprompt.templates import Template

CONFIG, TENSOR = "adapter_config.json", "adapter_model.safetensors"
P, H = 4, 32


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=H, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


PROMPT_TUNING: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": P}
KINDS: dict[str, Any] = {
    "prompt tuning": lambda: peft.PromptTuningConfig(**PROMPT_TUNING),
    "p-tuning mlp": lambda: peft.PromptEncoderConfig(**PROMPT_TUNING, encoder_hidden_size=16),
    "p-tuning lstm": lambda: peft.PromptEncoderConfig(
        **PROMPT_TUNING, encoder_hidden_size=16, encoder_reparameterization_type="LSTM", encoder_num_layers=1
    ),
}
IDS = torch.tensor([[1, 2, 3, 9, 17], [6, 5, 4, 60, 2]])


def theirs(model: LlamaForCausalLM, folder: Path, kind: str = "prompt tuning", adapter: str = "default") -> Any:
    """An adapter that PEFT itself has made and saved."""
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, KINDS[kind](), adapter_name=adapter).eval()
    adapted.save_pretrained(str(folder))
    return adapted


def plain_logits(model: LlamaForCausalLM, vectors: torch.Tensor) -> torch.Tensor:
    """[B, P + T, V] by the concatenation of the vectors with the embeddings of the ids."""
    texts = model.get_input_embeddings()(IDS)
    prompts = vectors.expand(len(IDS), -1, -1)
    with torch.no_grad():
        return model(inputs_embeds=torch.cat([prompts, texts], dim=1)).logits


def peft_logits(model: LlamaForCausalLM, folder: Path) -> torch.Tensor:
    """[B, P + T, V] by PEFT from the adapter in `folder`; any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing.*")
        adapted = peft.PeftModel.from_pretrained(model, str(folder)).eval()
        with torch.no_grad():
            return adapted(input_ids=IDS).logits


def config_of(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return loaded


def rewrite(folder: Path, **changes: Any) -> None:
    config = {**config_of(folder), **changes}
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


@pytest.fixture
def adapter(model: LlamaForCausalLM, tmp_path: Path) -> Path:
    theirs(model, tmp_path / "theirs")
    return tmp_path / "theirs"


# Theirs in ours


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", ["default", "other"])
def test_reads_what_peft_saved(model: LlamaForCausalLM, tmp_path: Path, kind: str, name: str) -> None:
    adapted = theirs(model, tmp_path, kind, name)
    with torch.no_grad():
        expected = adapted(input_ids=IDS).logits
    prompt = load_prompt(tmp_path)
    assert prompt.vectors.shape == (P, H)
    assert prompt.template is None
    torch.testing.assert_close(plain_logits(adapted.get_base_model(), prompt.vectors), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", ["default", "other"])
def test_theirs_to_ours_to_theirs(model: LlamaForCausalLM, tmp_path: Path, kind: str, name: str) -> None:
    theirs(model, tmp_path / "theirs", kind, name)
    original = tmp_path / "theirs" / ("" if name == "default" else name)
    ours = load_prompt(load_prompt(tmp_path / "theirs").save(tmp_path / "one")).save(tmp_path / "two")
    assert (ours / TENSOR).read_bytes() == (original / TENSOR).read_bytes()
    before, after = config_of(original), config_of(ours)
    assert before.pop("peft_version")
    assert after.pop("peft_version")
    assert before == after
    assert verify_prompt(ours) == []


def test_text_initialised_adapter_keeps_its_configuration(adapter: Path, tmp_path: Path) -> None:
    rewrite(
        adapter, prompt_tuning_init="TEXT", prompt_tuning_init_text="classify", tokenizer_name_or_path="someone/model",
        tokenizer_kwargs={"trust_remote_code": True, "use_fast": True}, auto_mapping={"parent_library": "antigravity"},
        base_model_name_or_path="someone/model",
    )  # fmt: skip
    prompt = load_prompt(adapter)
    assert prompt.base_model == "someone/model"
    written = config_of(prompt.save(tmp_path / "ours"))
    assert written["tokenizer_kwargs"] == {"use_fast": True}
    assert written["auto_mapping"] is None
    assert written["prompt_tuning_init_text"] == "classify"


def test_a_prompt_of_another_length_gets_a_configuration_of_its_own(adapter: Path, tmp_path: Path) -> None:
    prompt = load_prompt(adapter)
    prompt.vectors = prompt.vectors[:2].contiguous()
    assert config_of(prompt.save(tmp_path / "ours"))["num_virtual_tokens"] == 2


def test_older_and_newer_configurations(adapter: Path) -> None:
    rewrite(adapter, peft_version=..., tokenizer_kwargs=..., num_transformer_submodules=None, token_dim=None)
    assert load_prompt(adapter).tokens == P
    rewrite(adapter, future_option=3, token_dim=H)
    with pytest.warns(UserWarning, match="unknown keys, which are ignored: future_option"):
        prompt = load_prompt(adapter)
    assert prompt.provenance["peft"]["future_option"] == 3
    rewrite(adapter, future_option=..., task_type=None)
    with pytest.warns(UserWarning, match="names no task type: taken as the prompt of a causal model"):
        load_prompt(adapter)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(adapter: Path, dtype: torch.dtype) -> None:
    vectors = torch.randn(P, H).to(dtype)
    safetensors.torch.save_file({"prompt_embeddings": vectors}, str(adapter / TENSOR))
    prompt = load_prompt(adapter)
    assert prompt.vectors.dtype == torch.float32
    assert torch.equal(prompt.vectors, vectors.float())


# Ours in theirs


@pytest.mark.parametrize("described", [True, False])
def test_peft_gives_the_same_logits(model: LlamaForCausalLM, tmp_path: Path, described: bool) -> None:
    template = Template.make(input="{soft}Review: {text}", target=" {label}", labels=["bad", "good"])
    vectors = torch.randn(P, H, generator=torch.Generator().manual_seed(2))
    shape = {"architecture": {"num_layers": 2, "num_attention_heads": 4}} if described else {}
    prompt = SoftPrompt(vectors, template=template, base_model="tiny", provenance=shape)
    folder = prompt.save(tmp_path / "ours")
    expected = plain_logits(model, vectors)
    torch.testing.assert_close(peft_logits(model, folder), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", list(KINDS))
def test_peft_loads_what_came_from_it(model: LlamaForCausalLM, tmp_path: Path, kind: str) -> None:
    adapted = theirs(model, tmp_path / "theirs", kind)
    prompt = load_prompt(tmp_path / "theirs")
    base = adapted.get_base_model()
    expected = plain_logits(base, prompt.vectors)
    folder = prompt.save(tmp_path / "ours")
    torch.testing.assert_close(peft_logits(base, folder), expected, atol=1e-6, rtol=1e-6)


def test_our_files_are_laid_out_like_theirs(model: LlamaForCausalLM, adapter: Path, tmp_path: Path) -> None:
    prompt = load_prompt(adapter)
    prompt.provenance = {"architecture": {"num_layers": 2, "num_attention_heads": 4}}
    ours = prompt.save(tmp_path / "ours")
    assert (ours / TENSOR).read_bytes() == (adapter / TENSOR).read_bytes()
    text = (adapter / CONFIG).read_text().replace(peft.__version__, config_of(ours)["peft_version"])
    assert (ours / CONFIG).read_text() == text


# What cannot be read


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "ADAPTION_PROMPT"}, "type 'ADAPTION_PROMPT': only PROMPT_TUNING, P_TUNING, PREFIX_TUNING"),
        ({"peft_type": "LORA"}, "type 'LORA': only"),
        ({"peft_type": ...}, "type None: only"),
        ({"peft_type": ["PROMPT_TUNING"]}, "only PROMPT_TUNING"),
        ({"task_type": "SEQ_2_SEQ_LM"}, r"task type 'SEQ_2_SEQ_LM': only those of causal models \(CAUSAL_LM\)"),
        ({"task_type": "SEQ_CLS"}, "task type 'SEQ_CLS'"),
        ({"num_transformer_submodules": 2}, "prompts for 2 models, expected 1"),
        ({"num_virtual_tokens": 5}, "speaks of 5 tokens of width 32, but the tensor has 4 of width 32"),
        ({"token_dim": 64}, "speaks of 4 tokens of width 64, but the tensor has 4 of width 32"),
        ({"num_virtual_tokens": "4"}, "num_virtual_tokens '4' and token_dim 32, expected whole numbers"),
        ({"modules_to_save": ["lm_head"]}, "names other trained modules"),
    ],
)
def test_refused(adapter: Path, changes: dict[str, Any], message: str) -> None:
    rewrite(adapter, **changes)
    with pytest.raises(PromptFormatError, match=message):
        load_prompt(adapter)


def test_adapter_of_which_half_is_missing(adapter: Path) -> None:
    (adapter / TENSOR).unlink()
    with pytest.raises(PromptFormatError, match=r"has adapter_config.json but no adapter_model.safetensors"):
        load_prompt(adapter)


def test_several_adapters(adapter: Path, model: LlamaForCausalLM, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / "both" / name).mkdir(parents=True)
        for file in (CONFIG, TENSOR):
            (tmp_path / "both" / name / file).write_bytes((adapter / file).read_bytes())
    with pytest.raises(PromptFormatError, match=r"holds 2 adapters \(one, two\): name the folder of one of them"):
        load_prompt(tmp_path / "both")


def test_pickles_are_refused_unread_and_the_advice_works(adapter: Path, tmp_path: Path) -> None:
    expected = load_prompt(adapter).vectors
    (adapter / TENSOR).unlink()

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"prompt_embeddings": Bomb()}, adapter / "adapter_model.bin")
    for path in (adapter, adapter / "adapter_model.bin"):
        with pytest.raises(PromptFormatError, match="is a pickle, which can run code when it is read: refused"):
            load_prompt(path)
    assert not (tmp_path / "exploded").exists()

    torch.save({"prompt_embeddings": expected}, adapter / "adapter_model.bin")
    with pytest.raises(PromptFormatError) as told:
        load_prompt(adapter)
    first, second = (line.strip() for line in str(told.value).splitlines()[1:])
    exec(first + "\n" + second, {})
    assert torch.equal(load_prompt(adapter).vectors, expected)


def test_a_bare_pickle(tmp_path: Path) -> None:
    torch.save(torch.ones(2, 2), tmp_path / "decoder.pt")
    with pytest.raises(PromptFormatError, match="is a pickle"):
        load_prompt(tmp_path)
