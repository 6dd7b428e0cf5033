"""Latency by a user's clock, such as a phone or an inference engine, which times whole networks.

Layers cannot be timed alone on it. Instead each group of the dense network is narrowed to a few
widths, all others whole, and a table is fitted to these times and to those of a few networks whose
groups are all narrowed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from numbers import Real

import numpy as np
import torch
from torch import nn

from fppmo_ray.distribution.costs import BoolArray, FloatArray, IntArray, Width
from fppmo_ray.distribution.latency_table import LatencyTable, LayerLatency, monotone
from fppmo_ray.distribution.space import PruningSpace
from fppmo_ray.pruning.extract import Tracing, extract
from fppmo_ray.pruning.latency.measure import MeasuredLatency, TimedMask, mask_at, random_masks

logger = logging.getLogger(__name__)

Clock = Callable[[nn.Module], float]
"""(network) -> milliseconds: times an extracted network, in eval mode on the CPU."""

Read = Callable[[BoolArray], float]
"""(mask) -> milliseconds of its network, by a clock."""

_FITTED, _CHECKED = 8, 8  # whole networks at random masks
_MOST_POINTS = 4  # widths of each group below the dense one
_MOST_CALLS = 200  # unless the network has more groups
_NS = 1e6  # nanoseconds in a millisecond
_CHANCE = 1e-6  # a relative error below this is rounding


def name_of(clock: Clock) -> str:
    """Return the name of a clock for people, and for the identity of a search."""
    return str(getattr(clock, "__qualname__", type(clock).__qualname__))


@torch.no_grad()
def read_clock(clock: Clock, network: nn.Module, tracing: Tracing, keep: BoolArray) -> float:
    """Return the milliseconds that a clock measures for a mask's network.

    Args:
        clock: The clock.
        network: The dense network; it stays unchanged.
        tracing: What ``trace`` returned for it.
        keep: The mask, bool ``(num_filters,)``.

    Raises:
        ValueError: the clock raises, or returns something else than a finite number above 0.
    """
    smaller, name = extract(network, tracing, keep).cpu().eval(), name_of(clock)
    try:
        found = clock(smaller)
    except Exception as error:  # whatever a user's code raises
        raise ValueError(
            f"latency {name} raised {type(error).__name__}: {error}; it is given an extracted "
            "network, in eval mode on the CPU, and must return its milliseconds"
        ) from error
    if isinstance(found, bool) or not isinstance(found, Real) or not 0 < found < math.inf:
        raise ValueError(f"latency {name} must return milliseconds, finite and > 0, got {found!r}")
    return float(found)


def num_readings(space: PruningSpace) -> int:
    """Return how often ``table_by_clock`` reads the clock."""
    masks = _one_group_masks(space)
    return 1 + _FITTED + _CHECKED + sum(len(of_group) for of_group in masks)


def table_by_clock(read: Read, space: PruningSpace, *, seed: int, name: str) -> MeasuredLatency:
    """Return the latency table of a network by a clock, and its error on further networks.

    Two models explain the times. In the additive one every group has a cost of its own, whatever
    the others' widths (as in HALP and NetAdapt). In the other one a layer costs its output width
    times its input width, and a group something for each of its filters. The table is their mean,
    weighed so that networks with all groups narrowed come out best.

    Args:
        read: Returns the milliseconds of a mask's network.
        space: The space of the masks.
        seed: Random seed of the networks with all groups narrowed, >= 0.
        name: Name of the clock.
    """
    everything = mask_at(space, 1.0)
    dense = _NS * read(everything)
    alone = [
        {width: _NS * read(keep) for width, keep in of_group.items()}
        for of_group in _one_group_masks(space)
    ]
    random = random_masks(space, _FITTED + _CHECKED, np.random.default_rng(seed))
    times = [_NS * read(keep) for keep in random]
    fitted, at = random[:_FITTED], np.array(times[:_FITTED])
    additive, offset = _additive(space, alone, dense)
    narrowed = [keep for of_group in _one_group_masks(space) for keep in of_group.values()]
    singly = [time for of_group in alone for time in of_group.values()]
    layers, rest = _products(
        space, [everything, *narrowed, *fitted], np.array([dense, *singly, *at])
    )
    # The share of the second model that leaves the least relative error on the random networks.
    sums = _totals(space, additive, fitted) + offset
    apart, error = (_totals(space, layers, fitted) + rest - sums) / at, (at - sums) / at
    is_additive = np.abs(error).max() < _CHANCE
    share = 0.0 if is_additive else float(np.clip(apart @ error / (apart @ apart), 0, 1))
    table = _table(
        space,
        [*_scaled(additive, 1 - share), *_scaled(layers, share)],
        constant=(1 - share) * offset + share * rest,
        dense=dense,
    )
    checks = tuple(
        TimedMask(measured_ns=round(time), predicted_ns=table.total(space.widths(keep)))
        for keep, time in zip(random[_FITTED:], times[_FITTED:], strict=True)
    )
    return MeasuredLatency(table=table, checks=checks, device=name)


def table_of_clock(
    clock: Clock, network: nn.Module, tracing: Tracing, space: PruningSpace
) -> LatencyTable:
    """Return the latency table of a network by a clock; the log tells its error.

    Args:
        clock: The clock.
        network: The dense network.
        tracing: What ``trace`` returned for it.
        space: The space of the masks, with its limits.

    Raises:
        ValueError: the clock fails.
    """
    name = name_of(clock)
    logger.info("latency  %s times %d networks, one after the other", name, num_readings(space))

    def read(keep: BoolArray) -> float:
        return read_clock(clock, network, tracing, keep)

    measured = table_by_clock(read, space, seed=0, name=name)
    logger.info(
        "latency  dense %.3g ms by %s; the table is off by %.1f %% (median)",
        *(measured.table.dense_ns / 1e6, name, 100 * measured.median_error),
    )
    return measured.table


_Layers = list[tuple[str, Width, Width, tuple[int, ...], tuple[int, ...], FloatArray]]
"""Name, widths, measured widths and nanoseconds of each layer, not yet rounded."""


def _one_group_masks(space: PruningSpace) -> list[dict[int, BoolArray]]:
    """Return, for every group, masks that narrow it alone, by its width."""
    num_groups = len(space.groups)
    left = (_MOST_CALLS - 1 - _FITTED - _CHECKED) // num_groups
    levels = np.linspace(0, 1, min(max(left, 1), _MOST_POINTS), endpoint=False)
    found: list[dict[int, BoolArray]] = []
    for group in range(num_groups):
        masks = {}
        for level in levels:
            at = np.ones(num_groups)
            at[group] = level
            keep = mask_at(space, at)
            width = int(space.widths(keep)[group])
            if width < space.dense_widths[group]:
                masks[width] = keep
        found.append(masks)
    return found


def _additive(
    space: PruningSpace, alone: Sequence[dict[int, float]], dense: float
) -> tuple[_Layers, float]:
    """Return a cost for every group by its width, and the constant that is left.

    Args:
        space: The space of the masks.
        alone: For every group, nanoseconds of the dense network with it narrowed, by its width.
        dense: Nanoseconds of the dense network.
    """
    layers: _Layers = []
    for number, (group, times) in enumerate(zip(space.groups, alone, strict=True)):
        points = {**times, int(space.dense_widths[number]): dense}
        ns = monotone(np.array([list(points.values())]).T)
        widths = Width(terms=((number, 1),)), Width(constant=1)
        layers.append((group.name, *widths, tuple(points), (1,), ns - ns[0]))
    return layers, dense - sum(float(ns[-1, 0]) for *_, ns in layers)


def _products(
    space: PruningSpace, masks: Sequence[BoolArray], ns: FloatArray
) -> tuple[_Layers, float]:
    """Return layers that cost output width times input width, and the constant that is left.

    Args:
        space: The space of the masks.
        masks: Networks that were timed.
        ns: Their nanoseconds, ``(num_masks,)``.
    """
    by_widths: dict[tuple[Width, Width], tuple[str, int]] = {}
    for cost in space.layer_costs:
        key = cost.out_width, cost.in_width
        name, macs = by_widths.get(key, (cost.layer, 0))
        by_widths[key] = name, macs + cost.macs_per_pair
    for number, group in enumerate(space.groups):  # norms, activation functions, additions
        by_widths.setdefault((Width(terms=((number, 1),)), Width(constant=1)), (group.name, 1))
    lowest, highest = space.min_widths, space.dense_widths
    layers: _Layers = []
    for (out, read), (name, macs) in by_widths.items():
        outs, reads = (
            tuple(sorted({_value(width, lowest), _value(width, highest)})) for width in (out, read)
        )
        layers.append((name, out, read, outs, reads, macs * np.outer(outs, reads).astype(float)))
    causes = np.array([[*_each(layers, space.widths(keep)), 1.0] for keep in masks])
    *factors, constant = _nonnegative(causes / ns[:, None], np.ones(len(ns)))
    scaled = [(*rest, table * f) for (*rest, table), f in zip(layers, factors, strict=True)]
    return scaled, float(constant)


def _value(width: Width, widths: IntArray) -> int:
    return width.constant + sum(int(per * widths[group]) for group, per in width.terms)


def _each(layers: _Layers, widths: IntArray) -> list[float]:
    """Return every layer's nanoseconds, interpolated between its measured widths."""
    found = []
    for _, out, read, outs, reads, ns in layers:
        along = [np.interp(_value(out, widths), outs, column) for column in ns.T]
        found.append(float(np.interp(_value(read, widths), reads, along)))
    return found


