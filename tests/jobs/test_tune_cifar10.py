"""The Tune job on a few hundred of the real CIFAR-10 images, and what it refuses."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import tune_cifar10 as job

from fppmo_ray import Recipe, Resources, Sampler, Scoring, SearchSettings, load_network
from fppmo_ray.service.stopping import SearchStopped
from fppmo_ray.service.tune import FPPMOSearch

REPOSITORY = Path(__file__).resolve().parents[2]
SETTINGS = SearchSettings(
    macs_cut=0.57,
    proposals=2,
    fine_tune=Recipe(epochs=0, batch_size=32),
    sampler=Sampler(population=2),
    scoring=Scoring(
        score_steps=2, recalibrate_images=64, score_recalibrate_images=64, score_images=32
    ),
)
RUNGS = (0, 1, 2)

pytestmark = pytest.mark.filterwarnings("ignore:channel groups left whole")  # option-A shortcuts


@pytest.fixture(scope="module")
def flags(few_images: Path, weights: Path) -> dict[str, Any]:
    return {
        "data": few_images,
        "weights": weights,
        "network": "resnet20",
        "rungs": RUNGS,
        "resources": Resources(workers=1),
    }


def stop_after_the_first_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do as ``fppmo-ray stop``, while the last trial is still to be run."""
    learn = FPPMOSearch.on_trial_complete

    def learn_and_stop(self: FPPMOSearch, *arguments: Any, **named: Any) -> None:
        learn(self, *arguments, **named)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(FPPMOSearch, "on_trial_complete", learn_and_stop)


@pytest.mark.usefixtures("local_ray")
def test_the_job_ends_with_the_best_trials_network(
    flags: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    job.main(settings=SETTINGS, run_dir=run_dir, resume_or_start=True, **flags)
    network = load_network(run_dir / "network.json")
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sum(parameter.numel() for parameter in network.parameters()) < 200_000
    assert "best trials, on search-val" in capsys.readouterr().out
    with pytest.raises(ValueError, match="already holds an experiment; go on with it by --resume"):
        job.main(settings=SETTINGS, run_dir=run_dir, **flags)


@pytest.fixture
def plain_interrupts() -> Iterator[None]:
    """Python's own handler of SIGINT: Tune leaves one behind."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("plain_interrupts")
def test_the_first_sigterm_interrupts_and_the_second_does_what_it_did() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with job._stopped_by_sigterm():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is handler
    with job._stopped_by_sigterm():
        assert signal.getsignal(signal.SIGTERM) is not handler
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_stopped_job_goes_on_alike_and_ends_with_the_best_trials_network(
    flags: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after_the_first_trial(patch)
        with pytest.raises(SearchStopped, match="stopped: 1 of 2 proposals have ended; go on with"):
            job.main(settings=SETTINGS, run_dir=run_dir, resume_or_start=True, **flags)
    assert not (run_dir / "network.json").exists()
    faster = SETTINGS.changed(fine_tune=replace(SETTINGS.fine_tune, learning_rate=0.1))
    other = flags | {"rungs": (1, 2), "resources": Resources(workers=2)}
    with pytest.raises(ValueError, match="another search: it differs in settings and rungs;"):
        job.main(settings=faster, run_dir=run_dir, resume=True, **other)

    job.main(settings=SETTINGS, run_dir=run_dir, resume_or_start=True, **flags)
    assert load_network(run_dir / "network.json")(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize("limit", [{"score_timeout": 60.0}, {"call_timeout": 60.0}])
def test_a_time_limit_that_tune_does_not_have_is_refused(
    flags: dict[str, Any], tmp_path: Path, limit: dict[str, float]
) -> None:
    limited = flags | {"resources": Resources(workers=1, **limit)}
    with pytest.raises(ValueError, match="Tune has no limit for a trial's time: leave --score-t"):
        job.main(settings=SETTINGS, run_dir=tmp_path / "run", **limited)


def test_what_ended_before_tune_had_saved_a_state_is_begun_again(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for name in ("tuner.pkl", "experiment_state-2026.json"):
        (run_dir / name).write_bytes(b"")
        job._require_fit(run_dir, resume=False)
    (run_dir / "searcher-state-2026.json").write_bytes(b"")
    with pytest.raises(ValueError, match="already holds an experiment"):
        job._require_fit(run_dir, resume=False)


def test_resuming_nothing_is_refused(flags: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--resume: .* holds no experiment; start it without"):
        job.main(settings=SETTINGS, run_dir=tmp_path / "run", resume=True, **flags)
