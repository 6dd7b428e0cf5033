"""How well scores agree with long fine-tuning, from the cells that ``jobs/fidelity.py`` leaves."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fppmo_ray.report.cells import reading_cell
from fppmo_ray.report.spearman import spearman
from fppmo_ray.service.record.facts import Started

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NAMED = re.compile(r"(?P<mask>[a-z]+\d+)-(?P<kind>.+)-0")  # the first repeat of each
_TRUTH = "truth"
_FEWEST = 4  # masks that a correlation is taken of


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """A kind of score on several masks, beside what fine-tuning came to."""

    kind: str
    """Such as ``50steps-adapted``."""
    losses: tuple[float, ...]
    """Of the scores, a mask each."""
    true_losses: tuple[float, ...]
    """On held-out images after long fine-tuning, of the same masks."""

    @property
    def correlation(self) -> float:
        """Spearman's, of both."""
        return float(spearman(np.array(self.losses), np.array(self.true_losses)))


def read_agreements(folder: Path, started: Started) -> list[Agreement]:
    """Every kind of score in a folder of cells, from the best to the worst.

    Args:
        folder: Such as ``jobs/results/fidelity/resnet20``.
        started: How the search began on whose page they are told.

    Raises:
        ValueError: the folder holds too few cells, or cells of another network.
    """
    losses: dict[str, dict[str, float]] = {}
    for path in sorted(folder.glob("*.json")):
        if named := _NAMED.fullmatch(path.stem):
            losses.setdefault(named["kind"], {})[named["mask"]] = _loss(path, started.identity)
    true = losses.pop(_TRUTH, {})
    found = [_agreement(kind, of_kind, true) for kind, of_kind in losses.items()]
    found = [one for one in found if len(one.losses) >= _FEWEST]
    if not found:
        raise ValueError(
            f"{folder} holds no cells of jobs/fidelity.py with scores of {_FEWEST} or more masks "
            "that were fine-tuned too"
        )
    return sorted(found, key=lambda one: -one.correlation)


def draw_fidelity(figure: Figure, agreements: Sequence[Agreement]) -> None:
    """Scores' losses over those after fine-tuning, a mark for each mask and kind."""
    axes: Axes = figure.subplots()
    for number, one in enumerate(agreements):
        axes.plot(one.true_losses, one.losses, "ovs^Dx+*"[number % 8], label=one.kind, alpha=0.7)
    axes.set(xlabel="held-out loss after long fine-tuning", ylabel="loss of the score")
    axes.set_title(f"Are scores right: Spearman up to {agreements[0].correlation:.2f}")
    axes.legend(fontsize="x-small")


def _agreement(kind: str, losses: Mapping[str, float], true: Mapping[str, float]) -> Agreement:
    masks = [mask for mask in losses if mask in true]
    return Agreement(
        kind=kind,
        losses=tuple(losses[mask] for mask in masks),
        true_losses=tuple(true[mask] for mask in masks),
    )


def _loss(path: Path, identity: Mapping[str, Any]) -> float:
    with reading_cell(path, "jobs/fidelity.py"):
        told = json.loads(path.read_text())
        key, figures = told["key"], told["figures"]
        loss = figures["val_loss"] if "val_loss" in figures else figures["held_out"]["loss"]
        other = [name for name in ("network", "space") if key[name] != identity.get(name)]
    if other:
        raise ValueError(
            f"{path} is of another {other[0]} than this search: of other weights, or pruned with "
            "other --ignore; give the cells of the same"
        )
    return float(loss)
