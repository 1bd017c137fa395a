"""A backbone of the Llama family as GGUF. Names, metadata and the order of query and key rows as llama.cpp reads them.

Only architectures that are checked in tests against llama.cpp are here. For others: export to `model`, and convert that
folder with llama.cpp's own convert_hf_to_gguf.py, which keeps the new tokens.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from ..backbone import Backbone
from ..errors import BackboneError
from ..tokenising import PieceTokenizer
from .gguf_source import Source, need_gguf, packed

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
# How llama.cpp calls the ways in which byte-level tokenizers divide a text before they merge, by the pattern.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    "ByteLevel": "gpt-2",
    "Digits+ByteLevel": "smollm",
    _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _WORDS + r"\p{N}" + _REST: "qwen2",
}


def convert(backbone: Backbone) -> Source:
    """The backbone as GGUF, in its own precision. Raises BackboneError for what is not converted here."""
    config = backbone.text_config
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise BackboneError(
            f"{backbone.name} is of type {config.model_type}; only {', '.join(ARCHITECTURES)} are converted to GGUF "
            "here: export it with --to model, then run llama.cpp's convert_hf_to_gguf.py on that folder"
        )
    made = Source(architecture, {}, {})
    _add_shape(made, backbone)
    _add_vocabulary(made, backbone)
    for name, tensor in backbone.model.state_dict().items():
        if name == "lm_head.weight" and getattr(config, "tie_word_embeddings", False):
            continue
        _add_tensor(made, name, tensor, config)
    return made


def _add_shape(made: Source, backbone: Backbone) -> None:
    config, kinds = backbone.text_config, need_gguf().GGUFValueType
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise BackboneError(
            f"{backbone.name} has rotary positions of type {rope['rope_type']}, which is not converted here: export it "
            "with --to model, then run llama.cpp's convert_hf_to_gguf.py on that folder"
        )
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) or (
        config.model_type == "mistral" and config.sliding_window
    ):
        raise BackboneError(f"{backbone.name} has sliding windows, which llama.cpp does not compute for this type")
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    made.set("general.name", str(backbone.name), kinds.STRING)
    numbers = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        "attention.key_length": size,
        "attention.value_length": size,
        "rope.dimension_count": size,
        "vocab_size": backbone.vocab_size,
    }
    for key, number in numbers.items():
        made.set(f"{made.architecture}.{key}", int(number), kinds.UINT32)
    made.set(f"{made.architecture}.rope.freq_base", float(rope["rope_theta"]), kinds.FLOAT32)
    made.set(f"{made.architecture}.attention.layer_norm_rms_epsilon", float(config.rms_norm_eps), kinds.FLOAT32)


def _add_tensor(made: Source, name: str, tensor: torch.Tensor, config: Any) -> None:
    gguf = need_gguf()
    if name in WHOLE:
        target = WHOLE[name]
    else:
        _, _, layer, rest = name.split(".", 3)
        part, _, end = rest.rpartition(".")
        if part not in PARTS:
            raise BackboneError(f"the weight {name} has no place in a GGUF model of type {made.architecture}")
        target = f"blk.{layer}.{PARTS[part]}.{end}"
    if made.architecture == "llama" and ".q_proj." in name:
        tensor = _turned(tensor, config.num_attention_heads)
    if made.architecture == "llama" and ".k_proj." in name:
        tensor = _turned(tensor, getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    kind = {torch.bfloat16: "BF16", torch.float16: "F16"}.get(tensor.dtype, "F32") if tensor.ndim > 1 else "F32"
    data = packed(tensor.float().cpu().numpy(), gguf.GGMLQuantizationType[kind])
    assert data is not None
    made.tensors[target] = (data, gguf.GGMLQuantizationType[kind])


def _turned(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys so that the two numbers that are turned together stand side by side, as in Llama's own
    weights; transformers has them half a head apart."""
    return tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


# --- vocabulary ------------------------------------------------------------------------------------------------------


