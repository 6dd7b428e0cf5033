"""The demo's search, whole, on real Ray: undisturbed, disturbed, and asked for nonsense."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from in_process_ray import in_process_ray
from torch import nn

from fppmo_ray import (
    Calibration,
    Numerics,
    Recipe,
    Resources,
    Sampler,
    Scoring,
    SearchResult,
    SearchSettings,
    Space,
    Splits,
    load_dataset,
    run_search,
)
from fppmo_ray.demo import demo
from fppmo_ray.distribution import Feedback, Proposal
from fppmo_ray.service.journal.facts import (
    Chosen,
    EpochFinished,
    Fact,
    Finished,
    Started,
    pack_mask,
)
from fppmo_ray.service.journal.journal import to_lines
from fppmo_ray.service.journal.run_directory import JOURNAL, read_journal
from fppmo_ray.training import build_network, evaluate, open_images

PROPOSALS = 32
DENSE = build_network("digits_cnn", 10)
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of an undisturbed search with one worker."""
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    with in_process_ray():
        demo(run_dir, proposals=PROPOSALS, workers=1)
    return run_dir


def scores(run_dir: Path) -> list[tuple[int, str, float, float]]:
    """Sorted (id, mask, loss, accuracy) of all proposals."""
    facts = read_journal(run_dir)
    asked = [fact for fact in facts if isinstance(fact, Proposal)]
    masks = {fact.proposal_id: pack_mask(fact.keep) for fact in asked}
    return sorted(
        (fact.proposal_id, masks[fact.proposal_id], fact.val_loss, fact.val_accuracy)
        for fact in facts
        if isinstance(fact, Feedback)
    )


def chosen(run_dir: Path) -> tuple[str, list[bool]]:
    """Name and mask of the chosen finalist."""
    [fact] = [fact for fact in read_journal(run_dir) if isinstance(fact, Chosen)]
    return fact.finalist, fact.keep.tolist()


def last_losses(run_dir: Path) -> dict[str, float]:
    """The last epoch's training loss of every task."""
    epochs = [fact for fact in read_journal(run_dir) if isinstance(fact, EpochFinished)]
    return {fact.task: fact.train_loss for fact in epochs}


