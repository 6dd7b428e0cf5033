"""Pruning without training: what one pass over a few unlabelled images tells.

``calibrate`` sums up the second moments of the inputs of all layers that read prunable filters
(``Calibration``). ``obs_order`` orders the filters by what their removal costs, and gives every
group's error curve, from which ``allocate`` finds widths. ``Refit`` gives the layers behind removed
filters the weights that fit the inputs they have left.
"""

from fppmo_ray.pruning.calibration.filter_order import FilterOrder, obs_order
from fppmo_ray.pruning.calibration.grams import Calibration, InputGram, calibrate
from fppmo_ray.pruning.calibration.least_squares import Refit, refit

__all__ = [
    "Calibration",
    "FilterOrder",
    "InputGram",
    "Refit",
    "calibrate",
    "obs_order",
    "refit",
]
