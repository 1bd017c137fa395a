"""A folder of prompts."""

from .listing import list_prompts

__all__ = ["list_prompts"]
