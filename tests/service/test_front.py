"""One search for two budgets on real Ray: a network for each, and a record that can be cut."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from fppmo_ray import (
    Baseline,
    Numerics,
    Recipe,
    Resources,
    Sampler,
    Scoring,
    SearchResult,
    SearchSettings,
    load_dataset,
    load_network,
    run_search,
)
from fppmo_ray.distribution import Feedback, Proposal
from fppmo_ray.job import show_result
from fppmo_ray.report import print_status
from fppmo_ray.service.journal.facts import Chosen, EpochFinished, Fact, pack_mask
from fppmo_ray.service.journal.run_directory import JOURNAL, read_journal
from fppmo_ray.service.result import export_result
from fppmo_ray.training import build_network, evaluate, open_images, source_of

CUTS = 0.4, 0.65
DENSE = build_network("digits_cnn", 10)
SETTINGS = SearchSettings(
    macs_cut=CUTS,
    proposals=8,
    fine_tune=Recipe(epochs=1, batch_size=64),
    sampler=Sampler(population=4),
    scoring=Scoring(
        score_steps=3,
        rescore_seeds=2,
        recalibrate_images=64,
        score_recalibrate_images=64,
        score_images=64,
    ),
    baseline=Baseline(baseline_epochs=1),
    numerics=Numerics(dtype="float32"),
)


def run(run_dir: Path, *, resume: bool = False, workers: int = 1) -> SearchResult:
    return run_search(
        DENSE,
        load_dataset("digits"),
        SETTINGS,
        run_dir=run_dir,
        resources=Resources(workers=workers),
        resume=resume,
        source=source_of("digits_cnn", 10),
    )


@pytest.fixture(scope="module")
def finished(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "front"
    run(run_dir)
    show_result(run_dir)
    return run_dir


def decisions(run_dir: Path) -> tuple[list[object], list[object], dict[str, float | None]]:
    """Masks with their budgets and scores, choices, and the last loss of every training."""
    facts: list[Fact] = read_journal(run_dir)
    asked = {
        fact.proposal_id: (pack_mask(fact.keep), fact.macs_cut)
        for fact in facts
        if isinstance(fact, Proposal)
    }
    scored = [fact for fact in facts if isinstance(fact, Feedback)]
    scores: list[object] = sorted(
        (f.proposal_id, *asked[f.proposal_id], f.val_loss) for f in scored
    )
    chosen: list[object] = [
        (fact.finalist, pack_mask(fact.keep), fact.macs_cut)
        for fact in facts
        if isinstance(fact, Chosen)
    ]
    epochs = [fact for fact in facts if isinstance(fact, EpochFinished)]
    return scores, chosen, {fact.task: fact.train_loss for fact in epochs}


@pytest.mark.slow
def test_each_budget_ends_with_a_network_that_is_as_good_as_reported(finished: Path) -> None:
    result = SearchResult(finished, DENSE)
    test = load_dataset("digits")
    images = open_images(test.test, None, test, "cpu")
    assert [best.budget for best in result.front] == list(CUTS)
    for best in result.front:
        assert best.budget <= best.macs_cut < best.budget + 0.02
        accuracy = evaluate(result.network(best.budget), images.batches(250)).accuracy
        assert accuracy == pytest.approx(best.test_accuracy, abs=1e-9)
    wide, tight = result.front
    assert sum(wide.widths.values()) > sum(tight.widths.values())
    names = [(row["name"], row.get("budget")) for row in result.figures["variants"]]
    assert names == [
        ("dense", None),
        *(("importance-only", 0.4), ("allocation", 0.4), ("fppmo", 0.4)),
        *(("importance-only", 0.65), ("allocation", 0.65), ("fppmo", 0.65)),
    ]


@pytest.mark.slow
def test_every_mask_meets_its_own_budget_and_two_of_each_are_scored(finished: Path) -> None:
    result = SearchResult(finished, DENSE)
    history, dense = result.history, result.figures["variants"][0]["macs"]
    assert (history["macs"] <= (1 - history["budget"]) * dense).all()
    counts = history.groupby(["generation", "budget", "steps"]).size()
    assert counts.to_dict() == {(g, cut, 3): 2 for g in (0, 1) for cut in CUTS}


@pytest.mark.slow
def test_without_a_budget_neither_mask_nor_network_is_the_best(
    finished: Path, tmp_path: Path
) -> None:
    result = SearchResult(finished, DENSE)
    with pytest.raises(ValueError, match=r"several budgets \(0\.4, 0\.65\), .* of result\.front"):
        _ = result.best
    sentence = r"must be one of the search's budgets, 0\.4, 0\.65, got"
    with pytest.raises(ValueError, match=f"{sentence} none"):
        result.network()
    with pytest.raises(ValueError, match=f"{sentence} 0.57"):
        export_result(finished, tmp_path, macs_cut=0.57)


@pytest.mark.slow
def test_the_record_holds_a_network_for_each_budget_and_the_front(
    finished: Path, tmp_path: Path
) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {f"network-{cut}.{kind}" for cut in CUTS for kind in ("pt", "json")}
    assert names >= {"front.png", "scores.png", "probabilities.png"}
    text = io.StringIO()
    print_status(finished, Console(file=text, width=200))
    for part in ("finished", "0.4, 0.65 of", "best on search-val, budget 0.65"):
        assert part in text.getvalue()
    assert export_result(finished, tmp_path, macs_cut=0.65) == [
        tmp_path / "network-0.65.pt",
        tmp_path / "network-0.65.json",
    ]
    network = load_network(tmp_path / "network-0.65.json")
    images = torch.rand(2, 1, 8, 8)
    [path] = export_result(finished, tmp_path, macs_cut=0.65, format="torch.export")
    assert path == tmp_path / "network-0.65.pt2"
    torch.testing.assert_close(torch.export.load(path).module()(images), network(images))


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["amid the scores", "between the choices", "amid fine-tuning"])
def test_a_cut_journal_leads_to_the_same_front(finished: Path, tmp_path: Path, moment: str) -> None:
    lines = (finished / JOURNAL).read_bytes().splitlines(keepends=True)
    kind, number = {
        "amid the scores": (b'"Feedback"', 5),
        "between the choices": (b'"Chosen"', 1),
        "amid fine-tuning": (b'"EpochFinished"', 3),
    }[moment]
    of_kind = [index for index, line in enumerate(lines) if kind in line]
    (tmp_path / JOURNAL).write_bytes(b"".join(lines[: of_kind[number - 1] + 1]))
    for artifact in [finished / "importance.npy", *(finished / "checkpoints").iterdir()]:
        target = tmp_path / artifact.relative_to(finished)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(artifact.read_bytes())
    resumed = run(tmp_path, resume=True, workers=2)
    assert decisions(tmp_path) == decisions(finished)
    for best, expected in zip(resumed.front, SearchResult(finished, DENSE).front, strict=True):
        assert np.array_equal(best.keep, expected.keep)
        assert best.test_accuracy == expected.test_accuracy