def _totals(space: PruningSpace, layers: _Layers, masks: Sequence[BoolArray]) -> FloatArray:
    return np.array([math.fsum(_each(layers, space.widths(keep))) for keep in masks])


def _scaled(layers: _Layers, factor: float) -> _Layers:
    return [(*rest, ns * factor) for *rest, ns in layers] if factor else []  # type: ignore[misc]


def _table(space: PruningSpace, layers: _Layers, *, constant: float, dense: float) -> LatencyTable:
    return LatencyTable(
        num_groups=len(space.groups),
        layers=tuple(
            LayerLatency(
                layer=name,
                out_width=out,
                in_width=read,
                out_points=outs,
                in_points=reads,
                ns=tuple(map(tuple, np.rint(ns).astype(np.int64).tolist())),
            )
            for name, out, read, outs, reads, ns in layers
        ),
        written=(),
        fs_per_byte=0,
        constant_ns=round(constant),
        dense_ns=round(dense),
    )


def _nonnegative(causes: FloatArray, target: FloatArray) -> FloatArray:
    """Return the non-negative least-squares solution of ``causes @ x = target``.

    The active-set method of Lawson and Hanson (1974).

    Args:
        causes: ``(num_rows, num_columns)``.
        target: ``(num_rows,)``.
    """
    norms = np.linalg.norm(causes, axis=0)
    scaled = causes / np.where(norms > 0, norms, 1)
    found, free = np.zeros(len(norms)), norms < 0
    for _ in range(3 * len(norms)):
        gradient = np.where(free, -np.inf, scaled.T @ (target - scaled @ found))
        if gradient.max() <= 1e-12 * len(target):
            break
        free[gradient.argmax()] = True
        while free.any():
            trial = np.zeros_like(found)
            trial[free], *_ = np.linalg.lstsq(scaled[:, free], target)
            bad = free & (trial <= 0)
            if not bad.any():
                found = trial
                break
            step = (found[bad] / (found[bad] - trial[bad])).min()
            found = found + step * (trial - found)
            free &= found > 1e-15
            found[~free] = 0
    solution: FloatArray = found / np.where(norms > 0, norms, 1)
    return solution
