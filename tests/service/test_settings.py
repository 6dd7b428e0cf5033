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


def test_a_setting_that_there_is_not_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match="expected names of settings, got score_step"):
        SETTINGS.changed(score_step=3)
