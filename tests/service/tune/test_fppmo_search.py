"""The searcher as Tune talks to it: every way a trial can end, twice, late or never."""

from __future__ import annotations

import json
import logging
import math
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.tune.search import ConcurrencyLimiter, Searcher

from fppmo_ray import Recipe, Resources, SearchSettings, load_dataset
from fppmo_ray.distribution import (
    ChannelGroup,
    Feedback,
    LayerCost,
    MaskOptimizer,
    OptimizerSettings,
    PruningSpace,
    Width,
)
from fppmo_ray.service.journal.facts import pack_mask, unpack_mask
from fppmo_ray.service.tune import FPPMOSearch, Problem, build_problem, image_classification
from fppmo_ray.service.tune.trials import config_of, feedback_from, proposal_of
from fppmo_ray.training import build_network

GROUPS = tuple(ChannelGroup(name=f"conv{i}", num_filters=8) for i in range(3))
WIDTHS = [Width(constant=3), *(Width(terms=((i, 1),)) for i in range(3))]
SPACE = PruningSpace(
    GROUPS,
    tuple(
        LayerCost(layer=f"conv{i}", macs_per_pair=9, in_width=WIDTHS[i], out_width=WIDTHS[i + 1])
        for i in range(3)
    ),
).with_limits()
IMPORTANCE = 1.0 + np.arange(24.0) * 7 % 11
POPULATION = 4


def settings(**changes: Any) -> OptimizerSettings:
    values = {"macs_cut": 0.5, "num_proposals": 14, "population_size": POPULATION, "seed": 3}
    return OptimizerSettings(**values | changes)


def searcher(**changes: Any) -> FPPMOSearch:
    return FPPMOSearch(SPACE, IMPORTANCE, settings(**changes))


def score(config: dict[str, Any]) -> dict[str, Any]:
    """A result that depends on the mask alone, as Tune hands it over: flat, with more in it."""
    kept = float(np.linspace(1, 2, 24) @ unpack_mask(config["mask"], 24) / 36)
    return {
        "val_loss": 1 - kept,
        "val_accuracy": kept,
        "training_iteration": 1,
        "time_total_s": 1.0,
        "config/id": config["id"],
    }


def ask_all(search: Searcher, prefix: str = "t") -> dict[str, dict[str, Any]]:
    """Configs by trial id, until the searcher has no more for now."""
    configs: dict[str, dict[str, Any]] = {}
    while isinstance(config := search.suggest(f"{prefix}{len(configs)}"), dict):
        configs[f"{prefix}{len(configs)}"] = config
    return configs


def run_to_end(search: Searcher, known: dict[str, dict[str, Any]] | None = None) -> dict[int, str]:
    """The masks of all trials by id, ended in an order of no system."""
    shuffle = random.Random(0)
    live = dict(known or {})
    masks = {config["id"]: config["mask"] for config in live.values()}
    for number in range(1000):
        config = search.suggest(f"run-{number}")
        if isinstance(config, dict):
            live[f"run-{number}"] = config
            masks[config["id"]] = config["mask"]
        elif live:
            trial_id = shuffle.choice(sorted(live))
            search.on_trial_complete(trial_id, score(live.pop(trial_id)))
        else:
            break
    assert search.suggest("one-more") == Searcher.FINISHED
    return masks


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


NAN = {"val_loss": math.nan, "val_accuracy": 0.5}


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


def searcher_with_failed_generation(number: int) -> FPPMOSearch:
    """All generations before are scored, and none of this one's proposals is."""
    search = searcher(lag=0)
    for generation in range(number + 1):
        for trial_id, config in ask_all(search, f"generation {generation}, ").items():
            failed = config["generation"] == number
            search.on_trial_complete(trial_id, NAN if failed else score(config))
    return search


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


