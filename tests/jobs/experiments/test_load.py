from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import load
import numpy as np
import pytest

from fppmo_ray.distribution import Feedback, OptimizerSettings, Proposal
from fppmo_ray.service.journal.facts import Started
from fppmo_ray.service.journal.run_directory import read_journal
from fppmo_ray.testing import SIMULATED_SPACE


def test_a_journal_is_written_as_a_search_would(tmp_path: Path) -> None:
    settings = OptimizerSettings(macs_cut=0.5, num_proposals=40, population_size=8)
    load.write_journal(tmp_path / "run", settings, load.Load(workers=2, proposals=40))
    facts = read_journal(tmp_path / "run")
    feedback = [fact for fact in facts if isinstance(fact, Feedback)]
    assert [item.proposal_id for item in feedback] == list(range(40))
    assert {item.worker for item in feedback} == {"0@host:1", "1@host:1"}
    assert sum(isinstance(fact, Proposal) for fact in facts) == 40


def test_a_weighted_journal_differs_in_its_order_of_scores_alone(tmp_path: Path) -> None:
    settings = OptimizerSettings(macs_cut=0.5, num_proposals=16, population_size=8)
    load.write_journal(tmp_path / "run", settings, load.Load(workers=2, proposals=16))
    load.write_weighted_journal(tmp_path / "run", tmp_path / "weighted")
    plain, weighted = read_journal(tmp_path / "run"), read_journal(tmp_path / "weighted")
    started = weighted[0]
    assert isinstance(started, Started)
    assert started.merit.capacity_weight == 0.5
    masks = [
        [fact.packed for fact in facts if isinstance(fact, Proposal)] for facts in (plain, weighted)
    ]
    assert masks[0] == masks[1]
    assert all(fact.parameters > 0 for fact in weighted if isinstance(fact, Proposal))
    assert [fact for fact in plain if isinstance(fact, Feedback)] == [
        fact for fact in weighted if isinstance(fact, Feedback)
    ]


def test_a_worker_that_shares_a_process_scores_one_proposal_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running: list[int] = []
    most: list[int] = []
    pause = asyncio.sleep

    async def sleep(seconds: float) -> None:
        running.append(1)
        most.append(len(running))
        await pause(0)
        running.pop()

    monkeypatch.setattr(load.asyncio, "sleep", sleep)
    keep = np.ones(SIMULATED_SPACE.num_filters, dtype=bool)
    proposals = [Proposal(proposal_id=i, generation=0, keep=keep, macs=0) for i in range(4)]

    async def scored_by(slots: list[int]) -> int:
        seats = load.Seats(0.0)
        most.clear()
        await asyncio.gather(
            *(seats.score(slot, one) for slot, one in zip(slots, proposals, strict=True))
        )
        return max(most)

    assert asyncio.run(scored_by([0, 0, 0, 0])) == 1
    assert asyncio.run(scored_by([0, 1, 2, 3])) == 4


def test_a_seat_adds_its_slot_to_every_call() -> None:
    class Method:
        def options(self, **named: Any) -> Method:
            return self

        def remote(self, *arguments: Any) -> tuple[Any, ...]:
            return arguments

    class Process:
        ready = score = __ray_ready__ = Method()

    seat = load.Seat(Process(), 5)
    assert seat.ready.options(name="start").remote() == (5,)
    assert seat.score.options(name="score").remote("mask") == (5, "mask")
    assert getattr(seat, "__ray_ready__").remote() == ()  # noqa: B009