def run_until(
    run_dir: Path, kind: type[Fact], count: int, *flags: str, address: str | None = None
) -> None:
    """Run the job in a process of its own, and kill it once the journal has so many facts.

    It joins the Ray of an address, or starts one.
    """
    command = [sys.executable, "jobs/digits.py", "--run-dir", str(run_dir), *flags]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    job = subprocess.Popen(
        [*command, "--proposals", str(PROPOSALS)],
        cwd=REPOSITORY,
        env=environment | ({"RAY_ADDRESS": address} if address else {}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if job.poll() is not None:
            pytest.fail(f"the job ended with {job.returncode} before it could be killed")
        facts = read_journal(run_dir) if (run_dir / JOURNAL).is_file() else []
        if sum(isinstance(fact, kind) for fact in facts) >= count:
            break
        time.sleep(0.05)
    job.send_signal(signal.SIGKILL)
    job.wait()


MOMENTS = random.Random(20261122)
IN_BASELINE, IN_SEARCH, IN_FINE_TUNING = (
    (EpochFinished, MOMENTS.randint(1, 8)),
    (Feedback, MOMENTS.randint(1, PROPOSALS - 1)),
    (EpochFinished, MOMENTS.randint(13, 30)),
)


@pytest.mark.slow
def test_a_search_killed_three_times_with_its_own_ray_ends_like_an_undisturbed_one(
    local_ray: None, finished: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "killed"
    for kind, count in (IN_BASELINE, IN_SEARCH, IN_FINE_TUNING):
        run_until(run_dir, kind, count, "--resume-or-start", "--workers", "2")
    assert_resumed_like(finished, run_dir)


def test_a_search_killed_on_a_cluster_ends_like_an_undisturbed_one(
    local_ray: None, finished: Path, tmp_path: Path
) -> None:
    address = ray.get_runtime_context().gcs_address
    run_until(tmp_path / "killed", *IN_SEARCH, "--workers", "1", address=address)
    assert_resumed_like(finished, tmp_path / "killed")


def assert_resumed_like(finished: Path, run_dir: Path) -> None:
    """Resume a search with two workers, and compare it with an undisturbed one."""
    demo(run_dir, resume=True, proposals=PROPOSALS, workers=2)
    assert len(scores(run_dir)) == PROPOSALS
    assert scores(run_dir) == scores(finished)
    assert chosen(run_dir) == chosen(finished)
    assert last_losses(run_dir) == last_losses(finished)


def test_the_result_is_a_smaller_network_that_is_as_good_as_reported(finished: Path) -> None:
    result = SearchResult(finished, DENSE)
    network = result.network()
    dataset = load_dataset("digits")
    metrics = evaluate(network, open_images(dataset.test, None, dataset, "cpu").batches(250))
    assert metrics.accuracy == pytest.approx(result.best.test_accuracy, abs=1e-9)
    assert result.best.macs_cut >= 0.65
    assert sum(p.numel() for p in network.parameters()) < 0.5 * sum(
        p.numel() for p in result.dense.parameters()
    )
    assert [m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)] == list(
        result.best.widths.values()
    )


def test_the_history_has_a_row_per_proposal_within_the_budget(finished: Path) -> None:
    result = SearchResult(finished, DENSE)
    history = result.history
    dense = next(row for row in result.figures["variants"] if row["name"] == "dense")
    assert list(history["id"]) == list(range(PROPOSALS))
    assert list(history["generation"]) == [0] * 16 + [1] * 16
    assert (history["macs"] <= 0.15 * dense["macs"]).all()
    assert (history["macs"] >= 0.14 * dense["macs"]).all()
    assert history["error"].isna().all()
    assert history["val_accuracy"].between(0.1, 1).all()


def test_the_record_holds_what_the_readme_promises(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "journal.jsonl",
        "result.json",
        "network.pt",
        "network.json",
        "scores.png",
        "probabilities.png",
    }
    assert isinstance(read_journal(finished)[-1], Finished)


def test_the_chosen_mask_has_a_legal_width_in_every_layer(finished: Path) -> None:
    result = SearchResult(finished, DENSE)
    assert chosen(finished) == (result.best.finalist, result.best.keep.tolist())
    dense = next(row for row in result.figures["variants"] if row["name"] == "dense")
    for name, width in result.best.widths.items():
        assert 0.1 * dense["widths"][name] <= width <= dense["widths"][name]


def test_a_finished_search_resumes_to_its_result(finished: Path) -> None:
    before = (finished / JOURNAL).read_bytes()
    demo(finished, resume=True, proposals=PROPOSALS, workers=1)
    assert (finished / JOURNAL).read_bytes() == before


@pytest.mark.slow
def test_lost_results_of_a_finished_search_are_made_again(finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "damaged"
    shutil.copytree(finished, run_dir)
    (run_dir / "network.pt").write_bytes(b"other")
    (run_dir / "result.json").unlink()
    for checkpoint in run_dir.glob("checkpoints/fppmo-*.pt"):
        checkpoint.unlink()
    demo(run_dir, resume=True, proposals=PROPOSALS, workers=2)
    for name in ("network.pt", "network.json"):
        assert (run_dir / name).read_bytes() == (finished / name).read_bytes()
    before, after = SearchResult(finished, DENSE), SearchResult(run_dir, DENSE)
    assert after.best.test_accuracy == before.best.test_accuracy
    assert [isinstance(fact, Finished) for fact in read_journal(run_dir)].count(True) == 2


def test_another_search_in_the_same_directory_is_refused(finished: Path) -> None:
    with pytest.raises(
        ValueError, match=r"another search: settings\.proposals was 32, now 48; resume"
    ):
        demo(finished, resume=True, proposals=PROPOSALS + 16, workers=1)


def test_an_unreachable_budget_is_refused_before_anything_runs(tmp_path: Path) -> None:
    settings = SearchSettings(macs_cut=0.99, space=Space(min_keep=0.5))
    with pytest.raises(ValueError, match=r"macs_cut must be at most 0\.\d+, got 0.99"):
        run_search(
            build_network("digits_cnn", 10),
            load_dataset("digits"),
            settings,
            run_dir=tmp_path / "r",
        )
    assert not (tmp_path / "r").exists()


def test_a_network_without_convolutions_is_refused(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(ValueError, match="convolution"):
        run_search(network, load_dataset("digits"), SearchSettings(macs_cut=0.5), run_dir=tmp_path)


def small(**changes: Any) -> SearchSettings:
    """A search of seconds."""
    settings = SearchSettings(
        macs_cut=0.5,
        proposals=4,
        fine_tune=Recipe(epochs=0),
        sampler=Sampler(population=2),
        scoring=Scoring(score_steps=4, rescore_seeds=1),
        calibration=Calibration(calibration_images=50),
        numerics=Numerics(dtype="float32"),
    )
    return settings.changed(**changes)


def run_small(
    run_dir: Path,
    settings: SearchSettings,
    network: nn.Module = DENSE,
    workers: int = 1,
    **others: Any,
) -> SearchResult:
    resources = Resources(workers=workers)
    data = load_dataset("digits")
    return run_search(network, data, settings, run_dir=run_dir, resources=resources, **others)


@pytest.mark.usefixtures("ray_here")
def test_a_search_whose_scores_all_fail_stops_with_the_first_error(tmp_path: Path) -> None:
    settings = small(
        proposals=2,
        fine_tune=Recipe(epochs=0, learning_rate=1e30),
        score_by="labels",
        start="uniform",
    )
    sentence = "all 2 proposals of generation 0 failed.*fine-tuning diverged"
    with pytest.raises(RuntimeError, match=sentence):
        run_small(tmp_path, settings)
    assert [fact.failed for fact in read_journal(tmp_path) if isinstance(fact, Feedback)] == [
        True,
        True,
    ]


@pytest.mark.usefixtures("ray_here")
def test_without_fine_tuning_the_network_is_still_the_one_reported(tmp_path: Path) -> None:
    result = run_small(tmp_path, small(score_steps=0, baseline_epochs=2))
    dataset = load_dataset("digits")
    images = open_images(dataset.test, None, dataset, "cpu").batches(250)
    accuracy = evaluate(result.network(), images).accuracy
    assert accuracy == pytest.approx(result.best.test_accuracy, abs=1e-9)


@pytest.mark.usefixtures("ray_here")
def test_a_journal_cut_back_into_training_resumes_to_the_same_facts(tmp_path: Path) -> None:
    settings = small(baseline_epochs=3, population=4)
    history = run_small(tmp_path, settings).history
    assert history["steps"].to_list() == [4] * 4
    whole, losses = scores(tmp_path), last_losses(tmp_path)
    journal = tmp_path / JOURNAL
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:2]))
    run_small(tmp_path, settings, resume=True)
    assert scores(tmp_path) == whole
    assert last_losses(tmp_path) == losses


def test_other_library_versions_are_refused_where_numbers_would_mix(
    finished: Path, tmp_path: Path
) -> None:
    [started] = [fact for fact in read_journal(finished) if isinstance(fact, Started)]
    older = {**started.identity, "versions": {**started.identity["versions"], "torch": "1.0"}}
    (tmp_path / JOURNAL).write_bytes(to_lines([replace(started, identity=older)]))
    with pytest.raises(ValueError, match=r"another search: versions\.torch was '1\.0', now '"):
        demo(tmp_path, resume=True, proposals=PROPOSALS, workers=1)


def test_a_network_with_another_number_of_outputs_than_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"logits of shape \(N, 10\) .*, got \(1, 7\)"):
        run_small(tmp_path / "run", small(), build_network("digits_cnn", 7))
    assert not (tmp_path / "run").exists()