class TestSaveAndRestore:
    def half_done(self) -> tuple[FPPMOSearch, dict[str, dict[str, Any]]]:
        """Two generations asked, three trials ended, one of them failed; and the live ones."""
        search = searcher()
        live = ask_all(search)
        for trial_id in ("t5", "t0", "t2"):
            config = live.pop(trial_id)
            search.on_trial_complete(trial_id, NAN if trial_id == "t2" else score(config))
        return search, live

    def test_a_restored_search_goes_on_with_live_trials_as_if_nothing_had_been(
        self, tmp_path: Path
    ) -> None:
        search, live = self.half_done()
        search.on_trial_result("t7", score(live["t7"]))
        search.save(str(tmp_path / "state"))
        restored = searcher()
        restored.restore(str(tmp_path / "state"))
        for same in (search, restored):
            same.on_trial_complete("t7")  # by what it reported before
            same.on_trial_complete("t0", NAN)  # again
        live.pop("t7")
        assert run_to_end(restored, live) == run_to_end(search, live)

    def test_a_state_file_holds_every_field_of_feedback_and_reports(self, tmp_path: Path) -> None:
        search, live = self.half_done()
        deep = {"val_loss": 0.25, "val_accuracy": 0.75, "steps": 10}
        search.on_trial_complete("t1", deep)
        search.on_trial_result("t7", {**deep, "steps": 5})
        search.save(str(tmp_path / "state"))
        state = json.loads((tmp_path / "state").read_bytes())
        by_id = {entry["proposal_id"]: entry for entry in state["feedback"]}
        assert by_id[1] == {
            "proposal_id": 1,
            "val_loss": 0.25,
            "val_accuracy": 0.75,
            "error": None,
            "steps": 10,
            "seconds": None,
            "worker": "",
            "at": None,
        }
        assert by_id[2]["error"].startswith("its trial must report val_loss as a finite number")
        assert state["live"]["t7"] == {**by_id[1], "proposal_id": 7, "steps": 5}
        assert state["live"].keys() == live.keys() - {"t1"}
        restored = searcher()
        restored.restore(str(tmp_path / "state"))
        restored.save(str(tmp_path / "again"))
        assert (tmp_path / "again").read_bytes() == (tmp_path / "state").read_bytes()

    def test_a_search_that_waits_still_waits_after_restoring(self, tmp_path: Path) -> None:
        search, _ = self.half_done()
        search.save(str(tmp_path / "state"))
        restored = searcher()
        restored.restore(str(tmp_path / "state"))
        assert restored.suggest("more") is None

    def test_proposals_that_no_trial_has_at_saving_are_suggested_after_restoring(
        self, tmp_path: Path
    ) -> None:
        search = searcher()
        first = [search.suggest(f"t{i}") for i in range(3)]
        search.save(str(tmp_path / "state"))
        restored = searcher()
        restored.restore(str(tmp_path / "state"))
        rest = ask_all(restored, "u").values()
        ids = [config["id"] for config in [*first, *rest] if isinstance(config, dict)]
        assert ids == list(range(8))

    def test_a_finished_search_stays_finished(self, tmp_path: Path) -> None:
        search = searcher()
        run_to_end(search)
        search.save(str(tmp_path / "state"))
        restored = searcher()
        restored.restore(str(tmp_path / "state"))
        assert restored.suggest("more") == Searcher.FINISHED
        assert [f.name for f in restored.finalists()] == [f.name for f in search.finalists()]

    def test_tunes_own_folder_is_used_through_a_limiter(self, tmp_path: Path) -> None:
        search, live = self.half_done()
        search.save_to_dir(str(tmp_path), "2026")
        assert [path.name for path in tmp_path.iterdir()] == ["searcher-state-2026.json"]
        restored = searcher()
        restored.restore_from_dir(str(tmp_path))
        assert run_to_end(restored, live) == run_to_end(search, live)

    @pytest.mark.parametrize("status", ["absent", "TERMINATED", "ERROR", "RUNNING"])
    def test_a_live_trial_that_tunes_state_does_not_go_on_with_is_suggested_again(
        self, tmp_path: Path, status: str
    ) -> None:
        search, live = self.half_done()
        search.save_to_dir(str(tmp_path), "2026")
        trials = [{"trial_id": name, "status": "RUNNING"} for name in live if name != "t3"]
        trials += [{"trial_id": "t3", "status": status}] if status != "absent" else []
        tunes = {"trial_data": [[json.dumps(trial), "{}"] for trial in trials]}
        (tmp_path / "experiment_state-2026.json").write_text(json.dumps(tunes))
        restored = searcher()
        restored.restore_from_dir(str(tmp_path))
        again = ask_all(restored, "again ")
        assert list(again.values()) == ([] if status == "RUNNING" else [live["t3"]])
        others = {name: config for name, config in live.items() if name != "t3"}
        known = live if status == "RUNNING" else others | again
        assert run_to_end(restored, known) == run_to_end(search, live)

    def test_another_searchs_state_is_refused(self, tmp_path: Path) -> None:
        searcher().save(str(tmp_path / "state"))
        with pytest.raises(ValueError, match="holds another search: it differs in settings"):
            searcher(seed=4).restore(str(tmp_path / "state"))
        other = FPPMOSearch(SPACE, IMPORTANCE + 1, settings())
        with pytest.raises(ValueError, match="it differs in importance"):
            other.restore(str(tmp_path / "state"))

    @pytest.mark.parametrize(
        "content", [b"", b"{}", b"[1]", b'{"format": 1', b'{"format": 1}', b"\x80\x04K\x01."]
    )
    def test_a_damaged_state_is_refused(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "state").write_bytes(content)
        with pytest.raises(ValueError, match="state is no state of a searcher"):
            searcher().restore(str(tmp_path / "state"))

    @pytest.mark.parametrize("number", [0, 1, 3])
    def test_a_generation_that_failed_as_a_whole_is_tried_again(
        self, tmp_path: Path, number: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        searcher_with_failed_generation(number).save(str(tmp_path / "state"))
        restored = searcher(lag=0)
        with caplog.at_level(logging.WARNING):
            restored.restore(str(tmp_path / "state"))
        last = min(4 * number + 3, 13)
        assert f"all proposals from {4 * number} to {last} failed; trying again" in caplog.text
        masks = run_to_end(searcher(lag=0))
        assert run_to_end(restored) == {i: mask for i, mask in masks.items() if i >= 4 * number}

    def test_failures_beside_a_score_are_not_tried_again(self, tmp_path: Path) -> None:
        search, _ = self.half_done()
        search.save(str(tmp_path / "state"))
        restored = searcher()
        restored.restore(str(tmp_path / "state"))
        assert restored.num_ended == 3

    def test_a_search_whose_scores_meant_something_else_is_refused(self, tmp_path: Path) -> None:
        def scored_by(**others: Any) -> FPPMOSearch:
            return FPPMOSearch(SPACE, IMPORTANCE, settings(), scored_by=others)

        scored_by(rungs=(0, 5), data="digits").save(str(tmp_path / "state"))
        scored_by(rungs=(0, 5), data="digits").restore(str(tmp_path / "state"))
        with pytest.raises(ValueError, match="it differs in rungs;"):
            scored_by(rungs=(0, 6), data="digits").restore(str(tmp_path / "state"))
        with pytest.raises(ValueError, match="it differs in rungs and data;"):
            scored_by(rungs=(5,), data="cifar10").restore(str(tmp_path / "state"))


class TestForAProblem:
    def problem(self, resources: Resources | None = None, **changes: Any) -> Problem:
        small = {"proposals": 4, "population": 2, "score_steps": 50, "fine_tune": Recipe(epochs=0)}
        search_settings = SearchSettings(macs_cut=0.5).changed(**small | changes)
        network = build_network("digits_cnn", 10)
        task = image_classification(load_dataset("digits"))
        return build_problem(network, task, search_settings, resources=resources)

    def test_the_space_and_the_importance_are_the_networks(self) -> None:
        problem = self.problem()
        config = FPPMOSearch.for_problem(problem, (50,)).suggest("t")
        assert isinstance(config, dict)
        assert config["macs"] <= 0.5 * problem.tracing.space.dense_macs

    def test_masks_meet_a_cut_of_parameters_too(self) -> None:
        problem = self.problem(macs_cut=0.0, params_cut=0.7)
        search = FPPMOSearch.for_problem(problem, (50,))
        space = problem.tracing.space
        for finalist in search.finalists():
            assert space.parameters(finalist.keep) <= 0.3 * space.dense_parameters

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"importance": "taylor"}, "taylor is measured on images: measure it by"),
            ({"start": "allocation"}, "start must be uniform under Tune, got allocation"),
            ({"importance": "obs"}, r"obs is measured on images: .*pruning\.calibration"),
            (
                {"stages": (0.3,), "proposals": 16},
                r"stages must be left out under Tune, got \(0",
            ),
            ({"latency_cut": 0.3}, "latency_cut must be left out under Tune, got 0.3: nothing is"),
            ({"baseline_epochs": 3}, "baseline_epochs must be 0 under Tune, got 3; train the"),
            (
                {"macs_cut": (0.4, 0.5), "population": 4},
                r"macs_cut must be a single share under Tune, got \(0\.4, 0\.5\): its schedulers",
            ),
        ],
    )
    def test_what_needs_workers_is_refused(self, changes: dict[str, Any], sentence: str) -> None:
        problem = self.problem(**changes)
        with pytest.raises(ValueError, match=sentence):
            FPPMOSearch.for_problem(problem, (50,))

    def test_another_fidelity_recipe_device_or_rung_is_another_search(self, tmp_path: Path) -> None:
        problem = self.problem()
        search = FPPMOSearch.for_problem(problem, (25, 50))
        search.save(str(tmp_path / "state"))
        for changed, rungs, named in (
            (self.problem(score_images=9), (25, 50), "settings"),
            (self.problem(fine_tune=Recipe(epochs=0, batch_size=64)), (25, 50), "settings"),
            # A device also decides on the multiple of widths.
            (
                self.problem(Resources(gpus=1.0)),
                (25, 50),
                "settings and space and device_type",
            ),
            (self.problem(Resources(cpus=2)), (25, 50), "threads"),
            (self.problem(), (5, 50), "rungs"),
        ):
            with pytest.raises(ValueError, match=f"it differs in {named};"):
                FPPMOSearch.for_problem(changed, rungs).restore(str(tmp_path / "state"))
        FPPMOSearch.for_problem(self.problem(), (25, 50)).restore(str(tmp_path / "state"))
