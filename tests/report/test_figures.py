"""What the figures of a search show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from fppmo_ray.report import draw_figures
from fppmo_ray.service.journal.facts import Asked, Fact, Scored, Started
from fppmo_ray.service.journal.run_directory import open_run


def score(number: int, rung: int, accuracy: float) -> Scored:
    return Scored(
        id=number,
        round=0,
        rung=rung,
        val_loss=1.0,
        val_accuracy=accuracy,
        seconds=1.0,
        worker="0@a:1",
        at=0.0,
    )


def drawn(
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    scores: list[Scored],
    *,
    cuts: tuple[float | None, float | None] = (None, None),
    number: int = 0,
) -> dict[str, list]:
    """The accuracies of a figure of two generations of two, by label."""
    kept: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: kept.append(figure))
    started = Started(search_id="c0", identity={}, versions={}, groups=[], dense_macs=9)
    asked = [
        Asked(id=i, generation=i // 2, macs=5, mask="", macs_cut=cuts[i % 2]) for i in range(4)
    ]
    with open_run(run_dir, resume=False, started=started) as run:
        facts: list[Fact] = [*asked, *scores]
        run.record(facts)
    draw_figures(run_dir)
    lines = kept[number].axes[0].get_lines()
    return {str(line.get_label()): [round(y, 6) for y in line.get_ydata()] for line in lines}


def test_mean_and_best_of_a_search_in_rungs_are_those_of_the_deepest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shallow = [score(i, 5, 0.9) for i in range(4)]
    deep = [score(0, 50, 0.5), score(1, 50, 0.6), score(3, 50, 0.7)]
    assert drawn(tmp_path, monkeypatch, [*shallow, *deep]) == {
        "proposal, 5 steps": [90.0] * 4,
        "proposal, 50 steps": [50.0, 60.0, 70.0],
        "generation's mean": [55.0, 70.0],
        "generation's best": [60.0, 70.0],
    }


def test_where_all_scores_are_alike_their_steps_are_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = [score(i, 50, 0.1 * (i + 1)) for i in range(4)]
    assert drawn(tmp_path, monkeypatch, scores) == {
        "proposal": [10.0, 20.0, 30.0, 40.0],
        "generation's mean": [15.0, 35.0],
        "generation's best": [20.0, 40.0],
    }


def test_each_of_several_budgets_has_its_own_mean_and_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = [score(i, 50, 0.1 * (i + 1)) for i in range(4)]
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
    scores = [score(i, 50, 0.5) for i in range(4)]
    assert drawn(tmp_path / "several", monkeypatch, scores, number=2) == {
        "FPPMO": [85.0, 75.0],
        "importance-only": [80.0, 60.0],
        "dense": [90.0],
    }
    with pytest.raises(IndexError):  # one budget makes no front
        drawn(tmp_path / "single", monkeypatch, scores, number=2)
