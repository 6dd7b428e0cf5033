"""The cells of a comparison: their names and keys, and the figures that are read of a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from cells import Cell
from fine_tuning import Figures, Tuned, Tuner
from torch import nn

from fppmo_ray.service.journal.facts import pack_mask
from rivals.methods import DENSE, FASTNAS, Case, Choice, Method, settings_of

_NAMED_ELSEWHERE = (
    *("layer_limits", "dtype", "autotune"),
    *("baseline_epochs", "baseline_learning_rate", "fine_tune"),
    *("params_cut", "latency_cut", "latency_batch", "memory_cut"),
)


def cell_of(case: Case, method: Method, network: str) -> Cell:
    """Return the cell of a method and a case's seed.

    Args:
        case: One seed of a comparison.
        method: The method.
        network: Name of the network, for the key.
    """
    cut = "" if method.name == DENSE else f"-{100 * case.settings.only_macs_cut():g}"
    name = f"{method}{cut}-s{case.settings.seed}"
    return Cell(name=name, key=_key(case, method, network))


def _key(case: Case, method: Method, network: str) -> dict[str, Any]:
    """All settings that a cell's figures depend on, and no others."""
    settings, identity = case.settings, case.identity
    key: dict[str, Any] = {
        "network": network,
        "method": str(method),
        "seed": settings.seed,
        "recipe": asdict(settings.fine_tune),
        "compute": asdict(case.compute),
        "device_type": identity["device_type"],
        "weights": identity["network"],
        "data": identity["data"],
    }
    if method.name == DENSE:
        return key
    of_masks = ("macs_cut", "min_keep", "multiple", "layer_limits", "ignore")
    names = (*of_masks, "recalibrate_images")
    key |= {name: settings.flat()[name] for name in names}
    if method.name == FASTNAS:
        key["search"] = {"score_images": settings.scoring.rescore_images}
    if method.is_search or method.needs_fppmo:
        searching = settings_of(method, settings).flat()
        known = {*key, *_NAMED_ELSEWHERE}
        key["search"] = {name: value for name, value in searching.items() if name not in known}
    return key


def figures_of(case: Case, choice: Choice) -> dict[str, Any]:
    """Return the figures of a network that are known before it is fine-tuned.

    Args:
        case: One seed of a comparison.
        choice: What the method chose.
    """
    space = case.problem.tracing.space
    keep = choice.keep
    widths = space.dense_widths if keep is None else space.widths(keep)
    macs = space.macs_of_widths(widths)
    return {
        "macs": macs,
        "macs_cut": 1 - macs / space.dense_macs,
        "widths": dict(zip([group.name for group in space.groups], widths.tolist(), strict=True)),
        "mask": None if keep is None else pack_mask(keep),
        "finalist": choice.finalist,
        "scores": choice.scores,
        "rescores": choice.rescores,
        "score_seconds": choice.score_seconds,
    }


def look_before_and_after(
    tuner: Tuner, tuned: Tuned, *, known: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return accuracies before and after fine-tuning; the test images are only used here.

    Args:
        tuner: The tuner that holds the images.
        tuned: A network after its last epoch.
        known: Figures that are known already.
    """
    return {
        **known,
        "parameters": sum(parameter.numel() for parameter in tuned.network.parameters()),
        "epochs": tuned.epochs,
        "tuning_seconds": tuned.seconds,
        "before": _look(tuner, tuner.untrained(tuned.task, tuned.weights)),
        "after": _look(tuner, tuned.network),
    }


def _look(tuner: Tuner, network: nn.Module) -> dict[str, Figures]:
    return {split: tuner.look(network, split) for split in ("choose_val", "test")}
