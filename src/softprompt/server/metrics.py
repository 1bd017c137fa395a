"""Figures for Prometheus, named as vLLM names them, with our prefix. No label ever holds what a client sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily

if TYPE_CHECKING:
    from ..engine.engine import Engine, StepStats
    from ..engine.requests import Usage
    from .registry import Registry

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
PREFIX = "softprompt:"


class Metrics:
    """All figures of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._count("prompt_tokens", "Tokens read, soft ones included.")
        self._count("prompt_tokens_cached", "Of these, tokens whose states were there already.")
        self._count("generation_tokens", "Tokens generated.")
        self.success = Counter(
            PREFIX + "request_success", "Requests that ended.", ["finished_reason"], registry=self.registry
        )
        self.rejections = Counter(
            PREFIX + "admission_rejections", "Requests that were refused.", ["reason"], registry=self.registry
        )
        self.requests = Counter(PREFIX + "requests", "Requests by task.", ["model_name"], registry=self.registry)
        self.first = self._time("time_to_first_token_seconds", "From the request to its first token.")
        self.between = self._time("inter_token_latency_seconds", "Between two tokens of a request.")
        self.whole = self._time("e2e_request_latency_seconds", "From the request to its end.")
        self.step = self._time("iteration_seconds", "One step of the engine.")
        self.step_tokens = self._histogram("iteration_tokens_total", "Tokens in one step of the engine.", COUNTS)
        self.step_tasks = self._histogram("distinct_tasks_per_step", "Tasks in one step of the engine.", COUNTS)
        self.loading = self._time("prompt_load_seconds", "Looking at the folder and loading what is new.")
        self._count("prompt_load_failures", "Prompts that could not be loaded.")

    def _count(self, name: str, about: str) -> None:
        setattr(self, name, Counter(PREFIX + name, about, registry=self.registry))

    def _time(self, name: str, about: str) -> Histogram:
        return self._histogram(name, about, SECONDS)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, about, buckets=buckets, registry=self.registry)

    prompt_tokens: Counter
    prompt_tokens_cached: Counter
    generation_tokens: Counter
    prompt_load_failures: Counter

    def watch(self, engine: Engine, registry: Registry) -> None:
        """Figures that are looked up when they are asked for."""
        kept = engine.prefixes
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "num_requests_running": ("Requests under way.", lambda: engine.running),
            "num_requests_waiting": ("Requests that wait.", lambda: engine.waiting),
            "kv_cache_tokens": ("Tokens in slots.", lambda: engine.slots.used_tokens if engine.slots else 0),
            "prompts_registered": ("Prompts served.", lambda: registry.now.prompts),
            "prompts_skipped": ("Prompts of the folder that cannot be used.", lambda: len(registry.now.skipped)),
            "prompt_kv_cache_bytes": ("States kept for prompts.", lambda: kept.bytes),
        }
        for name, (about, value) in gauges.items():
            Gauge(PREFIX + name, about, registry=self.registry).set_function(value)
        self.registry.register(_Counted(engine))

    def loaded(self, seconds: float, failures: int) -> None:
        self.loading.observe(seconds)
        self.prompt_load_failures.inc(failures)

    def stepped(self, stats: StepStats) -> None:
        if stats.rows:
            self.step.observe(stats.seconds)
            self.step_tokens.observe(stats.read + stats.written)
            self.step_tasks.observe(stats.tasks)

    def ended(self, usage: Usage | None, why: str) -> None:
        self.success.labels(why).inc()
        if usage is not None:
            self.prompt_tokens.inc(usage.read)
            self.prompt_tokens_cached.inc(usage.cached)
            self.generation_tokens.inc(usage.generated)

    def page(self) -> bytes:
        return generate_latest(self.registry)


class _Counted:
    """Counters that the engine keeps itself."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> list[CounterMetricFamily]:
        kept = self._engine.prefixes
        figures = {"hits": kept.hits, "misses": kept.misses, "evictions": kept.evictions}
        return [
            CounterMetricFamily(f"{PREFIX}prompt_kv_cache_{name}", f"States of prompts: {name}.", value=value)
            for name, value in figures.items()
        ]
