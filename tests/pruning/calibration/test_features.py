"""The last feature map, where a pruned network is compared with the dense one."""

from __future__ import annotations

import numpy as np
import torch
from calibrated_networks import IMAGE, Chain, made
from torch import nn

from fppmo_ray.pruning import extract, trace
from fppmo_ray.pruning.calibration.features import last_feature_match
from fppmo_ray.training.networks import resnet20


def test_of_a_resnet_it_is_the_last_stage():
    network = resnet20().eval()
    image = torch.zeros(1, 3, 32, 32)
    tracing = trace(network, image, ignore=["conv1", "layer*.*.conv2"])
    keep = np.arange(tracing.space.num_filters) % 2 == 0
    (match,) = last_feature_match(extract(network, tracing, keep), network, tracing, keep, image)
    assert (match.module, match.channels) == ("layer3", None)


def test_of_a_map_that_lost_channels_it_says_which_are_left():
    network = made(Chain())
    tracing = trace(network, IMAGE)
    keep = np.ones(tracing.space.num_filters, dtype=bool)
    keep[[1, 8, 11]] = False  # of the second group, filters 0 and 3
    pruned = extract(network, tracing, keep)
    (match,) = last_feature_match(pruned, network, tracing, keep, IMAGE.double())
    assert match.module == "second"
    assert match.channels.tolist() == [1, 2, 4, 5]


def test_the_answer_itself_is_no_feature_map():
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    tracing = trace(network, IMAGE)
    keep = np.arange(8) < 5
    pruned = extract(network, tracing, keep)
    (match,) = last_feature_match(pruned, network, tracing, keep, IMAGE)
    assert (match.module, match.channels.tolist()) == ("1", [0, 1, 2, 3, 4])
