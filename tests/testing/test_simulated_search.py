from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fppmo_ray.service.pretend import PRETEND_SPACE, Pace, PretendWorker, pretend_search

from fppmo_ray.distribution import OptimizerSettings, pack_mask
from fppmo_ray.service.journal.artifacts import read_history

KEEP = np.arange(PRETEND_SPACE.num_filters) % 3 == 0


def test_a_pretended_search_needs_no_torch() -> None:
    code = "import sys, fppmo_ray.service.pretend; print({'torch', 'torchvision'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_pretended_score_and_its_time_are_functions_of_mask_and_seed() -> None:
    workers = [PretendWorker(Pace(mean_seconds=0.001), slot) for slot in (0, 1)]
    same = [worker.score(None, KEEP, (0, 1), "search_val") for worker in workers]
    other = [
        workers[0].score(None, keep, seed, "") for keep, seed in ((~KEEP, (0, 1)), (KEEP, (0, 2)))
    ]
    assert same[0] == same[1]
    assert len({score.val_loss for score in [*same, *other]}) == 3


def test_the_spread_of_a_pace_is_the_standard_deviation_of_its_seconds() -> None:
    worker = PretendWorker(Pace(mean_seconds=1e-4, spread=0.2), 0)
    seconds = [worker.score(None, KEEP, (0, seed), "").seconds for seed in range(2000)]
    assert np.mean(seconds) == pytest.approx(1e-4, rel=0.02)
    assert np.std(seconds) / np.mean(seconds) == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("wrong", [{"mean_seconds": -1.0}, {"spread": 0.6}, {"spread": -0.1}])
def test_an_impossible_pace_is_refused(wrong: dict[str, float]) -> None:
    [name] = wrong
    with pytest.raises(ValueError, match=f"{name} must be"):
        Pace(**wrong)


@pytest.mark.usefixtures("local_ray")
def test_a_search_in_rungs_cut_amid_its_deep_scores_ends_alike_with_more_workers(
    tmp_path: Path,
) -> None:
    settings = OptimizerSettings(macs_cut=0.5, num_proposals=24, population_size=8, rungs=(1, 4))

    def ending(workers: int, *, resume: bool) -> tuple[list[tuple[str, str]], list[list[float]]]:
        pace = Pace(mean_seconds=0.001)
        found = pretend_search(tmp_path, settings, workers=workers, pace=pace, resume=resume)
        history = read_history(tmp_path)[["id", "rung", "val_loss"]]
        return [(item.name, pack_mask(item.keep)) for item in found], history.to_numpy().tolist()

    expected = ending(1, resume=False)
    assert len(expected[1]) == 24 + 9
    journal = tmp_path / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    deep = [number for number, line in enumerate(lines) if b'"rung":4' in line]
    journal.write_bytes(b"".join(lines[: deep[1] + 1]))
    assert ending(3, resume=True) == expected
