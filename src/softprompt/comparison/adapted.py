"""LoRA and prompt tuning by PEFT, and full fine-tuning of a copy of the weights."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..backbone import Backbone
from ..computation import plain_batches
from ..fileformat import load_prompt
from ..initialisers import instruction
from ..losses import summed_cross_entropy
from ..machine import memory
from ..placement import Row, in_rectangle
from .places import at_the_front
from .protocol import Job, Opened, Trained, around
from .weights import answer_loss, train, validator

# Bytes for a parameter in full fine-tuning: weight, gradient, Adam's two moments and the best weights so far, float32.
BYTES_PER_PARAMETER = 20
SPARE = 1.15  # for what the batch needs


class Lora:
    """LoRA through PEFT (Hu et al. 2021, arXiv:2106.09685): rank 8, alpha 16 on all linear layers but the output's."""

    def why_not(self, job: Job) -> str:
        return _no_peft()

    def fit(self, job: Job, learning_rate: float | None, folder: Path) -> Trained:
        from peft import LoraConfig, get_peft_model

        assert learning_rate is not None
        given = {"rank": 8, "alpha": 16, "dropout": 0.0, "weight_decay": 0.0, **job.settings}
        config = LoraConfig(
            task_type="CAUSAL_LM",
            target_modules="all-linear",
            r=given["rank"],
            lora_alpha=given["alpha"],
            lora_dropout=given["dropout"],
        )
        torch.manual_seed(job.seed)  # PEFT draws its first matrices from torch's own generator
        wrapped = get_peft_model(job.backbone.model, config)
        try:
            adapted = around(job, wrapped.get_base_model())
            parameters = [p for name, p in wrapped.named_parameters() if "lora_" in name]
            with _learning(parameters):
                found = train(
                    job,
                    parameters,
                    lambda rows: answer_loss(adapted, rows),
                    validator(job, adapted),
                    learning_rate,
                    weight_decay=given["weight_decay"],
                )
            wrapped.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
        finally:
            _unwrap(job.backbone, wrapped)
        found.settings |= {**given, "target_modules": "all-linear"}
        return found

    def open(self, job: Job, folder: Path) -> Opened:
        from peft import PeftModel

        wrapped = PeftModel.from_pretrained(job.backbone.model, str(folder / "adapter"), is_trainable=False)
        adapted = around(job, wrapped.get_base_model())
        return Opened(adapted, max_tokens=job.budget["max_tokens"], close=lambda: _unwrap(job.backbone, wrapped))


class PeftPrompt:
    """PEFT's prompt tuning as its guide for causal models sets it: the embeddings of an instruction as the start, as
    many soft tokens as that has, AdamW at 3e-2 (weight decay 0.01), linear decay without warm-up, nothing clipped.

    Only the budget (rows, epochs, batch size) is the comparison's. The best of four validations counts, which the guide
    does not do: it can only help. (huggingface/peft@0c27aaaa, docs/source/task_guides/prompt_based_methods.md)
    """

    def why_not(self, job: Job) -> str:
        return _no_peft()

    def fit(self, job: Job, learning_rate: float | None, folder: Path) -> Trained:
        from peft import get_peft_model

        assert learning_rate is not None
        torch.manual_seed(job.seed)
        text = job.settings.get("init_text") or instruction(job.task.template)
        wrapped = get_peft_model(job.backbone.model, self._config(job, text))
        (parameter,) = wrapped.prompt_encoder["default"].parameters()  # [P, H]
        with _learning([parameter]):
            found = train(
                job,
                [parameter],
                lambda rows: _peft_loss(job.backbone, wrapped, rows),
                validator(job, job.backbone, lambda: parameter.detach().float().cpu()),
                learning_rate,
                weight_decay=0.01,
                warmup=0.0,
                clip=0.0,
            )
        wrapped.save_pretrained(str(folder / "prompt"), save_embedding_layers=False)
        found.settings |= {"tokens": parameter.shape[0], "init_text": text}
        return found

    def _config(self, job: Job, text: str) -> Any:
        from peft import PromptTuningConfig, PromptTuningInit

        tokens = job.settings.get("tokens") or len(job.backbone.tokenizer(text)["input_ids"])
        self._folder = tempfile.TemporaryDirectory()  # PEFT takes a tokenizer by name only
        job.backbone.tokenizer.save_pretrained(self._folder.name)
        return PromptTuningConfig(
            task_type="CAUSAL_LM",
            prompt_tuning_init=PromptTuningInit.TEXT,
            prompt_tuning_init_text=text,
            num_virtual_tokens=tokens,
            tokenizer_name_or_path=self._folder.name,
            tokenizer_kwargs={"local_files_only": True},
        )

    def open(self, job: Job, folder: Path) -> Opened:
        vectors = load_prompt(folder / "prompt").vectors
        template = at_the_front(job.task.template)
        return Opened(job.backbone, vectors, template=template, max_tokens=job.budget["max_tokens"])


