"""A few facts of every shape that matters to a journal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from fppmo_ray.distribution import Feedback, Proposal
from fppmo_ray.service.journal.fact_lines import fact_to_json
from fppmo_ray.service.journal.facts import Fact, Started, WeightsFrozen

STARTED = Started(
    search_id="abc",
    identity={"settings": {"macs_cut": 0.5}, "network": "1f"},
    versions={},
    groups=["conv1"],
    num_filters=9,
    dense_macs=100,
)
KEEP = np.array([True, False, False, False, False, False, False, False, True])
FACTS: list[Fact] = [
    STARTED,
    Proposal(proposal_id=0, generation=0, keep=KEEP, macs=50),
    Feedback(
        proposal_id=0,
        val_loss=0.1 + 0.2,
        val_accuracy=1 / 3,
        seconds=1.0,
        worker="0@h:1",
        at=9.5,
    ),
    Feedback(proposal_id=0, error="RuntimeError('ü')"),
]


def numbered(number: int) -> Fact:
    """Return a fact that differs from those of other numbers."""
    return WeightsFrozen(sha256=str(number))


def told(facts: Iterable[Fact]) -> list[dict[str, Any]]:
    """Return all that facts say, in a form that can be compared: masks are arrays in memory."""
    return [fact_to_json(fact) for fact in facts]
