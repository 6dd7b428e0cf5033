"""The archive: measured cells as CSV files in ``results/``, a file for each table.

A study writes each cell as a JSON file into a work folder. ``collect.py`` adds the cells of such a
folder to a CSV file, ``tables.py`` prints the tables of a CSV file or of a work folder.

A row of a CSV file is a cell. Its columns are the paths of the cell's values, such as
``figures/after/test/accuracy``. A list of objects, such as the epochs of a fine-tuning, becomes a
column for each of their fields, ``figures/epochs[]/val_loss``, which holds a JSON list. Settings
that all cells of a table share stand once, in ``results/settings.csv``.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cells import Record, read_all

from fppmo_ray.durable_files import write_whole

RESULTS = Path(__file__).parent / "results"
SETTINGS = "settings.csv"
NOT_MEASURED = ("compute", "masks")
"""Cells that only say how a study was begun; no table shows them."""
_NAME = "cell"
_IN_EVERY_TABLE = ("method", "variant", "mask", "seed", "macs_cut")
"""Settings that name a cell and stay in its row, even where all cells agree."""


def records_of(source: str, folder: Path = RESULTS) -> dict[str, Record]:
    """The measured cells of a table, by name.

    Args:
        source: The name of a CSV file in the archive, without its suffix, or the path of a study's
            work folder, whose cells come in the order in which they were measured.
        folder: Folder of the archive.

    Raises:
        ValueError: there is neither such a table nor such a folder.
    """
    if (folder / f"{source}.csv").is_file():
        return read_table(source, folder)
    if not Path(source).is_dir():
        known = ", ".join(table_names(folder))
        raise ValueError(f"expected a folder of cells or one of the tables {known}; got {source!r}")
    cells = [item for item in read_all(Path(source)).items() if item[0] not in NOT_MEASURED]
    return dict(sorted(cells, key=lambda item: item[1].date))


def table_names(folder: Path = RESULTS) -> list[str]:
    """Return the names of the archive's tables in order."""
    return sorted(path.stem for path in folder.glob("*.csv") if path.name != SETTINGS)


def read_table(table: str, folder: Path = RESULTS) -> dict[str, Record]:
    """The cells of a CSV file by name, in the order of its rows.

    Args:
        table: Name of the CSV file, without its suffix.
        folder: Folder of the archive.
    """
    shared = _read_settings(folder).get(table, {})
    records = {}
    for row in read_rows(folder / f"{table}.csv"):
        name = row.pop(_NAME)
        records[name] = Record(**{"versions": {}, "key": {}} | unflattened({**shared, **row}))
    return records


def add_to_table(table: str, records: Mapping[str, Record], folder: Path = RESULTS) -> None:
    """Add cells to a CSV file, which is made if it is absent; a cell that is there is replaced.

    Args:
        table: Name of the CSV file, without its suffix.
        records: Cells by name.
        folder: Folder of the archive.
    """
    known = read_table(table, folder) if (folder / f"{table}.csv").is_file() else {}
    rows = {name: flattened(asdict(record)) for name, record in {**known, **records}.items()}
    shared = _shared(list(rows.values()))
    own = [
        {_NAME: name, **{path: value for path, value in row.items() if path not in shared}}
        for name, row in rows.items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    settings = _read_settings(folder) | {table: shared}
    write_rows(
        folder / SETTINGS,
        [
            {"table": name, "setting": path, "value": value}
            for name, values in sorted(settings.items())
            for path, value in values.items()
        ],
    )
    write_rows(folder / f"{table}.csv", own)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file as texts by column, without the empty ones."""
    with path.open(newline="") as file:
        return [{k: text for k, text in row.items() if text} for row in csv.DictReader(file)]


def write_rows(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Write texts by column as a CSV file, in one step; columns come in the order of first use.

    Args:
        path: The file.
        rows: A text may be missing in a row: its field stays empty.
    """
    known = list(rows)
    text = io.StringIO()
    columns = list(dict.fromkeys(column for row in known for column in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(known)
    write_whole(path, text.getvalue().encode())


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values as texts by path; the inverse of ``unflattened``.

    Args:
        tree: Values that JSON holds.
        prefix: What the paths begin with.
    """
    flat: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{name}/")
        elif _is_table(value):
            columns = {field: [item[field] for item in value] for field in value[0]}
            flat |= flattened(columns, f"{prefix}{name}[]/")
        else:
            flat[f"{prefix}{name}"] = _text_of(value)
    return flat


def unflattened(flat: Mapping[str, str]) -> dict[str, Any]:
    """Nested values from their texts by path."""
    tree: dict[str, Any] = {}
    for path, text in flat.items():
        *folders, name = path.split("/")
        inner = tree
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[name] = _value_of(text)
    return _with_lists(tree)


def _is_table(value: Any) -> bool:
    """Whether a value is a list of objects with the same fields."""
    if not isinstance(value, list | tuple) or not value:
        return False
    first = value[0]
    if not isinstance(first, Mapping) or not first:
        return False
    return all(isinstance(item, Mapping) and item.keys() == first.keys() for item in value)


def _with_lists(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with lists of objects again where a name ends in ``[]``."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        inner = _with_lists(value) if isinstance(value, dict) else value
        if name.endswith("[]"):
            items = zip(*inner.values(), strict=True)
            found[name.removesuffix("[]")] = [dict(zip(inner, item, strict=True)) for item in items]
        else:
            found[name] = inner
    return found


def _text_of(value: Any) -> str:
    """A text that is not empty: JSON, or the text itself where it is no JSON by accident."""
    if isinstance(value, str) and value and _value_of(value) == value:
        return value
    return json.dumps(value, separators=(",", ":"))


def _value_of(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _shared(rows: list[dict[str, str]]) -> dict[str, str]:
    """The settings, versions and the processor that are the same in all rows."""
    return {
        path: value
        for path, value in (rows[0] if rows else {}).items()
        if (path.startswith(("key/", "versions/")) or path == "cpu")
        and path.removeprefix("key/") not in _IN_EVERY_TABLE
        and all(row.get(path) == value for row in rows)
    }


def _read_settings(folder: Path) -> dict[str, dict[str, str]]:
    """The shared settings of each table, as texts by path."""
    settings: dict[str, dict[str, str]] = {}
    if (folder / SETTINGS).is_file():
        for row in read_rows(folder / SETTINGS):
            settings.setdefault(row["table"], {})[row["setting"]] = row["value"]
    return settings