def test_rows_outside_the_data_set_are_refused(tmp_path: Path) -> None:
    splits = Splits(
        search_train=np.arange(100), search_val=np.array([5000]), choose_val=np.arange(100, 110)
    )
    with pytest.raises(ValueError, match=r"rows of search_val must be in .*, got 5000 to 5000"):
        run_small(tmp_path, small(), splits=splits)


def test_more_workers_than_half_a_population_are_warned_of(tmp_path: Path) -> None:
    settings = SearchSettings(
        macs_cut=0.99, space=Space(min_keep=0.5), sampler=Sampler(population=4)
    )
    with (
        pytest.warns(UserWarning, match="3 workers will wait for each other at every generation"),
        pytest.raises(ValueError, match="macs_cut must be at most"),
    ):
        run_search(
            DENSE,
            load_dataset("digits"),
            settings,
            run_dir=tmp_path,
            resources=Resources(workers=3),
        )


@pytest.mark.gpu
def test_two_workers_search_on_one_gpu(local_ray: None, tmp_path: Path) -> None:
    settings = SearchSettings(
        macs_cut=0.5,
        proposals=16,
        fine_tune=Recipe(epochs=4),
        sampler=Sampler(population=8),
        scoring=Scoring(score_steps=4),
    )
    result = run_search(
        DENSE,
        load_dataset("digits"),
        settings,
        run_dir=tmp_path,
        resources=Resources(workers=2, gpus=0.5),
    )
    assert result.history["val_accuracy"].notna().all()
    assert result.best.macs_cut >= 0.5


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"macs_cut": 0.0}, "macs_cut must be in"),
        ({"macs_cut": 1.0}, "macs_cut must be in"),
        ({"macs_cut": 0.5, "rule": "guess"}, "rule must be one of"),
        ({"macs_cut": 0.5, "score_steps": -1}, "score_steps must be >= 0, got -1"),
        ({"macs_cut": 0.5, "min_keep": 0.0}, "min_keep must be in"),
        ({"macs_cut": 0.5, "population": 1}, "population must be at least 2"),
        ({"macs_cut": 0.5, "importance": "l7"}, "importance must be one of"),
        ({"macs_cut": 0.5, "score_images": 0}, "score_images must be >= 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused_with_a_sentence(
    wrong: dict[str, float], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        small(**wrong)
