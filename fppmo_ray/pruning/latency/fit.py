"""From times of layers and of whole networks to a table that explains both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from fppmo_ray.distribution.activations import as_products
from fppmo_ray.distribution.latency_table import FS_PER_NS, LatencyTable, LayerLatency
from fppmo_ray.distribution.products import FloatArray, IntArray
from fppmo_ray.distribution.space import PruningSpace


def fit_table(
    space: PruningSpace,
    layers: Sequence[LayerLatency],
    widths: Sequence[IntArray],
    measured_ns: Sequence[int],
) -> LatencyTable:
    """A factor on all layers, a time per byte written and a constant that explain whole networks.

    Within a network a layer finds other data in the caches than by itself, hence the factor. None
    of the three is negative, so that the table never falls as widths rise; relative errors count.

    Args:
        space: Tells what networks write.
        layers: As measured by themselves.
        widths: Kept filters per group of the networks, each ``(num_groups,)``; the dense first.
        measured_ns: What they take.
    """
    assert space.activations is not None  # trace tells them
    written = space.activations.written()
    bytes_of = as_products(written, len(space.groups))
    table = LatencyTable(
        num_groups=len(space.groups),
        layers=tuple(layers),
        written=written,
        fs_per_byte=0,
        constant_ns=0,
        dense_ns=measured_ns[0],
    )
    causes = np.array([[table.total(w), bytes_of.total(w), 1.0] for w in widths])
    factor, ns_per_byte, constant = _least_squares(causes / np.array(measured_ns)[:, None])
    return replace(
        table,
        layers=tuple(_scaled(layer, factor) for layer in layers),
        fs_per_byte=round(ns_per_byte * FS_PER_NS),
        constant_ns=round(constant),
    )


def _scaled(layer: LayerLatency, factor: float) -> LayerLatency:
    ns = np.rint(factor * np.array(layer.ns)).astype(np.int64)
    return replace(layer, ns=tuple(map(tuple, ns.tolist())))


def _least_squares(causes: FloatArray) -> FloatArray:
    """Non-negative factors ``(num_causes,)`` by which the causes come nearest to one.

    There are few causes, so every subset of them is tried.
    """
    rows, columns = causes.shape
    best, least = np.zeros(columns), np.inf
    for count in range(1, columns + 1):
        for chosen in combinations(range(columns), count):
            part = causes[:, chosen]
            factors, *_ = np.linalg.lstsq(part, np.ones(rows))
            error = float(np.sum((part @ factors - 1) ** 2))
            if (factors >= 0).all() and error < least:
                best, least = np.zeros(columns), error
                best[list(chosen)] = factors
    return best
