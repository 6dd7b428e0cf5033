"""The page about a search, and the one about several."""

from __future__ import annotations

import copy
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from example_runs import mask, proposal, rescored, score, started_with

from fppmo_ray.distribution import Feedback
from fppmo_ray.report import write_comparison, write_report
from fppmo_ray.service.journal.facts import Chosen, EpochFinished, Fact, Finished, Updated
from fppmo_ray.service.journal.run_directory import open_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


def row(name: str, macs: int, after: float, widths: dict[str, int]) -> dict[str, Any]:
    accuracy = {"test": {"accuracy": after}}
    return {
        "name": name,
        "macs": macs,
        "macs_cut": 1 - macs / 2_000_000,
        "widths": widths,
        "parameters": 12_345,
        "file_bytes": 54_321,
        "activation_bytes": 98_760,
        "latency_ms": {"1": 0.5, "64": 12.25},
        "before": accuracy,
        "after": accuracy,
    }


RESULT = {
    "chosen": "mode",
    "variants": [
        row("dense", 2_000_000, 0.95, {"first": 8, "second": 4}),
        row("importance-only", 1_000_000, 0.9, {"first": 4, "second": 2}),
        row("fppmo", 990_000, 0.925, {"first": 2, "second": 4}),
    ],
}


def trained(task: str, epoch: int) -> EpochFinished:
    return EpochFinished(
        task=task, epoch=epoch, train_loss=0.5 - 0.1 * epoch, seconds=1, artifact="a", sha256="b"
    )


def a_run(folder: Path, *, finished: bool = True, scored: bool = True) -> Path:
    """Write a search of four proposals by two workers, whose names hold HTML's own characters."""
    started = started_with(
        groups=("first", "second"), dense_macs=2_000_000, layer_limits={"<script>": (0.5, 1.0)}
    )
    facts: list[Fact] = [proposal(i) for i in range(4)]
    scores = [
        replace(
            score(i, 0.5 + 0.1 * i, loss=1.0 - 0.1 * i),
            seconds=2.0,
            worker=f"{i % 2}@<host>:1",
            at=10.0 + 2 * (i // 2),
        )
        for i in range(4)
    ]
    again = [
        rescored(
            f"sample {i}",
            mask(i),
            loss=1.1 - 0.1 * i + 0.02 * repeat,
            accuracy=0.5 + 0.1 * i,
            repeat=repeat,
        )
        for i in range(4)
        for repeat in range(2)
    ]
    facts += scores if scored else []
    if finished:
        facts += [Updated(generation=0, keep_share=[0.5, 0.75]), *again]
        facts.append(Chosen(finalist="sample 3", keep=mask(3)))
        facts += [trained(task, epoch) for task in ("dense", "fppmo") for epoch in range(2)]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").write_text(json.dumps(RESULT))
    with open_run(folder, resume=False, started=started) as run:
        run.record(facts)
    return folder


def test_a_page_is_whole_in_itself_and_its_figures_lie_beside_it(tmp_path: Path) -> None:
    page, *figures = write_report(a_run(tmp_path / "mine"), tmp_path / "out" / "r.html")
    text = page.read_text()
    names = ("results", "widths", "scores", "training", "probabilities", "timeline")
    assert [path.name for path in figures] == [f"r-{name}.svg" for name in names]
    for path in figures:
        ElementTree.parse(path)
        assert "currentColor" in path.read_text()
        assert path.read_text() in text
    addresses = {match for match in re.findall(r'(?:src|href)="([^"]*)"', text) if match[0] != "#"}
    assert addresses <= {a for a in addresses if a.startswith("data:image/png;base64,")}
    assert re.findall("<script[^>]*>", text) == ["<script>"]  # which sorts the proposals
    assert "&lt;script&gt;" in text


def test_a_page_tells_what_pruning_cost_who_was_chosen_and_how_idle_workers_were(
    tmp_path: Path,
) -> None:
    text = write_report(a_run(tmp_path / "mine"), tmp_path / "r.html")[0].read_text()
    cells = cells_of(text)
    fppmo = ["FPPMO", "92.50", "92.50", "0.99", "50.5 %", "12,345", "54", "98.8", "0.50", "12.25"]
    assert fppmo in cells
    assert ["sample 3 (chosen)", "80.00 ± 0.00", "0.8100 ± 0.0141"] in cells
    assert "Scores by worker: 0.0 % idle, 0 failed" in text


def cells_of(text: str) -> list[list[str]]:
    """Return the cells of every row of a page's tables."""
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", text)
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows]


