"""A folder of prompts."""

from .library import Library
from .listing import list_prompts
from .scanning import Entry, Scan

__all__ = ["Entry", "Library", "Scan", "list_prompts"]
