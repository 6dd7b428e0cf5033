"""Pruning without training: what one pass over a few unlabelled images tells.

``calibrate`` sums up the second moments of the inputs of all layers that read prunable filters
(``Calibration``). ``obs_order`` orders the filters by what their removal costs, and gives every
group's error curve, from which ``allocate`` finds widths. ``Refit`` gives the layers behind removed
filters the weights that fit the inputs they have left. ``reconstruct`` then corrects layer after
layer for the errors that have built up before it.
"""

from fppmo_ray.pruning.calibration.dense_calibration import DenseCalibration
from fppmo_ray.pruning.calibration.filter_order import FilterOrder, obs_order
from fppmo_ray.pruning.calibration.grams import Calibration, InputGram, calibrate
from fppmo_ray.pruning.calibration.least_squares import Refit, refit
from fppmo_ray.pruning.calibration.reconstruction import (
    LayerTargets,
    layer_targets,
    reconstruct,
)

__all__ = [
    "Calibration",
    "DenseCalibration",
    "FilterOrder",
    "InputGram",
    "LayerTargets",
    "Refit",
    "calibrate",
    "layer_targets",
    "obs_order",
    "reconstruct",
    "refit",
]