def test_a_page_begins_with_what_was_removed_what_it_cost_and_how_fast_it_is(
    tmp_path: Path,
) -> None:
    run_dir = a_run(tmp_path / "mine")
    result = copy.deepcopy(RESULT)
    result["variants"][2]["latency_ms"] = {"1": 0.4, "64": 4.9}
    result["variants"][2]["against"] = {
        "dense": {"difference": -0.025, "half": 0.0125},
        "importance-only": {"difference": 0.025, "half": 0.02},
    }
    result["images"] = {"train": 700, "score": 100, "choose": 50, "test": 1200}
    (run_dir / "result.json").write_text(json.dumps(result))
    text = write_report(run_dir, tmp_path / "r.html")[0].read_text()
    [headline] = re.findall("<h1>(.*?)</h1>", text)
    assert headline == (
        "50.5 % of the multiply-accumulates removed; accuracy on 1,200 test images is 92.50 %, "
        "-2.50 ± 1.25 points from the dense network with the same extra training; it runs 2.50 "
        "times as fast, measured at batch 64."
    )
    assert (
        "The importance-only network of the same size has 90.00 % after as much training; the "
        "search&#x27;s differs by +2.50 ± 2.00 points."
    ) in text
    assert text.index("<h1>") < text.index("<svg") < text.index("<h2>Networks")
    assert text.index("<h2>Proposals") < text.index("<h2>Internals") < text.index("Settings")


def test_a_page_says_when_the_search_ran_and_on_how_many_images(tmp_path: Path) -> None:
    images = {"train": 7000, "score": 100, "choose": 50, "test": 1200}
    started = replace(started_with(), images=images, at=1_700_000_000.0)
    with open_run(tmp_path / "run", resume=False, started=started) as run:
        run.record([proposal(0), score(0, 0.5)])
    text = write_report(tmp_path / "run", tmp_path / "r.html")[0].read_text()
    assert "Begun 2023-11-14 22:13 UTC." in text
    assert "Images: 7,000 to train on, 100 to score on, 50 to choose on, 1,200 to test on." in text


def test_a_page_does_not_count_hours_by_a_clock_that_went_back(tmp_path: Path) -> None:
    started = replace(started_with(), at=1_700_000_000.0)
    with open_run(tmp_path / "run", resume=False, started=started) as run:
        run.record([proposal(0), score(0, 0.5), Finished(artifacts={}, at=1_699_999_940.0)])
    text = write_report(tmp_path / "run", tmp_path / "r.html")[0].read_text()
    assert "finished 2023-11-14 22:12 UTC, by a clock that was set back." in text


