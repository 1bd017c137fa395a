"""OpenAI-compatible HTTP over the engine: knows HTTP, not torch."""
