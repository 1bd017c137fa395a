"""Soft prompts as vocabulary: other engines' tokens equal ours, and no new token is ever said."""

from __future__ import annotations

import json
import os

import pytest
import torch
import transformers as hf
from export_material import TEXTS, make_prompts, our_tokens, reload, tiny_backbone, written_ids

import tiny_tokenizers
from softprompt.errors import BackboneError, BackboneMismatchError, ConfigError, OutputError
from softprompt.export.model import MANIFEST, export_model, extended_copy
from softprompt.export.vocabulary import embedding_scale, make_entries, unlikely_tokens
from softprompt.prompt import SoftPrompt
from softprompt.templates import Template

# As transformers makes every tokenizer of a qwen2 model normalise, ours reads decomposed letters otherwise there.
pytestmark = pytest.mark.filterwarnings("ignore:transformers reads .* in another way:UserWarning")
TOKENIZERS = {
    "byte": tiny_tokenizers.byte_level,
    "llama": tiny_tokenizers.llama,
    "legacy": lambda: tiny_tokenizers.llama(True),
}
MODELS = [
    ("llama", "byte", True, 0),
    ("llama", "llama", False, 0),
    ("llama", "legacy", False, 50),
    ("qwen2", "byte", True, 50),
    ("gemma3", "llama", True, 0),
    ("gemma3", "legacy", False, 5),
    ("gpt2", "byte", True, 0),
    ("opt", "byte", True, 0),
    ("bloom", "byte", True, 0),
]


def frozen_bytes(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("architecture", "kind", "tied", "padding"), MODELS)
def test_transformers_generates_what_we_generate(architecture, kind, tied, padding, tmp_path):
    backbone = tiny_backbone(architecture, TOKENIZERS[kind](), tied=tied, padding=padding)
    prompts, before = make_prompts(backbone), frozen_bytes(backbone.model)
    made = export_model(backbone, prompts, tmp_path / "out")
    model, tokenizer = reload(tmp_path / "out")
    assert {"front", "after_bos", "behind", "divided"} == {each["name"] for each in made.prompts}
    for said in made.prompts:
        for text in TEXTS:
            ids = torch.tensor([written_ids(tokenizer, said, text)])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
            assert out[0, ids.shape[1] :].tolist() == our_tokens(backbone, prompts[said["name"]], text), said
    # The model that we export is another one: ours is as it was.
    after = backbone.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert backbone.model.config.vocab_size == len(backbone.tokenizer) + padding
    assert backbone.model.generation_config.suppress_tokens is None


def test_tables_tokens_and_configuration(tmp_path):
    backbone = tiny_backbone("llama", tiny_tokenizers.byte_level())
    prompts, size = make_prompts(backbone, "front", "behind"), backbone.vocab_size
    made = export_model(backbone, prompts, tmp_path / "out")
    model, tokenizer = reload(tmp_path / "out")
    assert made.vocabulary == size + 9 == model.config.vocab_size == len(tokenizer)
    assert not model.config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    table = model.model.embed_tokens.weight
    assert torch.equal(table[:size], backbone.model.model.embed_tokens.weight)
    assert torch.equal(table[size : size + 4], prompts["front"].vectors)
    assert torch.equal(table[size + 4 :], prompts["behind"].vectors)
    assert torch.equal(model.lm_head.weight[:size], backbone.model.lm_head.weight)
    assert model.generation_config.suppress_tokens == list(range(size, size + 9))
    assert tokenizer.chat_template == backbone.tokenizer.chat_template
    assert tokenizer.convert_ids_to_tokens(size) == "<|front:0|>"
    assert tokenizer("<|front|>x<|behind|>").input_ids[:4] == list(range(size, size + 4))
    assert tokenizer.decode(tokenizer("<|front|>fine").input_ids, skip_special_tokens=True) == "fine"


