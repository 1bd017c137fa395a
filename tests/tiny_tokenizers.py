"""Tiny real tokenizers, built without a hub: one of each family that treats seams and special tokens differently."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "Review: a fine film about nothing much at all, and yet it moves.\nSentiment: positive negative neutral",
    "Frage: Wie spät ist es? 评论：这部电影很好看。情感：积极 消极 🙂 {braces} 1234567890 <|im_start|>user",
] * 3
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if think %}{{ '<think>' }}{% endif %}{% endif %}"
)
LLAMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% elif m['role'] == 'system' %}{{ raise_exception('no system turn here') }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)

SPLITTER = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])


@cache
def byte_level() -> Any:
    """Byte-level BPE like GPT-2's: nothing is put before a text, every byte has a token; chats like ChatML."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    made.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHAT,
    )


def _llama_model() -> models.BPE:
    """A BPE vocabulary with byte fallback, as those converted from sentencepiece have."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(learned["vocab"])]
    vocab = {name: index for index, name in enumerate(dict.fromkeys(names))}
    merges = [tuple(pair) for pair in learned["merges"]]
    return models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


@cache
def llama(legacy: bool = False) -> Any:
    """Like Llama's: a space before the first word, BOS before the text, byte fallback.

    legacy: the space is put by a normalizer, so also after every special token in the text.
    """
    made = Tokenizer(_llama_model())
    if legacy:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=LLAMA_CHAT
    )


@cache
def word_level() -> Any:
    """Whole words and single characters, one token each; what is not known is <unk>; EOS is put behind the text."""
    words = {word for text in TEXTS for word in split_words(text)} | set("".join(TEXTS)) - {" "}
    vocab = {word: index for index, word in enumerate(["<unk>", "<eos>", *sorted(words - {"<unk>", "<eos>"})])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = SPLITTER
    made.add_special_tokens(["<unk>", "<eos>"])
    made.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", unk_token="<unk>")


def split_words(text: str) -> list[str]:
    """Words as the pre-tokenizer of `word_level` finds them."""
    return [word for word, _ in SPLITTER.pre_tokenize_str(text)]
