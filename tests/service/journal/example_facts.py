"""A few facts of every shape that matters to a journal."""

from __future__ import annotations

from fppmo_ray.service.journal.facts import Asked, Fact, Failed, Scored, Started

STARTED = Started(
    search_id="abc",
    identity={"settings": {"macs_cut": 0.5}, "network": "1f"},
    versions={},
    groups=["conv1"],
    dense_macs=100,
)
FACTS: list[Fact] = [
    STARTED,
    Asked(id=0, generation=0, macs=50, mask="gA=="),
    Scored(
        id=0,
        round=0,
        rung=0,
        val_loss=0.1 + 0.2,
        val_accuracy=1 / 3,
        seconds=1.0,
        worker="0@h:1",
        at=9.5,
    ),
    Failed(id=1, error="RuntimeError('ü')"),
]


def numbered(number: int) -> Fact:
    """A fact to be told from others."""
    return Failed(id=number, error="")
