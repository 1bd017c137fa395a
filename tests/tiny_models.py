"""Tiny random models of every architecture that the core promises, for tests of exactness."""

from __future__ import annotations

import torch
import transformers as hf

from softprompt.backbone import Backbone
from softprompt.placement import Row

VOCABULARY = 97
_LLAMA = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,
)
_OLD = dict(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2)
# Sliding windows are shorter than the rows of the tests, so that they matter.
ARCHITECTURES = {
    "llama": (hf.LlamaForCausalLM, lambda: hf.LlamaConfig(**_LLAMA)),
    "qwen2": (hf.Qwen2ForCausalLM, lambda: hf.Qwen2Config(**_LLAMA)),
    "qwen3": (hf.Qwen3ForCausalLM, lambda: hf.Qwen3Config(**_LLAMA, head_dim=16)),
    "mistral": (hf.MistralForCausalLM, lambda: hf.MistralConfig(**_LLAMA, sliding_window=8)),
    "gemma3": (
        hf.Gemma3ForCausalLM,
        lambda: hf.Gemma3TextConfig(
            **_LLAMA,
            head_dim=16,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    "gpt2": (hf.GPT2LMHeadModel, lambda: hf.GPT2Config(**_OLD, n_embd=32, n_layer=3, n_head=4, n_positions=256)),
    "opt": (
        hf.OPTForCausalLM,
        lambda: hf.OPTConfig(
            **_OLD,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=256,
            word_embed_proj_dim=16,
            pad_token_id=0,
        ),
    ),
    "bloom": (hf.BloomForCausalLM, lambda: hf.BloomConfig(**_OLD, hidden_size=32, n_layer=3, n_head=4)),
}
FAST = [name for name in ARCHITECTURES if name != "bloom"]  # ALiBi is built from the mask: computed plainly


def make_backbone(architecture: str, dtype: torch.dtype = torch.float64, tokenizer: object = None) -> Backbone:
    """A random model whose attention is far from uniform, so that a wrong mask or position shows."""
    kind, config = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    model = kind(config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "ln_" not in name:
                parameter.mul_(4)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return Backbone(model.to(dtype), tokenizer, architecture)


def random_ids(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()


def make_rows(placement: str, tokens: int = 5, seed: int = 1) -> list[Row]:
    """Rows of different lengths and answers with soft tokens at `placement`."""
    generator = torch.Generator().manual_seed(seed)
    soft = [-(i + 1) for i in range(tokens)]
    rows = []
    for length, answer in ((9, 1), (14, 3), (3, 2), (14, 1), (21, 4)):
        text = random_ids(length, generator)
        context = {
            "front": [*soft, 5, 6, *text],
            "after_bos": [1, *soft, *text],
            "divided": [1, 7, *soft[:2], *text, 9, *soft[2:], 4],
            "inside": [1, 7, *text, *soft, 11, 12],
            "behind": [1, 7, *text, *soft],
        }[placement]
        rows.append(Row(tuple(context + random_ids(answer, generator)), len(context)))
    return rows


PLACEMENTS = ("front", "after_bos", "divided", "inside", "behind")


def random_vectors(backbone: Backbone, tokens: int = 5, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, backbone.width, generator=generator).double() * backbone.embedding_rms


def make_tokenizer():
    """A tokenizer of whole words for the tiny models: 94 words beside <unk>, <s> and </s>, spaces kept apart."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["good", "bad", "fine", "awful", "film", "plot", "the", "a", "Review", "Sentiment", ":", "\n", "positive"]
    words += ["negative", "Classify", "text", "as", "or", ".", "N", "/", "x", "0"]
    words = ["<unk>", "<s>", "</s>", *words, *(f"w{i}" for i in range(VOCABULARY - 3 - len(words)))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(":", "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Fuse()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=256
    )


def make_reviews(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Made-up reviews whose class can be read off their words."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        positive = index % 2 == 0
        size = int(torch.randint(2, 9, (1,), generator=generator))
        fill = [f"w{int(i)}" for i in torch.randint(0, 60, (size,), generator=generator)]
        fill.insert(int(torch.randint(0, size, (1,), generator=generator)), "good" if positive else "bad")
        rows.append({"text": " ".join(fill), "label": "positive" if positive else "negative"})
    return rows
