"""Cells: measurements of a study, each kept in a file of its own as soon as it is done.

A cell has the name of what was measured (a method and a seed, a mask and a depth) and a key: all
settings that its figures depend on. A study measures the cells whose files are missing, so a
stopped or killed study continues by the same command, and further cells add to those there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

from fppmo_ray.durable_files import write_whole
from fppmo_ray.service.pool.call import Call
from fppmo_ray.service.pool.worker_pool import WorkerPool
from fppmo_ray.service.stopping import StopRequest, made_by_signal
from fppmo_ray.versions import package_versions

logger = logging.getLogger(__name__)

W = TypeVar("W")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A measurement to make."""

    name: str
    """Name of its file without the suffix; unique within a folder."""
    key: Mapping[str, Any]
    """All settings that its figures depend on, as values that JSON holds."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The result of a measurement."""

    figures: Mapping[str, Any]
    """Figures as values that JSON holds."""
    seconds: float
    """Wall time of the work, on one worker unless the figures say otherwise."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Measurement(Generic[W]):
    """How a cell is measured by a worker."""

    cell: Cell
    """The cell."""
    ask: Callable[[W], Measured | None]
    """Calls one method of the worker that it is given, which returns None when only a part of the
    measurement is done and the method has to be called again."""
    timeout: float | None = None
    """Seconds that one call may take; None: learned from earlier calls of the same method."""

    def call(self) -> Call[W, Measured | None]:
        """Return a new call of the worker's method."""
        return Call(self.cell.name, self.ask, timeout=self.timeout)


@dataclass(frozen=True, kw_only=True)
class Record:
    """A cell that is measured: the content of its file."""

    key: dict[str, Any]
    figures: dict[str, Any]
    seconds: float
    versions: dict[str, str]
    """Versions of Python and of the packages that computed the figures."""
    date: str
    """End of the measurement, UTC, ISO 8601."""
    cpu: str
    """Model of the driver's processor."""


def find(folder: Path, cell: Cell) -> Record | None:
    """Return the record of a cell, or None if it is not measured yet.

    Args:
        folder: Work folder of the cells.
        cell: The cell that is looked for.

    Raises:
        ValueError: its file is damaged, or was measured with another key.
    """
    path = _path(folder, cell)
    if not path.is_file():
        return None
    record = _read(path)
    _require_key(path, record.key, _plain(cell.key))
    return record


def keep(folder: Path, cell: Cell, measured: Measured) -> Record:
    """Write a cell's file in one step and return its record; the folder is made if absent.

    Args:
        folder: Work folder of the cells.
        cell: The cell that was measured.
        measured: Its figures.
    """
    record = Record(
        key=_plain(cell.key),
        figures=_plain(measured.figures),
        seconds=round(measured.seconds, 3),
        versions=package_versions(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        cpu=cpu_model(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(_path(folder, cell), (json.dumps(asdict(record), indent=1) + "\n").encode())
    return record


def read_all(folder: Path) -> dict[str, Record]:
    """Return all records of a folder by the name of the cell, in the order of the names.

    Raises:
        ValueError: a file is damaged.
    """
    return {path.stem: _read(path) for path in sorted(folder.glob("*.json"))}


def measure_missing(
    folder: Path,
    measurements: Iterable[Measurement[W]],
    pool: WorkerPool[W],
    *,
    on_kept: Callable[[Cell, Record], None] | None = None,
) -> None:
    """Measure every cell that has no file, begun in this order; each is kept as it ends.

    Args:
        folder: Where the cells are kept.
        measurements: How each cell is measured.
        pool: Workers with nothing unfinished.
        on_kept: Called with each cell that was measured.

    Raises:
        ValueError: the file of some cell was measured with another key; nothing was begun then.
        RuntimeError: some measurements failed by themselves; all others are done.
        SearchStopped: a stop was requested; what is done is kept.
    """
    in_flight: dict[Call[W, Measured | None], Measurement[W]] = {}

    def submit(measurement: Measurement[W], *, first: bool = False) -> None:
        call = measurement.call()
        in_flight[call] = measurement
        pool.submit(call, first=first)

    for measurement in [item for item in measurements if find(folder, item.cell) is None]:
        submit(measurement)
    failed = []
    while in_flight:
        for call in pool.next_ended():
            measurement = in_flight.pop(call)
            cell = measurement.cell
            if call.error is not None:
                logger.warning("cell %s failed: %s", cell.name, call.error)
                failed.append(cell.name)
                continue
            if call.value is None:
                submit(measurement, first=True)  # few cells are under way at a time
                continue
            record = keep(folder, cell, call.value)
            logger.info("cell %s  %.0f s", cell.name, record.seconds)
            if on_kept is not None:
                on_kept(cell, record)
    if failed:
        raise RuntimeError(f"cells failed, see the warnings above: {', '.join(failed)}")


def stopped_by_signal(folder: Path) -> AbstractContextManager[StopRequest]:
    """Return a context in which SIGTERM and SIGINT request a stop; see ``made_by_signal``."""

    def how_far() -> str:
        count = len(list(folder.glob("*.json")))
        return f"{count} cell{'s' * (count != 1)} in {folder}"

    return made_by_signal(StopRequest(how_far, "the same command goes on"))


def digest(values: Mapping[str, Any]) -> str:
    """Return ten hexadecimal digits that differ for different values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]


def folder_under_way(work_dir: Path, cell: Cell) -> Path:
    """Return the folder for the files of a running measurement; it depends on the cell's key.

    Args:
        work_dir: Parent folder.
        cell: The cell that is measured.
    """
    return work_dir / f"{cell.name}-{digest(cell.key)}"


def cpu_model() -> str:
    """Return the name that this machine's processor gives itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _path(folder: Path, cell: Cell) -> Path:
    return folder / f"{cell.name}.json"


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as JSON gives them back: lists for tuples."""
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def _read(path: Path) -> Record:
    try:
        return Record(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no cell's record: {error}; remove it") from error


def _require_key(path: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    before, now = _flat(stored), _flat(wanted)
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{path} was measured with {name} = {before.get(name)}, this run has "
                f"{now.get(name)}; use another --cells folder, or the same settings"
            )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        inner = _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else None
        flat |= {f"{prefix}{name}": value} if inner is None else inner
    return flat