def test_a_page_lists_the_proposals_best_first_and_says_why_some_failed(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", resume=False, started=started_with(dense_macs=20)) as run:
        run.record([proposal(i) for i in range(4)])
        run.record([score(i, 0.5, loss=loss) for i, loss in enumerate((0.3, 0.1, 0.2))])
        run.record([Feedback(proposal_id=3, error="no <memory>", worker="1@a:1", at=1.0)])
    text = write_report(tmp_path / "run", tmp_path / "r.html")[0].read_text()
    cells = cells_of(text)
    assert [row[:5] for row in cells if len(row) == 8] == [
        ["1", "0", "0.1000", "50.00", "75.0"],
        ["2", "1", "0.2000", "50.00", "75.0"],
        ["0", "0", "0.3000", "50.00", "75.0"],
    ]
    assert ["proposal 3", "1@a:1", "no &lt;memory&gt;"] in cells
    assert "Failed proposals: 1" in text


def test_a_page_shows_a_correlation_of_eight_finalists_and_of_no_fewer(tmp_path: Path) -> None:
    for count in (7, 8):
        with open_run(tmp_path / f"{count}", resume=False, started=started_with()) as run:
            run.record([proposal(i) for i in range(count)])
            run.record([score(i, 0.5, loss=1 - 0.1 * i) for i in range(count)])
            run.record([rescored(f"sample {i}", mask(i), loss=1 - 0.2 * i) for i in range(count)])
        text = write_report(tmp_path / f"{count}", tmp_path / "r.html")[0].read_text()
        assert ("Finalists scored again: Spearman 1.00, n = 8" in text) == (count == 8)
        assert ("Spearman" in text) == (count == 8)


def test_a_page_shows_every_stage(tmp_path: Path) -> None:
    run_dir = a_run(tmp_path / "mine", scored=False)
    a_run(run_dir / "stage-1", finished=False)
    page, *figures = write_report(run_dir, tmp_path / "r.html")
    assert "r-stage-1-scores.svg" in [path.name for path in figures]
    assert "Stage 1. Every dot is a mask" in page.read_text()


def test_a_page_sets_top5_accuracies_beside_those_of_the_first_guess(tmp_path: Path) -> None:
    run_dir = a_run(tmp_path / "mine")
    result = copy.deepcopy(RESULT)
    for variant in result["variants"]:
        variant["before"]["test"]["top5_accuracy"] = 0.99
    (run_dir / "result.json").write_text(json.dumps(result))
    text = write_report(run_dir, tmp_path / "r.html")[0].read_text()
    assert "Accuracy on test, % (top-1 / top-5); chosen" in text
    assert '>FPPMO</td><td data-label="before fine-tuning, %">92.50 / 99.00</td>' in text


def test_a_search_under_way_has_a_page_of_what_there_is(tmp_path: Path) -> None:
    run_dir = a_run(tmp_path / "mine", finished=False)
    page, *figures = write_report(run_dir, tmp_path / "r.html")
    names = {path.stem.removeprefix("r-") for path in figures}
    assert names == {"scores", "probabilities", "timeline"}
    assert "The search has not finished. State: searching, 4 scored, 0 failed" in page.read_text()
    only_asked = a_run(tmp_path / "yours", finished=False, scored=False)
    assert len(write_report(only_asked, tmp_path / "s.html")) == 1


def test_many_scores_become_pixels_so_that_a_page_stays_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = a_run(tmp_path / "mine", finished=False)

    def num_images() -> dict[str, int]:
        _, *figures = write_report(run_dir, tmp_path / "r.html")
        return {path.stem: path.read_text().count("<image ") for path in figures}

    assert num_images() == {"r-scores": 0, "r-probabilities": 0, "r-timeline": 0}
    monkeypatch.setattr("fppmo_ray.report.drawings._MAX_MARKS", 3)
    # One for each of the two axes of scores, and one for the bars of all workers.
    assert num_images() == {"r-scores": 2, "r-probabilities": 0, "r-timeline": 1}


def test_several_searches_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / "a" / "s"), a_run(tmp_path / "b" / "s")]
    unfinished = a_run(tmp_path / "c" / "s", finished=False)
    page = write_comparison([*runs, unfinished], tmp_path / "r.html")[0].read_text()
    found = [row[:2] for row in cells_of(page)]
    assert ["a/s", "FPPMO"] in found
    assert ["b/s", "dense"] in found
    assert "Not finished: c/s" in page


def test_what_has_no_page_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no journal"):
        write_report(tmp_path, tmp_path / "r.html")
    run_dir = a_run(tmp_path / "mine")
    with pytest.raises(ValueError, match=r"must end in \.html, got .*r\.pdf"):
        write_report(run_dir, tmp_path / "r.pdf")
    with pytest.raises(ValueError, match="at least two run directories, got 1"):
        write_comparison([run_dir], tmp_path / "r.html")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to look at pages with")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_phones_and_screens_and_can_be_read_in_the_dark(
    tmp_path: Path, width: int, scheme: str
) -> None:
    from playwright.sync_api import sync_playwright

    page = write_report(a_run(tmp_path / "mine"), tmp_path / "r.html")[0]
    alone = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=alone)
        look = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        look.goto(page.as_uri())
        order = [look.inner_text("table.sortable tbody td")]
        look.click("table.sortable th:first-child button")
        order.append(look.inner_text("table.sortable tbody td"))
        fits = look.evaluate("document.documentElement.scrollWidth <= innerWidth")
        ink = look.evaluate("getComputedStyle(document.querySelector('figure text')).fill")
        browser.close()
    assert order == ["3", "0"]  # the best, then the first
    assert fits
    assert ink == {"light": "rgb(28, 31, 35)", "dark": "rgb(228, 231, 235)"}[scheme]