def test_rows_of_padding_are_used_before_the_table_grows(tmp_path):
    backbone = tiny_backbone("qwen2", tiny_tokenizers.byte_level(), padding=50)
    size, known = backbone.vocab_size, len(backbone.tokenizer)
    prompts = make_prompts(backbone, "front")
    assert export_model(backbone, prompts, tmp_path / "out").vocabulary == size
    model, tokenizer = reload(tmp_path / "out")
    assert tokenizer("".join(f"<|front:{i}|>" for i in range(4))).input_ids == list(range(known, known + 4))
    assert torch.equal(model.model.embed_tokens.weight[known : known + 4], prompts["front"].vectors)


def test_a_scaled_embedding_is_undone():
    backbone = tiny_backbone("gemma3", tiny_tokenizers.llama())
    assert embedding_scale(backbone) == pytest.approx(32**0.5)
    prompts = make_prompts(backbone, "front")
    entries = make_entries(prompts, backbone.tokenizer)
    read = extended_copy(backbone, entries).get_input_embeddings()(torch.tensor(list(entries[0].ids)))
    torch.testing.assert_close(read, prompts["front"].vectors, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_continuous_batching_generates_what_we_generate(architecture, tmp_path):
    """Many tasks mixed in one batch of transformers' own engine for token ids."""
    backbone = tiny_backbone(architecture, tiny_tokenizers.byte_level())
    prompts = make_prompts(backbone)
    made = export_model(backbone, prompts, tmp_path / "out")
    model, tokenizer = reload(tmp_path / "out")
    small = hf.ContinuousBatchingConfig(page_size=16, num_blocks=64, max_batch_tokens=256)
    asked = [(said, text) for text in TEXTS for said in made.prompts]
    settings = model.generation_config
    settings.max_new_tokens, settings.do_sample, settings.eos_token_id = 12, False, -1
    given = [written_ids(tokenizer, said, text) for said, text in asked]
    answers = model.generate_batch(given, settings, small, warmup=False)
    by_prompt = {tuple(answer.prompt_ids): answer.generated_tokens for answer in answers.values()}
    assert len(by_prompt) == len(asked)
    for (said, text), ids in zip(asked, given, strict=True):
        assert by_prompt[tuple(ids)] == our_tokens(backbone, prompts[said["name"]], text), (said["name"], text)


@pytest.mark.parametrize(("architecture", "kind"), [("llama", "byte"), ("gemma3", "llama"), ("gpt2", "byte")])
def test_ten_thousand_sampled_tokens_hold_no_new_one(architecture, kind, tmp_path):
    backbone = tiny_backbone(architecture, TOKENIZERS[kind]())
    made = export_model(backbone, make_prompts(backbone), tmp_path / "out")
    model, tokenizer = reload(tmp_path / "out")
    ids = torch.tensor([written_ids(tokenizer, made.prompts[0], "x")])
    torch.manual_seed(0)
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 100, "do_sample": True, "temperature": 1.5}
    said = model.generate(ids, num_return_sequences=100, top_k=0, **given)[:, ids.shape[1] :]
    assert said.numel() == 10_000
    assert int(said.max()) < len(backbone.tokenizer)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "bloom"])
def test_the_weights_alone_never_let_a_new_token_win(architecture):
    """For engines that do not read generation_config.json: at most the mean of others, whatever the state."""
    backbone = tiny_backbone(architecture, tiny_tokenizers.byte_level())
    entries = make_entries(make_prompts(backbone), backbone.tokenizer)
    head = extended_copy(backbone, entries).get_output_embeddings()
    first = entries[0].first
    states = torch.randn(10_000, backbone.width, generator=torch.Generator().manual_seed(1)) * 3
    logits = head(states)
    assert int(logits.argmax(dim=1).max()) < first
    new, old = logits[:, first:], logits[:, :first]
    assert (new < old.amax(dim=1, keepdim=True)).all()
    weight = torch.softmax(logits.double(), dim=1)
    unlikely = weight[:, unlikely_tokens(backbone)].mean(dim=1, keepdim=True)
    assert (weight[:, first:] <= 1.001 * unlikely).all()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ordinary_text_is_read_as_before(kind, tmp_path):
    backbone = tiny_backbone("llama", TOKENIZERS[kind]())
    export_model(backbone, make_prompts(backbone), tmp_path / "out")
    _, tokenizer = reload(tmp_path / "out")
    for text in (*tiny_tokenizers.TEXTS, " <|front|", "<|fron|>", "front:0|>", "<|front:9|>", "  a\n\n b<|im_end|>"):
        assert tokenizer(text).input_ids == backbone.tokenizer(text).input_ids, text


