"""Shares of filters that users say layers may keep."""

from __future__ import annotations

import numpy as np
import pytest
import tyro

from fppmo_ray import SearchSettings, load_dataset
from fppmo_ray.distribution import MaskOptimizer
from fppmo_ray.service.image_task import image_classification
from fppmo_ray.service.problem import Problem, build_problem
from fppmo_ray.training import build_network

NETWORK = build_network("digits_cnn", 10)  # conv1 and conv2 of 32 filters, conv3 and conv4 of 64
SETTINGS = SearchSettings(macs_cut=0.5, proposals=16)


def problem(**limits: tuple[float, float]) -> Problem:
    settings = SETTINGS.changed(layer_limits=limits)
    return build_problem(NETWORK, image_classification(load_dataset("digits")), settings)


def test_every_proposal_keeps_what_a_layer_must_and_no_more_than_it_may() -> None:
    space = problem(conv1=(0.75, 1.0), conv4=(0.1, 0.25)).space
    optimizer = MaskOptimizer(space, np.ones(space.num_filters), SETTINGS.optimizer_settings())
    proposals = optimizer.ask()
    assert len(proposals) == 16
    for proposal in proposals:
        widths = dict(zip("1234", space.widths(proposal.keep).tolist(), strict=True))
        assert widths["1"] >= 24
        assert 7 <= widths["4"] <= 16


def test_flags_name_layers_with_their_smallest_and_largest_share() -> None:
    flags = ["--layer-limits", "layer1.*", "0.5", "1.0", "conv1", "0.2", "0.8"]
    settings = tyro.cli(
        SearchSettings, args=["--macs-cut", "0.5", *flags], config=(tyro.conf.OmitArgPrefixes,)
    )
    assert settings.space.layer_limits == {"layer1.*": (0.5, 1.0), "conv1": (0.2, 0.8)}


def test_layers_that_are_not_there_and_shares_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no channel group holds filters of 'layer9\.\*'"):
        problem(**{"layer9.*": (0.5, 1.0)})
    with pytest.raises(
        ValueError, match="limits of conv1 must be shares 0 < smallest <= largest <= 1"
    ):
        problem(conv1=(0.9, 0.5))


def test_a_budget_that_limits_put_out_of_reach_is_refused() -> None:
    with pytest.raises(ValueError, match=r"macs_cut must be at most 0\.1776, got 0\.5"):
        problem(**{"conv*": (0.9, 1.0)})
