"""Prompts for other engines: PEFT adapters, a model with the prompts in its vocabulary, GGUF, vLLM's embeddings."""

from .collect import collect
from .gguf_file import export_gguf
from .model import export_model
from .peft import export_peft
from .vllm import export_vllm, prompt_embeds

__all__ = ["collect", "export_gguf", "export_model", "export_peft", "export_vllm", "prompt_embeds"]
