"""The archive gives cells back as they were measured, and every table of it can be printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import archive
import collect
import pytest
import tables
from cells import Cell, Measured, Record, keep

TREE = {
    "method": "fppmo@80",
    "recipe": {"epochs": 6, "schedule": "cosine", "clip_norm": None},
    "widths": {"layer1.0.conv1": 2},
    "epochs": [{"val_loss": 0.5, "seconds": 1.0}, {"val_loss": 0.25, "seconds": 2.0}],
    "ignore": ["conv1"],
    "texts": ["640", "null", "", "a b", '"', "NaN"],
    "layer_limits": {},
}


def test_nested_values_become_columns_and_come_back() -> None:
    flat = archive.flattened(TREE)
    assert flat["recipe/clip_norm"] == "null"
    assert flat["method"] == "fppmo@80"
    assert flat["epochs[]/val_loss"] == "[0.5,0.25]"
    assert archive.unflattened(flat) == TREE


@pytest.mark.parametrize("text", ["640", "null", "", "1e3", "true", '"quoted"', "[1]", "a, b"])
def test_texts_that_look_like_other_values_stay_texts(text: str) -> None:
    assert archive.unflattened(archive.flattened({"text": text})) == {"text": text}


def record(seed: int, **key: Any) -> Record:
    shared = {"network": "resnet20", "recipe": {"epochs": 6}}
    return Record(
        key={**shared, "method": "fpgm", "seed": seed, **key},
        figures={"after": {"test": {"accuracy": 0.1 + 0.2 * seed}}},
        **{"seconds": 1.5, "versions": {"torch": "2.13.0+cpu"}, "date": "2026", "cpu": "AMD EPYC"},
    )


def test_settings_that_all_cells_share_stand_once_beside_the_table(tmp_path: Path) -> None:
    cells = {f"fpgm-s{seed}": record(seed) for seed in range(3)}
    archive.add_to_table("rivals-small", cells, tmp_path)
    header = (tmp_path / "rivals-small.csv").read_text().splitlines()[0]
    assert header == "cell,key/method,key/seed,figures/after/test/accuracy,seconds,date"
    assert (tmp_path / "settings.csv").read_text().splitlines() == [
        "table,setting,value",
        "rivals-small,key/network,resnet20",
        "rivals-small,key/recipe/epochs,6",
        "rivals-small,versions/torch,2.13.0+cpu",
        "rivals-small,cpu,AMD EPYC",
    ]
    assert archive.read_table("rivals-small", tmp_path) == cells


def test_a_cell_with_another_setting_gives_it_a_column(tmp_path: Path) -> None:
    archive.add_to_table("rivals-small", {"a": record(0)}, tmp_path)
    other = record(1, recipe={"epochs": 8}, search={"proposals": 80})
    archive.add_to_table("rivals-small", {"b": other}, tmp_path)
    assert archive.read_table("rivals-small", tmp_path) == {"a": record(0), "b": other}
    archive.add_to_table("rivals-small", {"b": record(1)}, tmp_path)  # measured again
    assert archive.read_table("rivals-small", tmp_path) == {"a": record(0), "b": record(1)}


def test_cells_of_a_work_folder_are_collected_without_those_that_no_table_shows(
    tmp_path: Path,
) -> None:
    for name in ("compute", "fpgm-s0"):
        measured = Measured(figures={"accuracy": 0.5}, seconds=1.0)
        keep(tmp_path / "cells", Cell(name=name, key={"method": "fpgm"}), measured)
    collect.main(tmp_path / "cells", "rivals-small", archive=tmp_path / "archive")
    found = archive.read_table("rivals-small", tmp_path / "archive")
    assert found == archive.records_of(str(tmp_path / "cells"))
    assert list(found) == ["fpgm-s0"]
    with pytest.raises(ValueError, match="expected a folder of cells, got"):
        collect.main(tmp_path / "none", "rivals-small", archive=tmp_path)


def test_every_table_of_the_archive_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables.main(figures=tmp_path)
    printed = capsys.readouterr().out
    for part in (
        "+1.22 [+0.78, +1.66]",  # FPPMO minus uniform L1, ResNet-20
        "0.77 [0.35, 0.98]",  # cheapest scores near an optimum
        "distillation-weight=0.5",
        "filter-step=0.25",
        "+0.57 [+0.34, +0.80]",  # 48 scores minus the allocation at 70 %, untrained
        "+0.51 [-0.25, +1.27]",  # 160 scores minus it
        "+5.90 [+2.62, +9.18]",  # prune minus uniform L1, distilled, at 80 %
        "86.76 ± 0.11",  # prune, distilled, at 30 %
        "80 of 80 pruned",
        "31 of 34 pruned",
        "77 of 79 lose half",
    ):
        assert part in printed
    assert {path.name for path in tmp_path.iterdir()} >= {
        "rivals-resnet20.png",
        "fidelity-resnet20.png",
    }


def test_a_table_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(
        ValueError,
        match=r"one of the tables chaos, feedback, fidelity-resnet20, .*'nowhere'",
    ):
        tables.main(("nowhere",))


def test_the_archive_has_few_and_small_files() -> None:
    files = list(archive.RESULTS.iterdir())
    assert len(files) <= 25
    assert max(file.stat().st_size for file in files) <= 300_000
