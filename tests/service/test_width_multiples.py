"""Widths in multiples of 8 in the wide layers where workers hold GPUs, of any number on CPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from simulated_training import TinyCNN
from torch import nn

from fppmo_ray import Resources, Sampler, SearchSettings, load_dataset
from fppmo_ray.service.image_task import image_classification
from fppmo_ray.service.journal.run_directory import open_run
from fppmo_ray.service.problem import Problem, build_problem, started_of

SETTINGS = SearchSettings(macs_cut=0.3, proposals=4, sampler=Sampler(population=4))
ON_CPUS, ON_GPUS = Resources(), Resources(gpus=0.5)


def problem_of(settings: SearchSettings, resources: Resources) -> Problem:
    """The problem of pruning a network of 12 and of 64 filters, of fixed weights."""
    network = TinyCNN()
    network.conv2, network.norm2 = nn.Conv2d(12, 64, 3, padding=1), nn.BatchNorm2d(64)
    network.head = nn.Linear(64, 10)
    for parameter in network.parameters():
        parameter.data.fill_(0.01)
    task = image_classification(load_dataset("digits"))
    return build_problem(network, task, settings, resources=resources)


def legal_widths(settings: SearchSettings, resources: Resources) -> list[int]:
    return [group.multiple for group in problem_of(settings, resources).space.groups]


@pytest.mark.parametrize(
    ("given", "on_cpus", "on_gpus"),
    [
        (None, [1, 1], [1, 8]),
        (1, [1, 1], [1, 1]),
        (4, [4, 4], [4, 4]),
        ("wide", [1, 8], [1, 8]),
    ],
    ids=str,
)
def test_the_device_decides_where_nothing_is_given(
    given: Any, on_cpus: list[int], on_gpus: list[int]
) -> None:
    settings = SETTINGS.changed(multiple=given)
    assert legal_widths(settings, ON_CPUS) == on_cpus
    assert legal_widths(settings, ON_GPUS) == on_gpus


def test_journals_hold_the_multiple_that_counts() -> None:
    explicit = problem_of(SETTINGS.changed(multiple=1), ON_CPUS)
    on_cpus, on_gpus = (problem_of(SETTINGS, resources) for resources in (ON_CPUS, ON_GPUS))
    assert on_cpus.identity() == explicit.identity()
    assert on_cpus.identity()["settings"]["space"]["multiple"] == 1
    assert on_gpus.identity()["settings"]["space"]["multiple"] == "wide"


def test_a_search_that_was_begun_with_multiples_of_1_goes_on_by_default(tmp_path: Path) -> None:
    begun, resumed = (
        started_of(problem_of(settings, ON_CPUS), "run", {})
        for settings in (SETTINGS.changed(multiple=1), SETTINGS)
    )
    with open_run(tmp_path, resume=False, started=begun):
        pass
    with open_run(tmp_path, resume=True, started=resumed) as run:
        assert len(run.facts) == 1


def test_multiples_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple must be >= 1, got 0"):
        SETTINGS.changed(multiple=0)