def _add_vocabulary(made: Source, backbone: Backbone) -> None:
    gguf = need_gguf()
    kinds, types = gguf.GGUFValueType, gguf.TokenType
    tokenizer = backbone.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise BackboneError(
            f"{type(tokenizer).__name__} is not a tokenizer with a tokenizer.json, which is needed here"
        )
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    if described["model"]["type"] != "BPE":
        raise BackboneError(f"a tokenizer of type {described['model']['type']} is not converted to GGUF here, only BPE")
    names = {number: text for text, number in tokenizer.get_vocab().items()}
    added = {int(number): token for number, token in tokenizer.added_tokens_decoder.items()}
    pieces = bool(described["model"].get("byte_fallback"))
    texts, sorts = [], []
    for number in range(max(backbone.vocab_size, max(names) + 1)):
        texts.append(names.get(number, f"[PAD{number}]"))
        sorts.append(int(_sort(number, names, added, pieces, tokenizer.unk_token_id, types)))
    made.set("tokenizer.ggml.tokens", texts, kinds.ARRAY, kinds.STRING)
    made.set("tokenizer.ggml.token_type", sorts, kinds.ARRAY, kinds.INT32)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in described["model"]["merges"]]
    if pieces:
        _add_pieces(made, texts, merges, described)
    else:
        made.set("tokenizer.ggml.model", "gpt2", kinds.STRING)
        made.set("tokenizer.ggml.pre", _pre_tokenizer(described), kinds.STRING)
        made.set("tokenizer.ggml.merges", merges, kinds.ARRAY, kinds.STRING)
    for key in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{key}_token_id")
        if number is not None:
            word = {"unk": "unknown", "pad": "padding"}.get(key, key)
            made.set(f"tokenizer.ggml.{word}_token_id", int(number), kinds.UINT32)
    lead = PieceTokenizer(tokenizer).lead
    made.set("tokenizer.ggml.add_bos_token", lead == [tokenizer.bos_token_id], kinds.BOOL)
    made.set("tokenizer.ggml.add_eos_token", False, kinds.BOOL)
    if isinstance(tokenizer.chat_template, str):
        made.set("tokenizer.chat_template", tokenizer.chat_template, kinds.STRING)


def _sort(number: int, names: dict[int, str], added: dict[int, Any], pieces: bool, unknown: Any, types: Any) -> Any:
    if number not in names:
        return types.UNUSED
    if pieces and number == unknown:
        return types.UNKNOWN
    if number in added:
        return types.CONTROL if added[number].special else types.USER_DEFINED
    byte = pieces and len(names[number]) == 6 and names[number].startswith("<0x")
    return types.BYTE if byte else types.NORMAL


def _add_pieces(made: Source, texts: list[str], merges: list[str], described: dict[str, Any]) -> None:
    """A vocabulary from sentencepiece: what is merged first has the highest score."""
    kinds = need_gguf().GGUFValueType
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault(pair.replace(" ", ""), rank)
    scores = [-float(ranks.get(text, len(merges))) for text in texts]
    steps = json.dumps([described.get("normalizer"), described.get("pre_tokenizer")])
    made.set("tokenizer.ggml.model", "llama", kinds.STRING)
    made.set("tokenizer.ggml.pre", "default", kinds.STRING)
    made.set("tokenizer.ggml.scores", scores, kinds.ARRAY, kinds.FLOAT32)
    prefixed = '"Prepend"' in steps or ('"Metaspace"' in steps and '"prepend_scheme": "never"' not in steps)
    made.set("tokenizer.ggml.add_space_prefix", prefixed, kinds.BOOL)


def _pre_tokenizer(described: dict[str, Any]) -> str:
    """llama.cpp's name for how the tokenizer divides a text. Raises BackboneError for one that it has no name for."""
    step = described.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", [step])
    patterns = [each["pattern"].get("Regex", "") for each in steps if each.get("type") == "Split"]
    found = patterns[0] if patterns else "+".join(str(each.get("type")) for each in steps)
    if found not in PRE_TOKENIZERS:
        raise BackboneError(
            "llama.cpp has no name that we know for the way in which this tokenizer divides a text: export with --to "
            "model, then run llama.cpp's convert_hf_to_gguf.py on that folder"
        )
    return PRE_TOKENIZERS[found]
