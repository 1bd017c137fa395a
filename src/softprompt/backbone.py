"""The frozen model: load it, know it again, embed, compute. The only file that knows transformers' models."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from .attention import Pass, StateCache, one_at_a_time, rows_in_line
from .errors import BackboneError, BackboneMismatchError
from .few_rows import few_rows_at_once
from .frozen_layers import frozen_layers, know_layers
from .prompt import SoftPrompt

log = logging.getLogger(__name__)

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class Backbone:
    """A pretrained causal language model that never changes, with its tokenizer.

    model, tokenizer: transformers' own objects; the model is in eval mode with no parameter that requires a gradient.
    name: what it was loaded as. fast: whether rows are computed in one line with shared states (see attention.py), or
    each row by plain concatenation because this architecture does not allow it; `why_plain` says why. states: what has
    been computed before any row's own text, kept.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str = "", report: Callable[[str], None] | None = None):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        self._report = report or log.warning
        self.states = StateCache()
        self._fast: bool | None = None
        self.why_plain = ""
        self._fingerprint = ""
        if self.dtype == torch.float64:
            _norms_in_float64(model)
        self._softcap = getattr(self.text_config, "final_logit_softcapping", None)
        if getattr(model, "get_output_embeddings", lambda: None)() is None or getattr(
            model.config, "is_encoder_decoder", False
        ):
            raise BackboneError(f"{self.name} ({type(model).__name__}) is not a causal language model; expected one")
        with one_at_a_time:
            know_layers(model)

    @staticmethod
    def load(
        name: str,
        *,
        precision: str = "auto",
        device: str | None = None,
        report: Callable[[str], None] | None = None,
    ) -> Backbone:
        """Load a frozen model by hub id, local folder, .gguf file, or the alias `smollm2-135m`.

        precision: auto (what is faster here, measured), float32, bfloat16, float16 or float64. device: cuda, mps, cpu;
        by default what there is. report: called with one line for each thing done. Raises BackboneError, with all that
        was tried when nothing is found.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging as hf_logging

        from . import machine, weights

        say = report or log.info
        place = torch.device(device) if device else machine.default_device()
        if precision == "auto":
            choice = machine.probe_precision(place)
            dtype = choice.dtype
            say(f"precision {str(dtype).removeprefix('torch.')}: {choice.reason}")
        elif precision in PRECISIONS:
            dtype = PRECISIONS[precision]
        else:
            raise BackboneError(f"unknown precision '{precision}'; expected auto, {', '.join(PRECISIONS)}")
        if place.type == "cpu":
            machine.keep_freed_memory()
        found = weights.locate(name, report=say)
        hf_logging.disable_progress_bar()  # a line of ours says it
        given = {"dtype": dtype, "local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
        try:
            model = AutoModelForCausalLM.from_pretrained(found.folder, attn_implementation="sdpa", **given)
        except (ValueError, ImportError):  # not every architecture has sdpa
            model = AutoModelForCausalLM.from_pretrained(found.folder, **given)
        tokenizer = AutoTokenizer.from_pretrained(found.folder, local_files_only=True, trust_remote_code=False)
        backbone = Backbone(model.to(place), tokenizer, found.base_model_id, report)
        precision_name = str(dtype).removeprefix("torch.")
        say(f"{backbone.name}: {backbone.parameters / 1e6:,.0f} M parameters, frozen, {precision_name} on {place}")
        return backbone

    # --- what it is ---------------------------------------------------------------------------------------------

    @property
    def text_config(self) -> Any:
        return self.model.config.get_text_config()

    @property
    def embed(self) -> torch.nn.Module:
        """The model's own token embedding: ids [...] -> [..., H], with whatever scaling the model applies."""
        module: torch.nn.Module = self.model.get_input_embeddings()
        return module

    @property
    def device(self) -> torch.device:
        return next(self.embed.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.embed.parameters()).dtype

    @property
    def width(self) -> int:
        """H, the width of the embeddings."""
        return int(next(self.embed.parameters()).shape[1])

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(L, K, D): layers, key-value heads and head size of the keys and values that the model caches.

        Raises BackboneError for a model whose layers differ in this, or that caches something else.
        """
        if not hasattr(self, "_state_shape"):
            with torch.no_grad(), one_at_a_time:
                line = torch.zeros(1, 1, dtype=torch.long, device=self.device)
                cache = self.model(input_ids=line, use_cache=True).past_key_values
            shapes = {tuple(layer.keys.shape) for layer in cache.layers} if hasattr(cache, "layers") else set()
            if len(shapes) != 1:
                raise BackboneError(
                    f"{self.name} does not cache keys and values of one shape in all layers; tune an embedding prompt"
                )
            _, heads, _, size = shapes.pop()
            self._state_shape: tuple[int, int, int] = (len(cache.layers), heads, size)
        return self._state_shape

    @property
    def vocab_size(self) -> int:
        return int(next(self.embed.parameters()).shape[0])

    @property
    def layers(self) -> int:
        return int(self.text_config.num_hidden_layers)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def context_length(self) -> int:
        """Longest sequence the model was made for, in tokens; a very large number where the model has no limit."""
        config = self.text_config
        rope = getattr(config, "rope_parameters", None) or {}
        if "longrope" in (rope.get("rope_type"), rope.get("type")):
            # Beyond this length the model turns all positions by other factors: no state could be shared any more.
            original = rope.get("original_max_position_embeddings")
            return int(original or config.original_max_position_embeddings)
        found = [getattr(config, key, None) for key in ("max_position_embeddings", "n_positions", "seq_length")]
        return next((int(n) for n in found if n), 1 << 20)

    @property
    def architecture(self) -> dict[str, Any]:
        """The few numbers that PEFT writes beside a prompt."""
        config = self.text_config
        return {
            "num_layers": self.layers,
            "num_attention_heads": int(getattr(config, "num_attention_heads", None) or 0),
            "token_dim": self.width,
            "model_type": config.model_type,
        }

    @torch.no_grad()
    def embedding_table(self) -> torch.Tensor:
        """The embeddings of all V tokens as the model sees them: float32 [V, H] on the CPU."""
        chunks = torch.arange(self.vocab_size, device=self.device).split(65536)
        return torch.cat([self.embed(ids).to("cpu", torch.float32) for ids in chunks])

    @property
    def embedding_rms(self) -> float:
        """Root mean square of an entry of the embedding table: the unit of the learning rate."""
        if not hasattr(self, "_embedding_rms"):
            chunks = torch.arange(self.vocab_size, device=self.device).split(4096)  # few: these are copies in float64
            squares = sum(float(self.embed(ids).to("cpu", torch.float64).square().sum()) for ids in chunks)
            self._embedding_rms: float = (squares / (self.vocab_size * self.width)) ** 0.5
        return self._embedding_rms

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits, the same for a model in float32, float64 and bfloat16, on any device, from any folder.

        A hash of the shape-giving configuration and, of each of up to 64 parameters spread over the model, 64 evenly
        spaced numbers rounded to bfloat16, so that a model and its bfloat16 copy agree. A float16 copy does not: its
        numbers are rounded twice.
        """
        if not self._fingerprint:
            self._fingerprint = _fingerprint(self.model, self.text_config)
        return self._fingerprint

    @property
    def tokenizer_hash(self) -> str:
        """Sixteen hex digits of the vocabulary with its ids."""
        if not hasattr(self, "_tokenizer_hash"):
            vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items()), ensure_ascii=False)
            self._tokenizer_hash = hashlib.sha256(vocabulary.encode("utf-8", "replace")).hexdigest()[:16]
        return self._tokenizer_hash

    def check(self, prompt: SoftPrompt, *, force: bool = False) -> None:
        """Raise BackboneMismatchError if `prompt` was tuned for another model. A wrong width cannot be forced."""
        mine = f"{self.name} (fingerprint {self.fingerprint}, width {self.width})"
        named, known = prompt.base_model or "an unnamed model", prompt.fingerprint or "unknown"
        theirs = f"{named} (fingerprint {known}, width {prompt.width})"
        if prompt.kind == "deep":
            shape = (prompt.vectors.shape[0], prompt.vectors.shape[2], prompt.vectors.shape[4])
            if shape != self.state_shape:
                raise BackboneMismatchError(
                    f"the deep prompt was tuned for {named} (fingerprint {known}; layers, key-value heads, head size "
                    f"{shape}), this model is {mine} with {self.state_shape}; load that model"
                )
        elif prompt.width != self.width:
            raise BackboneMismatchError(f"the prompt was tuned for {theirs}, this model is {mine}; load that model")
        if prompt.fingerprint and prompt.fingerprint != self.fingerprint and not force:
            raise BackboneMismatchError(
                f"the prompt was tuned for {theirs}, this model is {mine}; load that model, or force it"
            )

    # --- computing ----------------------------------------------------------------------------------------------

    @property
    def fast(self) -> bool:
        """Whether rows may be computed in one line. Found out once, by comparing it with the plain model on noise."""
        if self._fast is None:
            from .fast_path import sees_the_future, why_not_in_line

            if sees_the_future(self):
                raise BackboneError(
                    f"{self.name} ({type(self.model).__name__}) is not a causal model: what it says of a token depends "
                    "on later ones; load a causal language model"
                )
            self.why_plain = why_not_in_line(self)
            self._fast = not self.why_plain
            if self.why_plain:
                self._report(
                    f"{self.name}: computed plainly, by concatenation ({self.why_plain}); slower, the same results"
                )
        return self._fast

    def hidden(
        self, embeddings: torch.Tensor, positions: torch.Tensor, rows: Pass, wanted: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Last hidden states of rows in one line: embeddings [N, H], positions [N] -> [N, H of the last layer].

        wanted: places in the line [A] whose last hidden states alone are wanted (none, where only keys and values are):
        -> [A, H]. Nothing reads the others in the last layer, so its MLP is then computed for these alone.
        """
        model, body = self.model, self.model.base_model
        with rows_in_line(model, rows), few_rows_at_once(model), frozen_layers(model), _mlp_of(self._last_mlp, wanted):
            out = body(inputs_embeds=embeddings[None], position_ids=positions[None], use_cache=False)
        states: torch.Tensor = out.last_hidden_state[0]
        return states if wanted is None else states[wanted]

    @property
    def _last_mlp(self) -> torch.nn.Module | None:
        """The MLP of the last layer, if it is one that sees each token alone and gives one tensor."""
        body = self.model.base_model
        layers = next((found for name in ("layers", "h") if (found := getattr(body, name, None)) is not None), None)
        mlp = getattr(layers[-1], "mlp", None) if isinstance(layers, torch.nn.ModuleList) and len(layers) else None
        return mlp if type(mlp).__name__.endswith("MLP") else None

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of hidden states: [A, H] -> [A, V]."""
        logits: torch.Tensor = self.model.get_output_embeddings()(hidden)
        if self._softcap:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits

    def plain_logits(
        self, embeddings: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any = None
    ) -> torch.Tensor:
        """The model's own forward over right-padded rows: [B, T, H], [B, T], [B, T] -> [B, T, V]. The reference.

        cache: transformers' own, with what stands before (the mask then covers that too); it grows by these tokens.
        """
        given: dict[str, Any] = {"inputs_embeds": embeddings, "attention_mask": mask, "use_cache": cache is not None}
        if cache is not None:
            given["past_key_values"] = cache
        if self._takes_positions:
            given["position_ids"] = positions
        with one_at_a_time, _softmax_in_float64() if self.dtype == torch.float64 else nullcontext():
            logits: torch.Tensor = self.model(**given).logits
        return logits

    @property
    def _takes_positions(self) -> bool:
        from inspect import signature

        return "position_ids" in signature(self.model.forward).parameters


@contextmanager
def _mlp_of(mlp: torch.nn.Module | None, wanted: torch.Tensor | None) -> Iterator[None]:
    """Within it `mlp` computes the tokens at `wanted` of its input [1, N, H] and gives zeros for the others."""
    if mlp is None or wanted is None:
        yield
        return
    count = 0

    def before(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        nonlocal count
        count = given[0].shape[1]
        return (given[0][:, wanted], *given[1:])

    def after(module: torch.nn.Module, given: Any, found: torch.Tensor) -> torch.Tensor:
        return found.new_zeros(1, count, found.shape[2]).index_copy(1, wanted, found)

    hooks = (mlp.register_forward_pre_hook(before), mlp.register_forward_hook(after))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _norms_in_float64(model: Any) -> None:
    """Let a float64 model compute in float64: transformers' RMS norms always go through float32.

    A norm is replaced only if the float64 formula gives the norm's own numbers to float32 precision.
    """
    for module in model.modules():
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        weight = getattr(module, "weight", None)
        if "RMSNorm" not in type(module).__name__ or eps is None or weight is None:
            continue
        sample = torch.linspace(-1, 1, weight.numel(), dtype=torch.float64, device=weight.device)[None]
        for scale in (weight, 1 + weight):  # Gemma's norms scale by 1 + weight

            def norm(x: torch.Tensor, scale: torch.Tensor = scale, eps: float = eps) -> torch.Tensor:
                return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * scale

            with torch.no_grad():
                same = torch.allclose(norm(sample), module(sample), rtol=1e-5, atol=1e-6)
            if same:
                module.forward = norm
                break


@contextmanager
def _softmax_in_float64() -> Iterator[None]:
    """Let eager attention in a float64 model compute in float64: it asks for a float32 softmax by name."""
    softmax = torch.nn.functional.softmax

    def precise(x: torch.Tensor, dim: int | None = None, dtype: torch.dtype | None = None, **more: Any) -> torch.Tensor:
        return softmax(x, dim=dim, dtype=torch.float64 if x.dtype == torch.float64 else dtype, **more)

    torch.nn.functional.softmax = precise  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.nn.functional.softmax = softmax


def _fingerprint(model: Any, config: Any) -> str:
    digest = hashlib.sha256()
    keys = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    digest.update(json.dumps({key: getattr(config, key, None) for key in keys}, sort_keys=True).encode())
    named = sorted(model.named_parameters())
    for name, parameter in named[:: max(1, len(named) // 64)]:
        flat = parameter.detach().flatten()
        count = min(64, flat.numel())
        index = torch.arange(count) * (flat.numel() - 1) // max(1, count - 1)
        sample = flat[index.to(flat.device)].to("cpu", torch.bfloat16).float()
        digest.update(name.encode() + str(tuple(parameter.shape)).encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]
