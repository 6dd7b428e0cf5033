"""A running search as it is seen from outside: in Ray's dashboard and by Prometheus."""

from __future__ import annotations

import re
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from ray_head import Head, num_scored, wait_until

from fppmo_ray.service.progress import METRICS

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
ALONE = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
    *("--disable-component-update", "--disable-sync"),
)
PATIENCE_MS = 60_000


@pytest.fixture(scope="module")
def search(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The id of a search that goes on for as long as it is looked at."""
    run_dir = tmp_path_factory.mktemp("runs") / "digits"
    search = head.submit("jobs/digits.py", "--run-dir", run_dir, "--proposals", "16000")
    wait_until(lambda: num_scored(run_dir) >= 20, "a generation")
    yield search
    head.fppmo_ray("stop", search)


def series(text: str, search: str) -> dict[str, float]:
    """The largest value of each series of a search in Prometheus' text format."""
    values: dict[str, float] = {}
    for name, labels, value in re.findall(r"^(ray_fppmo_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        if f'search="{search}"' in labels:
            values[name] = max(values.get(name, 0.0), float(value))
    return values


def test_prometheus_finds_every_metric_of_a_running_search(head: Head, search: str) -> None:
    seen: dict[str, float] = {}

    def has_all() -> bool:
        with urllib.request.urlopen(f"{head.metrics}/metrics", timeout=30) as answer:
            for name, value in series(answer.read().decode(), search).items():
                seen[name] = max(seen.get(name, 0.0), value)
        return all(seen.get(metric.series, 0.0) > 0 for metric in METRICS)

    wait_until(has_all, "all metrics")
    assert {name for name in seen if not name.endswith(("_sum", "_count"))} == {
        metric.series for metric in METRICS
    }
    assert seen["ray_fppmo_proposals_wanted"] == 16000
    assert seen["ray_fppmo_workers_placed"] == 2
    assert seen["ray_fppmo_proposals_total"] >= 16
    assert 0.5 < seen["ray_fppmo_best_accuracy"] <= 1


@pytest.fixture(scope="module")
def page(head: Head) -> Iterator[Page]:
    """The dashboard in a browser, past the dialog that asks for the token."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ALONE))
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(PATIENCE_MS)
        page.goto(head.address)
        dialog = page.get_by_role("dialog")
        dialog.locator("input").fill(head.token)
        dialog.get_by_role("button", name="Submit").click()
        dialog.wait_for(state="hidden")
        yield page
        browser.close()


def test_the_dashboard_shows_the_job_and_its_progress(head: Head, search: str, page: Page) -> None:
    page.goto(f"{head.address}/#/jobs")
    page.get_by_text(f"fppmo-{search}").first.wait_for()
    page.goto(f"{head.address}/#/jobs/fppmo-{search}")
    page.get_by_text(f'"fppmo_search": "{search}"').first.wait_for()
    page.get_by_text(re.compile(r"generation\s+0\s+best")).first.wait_for()
    unfold(page.get_by_test_id("progress-bar-segment").first.locator("xpath=.."))
    for number in (0, 1):  # whichever was ready first has trained the baseline
        unfold(page.get_by_role("button", name=f"PruningWorker({number}, cpu)"))
    for name in ("score", "train epoch"):
        cell(page, name).wait_for()
    unfold(page.get_by_role("button", name="ProbabilityModel(layer_es, 1000 generations)"))
    cell(page, "step").wait_for()


def cell(page: Page, name: str) -> Locator:
    """The cell of the task overview that names a kind of task."""
    before = "^(Expand|Collapse)?"  # the title of the arrow
    return page.locator("td", has_text=re.compile(rf"{before}{name}\W")).first


def unfold(row: Locator) -> None:
    """Click the arrow before a row of the task overview."""
    row.first.locator("xpath=preceding-sibling::*").click()


def test_the_dashboard_shows_the_actors_by_what_they_are(
    head: Head, search: str, page: Page
) -> None:
    page.goto(f"{head.address}/#/actors")
    for name in (
        "PruningWorker(0, cpu)",
        "PruningWorker(1, cpu)",
        "ProbabilityModel(layer_es, 1000 generations)",
        f"_ray_internal_job_actor_fppmo-{search}",
    ):
        page.get_by_text(name).first.wait_for()


def test_the_readmes_screenshots_are_small_pictures_of_1280_pixels() -> None:
    folder = Path(__file__).resolve().parents[2] / "cluster" / "screenshots"
    pictures = sorted(folder.glob("*.png"))
    assert [picture.name for picture in pictures] == ["actors.png", "job.png", "report.png"]
    for picture in pictures:
        content = picture.read_bytes()
        assert len(content) < 250_000
        assert int.from_bytes(content[16:20], "big") == 1280  # the width in a PNG's header
