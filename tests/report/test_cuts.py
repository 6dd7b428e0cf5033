"""The tables of resources that are cut besides MACs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from example_runs import started_with
from test_table import printed, row

from fppmo_ray.report.result_rows import cut_table, table_sentence
from fppmo_ray.report.table import status_lines
from fppmo_ray.service.journal.facts import LatencyMeasured

LATENCY = {
    "predicted_ms": 1.25,
    "predicted_cut": 0.375,
    "measured_ms": 1.3,
    "measured_cut": 0.3333,
}
CUTS = {
    "params": {"left": 100, "cut": 0.5},
    "latency": LATENCY,
    "memory": {"left": 2500, "cut": 0.4},
}
FIGURES: dict[str, Any] = {
    "chosen": "mode",
    "variants": [row("dense", 0.9, 0.9, 4), row("fppmo", 0.8, 0.9, 2) | {"cuts": CUTS}],
    "latency_table": {"batch": 8, "device": "cpu", "dense_ms": 2.0, "median_error": 0.012},
    "score_noise": None,
    "scores": {"scored": 3, "failed": 0, "mean_seconds": 1.0},
}


def test_every_limited_resource_has_its_columns() -> None:
    columns, rows = cut_table(FIGURES)
    assert dict(zip(columns, rows[0], strict=True)) == {
        "network": "FPPMO",
        "parameters cut": "50.0 %",
        "latency cut, by the table": "37.5 %",
        "measured": "33.3 %",
        "ms, by the table": "1.250",
        "ms, measured": "1.300",
        "activations cut": "40.0 %",
        "at most, kB": "2.5",
    }


def test_a_search_that_cuts_macs_alone_has_no_such_table(tmp_path: Path) -> None:
    plain = {**FIGURES, "variants": [row("dense", 0.9, 0.9, 4), row("fppmo", 0.8, 0.9, 2)]}
    del plain["latency_table"]
    assert cut_table(plain) == ([], [])
    assert table_sentence(plain) == ""
    (tmp_path / "result.json").write_text(json.dumps(plain))
    assert "cut besides MACs" not in printed(tmp_path)


def test_the_closing_tables_show_the_error_of_the_latency_table(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(FIGURES))
    text = " ".join(printed(tmp_path).split())
    assert "cut besides MACs" in text
    assert "latency at batch 8 on cpu; its table is off by 1.2 %" in text


def test_the_status_shows_all_cuts_and_the_measured_latency() -> None:
    started = started_with(macs_cut=0.0, params_cut=0.4, latency_cut=0.3)
    measured = LatencyMeasured(
        artifact="a", sha256="0", batch=1, dense_ms=2.34567, median_error=0.0123, device="cpu"
    )
    lines = dict(status_lines([started, measured]))
    assert (lines["params cut"], lines["latency cut"]) == ("0.4", "0.3")
    assert lines["latency"] == "dense 2.35 ms at batch 1 on cpu; the table is off by 1.2 % (median)"
