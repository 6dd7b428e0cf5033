"""The searcher inside real Tune runs: lost and failed trials, early stopping, a killed driver."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Container
from pathlib import Path
from typing import Any

import pytest
import scripted_trials
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from scripted_trials import PROPOSALS, loss_of, make_searcher, make_tuner, scripted

from fppmo_ray.service.tune import FPPMOSearch

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(autouse=True)
def no_loggers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune leaves its log files open when it is interrupted."""
    monkeypatch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")


def masks_without_tune(failed: Container[int] = ()) -> dict[int, str]:
    """Masks by id of a search whose trials all get to their last rung, but for the failed."""
    search = make_searcher()
    masks = {}
    while isinstance(config := search.suggest(f"trial-{len(masks)}"), dict):
        trial_id = f"trial-{len(masks)}"
        masks[config["id"]] = config["mask"]
        result = {"val_loss": loss_of(config), "val_accuracy": 0.5, "steps": 4}
        search.on_trial_complete(trial_id, result, error=config["id"] in failed)
    return masks


def masks(results: tune.ResultGrid) -> dict[int, str]:
    return {result.config["id"]: result.config["mask"] for result in results}


def state(search: FPPMOSearch, folder: Path) -> dict[str, Any]:
    search.save(str(folder / "state"))
    content: dict[str, Any] = json.loads((folder / "state").read_bytes())
    return content


def test_a_lost_trial_is_run_again_and_one_that_fails_by_itself_is_left_out(
    tmp_path: Path,
) -> None:
    search = make_searcher()
    troubles = {1: "dies once", 2: "NaN", 11: "raises"}
    results = make_tuner(tmp_path, troubles, search_alg=search, max_failures=1).fit()
    assert (tmp_path / "died-1").exists()
    feedback = {entry["proposal_id"]: entry for entry in state(search, tmp_path)["feedback"]}
    failed = {number: entry["error"] for number, entry in feedback.items() if entry["error"]}
    assert sorted(failed) == [2, 11]
    assert "must report val_loss as a finite number, got nan" in failed[2]
    assert "ended with an error, which Tune has logged" in failed[11]
    assert masks(results) == masks_without_tune(failed=(2, 11))


def test_asha_stops_a_bad_mask_and_the_searcher_learns_how_deep_it_got(tmp_path: Path) -> None:
    search = make_searcher()
    scheduler = ASHAScheduler(metric="val_loss", mode="min", max_t=4, reduction_factor=2)
    results = make_tuner(tmp_path, {3: "bad"}, search_alg=search, scheduler=scheduler).fit()
    steps = {result.config["id"]: result.metrics["steps"] for result in results}
    feedback = {entry["proposal_id"]: entry for entry in state(search, tmp_path)["feedback"]}
    assert steps[0] == 4
    assert steps[3] == 1
    assert feedback[3]["val_loss"] > 2
    assert {number: entry["steps"] for number, entry in feedback.items()} == steps
    assert len(steps) == PROPOSALS


def test_a_last_generation_that_failed_as_a_whole_ends_the_run_with_its_first_error(
    tmp_path: Path,
) -> None:
    tuner = make_tuner(tmp_path, dict.fromkeys(range(8, PROPOSALS), "NaN"), max_failures=1)
    with pytest.raises(RuntimeError, match=r"all 4 proposals of generation 2 failed.*got nan"):
        tuner.fit()


@pytest.mark.slow
def test_a_generation_whose_trials_all_raised_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    tuner = make_tuner(tmp_path, dict.fromkeys(range(4), "raises"))
    with pytest.raises(RuntimeError, match=r"all 4 proposals of generation 0 failed.*with an err"):
        tuner.fit()


class InterruptOnce(tune.Callback):
    """Control-C after the second rung of proposal 6, which is live when Tune saves.

    Tune keeps callbacks for the restored run, so that it was done is told by a file.
    """

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def on_trial_result(self, *, trial: Any, result: dict[str, Any], **others: Any) -> None:
        if trial.config["id"] == 6 and result["steps"] == 2 and not self._mark.exists():
            self._mark.touch()
            os.kill(os.getpid(), signal.SIGINT)  # Tune catches it, and saves


def test_an_interrupted_run_is_restored_to_the_undisturbed_trajectory(tmp_path: Path) -> None:
    callbacks = [InterruptOnce(tmp_path / "interrupted")]
    tuner = make_tuner(tmp_path, {}, callbacks=callbacks)
    interrupted = tuner.fit()
    assert len(interrupted) < PROPOSALS
    restored = tune.Tuner.restore(str(tmp_path / "trials"), scripted({}, tmp_path)).fit()
    assert len(restored) == PROPOSALS
    assert masks(restored) == masks_without_tune()
    assert {result.metrics["steps"] for result in restored} == {4}


@pytest.mark.slow
def test_a_killed_driver_is_restored_to_the_undisturbed_trajectory(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    driver = subprocess.Popen(
        [sys.executable, scripted_trials.__file__, str(tmp_path)],
        env=environment | {"TUNE_GLOBAL_CHECKPOINT_S": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for_feedback(driver, tmp_path / "trials", 7)  # of 0 to 7, without 5
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    tuner = tune.Tuner.restore(str(tmp_path / "trials"), scripted({}, tmp_path))
    results = tuner.fit()
    assert len(results) == PROPOSALS
    assert masks(results) == masks_without_tune()
    assert {result.metrics["steps"] for result in results} == {4}


def wait_for_feedback(driver: subprocess.Popen[bytes], experiment: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if driver.poll() is not None:
            pytest.fail(f"the driver ended with {driver.returncode} before it could be killed")
        for path in experiment.glob("searcher-state-*.json"):
            if len(json.loads(path.read_bytes() or b"{}").get("feedback", ())) >= count:
                return
        time.sleep(0.05)
    pytest.fail(f"no {count} trials ended in time")
