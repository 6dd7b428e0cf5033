"""Measuring what a network's latency is over all widths, on the device where it is.

Every layer is timed by itself at some widths, whole networks at some masks; the table that
explains them is plain data (``fppmo_ray.distribution.latency_table``), and other masks' networks
tell how far off it is.
"""

from fppmo_ray.pruning.latency.measure import (
    MeasuredLatency,
    TimedMask,
    measure_latency_table,
    repeated,
    time_masks,
)

__all__ = ["MeasuredLatency", "TimedMask", "measure_latency_table", "repeated", "time_masks"]
