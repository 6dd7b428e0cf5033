"""Searches on a user's own data share their trainings, and go on wherever they were killed."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from own_data_driver import EPOCHS, NAMES, PROPOSALS, network, picture

from fppmo_ray import load_classifier
from fppmo_ray.distribution import Feedback
from fppmo_ray.service.journal.facts import EpochFinished, Fact
from fppmo_ray.service.journal.run_directory import read_journal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DRIVER = Path(__file__).with_name("own_data_driver.py")
PARTS = {"train": range(240), "val": range(240, 300), "test": range(300, 360)}


def write_folder(root: Path) -> None:
    for part, rows in PARTS.items():
        for row in rows:
            path = root / part / NAMES[row % 3] / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(row).save(path)


def write_parquet(root: Path) -> None:
    root.mkdir()
    for part, rows in PARTS.items():
        cells = []
        for row in rows:
            buffer = io.BytesIO()
            picture(row).save(buffer, "PNG")
            cells.append({"bytes": buffer.getvalue(), "path": None})
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table({"image": pa.array(cells, kind), "label": [row % 3 for row in rows]})
        pq.write_table(table, root / f"{part}-0.parquet", row_group_size=16)


WRITERS: dict[str, Callable[[Path], None]] = {
    "torch": lambda root: None,
    "folder": write_folder,
    "parquet": write_parquet,
}


def start(kind: str, data: Path, run_dir: Path) -> subprocess.Popen[str]:
    """The driver, whose lines go to a file beside its run directory."""
    with run_dir.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, str(DRIVER), kind, str(data), str(run_dir)],
            env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            stdout=log,
            stderr=log,
            text=True,
        )


def finish(driver: subprocess.Popen[str], run_dir: Path) -> str:
    driver.wait(timeout=400)
    log = run_dir.with_suffix(".log").read_text()
    assert driver.returncode == 0, log
    return log


def facts_of(kind: type[Fact], run_dir: Path) -> list[Fact]:
    if not (run_dir / "journal.jsonl").is_file():
        return []
    return [fact for fact in read_journal(run_dir) if isinstance(fact, kind)]


def kill_after(driver: subprocess.Popen[str], kind: type[Fact], run_dir: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while len(facts_of(kind, run_dir)) < count:
        assert driver.poll() is None, run_dir.with_suffix(".log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    driver.kill()
    driver.wait()


def scores(run_dir: Path) -> list[tuple[int, float]]:
    facts = [fact for fact in read_journal(run_dir) if isinstance(fact, Feedback)]
    return sorted((fact.proposal_id, fact.val_loss) for fact in facts)


def epochs(run_dir: Path) -> list[tuple[str, int, float | None]]:
    facts = [fact for fact in read_journal(run_dir) if isinstance(fact, EpochFinished)]
    return [(fact.task, fact.epoch, fact.train_loss) for fact in facts]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_search_on_own_data_that_is_killed_twice_ends_as_one_that_was_not(
    kind: str, tmp_path: Path
) -> None:
    data, undisturbed, run_dir = tmp_path / "data", tmp_path / "undisturbed", tmp_path / "run"
    WRITERS[kind](data)
    log = finish(start(kind, data, undisturbed), undisturbed)
    assert "dense network as given: 100.0 %" in log
    kill_after(start(kind, data, run_dir), Feedback, run_dir, 2)
    assert 2 <= len(facts_of(Feedback, run_dir)) < PROPOSALS
    kill_after(start(kind, data, run_dir), EpochFinished, run_dir, EPOCHS + 1)
    assert EPOCHS < len(facts_of(EpochFinished, run_dir)) < len(epochs(undisturbed))
    finish(start(kind, data, run_dir), run_dir)
    assert [number for number, _ in scores(run_dir)] == list(range(PROPOSALS))
    assert scores(run_dir) == scores(undisturbed)
    assert epochs(run_dir) == epochs(undisturbed)
    if kind != "torch":  # whose preparation only the user's own class knows
        classify = load_classifier(run_dir / "network.json", network)
        assert [classify(picture(row)) for row in range(3)] == list(NAMES)