def test_a_chat_prompt_is_written_in_its_turn(tmp_path):
    backbone = tiny_backbone("llama", tiny_tokenizers.byte_level())
    template = Template.make(None, "{answer}", [("user", "{soft}Review: {text}")])
    prompts = {"chatty": SoftPrompt(torch.randn(3, backbone.width), template)}
    made = export_model(backbone, prompts, tmp_path / "out")
    assert made.prompts[0]["messages"] == [{"role": "user", "content": "<|chatty|>Review: {text}"}]
    model, tokenizer = reload(tmp_path / "out")
    turns = [{"role": "user", "content": "<|chatty|>Review: fine"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
    assert out[0, ids.shape[1] :].tolist() == our_tokens(backbone, prompts["chatty"], "fine", 9)


def test_a_tokenizer_that_ignores_its_file_gets_the_name_in_chats(tmp_path):
    """transformers gives every model of type qwen2 a normalizer of its own."""
    backbone = tiny_backbone("qwen2", tiny_tokenizers.byte_level())
    template = Template.make(None, "{answer}", [("user", "{soft}Review: {text}")])
    prompts = {"chatty": SoftPrompt(torch.randn(3, backbone.width), template), **make_prompts(backbone, "front")}
    made = export_model(backbone, prompts, tmp_path / "out")
    assert made.prompts[0]["messages"] == [{"role": "user", "content": "<|chatty|>Review: {text}"}]
    assert made.prompts[1]["text"].startswith("<|front:0|><|front:1|><|front:2|><|front:3|>Review")
    _, tokenizer = reload(tmp_path / "out")
    plain = [{"role": "user", "content": "x <|cat|> {{ 1 }}"}]
    kept = [t.apply_chat_template(plain, tokenize=False) for t in (tokenizer, backbone.tokenizer)]
    assert kept[0] == kept[1]


def test_a_prompt_without_template_stands_before_the_text(tmp_path):
    backbone = tiny_backbone("llama", tiny_tokenizers.llama())
    made = export_model(backbone, {"old": SoftPrompt(torch.randn(3, backbone.width))}, tmp_path / "out")
    assert made.prompts[0]["text"] == "<|old|><s> {text}"
    assert made.prompts[0]["add_special_tokens"] is False


def test_bfloat16_stays_bfloat16(tmp_path):
    backbone = tiny_backbone("gemma3", tiny_tokenizers.byte_level(), dtype=torch.bfloat16)
    export_model(backbone, make_prompts(backbone), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == "bfloat16"
    model, _ = reload(tmp_path / "out", "auto")
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_the_manifest_says_how_each_is_written(tmp_path):
    backbone = tiny_backbone("llama", tiny_tokenizers.byte_level())
    made = export_model(backbone, make_prompts(backbone), tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["prompts"] == json.loads(json.dumps(made.prompts))
    assert manifest["fingerprint"] == backbone.fingerprint
    divided = manifest["prompts"][3]
    assert divided["text"] == "<|divided/1|>Review: {text}<|divided/2|> Sentiment:"
    assert divided["mark"] == "<|divided|>"


# --- refused ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_exported_is_told(tmp_path):
    backbone = tiny_backbone("llama", tiny_tokenizers.byte_level())
    good = make_prompts(backbone, "front")["front"]
    deep = SoftPrompt(torch.randn(3, 2, 2, 4, 8), good.template)
    with pytest.raises(ConfigError, match="deep prompt has keys and values in each layer"):
        export_model(backbone, {"a": good, "deep": deep}, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"has a token <\|im_start\|> already"):
        export_model(backbone, {"im_start": good}, tmp_path / "out")
    with pytest.raises(ConfigError, match="cannot be a name"):
        export_model(backbone, {"a b": good, "../c": good}, tmp_path / "out")
    with pytest.raises(ConfigError, match="none given"):
        export_model(backbone, {}, tmp_path / "out")
    with pytest.raises(BackboneMismatchError, match="tuned for"):
        export_model(backbone, {"wide": SoftPrompt(torch.randn(3, 8))}, tmp_path / "out")
    two = {name: SoftPrompt(good.vectors, good.template, name, name * 16) for name in "ab"}
    with pytest.raises(BackboneMismatchError, match=r"different models: 'a' a .*, 'b' b"):
        export_model(backbone, two, tmp_path / "out")
    assert not os.listdir(tmp_path)


def test_only_an_empty_folder_is_written_to(tmp_path):
    backbone = tiny_backbone("llama", tiny_tokenizers.byte_level())
    prompts = make_prompts(backbone, "front")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"not empty \(notes.txt\)"):
        export_model(backbone, prompts, tmp_path / "full")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="is there already"):
        export_model(backbone, prompts, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    export_model(backbone, prompts, tmp_path / "empty")
    assert (tmp_path / "empty/model.safetensors").exists()
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "full"]


def test_nothing_is_left_behind_when_saving_fails(tmp_path, monkeypatch):
    backbone = tiny_backbone("llama", tiny_tokenizers.byte_level())

    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf.LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(OutputError, match="no space left"):
        export_model(backbone, make_prompts(backbone), tmp_path / "out")
    assert not os.listdir(tmp_path)


def test_a_model_that_looks_at_ids_otherwise_is_refused(tmp_path, monkeypatch):
    """The copy is compared with the model before anything is written."""
    backbone = tiny_backbone("llama", tiny_tokenizers.byte_level())
    forward = hf.LlamaForCausalLM.forward

    def strange(self, input_ids=None, **more):
        return forward(self, None if input_ids is None else input_ids.clamp(max=400), **more)

    monkeypatch.setattr(hf.LlamaForCausalLM, "forward", strange)
    with pytest.raises(BackboneError, match="does something with token ids"):
        export_model(backbone, make_prompts(backbone), tmp_path / "out")
    assert not os.listdir(tmp_path)


# --- a real model -----------------------------------------------------------------------------------------------------


@pytest.mark.big
def test_a_real_model_in_transformers(tmp_path):
    import softprompt as sp

    torch.set_num_threads(1)
    backbone = sp.Backbone.load("smollm2-135m", precision="float32")
    start = backbone.tokenizer("Say whether this review is positive or negative, in one word.")["input_ids"]
    vectors = backbone.embedding_table()[start]
    templates = {
        "front": sp.Template.make("{soft}Review: {text}\nSentiment:", " {answer}"),
        "behind": sp.Template.make("Review: {text}\n{soft}Sentiment:", " {answer}"),
        "chat": sp.Template.make(None, "{answer}", [("user", "{soft}Review: {text}")]),
    }
    prompts = {name: SoftPrompt(vectors, template) for name, template in templates.items()}
    made = sp.export_model(backbone, prompts, tmp_path / "out")
    model, tokenizer = reload(tmp_path / "out")
    asked = [(said, text) for said in made.prompts for text in ("a fine film", "dull and far too long")]
    given, ours = [], []
    for said, text in asked:
        given.append(written_ids(tokenizer, said, text))
        ours.append(our_tokens(backbone, prompts[said["name"]], text, 16))
        ids = torch.tensor([given[-1]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        said_here = out[0, ids.shape[1] :].tolist()
        assert said_here == ours[-1][: len(said_here)]
        assert len(said_here) == 16 or said_here[-1] == tokenizer.eos_token_id
    settings = model.generation_config
    settings.max_new_tokens, settings.do_sample, settings.eos_token_id = 16, False, -1
    small = hf.ContinuousBatchingConfig(page_size=16, num_blocks=64, max_batch_tokens=256)
    answers = model.generate_batch(given, settings, small, warmup=False)
    by_prompt = {tuple(answer.prompt_ids): answer.generated_tokens for answer in answers.values()}
    assert [by_prompt[tuple(ids)] for ids in given] == ours
    with torch.no_grad():
        weight = torch.softmax(model(torch.tensor([given[0] + ours[0]])).logits[0].double(), dim=1)
    said_at = weight[len(given[0]) - 1 :, backbone.vocab_size :]
    assert float(said_at.max()) < 1e-7
