"""The result of a search, read from a run directory that is written out."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fppmo_ray import SearchResult
from fppmo_ray.distribution import Feedback, Proposal
from fppmo_ray.pruning import extract, save_network, trace
from fppmo_ray.service import result as result_module
from fppmo_ray.service.journal.facts import Chosen, Started
from fppmo_ray.service.journal.run_directory import open_run, read_journal

KEEP = np.arange(8) % 2 == 0


def dense_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A search of three proposals, one of which failed at first and one for good."""
    dense = dense_network()
    tracing = trace(dense, torch.zeros(1, 3, 8, 8))
    network = extract(dense, tracing, KEEP)
    save_network(network, tmp_path / "network", tracing=tracing, keep=KEEP)
    moments = {
        "before": {"test": {"accuracy": 0.25}},
        "after": {"test": {"accuracy": 0.75}},
    }
    row = {"name": "fppmo", "macs": 50, "macs_cut": 0.5, "widths": {"0": 4}, **moments}
    figures = {"settings": {"macs_cut": 0.4}, "variants": [row | {"name": "dense"}, row]}
    (tmp_path / "result.json").write_text(json.dumps(figures))
    started = Started(
        search_id="x", identity={}, versions={}, groups=["0"], num_filters=8, dense_macs=100
    )
    with open_run(tmp_path, resume=False, started=started) as run:
        run.record(
            [
                Proposal(proposal_id=i, generation=i // 2, keep=KEEP, macs=50 + i, parameters=7)
                for i in range(3)
            ]
        )
        run.record(
            [
                Feedback(proposal_id=2, error="lost"),
                Feedback(proposal_id=1, error="RuntimeError()", worker="0@h:1"),
                Feedback(proposal_id=0, val_loss=0.5, val_accuracy=0.625, steps=3, seconds=2.0),
                Feedback(proposal_id=2, val_loss=0.25, val_accuracy=0.875, steps=3, seconds=4.0),
                Chosen(finalist="sample 2", keep=KEEP),
            ]
        )
    return tmp_path


def test_the_chosen_mask_is_told_with_its_figures(finished: Path) -> None:
    best = SearchResult(finished, dense_network()).best
    assert best.keep.tolist() == KEEP.tolist()
    assert (best.finalist, best.budget, best.macs, best.macs_cut) == ("sample 2", 0.4, 50, 0.5)
    assert (best.widths, best.test_accuracy_before, best.test_accuracy) == ({"0": 4}, 0.25, 0.75)


def test_the_history_has_a_row_per_proposal_with_the_feedback_that_counts(finished: Path) -> None:
    history = SearchResult(finished, dense_network()).history
    assert list(history["id"]) == [0, 1, 2]
    assert list(history["generation"]) == [0, 0, 1]
    assert list(history["macs"]) == [50, 51, 52]
    assert list(history["parameters"]) == [7, 7, 7]
    assert list(history["steps"]) == [3, 0, 3]
    assert history["val_loss"].fillna(-1).to_list() == [0.5, -1, 0.25]
    assert history["score"].fillna(-1).to_list() == [0.625, -1, 0.875]
    assert history["error"].fillna("").to_list() == ["", "RuntimeError()", ""]
    assert "rung" not in history


def test_the_journal_is_read_once(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []

    def count(run_dir: str | Path) -> object:
        reads.append(run_dir)
        return read_journal(run_dir)

    monkeypatch.setattr(result_module, "read_journal", count)
    result = SearchResult(finished, dense_network())
    assert reads == []
    for _ in range(2):
        assert len(result.history) == 3
        assert result.front == (result.best,)
        result.network()
    assert reads == [finished]


def test_the_network_is_a_new_one_every_time_and_leaves_the_dense_one_alone(
    finished: Path,
) -> None:
    dense = dense_network()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    result = SearchResult(finished, dense)
    first, second = result.network(), result.network()
    assert first is not second
    assert not first.training
    expected = extract(dense, trace(dense, torch.zeros(1, 3, 8, 8)), KEEP).eval()
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(first(images), expected(images))
    assert all(torch.equal(before[name], t) for name, t in dense.state_dict().items())


def test_results_are_equal_by_their_place_and_survive_pickling_whatever_was_read(
    finished: Path,
) -> None:
    dense = dense_network()
    result, other = SearchResult(finished, dense), SearchResult(finished, dense)
    assert len(result.history) == 3
    assert result.best.macs == 50
    assert result == other
    assert hash(result) == hash(other)
    assert result != SearchResult(finished.parent, dense)
    copied = pickle.loads(pickle.dumps(result))
    assert copied.run_dir == finished
    assert copied.best.keep.tolist() == KEEP.tolist()
    assert copied.history.equals(result.history)


def test_an_unfinished_search_has_no_result(finished: Path) -> None:
    (finished / "result.json").unlink()
    with pytest.raises(ValueError, match=r"holds no result\.json: the search there has not finish"):
        _ = SearchResult(finished, dense_network()).best


def test_the_history_of_a_search_in_stages_has_the_rows_of_every_stage(tmp_path: Path) -> None:
    started = Started(
        search_id="x", identity={}, versions={}, groups=["0"], num_filters=8, dense_macs=100
    )
    losses = {"stage-1": [0.5, 0.25], "stage-2": [0.125]}
    with open_run(tmp_path, resume=False, started=started):
        pass
    for name, of_stage in losses.items():
        with open_run(tmp_path / name, resume=False, started=started) as run:
            for i, loss in enumerate(of_stage):
                run.record([Proposal(proposal_id=i, generation=0, keep=KEEP, macs=50)])
                run.record([Feedback(proposal_id=i, val_loss=loss)])
    history = SearchResult(tmp_path, dense_network()).history
    assert history[["stage", "id", "val_loss"]].to_numpy().tolist() == [
        [1, 0, 0.5],
        [1, 1, 0.25],
        [2, 0, 0.125],
    ]