def _peft_loss(backbone: Backbone, wrapped: Any, rows: Sequence[Row]) -> torch.Tensor:
    """Summed cross-entropy of the answers, as PEFT's own forward computes it: logits at every position."""
    total = torch.zeros((), device=backbone.device)
    for batch in plain_batches(backbone, rows, 4096):
        grid = in_rectangle(batch, backbone.device)
        logits = wrapped(input_ids=grid.ids, attention_mask=grid.mask).logits  # [B, P + T, V]
        logits = logits[:, logits.shape[1] - grid.ids.shape[1] :]
        total = total + summed_cross_entropy(logits[grid.scored], grid.targets)
    return total


class Full:
    """Full fine-tuning of a float32 copy of the weights; where the backbone is bfloat16 it computes in that."""

    def why_not(self, job: Job) -> str:
        needed = int(job.backbone.parameters * BYTES_PER_PARAMETER * SPARE)
        free = _free_bytes(job.backbone.device)
        if free is None or needed <= free:
            return ""
        return (
            f"full fine-tuning of {job.backbone.parameters / 1e6:,.0f} M parameters needs about {needed / 2**30:.1f} "
            f"GiB of memory, {free / 2**30:.1f} GiB are free"
        )

    def fit(self, job: Job, learning_rate: float | None, folder: Path) -> Trained:
        assert learning_rate is not None
        dtype = job.backbone.dtype
        model = copy.deepcopy(job.backbone.model)
        if dtype in (torch.bfloat16, torch.float16):
            model = model.float()
        adapted = around(job, model)
        given = {"weight_decay": 0.0, **job.settings}
        parameters = list(model.parameters())

        def loss(rows: Sequence[Row]) -> torch.Tensor:
            with torch.autocast(job.backbone.device.type, dtype, enabled=model.dtype != dtype):
                return answer_loss(adapted, rows)

        with _learning(parameters):
            found = train(
                job,
                parameters,
                loss,
                validator(job, adapted),
                learning_rate,
                weight_decay=given["weight_decay"],
            )
        model.to(dtype).save_pretrained(str(folder / "model"))
        found.settings |= given
        return found

    def open(self, job: Job, folder: Path) -> Opened:
        base = job.backbone.model
        model = type(base).from_pretrained(
            folder / "model",
            dtype=job.backbone.dtype,
            attn_implementation=base.config._attn_implementation,
            local_files_only=True,
            use_safetensors=True,
        )
        adapted = around(job, model.to(job.backbone.device))
        return Opened(adapted, max_tokens=job.budget["max_tokens"])


@contextmanager
def _learning(parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


def _unwrap(backbone: Backbone, wrapped: Any) -> None:
    """Take PEFT's layers out of the model again; the weights under them never changed."""
    wrapped.unload()
    if hasattr(backbone.model, "peft_config"):
        del backbone.model.peft_config
    backbone.model.eval().requires_grad_(False)


def _no_peft() -> str:
    from importlib.util import find_spec

    return "" if find_spec("peft") else "PEFT is not installed; pip install 'softprompt[compare]'"


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return memory().available
