"""Cells are kept whole, done once, and never mixed with those of other settings."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import cells
import pytest
import ray

from fppmo_ray import Resources
from fppmo_ray.service.pool.worker_group import WorkerInfo, worker_info
from fppmo_ray.service.pool.worker_pool import worker_pool
from fppmo_ray.service.stopping import SearchStopped

for module in (cells, sys.modules[__name__]):  # Ray's workers do not find them
    ray.cloudpickle.register_pickle_by_value(module)


class _Doubler:
    """A worker that notes what it was asked for."""

    def __init__(self, notes: Path, slot: int) -> None:
        self._notes, self._slot = notes, slot

    def ready(self) -> WorkerInfo:
        return worker_info(self._slot)

    def double(self, number: int) -> cells.Measured:
        with self._notes.open("a") as notes:
            notes.write(f"{number} ")
        if number < 0:
            raise ValueError("a negative number")
        return cells.Measured(figures={"double": 2 * number}, seconds=1.0)

    def double_at_the_third_time(self, number: int) -> cells.Measured | None:
        measured = self.double(number)
        return measured if self._notes.read_text().split().count(str(number)) == 3 else None


def doubling(number: int) -> cells.Measurement[_Doubler]:
    cell = cells.Cell(name=f"n{number}", key={"number": number})
    return cells.Measurement(cell=cell, ask=lambda worker: worker.double(number))


def test_a_cell_is_found_as_it_was_kept(tmp_path: Path) -> None:
    cell = cells.Cell(name="l1-s0", key={"seed": 0, "widths": (1, 2), "recipe": {"epochs": 6}})
    assert cells.find(tmp_path / "new", cell) is None
    kept = cells.keep(tmp_path / "new", cell, cells.Measured(figures={"macs": 7}, seconds=1.25))
    assert cells.find(tmp_path / "new", cell) == kept
    assert cells.read_all(tmp_path / "new") == {"l1-s0": kept}
    assert (kept.key["widths"], kept.figures, kept.seconds) == ([1, 2], {"macs": 7}, 1.25)
    assert kept.versions["torch"]
    assert kept.cpu


def test_a_cell_of_other_settings_is_refused(tmp_path: Path) -> None:
    first = cells.Cell(name="l1-s0", key={"seed": 0, "recipe": {"epochs": 6}})
    cells.keep(tmp_path, first, cells.Measured(figures={}, seconds=0.0))
    other = cells.Cell(name="l1-s0", key={"seed": 0, "recipe": {"epochs": 2}})
    expected = r"l1-s0.json was measured with recipe.epochs = 6, this run has 2; use another"
    with pytest.raises(ValueError, match=expected):
        cells.find(tmp_path, other)


def test_a_file_that_is_no_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "l1-s0.json").write_text('{"key": {')
    with pytest.raises(ValueError, match=r"l1-s0.json is no cell's record: .*; remove it"):
        cells.read_all(tmp_path)


@pytest.mark.usefixtures("local_ray")
def test_missing_cells_alone_are_measured_and_a_failed_one_keeps_no_other(tmp_path: Path) -> None:
    folder, notes = tmp_path / "results", tmp_path / "notes"

    def measure(numbers: list[int]) -> None:
        with worker_pool(_Doubler, notes, num_workers=1, demand=Resources().demand) as pool:
            cells.measure_missing(folder, map(doubling, numbers), pool)

    measure([1, 2])
    with pytest.raises(RuntimeError, match="cells failed, see the warnings above: n-1"):
        measure([1, -1, 2, 3])
    assert notes.read_text().split() == ["1", "2", "-1", "-1", "3"]  # errors get a second chance
    doubles = {name: record.figures["double"] for name, record in cells.read_all(folder).items()}
    assert doubles == {"n1": 2, "n2": 4, "n3": 6}


@pytest.mark.usefixtures("local_ray")
def test_cells_that_take_several_calls_are_finished_before_many_others_begin(
    tmp_path: Path,
) -> None:
    def in_three_calls(number: int) -> cells.Measurement[_Doubler]:
        return replace(doubling(number), ask=lambda worker: worker.double_at_the_third_time(number))

    notes = tmp_path / "notes"
    with worker_pool(_Doubler, notes, num_workers=1, demand=Resources().demand) as pool:
        cells.measure_missing(tmp_path / "results", map(in_three_calls, range(8)), pool)
    calls = notes.read_text().split()
    assert [calls.count(str(number)) for number in range(8)] == [3] * 8
    under_way = [
        sum(0 < calls[:end].count(cell) < 3 for cell in set(calls)) for end in range(len(calls))
    ]
    # Of one worker: two that it holds, and two that take their places before they are heard of.
    assert max(under_way) <= 4
    assert len(cells.read_all(tmp_path / "results")) == 8


@pytest.mark.usefixtures("local_ray")
def test_a_stop_keeps_what_is_done_and_says_how_to_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    demand = Resources().demand
    signals = iter([signal.SIGTERM])  # a second one would not be waited for

    def stop_soon(*_: object) -> None:
        for number in signals:
            os.kill(os.getpid(), number)

    with (
        cells.stopped_by_signal(folder) as stop,
        worker_pool(_Doubler, tmp_path / "notes", num_workers=1, demand=demand, stop=stop) as pool,
        pytest.raises(SearchStopped) as stopped,
    ):
        cells.measure_missing(folder, map(doubling, range(20)), pool, on_kept=stop_soon)
    done = len(cells.read_all(folder))
    assert 0 < done < 20
    expected = f"stopped on request: {done} cells in {folder}; the same command goes on"
    assert str(stopped.value) == expected
