"""softprompt: tune, evaluate and use soft prompts of a frozen language model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backbone import Backbone as Backbone
    from .computation import LossAndGradient as LossAndGradient
    from .data import Split as Split
    from .data import Task as Task
    from .errors import SoftPromptError as SoftPromptError
    from .evaluation.generation import Sampling as Sampling
    from .evaluation.runner import Report as Report
    from .evaluation.runner import evaluate as evaluate
    from .evaluation.voting import EnsembleReport as EnsembleReport
    from .evaluation.voting import evaluate_ensemble as evaluate_ensemble
    from .export import export_gguf as export_gguf
    from .export import export_model as export_model
    from .export import export_peft as export_peft
    from .export import export_vllm as export_vllm
    from .inference import Classified as Classified
    from .inference import classify as classify
    from .inference import generate as generate
    from .inference import loss_and_gradient as loss_and_gradient
    from .inference import stream as stream
    from .inspection.diff import Diff as Diff
    from .inspection.diff import diff as diff
    from .inspection.discretize import Discretized as Discretized
    from .inspection.discretize import discretize as discretize
    from .inspection.inspecting import Inspection as Inspection
    from .inspection.inspecting import inspect as inspect
    from .inspection.prune import Pruned as Pruned
    from .inspection.prune import prune as prune
    from .inspection.similarity import Similarity as Similarity
    from .inspection.similarity import similarity as similarity
    from .library import Library as Library
    from .prompt import SoftPrompt as SoftPrompt
    from .templates import Template as Template
    from .training.config import TuneConfig as TuneConfig
    from .training.ensemble import EnsembleResult as EnsembleResult
    from .training.ensemble import tune_ensemble as tune_ensemble
    from .training.mixing import MixResult as MixResult
    from .training.mixing import mix as mix
    from .training.run import TuneResult as TuneResult
    from .training.run import tune as tune
    from .training.sweep import SweepResult as SweepResult
    from .training.sweep import sweep as sweep

__version__ = "0.1.0"

# Public names and where they live; loaded when first asked for, so that `import softprompt` does not load torch.
_HOMES = {
    "Backbone": "backbone",
    "Classified": "inference",
    "Diff": "inspection.diff",
    "Discretized": "inspection.discretize",
    "EnsembleReport": "evaluation.voting",
    "EnsembleResult": "training.ensemble",
    "Inspection": "inspection.inspecting",
    "Library": "library",
    "LossAndGradient": "computation",
    "MixResult": "training.mixing",
    "Pruned": "inspection.prune",
    "Report": "evaluation.runner",
    "Sampling": "evaluation.generation",
    "Similarity": "inspection.similarity",
    "SoftPrompt": "prompt",
    "SoftPromptError": "errors",
    "Split": "data",
    "SweepResult": "training.sweep",
    "Task": "data",
    "Template": "templates",
    "TuneConfig": "training.config",
    "TuneResult": "training.run",
    "classify": "inference",
    "diff": "inspection.diff",
    "discretize": "inspection.discretize",
    "evaluate": "evaluation.runner",
    "evaluate_ensemble": "evaluation.voting",
    "export_gguf": "export",
    "export_model": "export",
    "export_peft": "export",
    "export_vllm": "export",
    "generate": "inference",
    "inspect": "inspection.inspecting",
    "loss_and_gradient": "inference",
    "mix": "training.mixing",
    "prune": "inspection.prune",
    "similarity": "inspection.similarity",
    "stream": "inference",
    "sweep": "training.sweep",
    "tune": "training.run",
    "tune_ensemble": "training.ensemble",
}
__all__ = [*sorted(_HOMES), "__version__"]  # noqa: PLE0604 (they are strings)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'softprompt' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
