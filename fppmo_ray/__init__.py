"""Prune a trained CNN by feedback: FPPMO as a search service on Ray.

The public names load what they need when they are first used, so that ``fppmo_ray.distribution``
can be had without torch and ``fppmo_ray.training`` without Ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fppmo_ray.distribution import Feedback, MaskOptimizer, OptimizerSettings, Proposal
    from fppmo_ray.pruning import extract, load_network, save_network, trace
    from fppmo_ray.pruning.classifier import load_classifier
    from fppmo_ray.pruning.export import export_network
    from fppmo_ray.pruning.one_call import prune, prune_with_report
    from fppmo_ray.script import search
    from fppmo_ray.service.callbacks import Callback, ConsoleProgress, MLflow, TensorBoard
    from fppmo_ray.service.function_task import FunctionTask
    from fppmo_ray.service.image_task import ImageClassification
    from fppmo_ray.service.problem import Task
    from fppmo_ray.service.resources import Resources
    from fppmo_ray.service.result import SearchResult
    from fppmo_ray.service.search import run_search
    from fppmo_ray.service.setting_groups import (
        Baseline,
        Calibration,
        Gradual,
        Numerics,
        Sampler,
        Scoring,
        Space,
    )
    from fppmo_ray.service.settings import SearchSettings
    from fppmo_ray.training import (
        Dataset,
        ImageArrays,
        Recipe,
        Splits,
        Transform,
        interface_of,
        load_dataset,
        recalibrate_batchnorm,
        transform_of,
    )

_HOMES = {
    "MLflow": "fppmo_ray.service.callbacks",
    "TensorBoard": "fppmo_ray.service.callbacks",
    "ConsoleProgress": "fppmo_ray.service.callbacks",
    "Callback": "fppmo_ray.service.callbacks",
    "Baseline": "fppmo_ray.service.setting_groups",
    "Calibration": "fppmo_ray.service.setting_groups",
    "Dataset": "fppmo_ray.training",
    "Feedback": "fppmo_ray.distribution",
    "FunctionTask": "fppmo_ray.service.function_task",
    "Gradual": "fppmo_ray.service.setting_groups",
    "ImageArrays": "fppmo_ray.training",
    "ImageClassification": "fppmo_ray.service.image_task",
    "MaskOptimizer": "fppmo_ray.distribution",
    "Numerics": "fppmo_ray.service.setting_groups",
    "OptimizerSettings": "fppmo_ray.distribution",
    "Proposal": "fppmo_ray.distribution",
    "Recipe": "fppmo_ray.training",
    "Resources": "fppmo_ray.service.resources",
    "Sampler": "fppmo_ray.service.setting_groups",
    "Scoring": "fppmo_ray.service.setting_groups",
    "SearchResult": "fppmo_ray.service.result",
    "SearchSettings": "fppmo_ray.service.settings",
    "Space": "fppmo_ray.service.setting_groups",
    "Splits": "fppmo_ray.training",
    "Task": "fppmo_ray.service.problem",
    "Transform": "fppmo_ray.training",
    "export_network": "fppmo_ray.pruning.export",
    "extract": "fppmo_ray.pruning",
    "interface_of": "fppmo_ray.training",
    "load_classifier": "fppmo_ray.pruning.classifier",
    "load_dataset": "fppmo_ray.training",
    "load_network": "fppmo_ray.pruning",
    "prune": "fppmo_ray.pruning.one_call",
    "prune_with_report": "fppmo_ray.pruning.one_call",
    "recalibrate_batchnorm": "fppmo_ray.training",
    "run_search": "fppmo_ray.service.search",
    "save_network": "fppmo_ray.pruning",
    "search": "fppmo_ray.script",
    "trace": "fppmo_ray.pruning",
    "transform_of": "fppmo_ray.training",
}

__all__ = [
    "Baseline",
    "Calibration",
    "Callback",
    "ConsoleProgress",
    "Dataset",
    "Feedback",
    "FunctionTask",
    "Gradual",
    "ImageArrays",
    "ImageClassification",
    "MLflow",
    "MaskOptimizer",
    "Numerics",
    "OptimizerSettings",
    "Proposal",
    "Recipe",
    "Resources",
    "Sampler",
    "Scoring",
    "SearchResult",
    "SearchSettings",
    "Space",
    "Splits",
    "Task",
    "TensorBoard",
    "Transform",
    "export_network",
    "extract",
    "interface_of",
    "load_classifier",
    "load_dataset",
    "load_network",
    "prune",
    "prune_with_report",
    "recalibrate_batchnorm",
    "run_search",
    "save_network",
    "search",
    "trace",
    "transform_of",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
