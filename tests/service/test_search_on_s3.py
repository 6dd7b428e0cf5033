"""A whole search whose run directory lies on a real S3 server."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from fppmo_ray import (
    Baseline,
    Numerics,
    Recipe,
    Resources,
    Sampler,
    Scoring,
    SearchResult,
    SearchSettings,
    cli,
    load_dataset,
    run_search,
)
from fppmo_ray.distribution import Feedback, Proposal
from fppmo_ray.job import show_result
from fppmo_ray.service.journal.facts import (
    Chosen,
    EpochFinished,
    Fact,
    Rescored,
    WeightsFrozen,
    pack_mask,
)
from fppmo_ray.service.journal.run_directory import RunDirectory, read_journal
from fppmo_ray.service.journal.storage import location_of, open_storage
from fppmo_ray.service.result import export_result
from fppmo_ray.training import build_network

pytestmark = (
    pytest.mark.slow
)  # what S3 does to a journal, journal/test_leases_on_s3.py tells sooner

SETTINGS = SearchSettings(
    macs_cut=0.5,
    proposals=4,
    fine_tune=Recipe(epochs=1),
    sampler=Sampler(population=2),
    scoring=Scoring(score_steps=4, rescore_seeds=1),
    baseline=Baseline(baseline_epochs=2),
    numerics=Numerics(dtype="float32"),
)
SOURCE = {
    "constructor": "fppmo_ray.training.networks:build_network",
    "arguments": {"name": "digits_cnn", "num_classes": 10},
}


def run(run_dir: str, *, resume: bool = False) -> SearchResult:
    return run_search(
        build_network("digits_cnn", 10),
        load_dataset("digits"),
        SETTINGS,
        run_dir=run_dir,
        resources=Resources(workers=1),
        resume=resume,
        source=SOURCE,
    )


def results(result: SearchResult) -> list[tuple[object, ...]]:
    """What the facts say, without times, workers, and the order in which they came."""
    seen: list[tuple[object, ...]] = []
    for fact in read_journal(result.run_dir):
        match fact:
            case EpochFinished():
                seen.append((fact.task, fact.epoch, fact.train_loss))
            case WeightsFrozen():
                seen.append(("weights", fact.sha256))
            case Proposal():
                seen.append(("mask", fact.proposal_id, pack_mask(fact.keep)))
            case Feedback():
                seen.append(("score", fact.proposal_id, fact.val_loss, fact.val_accuracy))
            case Rescored():
                seen.append((fact.finalist, fact.split, pack_mask(fact.keep), fact.val_loss))
            case Chosen():
                seen.append(("chosen", fact.finalist, pack_mask(fact.keep)))
    return sorted(seen, key=repr)


class Killed(Exception):
    """The driver is gone."""


def killed_after(scores: int, run_dir: str) -> None:
    """Run until so many scores are recorded."""
    record = RunDirectory.record

    def record_and_die(self: RunDirectory, facts: Iterable[Fact]) -> None:
        record(self, facts)
        if len(self.all(Feedback)) >= scores:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "record", record_and_die)
        with pytest.raises(Killed):
            run(run_dir)


@pytest.fixture(scope="module")
def local(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    """An undisturbed search on the local disk."""
    return run(str(tmp_path_factory.mktemp("runs") / "local"))


@pytest.fixture(scope="module")
def remote(local_ray: None, s3_run_dir: Callable[[], str]) -> SearchResult:
    """The same search on S3, killed after half of its scores and resumed."""
    uri = s3_run_dir()
    killed_after(2, uri)
    return run(uri, resume=True)


def test_a_search_on_s3_that_is_killed_and_resumed_has_the_facts_of_the_local_one(
    local: SearchResult, remote: SearchResult
) -> None:
    assert results(remote) == results(local)
    assert list(remote.history["val_loss"]) == list(local.history["val_loss"])
    assert remote.best.widths == local.best.widths
    assert remote.best.test_accuracy == local.best.test_accuracy


def test_the_network_on_s3_is_the_local_one(
    local: SearchResult, remote: SearchResult, tmp_path: Path
) -> None:
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(remote.network()(images), local.network()(images))
    for path in export_result(str(remote.run_dir), tmp_path):
        assert path.read_bytes() == (Path(local.run_dir) / path.name).read_bytes()


def test_only_the_last_checkpoint_of_every_training_stays_on_s3(remote: SearchResult) -> None:
    assert open_storage(remote.run_dir).names("checkpoints") == [
        "allocation-epoch0.pt",
        "baseline-epoch1.pt",
        "dense-epoch0.pt",
        "fppmo-epoch0.pt",
        "importance-only-epoch0.pt",
    ]


def test_table_and_figures_are_made_from_s3_and_kept_there(
    remote: SearchResult, capsys: pytest.CaptureFixture[str]
) -> None:
    show_result(remote.run_dir)
    assert "4 scores of" in (printed := capsys.readouterr().out)
    assert f"run directory: {location_of(remote.run_dir)}" in printed
    assert set(open_storage(remote.run_dir).names("")) == {
        *("error_curves.npy", "importance.npy", "network.json", "network.pt", "probabilities.png"),
        *("result.json", "scores.png"),
    }


def test_the_command_line_takes_uris(
    remote: SearchResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.status(str(remote.run_dir))
    printed = capsys.readouterr().out
    assert "finished" in printed
    assert "4 scored, 0 failed of 4" in printed
    cli.export(str(remote.run_dir), output=tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"network.pt", "network.json"}
