"""The choice among finalists, with scores that are written out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from inline_pool import InlinePool
from simulated_run import told

from fppmo_ray.distribution import BoolArray, Finalist, OptimizerSettings, PruningSpace
from fppmo_ray.distribution.space import TensorSize, Width
from fppmo_ray.pruning import Score
from fppmo_ray.service.choices import Choice, choose
from fppmo_ray.service.dense_network import Context
from fppmo_ray.service.journal.facts import Chosen, Rescored
from fppmo_ray.service.settings import SearchSettings
from fppmo_ray.testing.simulated_search import SIMULATED_SPACE, simulated_run

NUM_FILTERS = SIMULATED_SPACE.num_filters
EVEN = np.arange(NUM_FILTERS) % 2 == 0
WEIGHTS: Any = SimpleNamespace(shared="the weights")
OF_THE_RUN = OptimizerSettings(macs_cut=0.5, num_proposals=24, population_size=8)


class Rescorer:
    """Scores a mask the better, the fewer filters with odd numbers it keeps.

    Args:
        loss_of: Loss of a mask, instead.
    """

    def __init__(self, loss_of: Any = lambda keep: float(keep[1::2].mean())) -> None:
        self._loss_of = loss_of
        self.asked: list[tuple[tuple[int, ...], str]] = []
        """Seed and split of every score."""

    def rescore(self, weights: Any, keep: BoolArray, seed: Sequence[int], split: str) -> Score:
        assert weights == "the weights"
        self.asked.append((tuple(seed), split))
        loss = self._loss_of(keep)
        return Score(val_loss=loss, val_accuracy=0.5, seconds=1.0)


def chosen(
    finalists: list[Finalist],
    run_dir: Path,
    worker: Any,
    settings: SearchSettings,
    *,
    space: PruningSpace = SIMULATED_SPACE,
    resume: bool = False,
    pool: Any = None,
) -> tuple[list[Choice], list[Rescored]]:
    problem: Any = SimpleNamespace(settings=settings, space=space)
    with simulated_run(run_dir, OF_THE_RUN, resume=resume) as run:
        inline: Any = pool or InlinePool(worker)
        context = Context(problem=problem, run=run, pool=inline, compute=problem)
        choices = choose(finalists, context, WEIGHTS)
        return choices, list(run.all(Rescored))


def settings(**changes: Any) -> SearchSettings:
    return SearchSettings(macs_cut=0.5).changed(
        **{"capacity_weight": 0.0, "rescore_seeds": 1} | changes
    )


def test_a_finalist_whose_score_is_not_finite_is_not_chosen(tmp_path: Path) -> None:
    # Without the filters with odd numbers the loss is least: sample 3 would be chosen.
    finalists = [
        Finalist(name="mode", keep=np.arange(NUM_FILTERS) % 4 != 3),
        Finalist(name="sample 3", keep=EVEN),
        Finalist(name="importance-only", keep=np.roll(EVEN, 1)),
    ]
    worker = Rescorer(lambda keep: math.nan if (keep == EVEN).all() else float(keep[1::2].mean()))
    [choice], rescored = chosen(finalists, tmp_path, worker, settings())
    assert (choice.chosen.name, choice.importance_only.name) == ("mode", "importance-only")
    assert [(fact.finalist, fact.split, fact.val_loss) for fact in rescored] == [
        ("mode", "choose_val", 0.5),
        ("importance-only", "choose_val", 1.0),
        ("importance-only", "search_val", 1.0),  # like a proposal, for the noise of a score
    ]


def test_seeds_of_finalists_are_fresh_and_the_same_for_all_of_them(tmp_path: Path) -> None:
    finalists = [
        Finalist(name="mode", keep=EVEN),
        Finalist(name="importance-only", keep=np.roll(EVEN, 1)),
    ]
    worker = Rescorer()
    chosen(finalists, tmp_path, worker, settings(rescore_seeds=2, seed=7))
    assert worker.asked == [
        *(((7, 0, 1), "choose_val"), ((7, 0, 1), "choose_val"), ((7, 0, 1), "search_val")),
        *(((7, 1, 1), "choose_val"), ((7, 1, 1), "choose_val"), ((7, 1, 1), "search_val")),
    ]  # three numbers, where seeds of generations have two


def test_the_mean_over_the_seeds_decides(tmp_path: Path) -> None:
    losses = {"mode": [0.1, 0.9], "sample 3": [0.4, 0.4], "importance-only": [0.6] * 4}
    masks = {name: np.arange(NUM_FILTERS) % (3 + i) == 0 for i, name in enumerate(losses)}
    left = {masks[name].tobytes(): iter(values) for name, values in losses.items()}
    worker = Rescorer(lambda keep: next(left[keep.tobytes()]))
    finalists = [Finalist(name=name, keep=keep) for name, keep in masks.items()]
    [choice], _ = chosen(finalists, tmp_path, worker, settings(rescore_seeds=2))
    assert choice.chosen.name == "sample 3"


def test_every_budget_has_its_own_choice_and_a_cut_journal_leads_to_the_same(
    tmp_path: Path,
) -> None:
    # The fewer filters with odd numbers, the better; the tight budget's "mode" is the best of all.
    most, few = np.ones_like(EVEN), EVEN & (np.arange(NUM_FILTERS) % 4 == 0)
    finalists = [
        Finalist(name="mode", keep=most, macs_cut=0.4),
        Finalist(name="sample 3", keep=EVEN, macs_cut=0.4),
        Finalist(name="importance-only", keep=most, macs_cut=0.4),
        Finalist(name="mode", keep=few, macs_cut=0.6),
        Finalist(name="importance-only", keep=most, macs_cut=0.6),
    ]

    def names(resume: bool) -> tuple[list[tuple[float | None, str]], int]:
        worker, asked = Rescorer(), settings(macs_cut=(0.4, 0.6), rescore_seeds=2)
        choices, _ = chosen(finalists, tmp_path, worker, asked, resume=resume)
        return [(choice.macs_cut, choice.chosen.name) for choice in choices], len(worker.asked)

    # Two of everything, and the importance-only mask, which both have, on search-val as well.
    assert names(resume=False) == ([(0.4, "sample 3"), (0.6, "mode")], 2 * (4 + 1))
    journal = tmp_path / "journal.jsonl"
    lines, whole = journal.read_bytes().splitlines(keepends=True), sorted(told(tmp_path))
    for missing, scores in ((1, 0), (2, 0), (5, 3)):
        journal.write_bytes(b"".join(lines[:-missing]))
        assert names(resume=True) == ([(0.4, "sample 3"), (0.6, "mode")], scores)
        assert sorted(told(tmp_path)) == whole


@pytest.mark.parametrize(("weight", "name"), [(0.0, "mode"), (2.0, "importance-only")])
def test_of_finalists_with_equal_losses_the_one_that_leaves_more_parameters_is_chosen(
    tmp_path: Path, weight: float, name: str
) -> None:
    size = TensorSize(
        tensor="w", per_pair=9, out_width=Width(terms=((0, 1),)), in_width=Width(constant=1)
    )
    space = replace(SIMULATED_SPACE, tensor_sizes=(size,))
    few, many = np.zeros((2, NUM_FILTERS), dtype=bool)
    few[:2], many[:4] = True, True
    finalists = [
        Finalist(name="mode", keep=few, parameters=2 * 9),
        Finalist(name="importance-only", keep=many, parameters=4 * 9),
    ]
    worker, weighed = Rescorer(lambda keep: 1.0), settings(capacity_weight=weight)
    [choice], _ = chosen(finalists, tmp_path, worker, weighed, space=space)
    assert choice.chosen.name == name


def test_a_budget_without_a_rescored_finalist_ends_the_search(tmp_path: Path) -> None:
    finalists = [
        Finalist(name="mode", keep=EVEN),
        Finalist(name="importance-only", keep=np.roll(EVEN, 1)),
    ]
    pool = InlinePool(Rescorer(), lambda call: "no space")
    with pytest.raises(RuntimeError, match="every finalist failed when it was rescored"):
        chosen(finalists, tmp_path, None, settings(), pool=pool)


def test_a_journaled_choice_that_the_model_does_not_name_is_refused(tmp_path: Path) -> None:
    finalists = [
        Finalist(name="mode", keep=EVEN),
        Finalist(name="importance-only", keep=np.roll(EVEN, 1)),
    ]
    with simulated_run(tmp_path, OF_THE_RUN) as run:
        run.record([Chosen(finalist="mode", keep=~EVEN)])
    with pytest.raises(ValueError, match="another mask for the chosen finalist mode"):
        chosen(finalists, tmp_path, Rescorer(), settings(), resume=True)
