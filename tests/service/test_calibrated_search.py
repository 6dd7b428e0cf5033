"""Searches that start at the allocation: from the settings to the closing table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from simulated_run import Killed, all_of, go_on, killed_after, told

from fppmo_ray import (
    Baseline,
    Calibration,
    Numerics,
    Recipe,
    Resources,
    Sampler,
    Scoring,
    SearchResult,
    SearchSettings,
    load_dataset,
    run_search,
)
from fppmo_ray.distribution import Proposal
from fppmo_ray.report import draw_figures, print_result, print_status, write_report
from fppmo_ray.service.journal.facts import AllocationChosen, EpochFinished, Rescored
from fppmo_ray.training import build_network, evaluate, open_images

SETTINGS = SearchSettings(
    macs_cut=0.5,
    proposals=8,
    fine_tune=Recipe(epochs=1, batch_size=64),
    sampler=Sampler(population=4, importance="obs", start="allocation"),
    calibration=Calibration(refit=True, calibration_images=60),
    scoring=Scoring(
        score_by="divergence",
        score_images=100,
        rescore_images=100,
        rescore_seeds=2,
        score_reconstruct_images=20,
    ),
    baseline=Baseline(baseline_epochs=1),
    numerics=Numerics(dtype="float32"),
)


def searched(run_dir: Path, settings: SearchSettings) -> SearchResult:
    network, dataset = build_network("digits_cnn", 10, seed=0), load_dataset("digits")
    one = Resources(workers=1)
    return run_search(network, dataset, settings, run_dir=run_dir, resources=one)


def test_without_proposals_the_allocation_is_fine_tuned_and_no_mask_scored(
    ray_here: None, tmp_path: Path
) -> None:
    result = searched(tmp_path / "run", SETTINGS.changed(proposals=0, distill_steps=4))
    rows = {row["name"]: row for row in result.figures["variants"]}
    assert list(rows) == ["dense", "importance-only", "allocation", "fppmo"]
    assert result.best.finalist == "allocation"
    assert rows["allocation"]["widths"] == rows["fppmo"]["widths"]
    assert rows["allocation"]["after"] == rows["fppmo"]["after"]
    assert all_of(tmp_path / "run", Proposal) == all_of(tmp_path / "run", Rescored) == []
    trained = {fact.task for fact in all_of(tmp_path / "run", EpochFinished)}
    distilled = {"importance-only-distilled", "fppmo-distilled"}
    assert trained == {"baseline", "dense", "importance-only", "fppmo", *distilled}
    assert "distilled" not in rows["dense"]
    assert rows["allocation"]["distilled"] == rows["fppmo"]["distilled"]
    figures = [rows["fppmo"][at]["test"]["accuracy"] for at in ("before", "distilled", "after")]
    assert len(set(figures)) == 3
    assert result.best.test_score_distilled == figures[1]
    test = open_images(load_dataset("digits").test, None, load_dataset("digits"))
    networks = result.network(distilled=True), result.network()
    for network, figure in zip(networks, figures[1:], strict=True):
        assert evaluate(network, test.batches(250)).accuracy == pytest.approx(figure, abs=1e-6)
    assert len(result.history) == 0
    console = Console(record=True, width=160)
    print_result(result.run_dir, console)
    print_status(result.run_dir, console)
    text = console.export_text()
    assert "chosen: allocation" in text
    assert f"{100 * figures[1]:.2f}" in text
    assert "no scores" in text
    draw_figures(result.run_dir)
    assert "allocation" in write_report(result.run_dir, tmp_path / "report.html")[0].read_text()


def test_with_proposals_the_allocation_is_a_row_of_the_table_beside_what_was_chosen(
    ray_here: None, tmp_path: Path
) -> None:
    result = searched(tmp_path / "run", SETTINGS)
    rows = {row["name"]: row for row in result.figures["variants"]}
    assert list(rows) == ["dense", "importance-only", "allocation", "fppmo"]
    assert all(0 <= row["after"]["test"]["accuracy"] <= 1 for row in rows.values())
    rescored = {fact.finalist for fact in all_of(tmp_path / "run", Rescored)}
    assert {"allocation", "importance-only"} < rescored
    assert result.history["val_accuracy"].between(0, 1).all()
    console = Console(record=True, width=160)
    print_result(result.run_dir, console)
    assert "allocation" in console.export_text()


def test_the_allocation_is_the_one_that_scores_best(ray_here: None, tmp_path: Path) -> None:
    settings = SETTINGS.changed(macs_cut=0.8, proposals=0, score_images=400)
    chosen = searched(tmp_path / "three", settings)
    [fact] = all_of(tmp_path / "three", AllocationChosen)
    assert settings.gammas() == (0.0, 1.0, 3.0)
    assert len(fact.costs) == 3
    assert fact.gamma == settings.gammas()[int(np.argmin(fact.costs))]
    alone = searched(tmp_path / "one", settings.changed(gamma=fact.gamma))
    assert np.array_equal(alone.best.keep, chosen.best.keep)
    [fact] = all_of(tmp_path / "one", AllocationChosen)
    assert fact.costs == []


def test_settings_say_which_weights_of_parameters_are_scored() -> None:
    assert SETTINGS.gammas() == (0.0, 1.0, 3.0)
    assert SETTINGS.changed(gamma=3.0).gammas() == (3.0,)
    assert SETTINGS.changed(gamma=(0.0, 2.0)).gammas() == (0.0, 2.0)


@pytest.mark.parametrize("proposals", [0, 12])
def test_a_search_from_the_allocation_that_is_killed_ends_like_an_undisturbed_one(
    tmp_path: Path, proposals: int
) -> None:
    settings = SETTINGS.changed(proposals=proposals, baseline_epochs=0)
    undisturbed, _ = go_on(tmp_path / "whole", settings)
    assert undisturbed.choices[0].allocation is not None
    for number in range(1, 1000, 3):
        run_dir = tmp_path / str(number)
        try:
            with killed_after(number):
                go_on(run_dir, settings, seed=number)
        except Killed:
            pass
        else:
            break
        found, _ = go_on(run_dir, settings, seed=number + 1)
        assert told(run_dir) == told(tmp_path / "whole"), number
        assert np.array_equal(found.choices[0].chosen.keep, undisturbed.choices[0].chosen.keep)
    assert number > 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"start": "middle"}, r"start must be one of \('uniform', 'allocation'\), got middle"),
        (
            {"start": "uniform", "proposals": 0},
            "proposals = 0 leaves the allocation .* got uniform",
        ),
        ({"proposals": 16, "stages": (0.3,)}, "start allocation does not go with stages"),
        ({"proposals": 3}, "proposals must be at least population = 4"),
        ({"gamma": -1.0}, "gamma must be finite and >= 0, got -1.0"),
        ({"gamma": ()}, r"gamma must be finite and >= 0, got \(\)"),
        ({"calibration_images": 0}, "calibration_images must be >= 1"),
        ({"distill_steps": -1}, "distill_steps must be >= 0, got -1"),
        ({"score_by": "guess"}, "score_by must be one of"),
        ({"importance": "best"}, "importance must be one of .*obs"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_a_sentence(
    changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        SETTINGS.changed(**changes)
