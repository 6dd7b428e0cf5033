"""The figures of a search."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from example_runs import proposal, score, started_with
from matplotlib.figure import Figure

from fppmo_ray.distribution import Feedback
from fppmo_ray.report import draw_figures
from fppmo_ray.report.result_drawings import draw_training
from fppmo_ray.report.run import Run
from fppmo_ray.service.journal.facts import EpochFinished
from fppmo_ray.service.journal.run_directory import open_run


def drawn(
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    scores: list[Feedback],
    *,
    cuts: tuple[float | None, float | None] = (None, None),
    number: int = 0,
    axes: int = -1,
    **settings: object,
) -> dict[str, list]:
    """Return the lines of a figure's axes, by label: two generations of two proposals."""
    kept: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: kept.append(figure))
    parameters = (250, 500, 1000, 500)
    proposals = [proposal(i, macs_cut=cuts[i % 2], parameters=parameters[i]) for i in range(4)]
    with open_run(run_dir, resume=False, started=started_with(**settings)) as run:
        run.record([*proposals, *scores])
    draw_figures(run_dir)
    lines = kept[number].axes[axes].get_lines()
    return {str(line.get_label()): [round(y, 6) for y in line.get_ydata()] for line in lines}


def test_the_figure_of_scores_shows_every_score_and_the_mean_and_best_of_generations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = [score(i, 0.1 * (i + 1), loss=1 - 0.1 * i) for i in range(4)]
    assert drawn(tmp_path, monkeypatch, scores) == {
        "proposal": [10.0, 20.0, 30.0, 40.0],
        "generation's mean": [15.0, 35.0],
        "generation's best": [20.0, 40.0],
    }


@pytest.mark.parametrize(
    ("settings", "best"),
    [
        ({"rank_by": "val_accuracy"}, [70.0, 60.0]),
        ({}, [50.0, 60.0]),  # the least losses are those of proposals 0 and 2
        ({"capacity_weight": 1.0}, [70.0, 60.0]),  # 0.4 * 4 and 0.5 * 2; 0.5 and 0.9 * 2
    ],
)
def test_a_generations_best_is_the_proposal_that_the_search_ranks_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], best: list[float]
) -> None:
    scores = [
        *(score(0, 0.5, loss=0.4), score(1, 0.7, loss=0.5)),
        *(score(2, 0.6, loss=0.5), score(3, 0.3, loss=0.9)),
    ]
    lines = drawn(tmp_path, monkeypatch, scores, **settings)
    assert lines["generation's best"] == best


def test_the_upper_axes_show_the_weighed_losses_that_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = (0.25, 0.75, 1.0, 0.5)  # of masks that leave a quarter, a half, all and a half
    scores = [score(i, 0.5, loss=losses[i]) for i in range(4)]
    assert drawn(tmp_path, monkeypatch, scores, axes=0, capacity_weight=1.0) == {
        "proposal": [1.0, 1.5, 1.0, 1.0],
        "generation's mean": [1.25, 1.0],
        "generation's best": [1.0, 1.0],
    }


@pytest.mark.parametrize(
    ("scores", "settings"),
    [
        ([score(i, 0.1 * (i + 1)) for i in range(4)], {"rank_by": "val_accuracy"}),
        (  # of a task of one's own: the loss is minus its score
            [score(i, None, loss=-10 * (i + 1)) for i in range(4)],
            {"identity": {"task": {"measure": "PSNR, dB"}}},
        ),
    ],
)
def test_where_people_read_what_is_compared_one_pair_of_axes_shows_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scores: list[Feedback],
    settings: dict[str, object],
) -> None:
    assert drawn(tmp_path, monkeypatch, scores, axes=0, **settings) == {
        "proposal": [10.0, 20.0, 30.0, 40.0],
        "generation's mean": [15.0, 35.0],
        "generation's best": [20.0, 40.0],
    }


def test_each_of_several_budgets_has_its_own_mean_and_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = [score(i, 0.1 * (i + 1)) for i in range(4)]
    assert drawn(tmp_path, monkeypatch, scores, cuts=(0.4, 0.6)) == {
        "proposal": [10.0, 20.0, 30.0, 40.0],
        "generation's mean, budget 0.4": [10.0, 30.0],
        "generation's best, budget 0.4": [10.0, 30.0],
        "generation's mean, budget 0.6": [20.0, 40.0],
        "generation's best, budget 0.6": [20.0, 40.0],
    }


def test_the_front_of_several_budgets_is_drawn_over_the_macs_that_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(name: str, macs_cut: float, after: float) -> dict[str, object]:
        return {"name": name, "macs_cut": macs_cut, "after": {"test": {"accuracy": after}}}

    variants = [row("dense", 0.0, 0.9), row("importance-only", 0.4, 0.8), row("fppmo", 0.4, 0.85)]
    single = json.dumps({"variants": variants})
    variants += [row("importance-only", 0.6, 0.6), row("fppmo", 0.6, 0.75)]
    for name, result in (("single", single), ("several", json.dumps({"variants": variants}))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(result)
    scores = [score(i, 0.5) for i in range(4)]
    assert drawn(tmp_path / "several", monkeypatch, scores, number=2) == {
        "FPPMO": [85.0, 75.0],
        "importance-only": [80.0, 60.0],
        "dense": [90.0],
    }
    with pytest.raises(IndexError):  # one budget makes no front
        drawn(tmp_path / "single", monkeypatch, scores, number=2)


def test_the_losses_of_a_single_epoch_stand_at_one_within_the_axes() -> None:
    facts = [
        EpochFinished(task=task, epoch=0, train_loss=loss, seconds=1, artifact="a", sha256="b")
        for task, loss in (("dense", 0.0895), ("fppmo", 0.0919), ("allocation", 0.1031))
    ]
    figure = Figure()
    draw_training(figure, cast(Run, SimpleNamespace(facts=facts)))
    [axes] = figure.axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[0.0895], [0.0919], [0.1031]]
    low, high = axes.get_ylim()
    assert (low, high > 0.1031) == (0, True)
    left, right = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if left <= tick <= right] == [1]
