from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import fields, replace

import pytest

import fppmo_ray
from fppmo_ray import Recipe, Sampler, Scoring, SearchSettings, Space
from fppmo_ray.service.resources import Resources

SETTINGS = SearchSettings(macs_cut=0.5)


def test_search_takes_every_setting_with_its_own_default() -> None:
    parameters = inspect.signature(fppmo_ray.search).parameters
    taken = {one.name: parameters[one.name].default for one in fields(SearchSettings)}
    assert taken == {one.name: getattr(SearchSettings, one.name) for one in fields(SearchSettings)}
    assert len(taken) == 15


def test_no_two_settings_have_the_same_name_so_that_flags_need_no_prefixes() -> None:
    recipe = [one.name for one in fields(Recipe)]
    names = Counter([*SETTINGS.flat(), *recipe, *(one.name for one in fields(Resources))])
    assert [name for name, count in names.items() if count > 1] == []
    assert {"macs_cut", "min_keep", "population", "score_steps", "refit", "dtype"} <= names.keys()


def test_settings_are_changed_by_their_own_names_or_by_whole_groups() -> None:
    changed = SETTINGS.changed(seed=1, score_steps=50, min_keep=0.2, rescore_seeds=5)
    assert changed == SearchSettings(
        macs_cut=0.5,
        seed=1,
        space=Space(min_keep=0.2),
        scoring=Scoring(score_steps=50, rescore_seeds=5),
    )
    sampler = Sampler(rule="elite", population=8)
    assert SETTINGS.changed(sampler=sampler, lag=0).sampler == replace(sampler, lag=0)
    assert SETTINGS.changed() == SETTINGS


@pytest.mark.parametrize(
    ("settings", "has_images", "wanted"),
    [
        (SETTINGS, True, 48),
        (SETTINGS, False, 160),
        (SETTINGS.changed(start="uniform"), True, 160),
        (SETTINGS.changed(macs_cut=(0.3, 0.5, 0.7)), True, 3 * 48),
        (SETTINGS.changed(macs_cut=(0.3, 0.5, 0.7)), False, 160),
        (SETTINGS.changed(population=32), True, 3 * 32),
        (SETTINGS.changed(population=64), False, 3 * 64),
        (SETTINGS.changed(proposals=20), True, 20),
        (SETTINGS.changed(proposals=0), True, 0),
    ],
)
def test_a_search_scores_48_masks_from_the_allocation_and_160_from_equal_shares(
    settings: SearchSettings, has_images: bool, wanted: int
) -> None:
    settled = settings.on("cpu", has_images=has_images)
    assert (settled.proposals, settled.num_proposals) == (wanted, wanted)
    assert settled.optimizer_settings().num_proposals == wanted
    assert settled.on("cpu", has_images=has_images) == settled


def test_a_setting_that_there_is_not_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match="expected names of settings, got score_step"):
        SETTINGS.changed(score_step=3)
