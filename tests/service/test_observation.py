"""The observations of a search, and how they are shown to people."""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Iterable

import numpy as np
import pytest
from rich.console import Console

from fppmo_ray.distribution import Feedback, Merit, OptimizerSettings, Proposal, RankBy
from fppmo_ray.service.callbacks import ConsoleProgress
from fppmo_ray.service.observation import Observation, Tally, Workforce
from fppmo_ray.service.progress import generation_log

WORKFORCE = Workforce(wanted=8, placed=6, busy=5, queued=3, requeued=1)


def scored(proposal_id: int, loss: float, accuracy: float | None = 0.5, steps: int = 0) -> Feedback:
    return Feedback(proposal_id=proposal_id, val_loss=loss, val_accuracy=accuracy, steps=steps)


def failed(proposal_id: int) -> Feedback:
    return Feedback(proposal_id=proposal_id, error="NaN")


def proposals(parameters: Iterable[int], population: int = 4) -> list[Proposal]:
    return [
        Proposal(
            proposal_id=i,
            generation=i // population,
            keep=np.ones(4, dtype=bool),
            macs=100,
            parameters=count,
        )
        for i, count in enumerate(parameters)
    ]


def tally(rank_by: RankBy = "val_loss") -> Tally:
    """Return a tally of ten proposals in generations of four, four and two."""
    settings = OptimizerSettings(macs_cut=0.5, num_proposals=10, population_size=4, rank_by=rank_by)
    counting = Tally(settings, Merit(rank_by=rank_by))
    counting.propose(proposals([1000] * 10))
    return counting


def best_id(seen: Observation) -> int:
    assert seen.best is not None
    proposal, feedback = seen.best
    assert proposal.proposal_id == feedback.proposal_id
    return proposal.proposal_id


def losses(feedback: Iterable[Feedback]) -> list[float | None]:
    return [item.val_loss for item in feedback]


def test_a_generation_is_complete_once_every_budgets_proposals_have_ended() -> None:
    settings = OptimizerSettings(macs_cut=(0.4, 0.6), num_proposals=20, population_size=10)
    counting = Tally(settings, Merit())
    counting.propose(proposals([1000] * 20, population=10))
    assert counting.begin([], WORKFORCE).num_wanted == 20
    wide = [scored(i, 0.1 * (i + 1)) for i in range(5)]
    seen = counting.count(wide, WORKFORCE)
    assert not seen.touched[0].is_complete  # the other budget's five are missing
    tight = [scored(5, 0.3, 0.25), *(failed(i) for i in range(6, 10))]
    [generation] = counting.count(tight, WORKFORCE).touched
    assert generation.is_complete
    assert str(generation) == ("generation 0  best 0.5000 0.2500  mean 0.5000 0.2500  failed 4/10")
    assert [losses(ranked) for ranked in generation.ranked_by_budget] == [
        [0.1, 0.2, pytest.approx(0.3), 0.4, 0.5],
        [0.3],
    ]


def test_a_generation_is_complete_when_its_last_proposal_has_ended_in_whatever_order() -> None:
    counting = tally()
    first = counting.count([scored(5, 0.3), scored(0, 0.2), failed(2)], WORKFORCE)
    assert [generation.index for generation in first.touched] == [0, 1]
    assert first.num_complete == 0
    second = counting.count([scored(1, 0.4), scored(3, 0.6), scored(9, 0.1)], WORKFORCE)
    assert [generation.is_complete for generation in second.touched] == [True, False]
    assert (second.num_complete, second.num_ended) == (1, 6)
    [complete, _] = second.touched
    assert losses(complete.ranked) == [0.2, 0.4, 0.6]
    assert complete.num_failed == 1
    last = counting.count([scored(8, 0.5)], WORKFORCE)
    assert last.touched[0].is_complete  # the last generation has two
    assert last.num_complete == 2


def test_the_best_has_the_best_ranking_figure_and_the_lowest_id_among_equals() -> None:
    ended = [scored(3, 0.2, 0.6), scored(1, 0.2, 0.6), scored(7, 0.3, 0.9), failed(2)]
    assert best_id(tally("val_loss").count(ended, WORKFORCE)) == 1
    assert best_id(tally("val_accuracy").count(ended, WORKFORCE)) == 7


def test_the_best_stays_when_later_scores_are_worse() -> None:
    counting = tally()
    for ended, best in (([scored(4, 0.5)], 4), ([scored(2, 0.4)], 2), ([scored(0, 0.6)], 2)):
        assert best_id(counting.count(ended, WORKFORCE)) == best


