"""The searcher as Tune talks to it: every way a trial can end, twice, late or never."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from ray.tune.search import ConcurrencyLimiter, Searcher
from scripted_searcher import (
    IMPORTANCE,
    NAN,
    POPULATION,
    SPACE,
    ask_all,
    run_to_end,
    score,
    searcher,
    searcher_with_failed_generation,
    settings,
)

from fppmo_ray.distribution import (
    Feedback,
    MaskOptimizer,
)
from fppmo_ray.service.journal.facts import pack_mask, unpack_mask
from fppmo_ray.service.tune.trials import config_of, feedback_from, proposal_of


def undisturbed() -> dict[int, str]:
    """The masks of the same search without Tune."""
    optimizer = MaskOptimizer(SPACE, IMPORTANCE, settings())
    masks = {}
    while not optimizer.finished:
        for proposal in optimizer.ask():
            mask = masks[proposal.proposal_id] = pack_mask(proposal.keep)
            result = score({"id": proposal.proposal_id, "mask": mask})
            optimizer.tell(
                Feedback(
                    proposal_id=proposal.proposal_id,
                    val_loss=result["val_loss"],
                    val_accuracy=result["val_accuracy"],
                )
            )
    return masks


def prune_prob_after(*endings: tuple[dict[str, Any] | None, bool]) -> list[float]:
    """What is believed after a first generation whose last trials ended so.

    Read from the first mask of a generation that is sampled from it.
    """
    search = searcher(population_size=6, num_proposals=18, rule="elite")
    configs = list(ask_all(search).items())
    plain = 6 - len(endings)
    for trial_id, config in configs[:plain]:
        search.on_trial_complete(trial_id, score(config))
    for (trial_id, _), (result, error) in zip(configs[plain:6], endings, strict=True):
        search.on_trial_complete(trial_id, result, error)
    return [unpack_mask(c["mask"], 24).tolist() for c in ask_all(search, "next").values()]


def test_the_trajectory_is_the_searchs_own() -> None:
    assert run_to_end(searcher()) == undisturbed()


@pytest.mark.parametrize(("most", "batch"), [(1, False), (3, False), (3, True)])
def test_limited_concurrency_changes_no_mask(most: int, batch: bool) -> None:
    limited = ConcurrencyLimiter(searcher(), max_concurrent=most, batch=batch)
    assert run_to_end(limited) == undisturbed()


def test_a_limiters_number_of_trials_live_at_once() -> None:
    limited = ConcurrencyLimiter(searcher(), max_concurrent=3)
    configs = ask_all(limited)
    assert len(configs) == 3
    limited.on_trial_complete("t1", score(configs["t1"]))
    assert len(ask_all(limited, "next")) == 1


def test_a_config_is_small_and_flat_and_holds_all_that_a_score_needs() -> None:
    config = searcher().suggest("t0")
    assert isinstance(config, dict)
    keep = unpack_mask(config["mask"], 24)
    assert config == {
        "id": 0,
        "generation": 0,
        "macs": SPACE.macs(keep),
        "parameters": 0,  # this space does not know tensor sizes
        "mask": pack_mask(keep),
        "score_seed": [3, 0],
    }
    assert json.loads(json.dumps(config)) == config


def test_a_searcher_with_nothing_to_propose_waits_until_a_generation_is_in() -> None:
    search = searcher()
    configs = ask_all(search)
    assert [config["generation"] for config in configs.values()] == [0] * 4 + [1] * 4
    for trial_id in ("t0", "t1", "t2"):
        search.on_trial_complete(trial_id, score(configs[trial_id]))
        assert search.suggest("waits") is None
    search.on_trial_complete("t3", score(configs["t3"]))
    following = search.suggest("goes on")
    assert isinstance(following, dict)
    assert following["generation"] == 2


@pytest.mark.parametrize(
    ("result", "error"),
    [
        (None, False),
        (None, True),
        ({"val_loss": 0.1, "val_accuracy": 0.9}, True),
        (NAN, False),
        ({"val_loss": math.inf, "val_accuracy": 0.5}, False),
        ({"val_loss": -math.inf, "val_accuracy": 0.5}, False),
        ({"val_loss": 0.0, "val_accuracy": math.nan}, False),
        ({"val_accuracy": 0.5}, False),
        ({"val_loss": 0.0}, False),
        ({"val_loss": None, "val_accuracy": 0.5}, False),
        ({"val_loss": "0.0", "val_accuracy": 0.5}, False),
        ({"val_loss": 0.0, "val_accuracy": 0.5, "steps": math.nan}, False),
        ({"val_loss": 0.0, "val_accuracy": 0.5, "steps": -1}, False),
        ({}, False),
    ],
)
def test_a_trial_without_a_score_is_left_out_of_the_update(
    result: dict[str, Any] | None, error: bool
) -> None:
    assert prune_prob_after((result, error)) == prune_prob_after((NAN, False))
    assert prune_prob_after((result, error)) != prune_prob_after(
        ({"val_loss": 0.0, "val_accuracy": 0.5}, False)
    )


def test_numpys_numbers_are_scores() -> None:
    numpys = {"val_loss": np.float32(0.5), "val_accuracy": np.float64(0.5), "steps": np.int64(3)}
    plain = {"val_loss": 0.5, "val_accuracy": 0.5, "steps": 3}
    assert prune_prob_after((numpys, False)) == prune_prob_after((plain, False))


def test_a_trial_that_got_further_ranks_before_a_better_score() -> None:
    worst_but_deep = {"val_loss": 9.0, "val_accuracy": 0.1, "steps": 25}
    best = {"val_loss": 0.0, "val_accuracy": 0.9}
    assert prune_prob_after((worst_but_deep, False)) == prune_prob_after((best, False))


def test_a_trial_stopped_without_a_final_result_counts_by_its_last_report() -> None:
    def believed(report: dict[str, Any], last_word: dict[str, Any] | None) -> Any:
        search = searcher(num_proposals=12)
        configs = ask_all(search)
        for trial_id in ("t0", "t1", "t2"):
            search.on_trial_complete(trial_id, score(configs[trial_id]))
        search.on_trial_result("t3", {"val_loss": 5.0, "val_accuracy": 0.1, "steps": 0})
        search.on_trial_result("t3", report)
        search.on_trial_complete("t3", last_word)
        return [config["mask"] for config in ask_all(search, "next").values()]

    good = {"val_loss": 0.0, "val_accuracy": 0.9, "steps": 10}
    assert believed(good, None) == believed(NAN, good)
    assert believed(good, None) != believed(NAN, None)


def test_late_repeated_and_foreign_reports_change_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    search = searcher()
    configs = ask_all(search)
    wrong = {"val_loss": 0.0, "val_accuracy": 1.0, "steps": 99}
    for trial_id, config in configs.items():
        search.on_trial_result(trial_id, score(config))
        search.on_trial_complete(trial_id, score(config))
        search.on_trial_result(trial_id, wrong)  # late
        search.on_trial_complete(trial_id, wrong)  # again
        search.on_trial_complete(trial_id, error=True)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        search.on_trial_result("stranger", wrong)
        search.on_trial_complete("stranger", wrong)
    assert [record.message for record in caplog.records] == [
        "a report of trial stranger, which was not suggested, is ignored"
    ] * 2
    assert run_to_end(search) | {c["id"]: c["mask"] for c in configs.values()} == undisturbed()


@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_generation_that_failed_as_a_whole_stops_the_search_with_its_first_error(
    number: int,
) -> None:
    search = searcher_with_failed_generation(number)
    sentence = f"generation {number} failed; .*report val_loss as a finite number, got nan"
    for trial_id in ("another", "one more"):
        with pytest.raises(RuntimeError, match=sentence):
            search.suggest(trial_id)


def test_a_searcher_has_not_finished_while_trials_live() -> None:
    search = searcher(num_proposals=POPULATION)
    configs = ask_all(search)
    assert len(configs) == POPULATION
    for trial_id, config in configs.items():
        assert search.suggest("too early") is None
        search.on_trial_complete(trial_id, score(config))
    assert search.suggest("at the end") == Searcher.FINISHED


@pytest.mark.parametrize(
    ("metric", "mode"), [("val_accuracy", "max"), ("val_loss", "max"), (None, "max"), ("x", None)]
)
def test_a_metric_or_mode_that_contradicts_the_settings_is_refused(
    metric: str | None, mode: str | None
) -> None:
    sentence = "ranks by rank_by=val_loss, which is to be minimal; got metric="
    with pytest.raises(ValueError, match=sentence):
        searcher().set_search_properties(metric, mode, {})


def test_the_settings_name_metric_and_mode_and_tune_may_repeat_them() -> None:
    by_accuracy = searcher(rank_by="val_accuracy")
    assert (by_accuracy.metric, by_accuracy.mode) == ("val_accuracy", "max")
    by_accuracy.set_search_properties("val_accuracy", "max", {})
    by_accuracy.set_search_properties(None, None, {})
    limited = ConcurrencyLimiter(searcher(), max_concurrent=2)
    assert (limited.metric, limited.mode) == ("val_loss", "min")


def test_a_config_describes_its_proposal_completely() -> None:
    [proposal, *_] = MaskOptimizer(SPACE, IMPORTANCE, settings()).ask()
    again = proposal_of(json.loads(json.dumps(config_of(proposal))), 24)
    assert (again.keep == proposal.keep).all()
    assert {**asdict(again), "keep": None} == {**asdict(proposal), "keep": None}


def test_a_report_becomes_feedback_with_its_steps() -> None:
    report = {"val_loss": 0.5, "val_accuracy": 0.75, "steps": 25, "training_iteration": 3}
    assert feedback_from(7, report) == Feedback(
        proposal_id=7, val_loss=0.5, val_accuracy=0.75, steps=25
    )
    assert feedback_from(7, {"val_loss": 0.5, "val_accuracy": 0.75}).steps == 0
