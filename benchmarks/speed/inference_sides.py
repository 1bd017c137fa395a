"""The sides of the inference benchmark: scoring label words, and generating text, ours and PEFT's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from softprompt.data import Split
from softprompt.encoding import Encoder

from .cases import FACTS, REVIEW
from .sides import Made, Setting, load_ours, peft_prompt_model

INIT = "Read the text and answer in one word or one short sentence."
PEFT_BATCH = 16  # rows at once, for PEFT's scoring


def start_vectors(table: torch.Tensor, tokenizer: Any, tokens: int) -> torch.Tensor:
    """The embeddings of INIT, over and over: float32 [P, H]. So the model says something of the rows, untuned."""
    ids = tokenizer(INIT, add_special_tokens=False)["input_ids"]
    return table[[ids[i % len(ids)] for i in range(tokens)]].detach().float().cpu()


def endless(tokenizer: Any, model: Any) -> None:
    """Take a token that is never said for the one that ends an answer, so that all answers have the same length."""
    never = max(tokenizer.added_tokens_decoder)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(never)
    model.generation_config.eos_token_id = model.config.eos_token_id = never


# --- ours -----------------------------------------------------------------------------------------------------------


def our_prompt(setting: Setting, template: Any) -> tuple[Any, Any]:
    import softprompt as sp

    backbone = load_ours(setting)
    vectors = start_vectors(backbone.embed.weight, backbone.tokenizer, setting.tokens)
    prompt = sp.SoftPrompt(vectors, template, backbone.name, backbone.fingerprint, backbone.tokenizer_hash)
    return backbone, prompt


def our_evaluation(setting: Setting) -> Made:
    """`softprompt.evaluate` over some of the rows, as one call; the array is the probabilities [N, C]."""
    import softprompt as sp

    backbone, prompt = our_prompt(setting, REVIEW)

    def step(number: int) -> tuple[float, torch.Tensor]:
        report = sp.evaluate(backbone, Split("test", tuple(setting.more["parts"][number]), REVIEW), prompt)
        assert report.probabilities is not None
        return report.loss, report.probabilities

    return backbone.model, step, {}


def our_generation(setting: Setting) -> Made:
    import softprompt as sp

    backbone, prompt = our_prompt(setting, FACTS)
    endless(backbone.tokenizer, backbone.model)

    def step(number: int) -> tuple[float, list[str]]:
        rows = setting.more["parts"][number]
        return 0.0, sp.generate(backbone, prompt, rows, max_new_tokens=setting.more["new_tokens"])

    return backbone.model, step, {}


# --- PEFT's ---------------------------------------------------------------------------------------------------------


def peft_ready(setting: Setting, template: Any) -> tuple[Any, Any, Any, Encoder]:
    from transformers import AutoTokenizer

    base, model, weight = peft_prompt_model(setting)
    tokenizer = AutoTokenizer.from_pretrained(setting.folder)
    with torch.no_grad():
        weight.copy_(start_vectors(base.get_input_embeddings().weight, tokenizer, setting.tokens))
    return base, model.eval(), tokenizer, Encoder(template, tokenizer, setting.tokens)


def peft_by_logits(setting: Setting) -> Made:
    """The quickest that PEFT's users do: one forward of each text, the label words' first tokens compared.

    Right for label words that differ in their first tokens and have no others.
    """
    base, model, _, encoder = peft_ready(setting, REVIEW)
    answers = encoder.answers()
    assert {len(answer) for answer in answers} == {1}, "label words of several tokens; see peft-labels"
    words = [answer[0] for answer in answers]

    @torch.no_grad()
    def step(number: int) -> tuple[float, torch.Tensor]:
        found = []
        for batch in _contexts(encoder, setting.more["parts"][number]):
            ids, mask = padded(batch, 0, "right", setting.device)
            logits = model(input_ids=ids, attention_mask=mask).logits  # [B, P + T, V]
            last = logits[range(len(batch)), [setting.tokens + len(each) - 1 for each in batch]]
            found.append(last.float().log_softmax(dim=-1)[:, words].softmax(dim=-1))
        return 0.0, torch.cat(found)

    return base, step, {}


def peft_by_labels(setting: Setting) -> Made:
    """What works for any label words: the log-probability of each label word behind each text, a row of its own."""
    base, model, _, encoder = peft_ready(setting, REVIEW)
    answers = encoder.answers()

    @torch.no_grad()
    def step(number: int) -> tuple[float, torch.Tensor]:
        found = []
        for batch in _contexts(encoder, setting.more["parts"][number], PEFT_BATCH // len(answers)):
            rows = [[*each, *answer] for each in batch for answer in answers]
            ids, mask = padded(rows, 0, "right", setting.device)
            logits = model(input_ids=ids, attention_mask=mask).logits[:, setting.tokens - 1 : -1]
            each = logits.float().log_softmax(dim=-1).gather(2, ids[:, :, None])[:, :, 0]  # [B * C, T]
            sums = [each[i, len(row) - len(answers[i % len(answers)]) : len(row)].sum() for i, row in enumerate(rows)]
            found.append(torch.stack(sums).view(len(batch), len(answers)).softmax(dim=-1))
        return 0.0, torch.cat(found)

    return base, step, {}


def peft_generation(setting: Setting) -> Made:
    """PEFT's `generate` on a left-padded batch. Numbers beyond the parts: rows of the first part, each alone."""
    base, model, tokenizer, encoder = peft_ready(setting, FACTS)
    endless(tokenizer, base)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    parts = setting.more["parts"]

    @torch.no_grad()
    def say(rows: Sequence[Any]) -> list[str]:
        texts = [text_of(encoder, row) for row in rows]
        ids, mask = padded(texts, pad, "left", setting.device)
        new = setting.more["new_tokens"]
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=pad)
        return tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)

    def step(number: int) -> tuple[float, list[str]]:
        return 0.0, say(parts[number] if number < len(parts) else [parts[0][number - len(parts)]])

    return base, step, {}


def text_of(encoder: Encoder, row: Any) -> list[int]:
    """A row's context without the soft tokens, which PEFT puts in front itself."""
    return [token for token in encoder.context(row).ids if token >= 0]


def _contexts(encoder: Encoder, rows: Sequence[Any], size: int = PEFT_BATCH) -> list[list[list[int]]]:
    texts = [text_of(encoder, row) for row in rows]
    return [texts[i : i + size] for i in range(0, len(texts), size)]


def padded(texts: Sequence[list[int]], pad: int, side: str, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, [B, T] each."""
    width = max(map(len, texts))
    ids, mask = torch.full((len(texts), width), pad), torch.zeros(len(texts), width, dtype=torch.long)
    for number, text in enumerate(texts):
        place = slice(0, len(text)) if side == "right" else slice(width - len(text), width)
        ids[number, place], mask[number, place] = torch.tensor(text), 1
    return ids.to(device), mask.to(device)


Maker = Callable[[Setting], Made]
EVALUATION: dict[str, Maker] = {
    "softprompt": our_evaluation,
    "peft-logits": peft_by_logits,
    "peft-labels": peft_by_labels,
}
GENERATION: dict[str, Maker] = {"softprompt": our_generation, "peft": peft_generation}
