"""A problem on a few real images, which tests of jobs share."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from fppmo_ray import SearchSettings, load_dataset
from fppmo_ray.service.image_task import image_classification
from fppmo_ray.service.problem import Problem, build_problem
from fppmo_ray.training import Splits, build_network, load_weights


def small_problem(few_images: Path, weights: Path, settings: SearchSettings) -> Problem:
    """ResNet-20: 128 images of search-train, 60 of search-val, 40 of choose-val.

    Its residual stream stays whole, since Torch-Pruning cannot cut it.
    """
    settings = settings.changed(ignore=("conv1",))
    dense = build_network("resnet20", 10)
    load_weights(dense, weights)
    train, val, choose = np.split(np.arange(228), [128, 188])
    splits = Splits(search_train=train, search_val=val, choose_val=choose)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # option-A shortcuts are left whole
        task = image_classification(load_dataset("cifar10", few_images), splits)
        return build_problem(dense, task, settings)
