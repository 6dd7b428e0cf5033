"""Widths in multiples of 8 where workers hold GPUs, of any number on CPUs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pretend_training import TinyCNN

from fppmo_ray import Placement, SearchSettings, load_dataset
from fppmo_ray.service.journal.run_directory import open_run
from fppmo_ray.service.problem import identity_of, state_problem
from fppmo_ray.service.search import start_of

SETTINGS = SearchSettings(macs_cut=0.3, proposals=4, population=4)
ON_CPUS, ON_GPUS = Placement(), Placement(gpus_per_worker=0.5)


def legal_widths(settings: SearchSettings, placement: Placement) -> list[int]:
    problem = state_problem(TinyCNN(), load_dataset("digits"), settings, placement=placement)
    return [group.multiple for group in problem.tracing.space.groups]


@pytest.mark.parametrize(
    ("given", "on_cpus", "on_gpus"), [(None, 1, 8), (1, 1, 1), (4, 4, 4)], ids=str
)
def test_the_device_decides_where_nothing_is_given(
    given: int | None, on_cpus: int, on_gpus: int
) -> None:
    settings = replace(SETTINGS, width_multiple=given)
    assert set(legal_widths(settings, ON_CPUS)) == {on_cpus}
    assert set(legal_widths(settings, ON_GPUS)) == {on_gpus}


def identity(settings: SearchSettings, placement: Placement) -> dict[str, Any]:
    network, dataset = TinyCNN(), load_dataset("digits")
    for parameter in network.parameters():
        parameter.data.fill_(0.01)
    problem = state_problem(network, dataset, settings, placement=placement)
    return identity_of(problem, settings)


def test_journals_hold_the_multiple_that_counts() -> None:
    explicit = replace(SETTINGS, width_multiple=1)
    assert identity(SETTINGS, ON_CPUS) == identity(explicit, ON_CPUS)
    assert identity(SETTINGS, ON_CPUS)["settings"]["width_multiple"] == 1
    assert identity(SETTINGS, ON_GPUS)["settings"]["width_multiple"] == 8


def test_a_search_that_was_begun_with_multiples_of_1_goes_on_by_default(tmp_path: Path) -> None:
    problem = state_problem(TinyCNN(), load_dataset("digits"), SETTINGS, placement=ON_CPUS)
    begun = start_of(problem, replace(SETTINGS, width_multiple=1), tmp_path)
    with open_run(tmp_path, resume=False, started=begun):
        pass
    with open_run(tmp_path, resume=True, started=start_of(problem, SETTINGS, tmp_path)) as run:
        assert len(run.facts) == 1


def test_multiples_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="width_multiple must be >= 1, got 0"):
        replace(SETTINGS, width_multiple=0)