def test_weighed_losses_decide_on_the_best_and_finished_generations_are_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = OptimizerSettings(
        macs_cut=0.5, num_proposals=8, population_size=4, capacity_weight=1.0
    )
    merit, log = Merit(capacity_weight=1.0, dense_parameters=1000), generation_log()
    counting = Tally(settings, merit)
    counting.propose(proposals([250, 500, 400, 100, 500, 500, 500, 500]))
    # Multiplied by 1000 / parameters: 1.6, 1.0, 1.25 and 9.0.
    ended = [scored(0, 0.4, 0.6), scored(1, 0.5, 0.7), scored(2, 0.5, 0.65), scored(3, 0.9, 0.9)]
    seen = counting.count(ended, WORKFORCE)
    with caplog.at_level(logging.INFO):
        log(seen)
    assert best_id(seen) == 1
    assert seen.num_complete == 1
    assert [item.proposal_id for item in seen.touched[0].ranked] == [1, 2, 0, 3]
    [line] = caplog.messages
    assert line.startswith("generation 0  best 0.7000  mean 0.7125  failed 0/4  workers 6 of 8")


def test_deeper_scores_rank_before_better_ones() -> None:
    ended = [scored(0, 0.1), scored(1, 0.9, steps=50), scored(2, 0.8, steps=50), scored(3, 0.2)]
    seen = tally().count(ended, WORKFORCE)
    assert [item.proposal_id for item in seen.touched[0].ranked] == [2, 1, 0, 3]
    assert best_id(seen) == 2


def test_without_a_score_there_is_no_best() -> None:
    assert tally().count([failed(0)], WORKFORCE).best is None


def test_a_resumed_search_counts_what_its_journal_holds() -> None:
    counting = tally()
    known = [scored(index, 0.1 * index) for index in range(5)]
    seen = counting.begin(known, WORKFORCE)
    assert (seen.num_ended, seen.num_complete, seen.ended, seen.touched) == (5, 1, (), ())
    assert counting.count([scored(6, 0.7)], WORKFORCE).num_ended == 6


def test_the_log_has_a_line_for_each_complete_generation_and_says_workers_6_of_8(
    caplog: pytest.LogCaptureFixture,
) -> None:
    counting, log = tally(), generation_log()
    with caplog.at_level(logging.INFO):
        log(counting.begin([], WORKFORCE))
        log(counting.count([scored(0, 0.3, 0.5), scored(1, 0.2, 0.75)], WORKFORCE))
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
        generation_log()(tally().begin([scored(4, 0.1)], WORKFORCE))
    assert caplog.messages == ["resumed with 1 of 10 scores"]


def test_the_bar_on_a_terminal_says_how_many_have_ended_and_how_the_generation_stands() -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=140)
    bar = ConsoleProgress(terminal)
    bar.feedback(tally().count([scored(0, 0.3, 0.875), scored(1, 0.3, 0.625)], WORKFORCE))
    bar.end(None)
    assert isinstance(terminal.file, io.StringIO)
    text = terminal.file.getvalue()
    for part in ("2/10", "best 0.8750", "mean 0.7500", "workers 6 of 8"):
        assert part in text


def test_the_bar_keeps_count_and_remaining_time_at_80_columns_and_leaves_nothing_behind() -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=80)
    bar = ConsoleProgress(terminal)
    bar.feedback(tally().count([scored(0, 0.3, 0.875), scored(1, 0.3, 0.625)], WORKFORCE))
    bar.end(None)
    assert isinstance(terminal.file, io.StringIO)
    *_, drawn, erased = terminal.file.getvalue().split("\n")
    line = drawn[drawn.rindex("scores") :].partition("\x1b")[0]
    assert re.fullmatch(r"scores .{16} +2/10 -:--:-- generation 0  best 0\.8750.*…", line)
    assert len(line) <= 80
    assert erased.endswith("\x1b[1A\x1b[2K")  # the bar's line


def test_lines_of_the_log_are_written_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "__stderr__", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    handler, own = logging.StreamHandler(stream), logging.getLogger("fppmo_ray")
    own.addHandler(handler)
    try:
        terminal = Console(file=stream, force_terminal=True, color_system=None, width=80)
        bar = ConsoleProgress(terminal)
        bar.feedback(tally().count([scored(0, 0.3, 0.875)], WORKFORCE))
        own.error("generation 7")
        bar.end(None)
        own.error("finalist")
    finally:
        own.removeHandler(handler)
    # The line of the bar is erased, the line of the log written, and the bar drawn again.
    assert re.search(r"\x1b\[2Kgeneration 7 *\n *scores ", stream.getvalue())
    assert stream.getvalue().endswith("\x1b[2Kfinalist\n")


def test_a_task_of_functions_is_shown_by_its_own_score() -> None:
    ended = [scored(i, -10.0 - i, None) for i in range(4)]
    [generation] = tally().count(ended, WORKFORCE).touched
    assert str(generation) == "generation 0  best 13.0000  mean 11.5000  failed 0/4"
