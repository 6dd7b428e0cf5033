from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fppmo_ray.distribution import Feedback, OptimizerSettings, Proposal
from fppmo_ray.service.journal.artifacts import history_of
from fppmo_ray.service.journal.facts import pack_mask
from fppmo_ray.service.journal.run_directory import read_journal
from fppmo_ray.testing.simulated_search import (
    SIMULATED_SPACE,
    Pace,
    SimulatedWorker,
    simulated_search,
)

KEEP = np.arange(SIMULATED_SPACE.num_filters) % 3 == 0


def test_a_simulated_search_needs_no_torch() -> None:
    code = (
        "import sys, fppmo_ray.testing.simulated_search\n"
        "print({'torch', 'torchvision'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def score(worker: SimulatedWorker, keep: np.ndarray, seed: tuple[int, int]) -> Feedback:
    """The feedback of proposal 5."""
    proposal = Proposal(proposal_id=5, generation=seed[1], keep=keep, macs=0, score_seed=seed)
    return worker.score(proposal)


def test_a_simulated_score_and_its_time_are_functions_of_mask_and_seed() -> None:
    workers = [SimulatedWorker(Pace(mean_seconds=0.001), slot) for slot in (0, 1)]
    same = [score(worker, KEEP, (0, 1)) for worker in workers]
    other = [score(workers[0], ~KEEP, (0, 1)), score(workers[0], KEEP, (0, 2))]
    assert same[0] == same[1]
    assert same[0].proposal_id == 5
    assert len({feedback.val_loss for feedback in [*same, *other]}) == 3


def test_masks_that_keep_filters_of_even_numbers_score_better() -> None:
    worker = SimulatedWorker(Pace(mean_seconds=0), 0)
    even = np.arange(SIMULATED_SPACE.num_filters) % 2 == 0
    good, bad = (score(worker, keep, (0, 0)) for keep in (even, ~even))
    assert good.val_loss == pytest.approx(0.0, abs=0.02)
    assert bad.val_loss == pytest.approx(1.0, abs=0.02)


def test_the_spread_of_a_pace_is_the_standard_deviation_of_its_seconds() -> None:
    worker = SimulatedWorker(Pace(mean_seconds=1e-4, spread=0.2), 0)
    seconds = [score(worker, KEEP, (0, seed)).seconds for seed in range(2000)]
    assert np.mean(seconds) == pytest.approx(1e-4, rel=0.02)
    assert np.std(seconds) / np.mean(seconds) == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("wrong", [{"mean_seconds": -1.0}, {"spread": 0.6}, {"spread": -0.1}])
def test_an_impossible_pace_is_refused(wrong: dict[str, float]) -> None:
    [name] = wrong
    with pytest.raises(ValueError, match=f"{name} must be"):
        Pace(**wrong)


@pytest.mark.usefixtures("local_ray")
def test_a_search_cut_amid_its_scores_ends_alike_with_more_workers(tmp_path: Path) -> None:
    settings = OptimizerSettings(macs_cut=0.5, num_proposals=24, population_size=8)

    def ending(workers: int, *, resume: bool) -> tuple[list[tuple[str, str]], list[list[float]]]:
        pace = Pace(mean_seconds=0.001)
        found = simulated_search(tmp_path, settings, workers=workers, pace=pace, resume=resume)
        history = history_of(read_journal(tmp_path))[["id", "val_loss"]]
        return [(item.name, pack_mask(item.keep)) for item in found], history.to_numpy().tolist()

    expected = ending(1, resume=False)
    assert len(expected[1]) == 24
    journal = tmp_path / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    scored = [number for number, line in enumerate(lines) if b'"Feedback"' in line]
    journal.write_bytes(b"".join(lines[: scored[10] + 1]))
    assert ending(3, resume=True) == expected


@pytest.mark.usefixtures("ray_here")
def test_settings_of_another_search_are_refused(tmp_path: Path) -> None:
    settings = OptimizerSettings(macs_cut=0.5, num_proposals=4, population_size=4)
    simulated_search(tmp_path, settings, workers=1, pace=Pace(mean_seconds=0))
    other = OptimizerSettings(macs_cut=0.6, num_proposals=4, population_size=4)
    with pytest.raises(ValueError, match=r"another search: settings\.macs_cut was 0\.5, now 0\.6"):
        simulated_search(tmp_path, other, workers=1, resume=True)
