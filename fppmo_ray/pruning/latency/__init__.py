"""Measurement of a network's latency as a function of its widths, on the network's device.

Every layer is timed alone at several widths, and whole networks at several masks. A table of plain
data (``fppmo_ray.distribution.latency_table``) is fitted to both, and its error is measured on
networks of further masks.
"""

from fppmo_ray.pruning.latency.clock import (
    Clock,
    Read,
    name_of,
    num_readings,
    read_clock,
    table_by_clock,
    table_of_clock,
)
from fppmo_ray.pruning.latency.forward import Latency, measure_latencies
from fppmo_ray.pruning.latency.measure import (
    MeasuredLatency,
    TimedMask,
    measure_latency_table,
    repeated,
    time_masks,
)

__all__ = [
    "Clock",
    "Latency",
    "MeasuredLatency",
    "Read",
    "TimedMask",
    "measure_latencies",
    "measure_latency_table",
    "name_of",
    "num_readings",
    "read_clock",
    "repeated",
    "table_by_clock",
    "table_of_clock",
    "time_masks",
]
