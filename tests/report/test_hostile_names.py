"""Names and errors that users' code chose: in figures, on pages and in the terminal."""

from __future__ import annotations

import io
import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from example_runs import mask, proposal, rescored, score, started_with
from rich.console import Console

from fppmo_ray.distribution import Feedback
from fppmo_ray.report import (
    draw_figures,
    print_result,
    print_status,
    write_comparison,
    write_report,
)
from fppmo_ray.report.result_rows import label_of, plain
from fppmo_ray.service.journal.facts import Chosen, Fact, Updated
from fppmo_ray.service.journal.run_directory import open_run

HOSTILE = {
    "formula": r"$\frac{$",
    "dollar": "$",
    "backslash": "\\",
    "control": "\x00\x07\x1b[31m",
    "markup": "[/][red]",
    "tag": "</td><script>alert(1)</script>]]>",
    "surrogate": "\ud800",
    "lines": "\r\n\n",
    "backwards": "\u202eabc",
    "long": 5000 * "x",
}


def a_run(folder: Path, name: str) -> Path:
    """A finished search whose layers, workers, errors, id and measure have this name."""
    groups = (f"{name}1", f"{name}2")
    task = {"task": {"measure": f"{name}, {name}"}}
    started = replace(
        started_with(groups=groups, identity=task), search_id=name, versions={name: name}
    )
    scores = [replace(score(i, None, loss=i / 4), worker=f"{name}@a:1") for i in range(3)]
    facts: list[Fact] = [
        *map(proposal, range(4)),
        *scores,
        Feedback(proposal_id=3, error=name, worker=name, at=1.0),
        Updated(generation=1, keep_share=[0.5, 0.25]),
        replace(rescored(name, mask(2)), val_accuracy=None),
        Chosen(finalist=name, keep=mask(2)),
    ]
    with open_run(folder, resume="auto", started=started) as run:
        run.record(facts)
        run.write_artifact("result.json", json.dumps(result_of(name, groups, task)).encode())
    return folder


def result_of(name: str, groups: tuple[str, ...], task: dict[str, Any]) -> dict[str, Any]:
    row = {
        **{"macs": 5, "macs_cut": 0.5, "parameters": 9, "file_bytes": 9, "activation_bytes": 9},
        "latency_ms": {"1": 1.5},
        "widths": dict.fromkeys(groups, 4),
        "before": {"test": {"score": 0.25}},
        "after": {"test": {"score": 0.5}},
    }
    return {
        **task,
        "chosen": name,
        "variants": [row | {"name": kind} for kind in ("dense", "importance-only", "fppmo")],
        "score_noise": None,
        "scores": {"scored": 3, "failed": 1, "mean_seconds": 1.0},
    }


@pytest.mark.parametrize("kind", HOSTILE)
def test_any_name_is_drawn_and_printed_as_it_is_written(tmp_path: Path, kind: str) -> None:
    name = HOSTILE[kind]
    folders = [tmp_path / "[/]$_a", tmp_path / "b"]
    for folder in folders:
        a_run(folder, name)
    pages = [
        write_report(folders[0], tmp_path / "report.html"),
        write_comparison(folders, tmp_path / "comparison.html"),
    ]
    for page, *figures in pages:
        text = page.read_text()
        assert re.findall("<script[^>]*>", text) in ([], ["<script>"])  # the page's own
        assert "alert(1)" not in text or "&lt;script&gt;alert(1)" in text
        assert all(char.isprintable() or char == "\n" for char in text)
        for figure in figures:
            ElementTree.parse(figure)
            assert figure.read_text() in text
    shown = "".join(ElementTree.parse(pages[0][2]).getroot().itertext())
    assert pages[0][2].name == "report-widths.svg"
    assert label_of(f"{name}1") in shown
    draw_figures(folders[0])
    console = Console(file=io.StringIO(), width=400, record=True)
    print_status(folders[0], console)
    print_result(folders[0], console)
    printed = console.export_text()
    assert "\x1b" not in printed
    assert plain(name)[:30] in printed
    assert "[/]$_a" in printed


def test_text_is_plain_if_it_can_be_printed() -> None:
    assert plain("a\x00\x1b\n\ud800ü漢 $\\") == "a\\x00\\x1b\\n\\ud800ü漢 $\\"
    assert label_of("a" * 40) == "a" * 40
    assert label_of("a" * 41) == "a" * 39 + "…"


@pytest.mark.parametrize("loss", [1e100, -1e100, 5e-324])
def test_any_finite_loss_is_drawn(tmp_path: Path, loss: float) -> None:
    facts: list[Fact] = [*map(proposal, range(4))]
    facts += [score(number, 0.5, loss=loss / (number + 1)) for number in range(4)]
    facts += [Updated(generation=1, keep_share=[0.5])]
    with open_run(tmp_path / "run", resume=False, started=started_with()) as run:
        run.record(facts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # overflow of a range is numpy's
        for figure in write_report(tmp_path / "run", tmp_path / "report.html")[1:]:
            ElementTree.parse(figure)
    print_status(tmp_path / "run", Console(file=io.StringIO()))
