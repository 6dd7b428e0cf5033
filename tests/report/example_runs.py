"""Facts of small searches, for tests of what is shown of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from fppmo_ray import SearchSettings
from fppmo_ray.distribution import BoolArray, Feedback, Proposal
from fppmo_ray.service.journal.facts import Rescored, Started

NUM_FILTERS = 8


def started_with(
    groups: tuple[str, ...] = ("conv1",),
    dense_macs: int = 9,
    dense_parameters: int = 1000,
    identity: dict[str, Any] | None = None,
    **settings: Any,
) -> Started:
    """Return the first fact of a search with these settings; losses are not weighed by default."""
    given: dict[str, Any] = {"proposals": 4, "population": 2, "capacity_weight": 0}
    return Started(
        search_id="c0ffee",
        identity={
            "settings": SearchSettings(macs_cut=0.5).changed(**given | settings).journaled(),
            **(identity or {}),
        },
        versions={"torch": "2.13.0"},
        groups=list(groups),
        num_filters=NUM_FILTERS,
        dense_macs=dense_macs,
        dense_parameters=dense_parameters,
    )


def mask(number: int) -> BoolArray:
    """Return a mask of its own for every number below 256."""
    return np.unpackbits(np.array([number], dtype=np.uint8)).astype(bool)


def proposal(number: int, *, macs_cut: float | None = None, parameters: int = 500) -> Proposal:
    """Return a proposal, in generations of two."""
    return Proposal(
        proposal_id=number,
        generation=number // 2,
        keep=mask(number),
        macs=5,
        parameters=parameters,
        macs_cut=macs_cut,
    )


def score(number: int, accuracy: float | None, *, loss: float = 1.0, steps: int = 0) -> Feedback:
    """Return the feedback of a proposal that took one second."""
    return Feedback(
        proposal_id=number,
        val_loss=loss,
        val_accuracy=accuracy,
        steps=steps,
        seconds=1.0,
        worker="0@a:1",
        at=0.0,
    )


def rescored(
    name: str, keep: BoolArray, *, loss: float = 1.0, accuracy: float = 0.5, repeat: int = 0
) -> Rescored:
    """Return a finalist's score on choose-val."""
    return Rescored(
        finalist=name,
        keep=keep,
        split="choose_val",
        repeat=repeat,
        val_loss=loss,
        val_accuracy=accuracy,
        seconds=1.0,
    )
