"""What is seen of a search, and how it is told to people."""

from __future__ import annotations

import io
import logging
from dataclasses import replace

import pytest
from rich.console import Console

from fppmo_ray.distribution import Feedback, OptimizerSettings, RankBy
from fppmo_ray.service.progress.display import generation_log, live_bar
from fppmo_ray.service.progress.observation import Ended, Tally, Workforce

WORKFORCE = Workforce(wanted=8, placed=6, busy=5, queued=3, requeued=1)


def scored(proposal_id: int, loss: float, accuracy: float = 0.5) -> Ended:
    feedback = Feedback(proposal_id=proposal_id, val_loss=loss, val_accuracy=accuracy)
    return Ended(feedback=feedback, seconds=2.0)


def failed(proposal_id: int) -> Ended:
    return Ended(feedback=Feedback(proposal_id=proposal_id, error="NaN"))


def tally(rank_by: RankBy = "val_loss", rungs: tuple[int, ...] = ()) -> Tally:
    """Of ten proposals in generations of four, four and two."""
    settings = OptimizerSettings(
        macs_cut=0.5, num_proposals=10, population_size=4, rank_by=rank_by, rungs=rungs
    )
    return Tally(settings)


def test_the_scores_to_come_are_those_of_every_budget() -> None:
    settings = OptimizerSettings(
        macs_cut=(0.4, 0.6), num_proposals=20, population_size=10, rungs=(1, 5)
    )
    counting = Tally(settings)
    # Five of each budget in each of two generations; two of every five go on.
    assert counting.begin([], WORKFORCE).num_wanted == 20 + 2 * (2 + 2)
    shallow = [
        Ended(feedback=replace(scored(i, 0.1 * i).feedback, rung=1), seconds=1.0) for i in range(5)
    ]
    deep = [Ended(feedback=replace(scored(i, 0.1).feedback, rung=5)) for i in range(2)]
    seen = counting.count([*shallow, *deep], WORKFORCE)
    assert not seen.touched[0].is_complete  # the other budget's five are still out
    tight = [Ended(feedback=replace(scored(5, 0.3, 0.25).feedback, rung=1))]
    shown = str(counting.count(tight, WORKFORCE).touched[0])
    assert shown == "generation 0  best 0.5000 0.2500  mean 0.5000 0.2500  failed 0/8"


def test_a_generation_is_complete_when_its_last_proposal_has_ended_in_whatever_order() -> None:
    counting = tally()
    first = counting.count([scored(5, 0.3), scored(0, 0.2), failed(2)], WORKFORCE)
    assert [generation.index for generation in first.touched] == [0, 1]
    assert first.num_complete == 0
    second = counting.count([scored(1, 0.4), scored(3, 0.6), scored(9, 0.1)], WORKFORCE)
    assert [generation.is_complete for generation in second.touched] == [True, False]
    assert (second.num_complete, second.num_ended) == (1, 6)
    [complete, _] = second.touched
    assert complete.losses == [0.2, 0.4, 0.6]
    assert complete.num_failed == 1
    last = counting.count([scored(8, 0.5)], WORKFORCE)
    assert last.touched[0].is_complete  # the last generation has two
    assert last.num_complete == 2


def test_the_best_is_that_of_the_ranking_score_and_the_first_of_equals() -> None:
    ended = [scored(3, 0.2, 0.6), scored(1, 0.2, 0.6), scored(7, 0.3, 0.9), failed(2)]
    for rank_by, best in (("val_loss", 1), ("val_accuracy", 7)):
        seen = tally(rank_by).count(ended, WORKFORCE)  # type: ignore[arg-type]
        assert seen.best is not None
        assert seen.best.proposal_id == best


def at(rung: int, *ended: Ended) -> list[Ended]:
    return [replace(item, feedback=replace(item.feedback, rung=rung)) for item in ended]


def test_in_rungs_a_generation_is_complete_and_said_once_its_promoted_have_ended(
    caplog: pytest.LogCaptureFixture,
) -> None:
    counting, log = tally(rungs=(5, 20)), generation_log()
    seen = counting.count(at(5, *(scored(i, 0.1 * i, 0.9) for i in range(4))), WORKFORCE)
    assert not seen.touched[0].is_complete
    assert (seen.num_ended, seen.num_wanted, seen.num_complete) == (4, 6 + 6 + 4, 0)
    with caplog.at_level(logging.INFO):
        log(seen)
        log(counting.count(at(20, scored(1, 0.5, 0.25)), WORKFORCE))
        assert caplog.messages == []
        seen = counting.count(at(20, scored(0, 0.6, 0.75)), WORKFORCE)
        log(seen)
    assert (seen.num_ended, seen.num_complete) == (6, 1)
    [line] = caplog.messages
    assert line.startswith("generation 0  best 0.7500  mean 0.5000  failed 0/6  workers 6 of 8")
    assert seen.touched[0].losses == [0.6, 0.5]
    assert seen.best is not None
    assert (seen.best.proposal_id, seen.best.rung) == (1, 20)


def test_scores_that_failures_make_needless_are_wanted_no_more() -> None:
    counting = tally(rungs=(5, 20))
    assert counting.begin([], WORKFORCE).num_wanted == 6 + 6 + 4
    ended = at(5, failed(0), failed(1), failed(2), scored(3, 0.5))
    assert counting.count(ended, WORKFORCE).num_wanted == 5 + 6 + 4


def test_without_a_score_there_is_no_best() -> None:
    assert tally().count([failed(0)], WORKFORCE).best is None


def test_a_resumed_search_counts_what_its_journal_holds() -> None:
    counting = tally()
    known = [scored(index, 0.1 * index).feedback for index in range(5)]
    seen = counting.begin(known, WORKFORCE)
    assert (seen.num_ended, seen.num_complete, seen.ended, seen.touched) == (5, 1, (), ())
    assert counting.count([scored(6, 0.7)], WORKFORCE).num_ended == 6


def test_the_log_has_a_line_for_each_complete_generation_and_says_workers_6_of_8(
    caplog: pytest.LogCaptureFixture,
) -> None:
    counting, log = tally(), generation_log()
    with caplog.at_level(logging.INFO):
        log(counting.begin([], WORKFORCE))
        log(counting.count([scored(0, 0.3, 0.5), scored(1, 0.3, 0.75)], WORKFORCE))
        assert caplog.messages == []
        log(counting.count([failed(2), scored(3, 0.3, 0.25)], WORKFORCE))
    [line] = caplog.messages
    assert line.startswith(
        "generation 0  best 0.7500  mean 0.5000  failed 1/4  workers 6 of 8  after "
    )


def test_the_log_says_with_how_much_a_search_is_resumed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        generation_log()(tally().begin([scored(4, 0.1).feedback], WORKFORCE))
    assert caplog.messages == ["resumed with 1 of 10 scores"]


def test_the_bar_on_a_terminal_says_how_many_have_ended_and_how_the_generation_stands() -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=140)
    with live_bar(terminal) as show:
        show(tally().count([scored(0, 0.3, 0.875), scored(1, 0.3, 0.625)], WORKFORCE))
    assert isinstance(terminal.file, io.StringIO)
    text = terminal.file.getvalue()
    for part in ("2/10", "best 0.8750", "mean 0.7500", "workers 6 of 8"):
        assert part in text
