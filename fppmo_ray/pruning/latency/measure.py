"""The latency table of a network: measured, fitted and checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from fppmo_ray.distribution.costs import BoolArray, FloatArray, IntArray, as_products
from fppmo_ray.distribution.latency_table import FS_PER_NS, LatencyTable, LayerLatency, monotone
from fppmo_ray.distribution.space import PruningSpace
from fppmo_ray.pruning.extract import Tracing, extract
from fppmo_ray.pruning.latency.timing import Call, TimedLayer, seconds_in_turns, timed_layers
from fppmo_ray.training.device import device_module

_SPREAD = 0.25


def mask_at(space: PruningSpace, level: float | FloatArray) -> BoolArray:
    """Return a mask whose widths lie between the smallest legal (0) and the dense ones (1).

    Which filters are kept does not matter for latency; it keeps the first ones of each group.

    Args:
        space: The space of the mask.
        level: In [0, 1], one number for all groups or ``(num_groups,)``.
    """
    smallest, dense = space.min_widths, space.dense_widths
    multiples = np.array([group.multiple for group in space.groups])
    wanted = smallest + level * (dense - smallest)
    legal = np.clip(np.rint(wanted / multiples) * multiples, smallest, dense).astype(np.int64)
    widths: IntArray = np.where(wanted == dense, dense, legal)
    rank = np.arange(space.num_filters) - space.offsets[space.group_of]
    keep: BoolArray = rank < widths[space.group_of]
    return keep


def random_masks(space: PruningSpace, count: int, rng: np.random.Generator) -> list[BoolArray]:
    """Return masks from nearly dense to nearly smallest, with uneven widths, in random order.

    Args:
        space: The space of the masks.
        count: Number of masks.
        rng: Source of the widths and the order.
    """
    base = (np.arange(count) + rng.random(count)) / count
    noise = _SPREAD * rng.standard_normal((count, len(space.groups)))
    levels = np.clip(base[:, None] + noise, 0, 1)
    return [mask_at(space, level) for level in rng.permutation(levels)]


_LEVELS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # from the smallest legal widths to the dense ones
_FITTED, _CHECKED = 12, 8  # whole networks at random masks
_NS = 1e9


@dataclass(frozen=True, kw_only=True)
class TimedMask:
    """The measured and the predicted latency of a mask's network."""

    measured_ns: int
    """Nanoseconds per pass, as measured."""
    predicted_ns: int
    """Nanoseconds per pass, from the table."""

    @property
    def error(self) -> float:
        """Relative error of the prediction, >= 0."""
        return abs(self.predicted_ns / self.measured_ns - 1)


@dataclass(frozen=True, kw_only=True)
class MeasuredLatency:
    """A latency table, with its error on networks that it was not fitted to."""

    table: LatencyTable
    """The fitted table."""
    checks: tuple[TimedMask, ...]
    """Networks that were timed to check the table."""
    device: str
    """Model name of the GPU, or ``cpu``."""

    @property
    def median_error(self) -> float:
        """Median relative error of the checks."""
        return median(check.error for check in self.checks)


@torch.no_grad()
def measure_latency_table(
    network: nn.Module, tracing: Tracing, inputs: tuple[Tensor, ...], *, batch: int, seed: int
) -> MeasuredLatency:
    """Measure a network's latency as a function of its widths, on the network's device.

    Args:
        network: The dense network, in eval mode.
        tracing: What ``trace`` returned for it.
        inputs: Arguments of its forward for one image ``(1, ...)``, on the network's device, which
            should be idle.
        batch: Images per pass, at least 1.
        seed: Random seed of the masks whose networks are timed, >= 0.
    """
    space, device = tracing.space, inputs[0].device
    # 1. Time every layer alone, at a grid of output and input widths.
    layers = timed_layers(network, tracing, repeated(inputs, batch))
    latencies = _layer_latencies(layers, space, device)
    # 2. Time whole networks: dense, smallest and random masks.
    random = random_masks(space, _FITTED + _CHECKED, np.random.default_rng(seed))
    masks = [mask_at(space, 1.0), mask_at(space, 0.0), *random]
    measured = time_masks(network, tracing, inputs, masks, batch=batch)
    widths = [space.widths(keep) for keep in masks]
    # 3. Fit the table to some of the networks, and compare its predictions with the others.
    fitted = len(masks) - _CHECKED
    table = fit_table(space, latencies, widths[:fitted], measured[:fitted])
    return MeasuredLatency(
        table=table,
        checks=tuple(
            TimedMask(measured_ns=ns, predicted_ns=table.total(at))
            for ns, at in zip(measured[fitted:], widths[fitted:], strict=True)
        ),
        device=_name(device),
    )


@torch.no_grad()
def time_masks(
    network: nn.Module,
    tracing: Tracing,
    inputs: tuple[Tensor, ...],
    masks: Sequence[BoolArray],
    *,
    batch: int,
) -> list[int]:
    """Return the nanoseconds of a pass of each mask's network.

    Args:
        network: The dense network, in eval mode.
        tracing: What ``trace`` returned for it.
        inputs: Arguments of its forward for one image ``(1, ...)``, on the network's device.
        masks: The masks, each bool ``(num_filters,)``.
        batch: Images per pass, at least 1.
    """
    images = repeated(inputs, batch)

    def maker(keep: BoolArray) -> Callable[[], Call]:
        def make() -> Call:
            smaller = extract(network, tracing, keep)
            return lambda: smaller(*images)

        return make

    seconds = seconds_in_turns([maker(keep) for keep in masks], inputs[0].device)
    return [round(_NS * of_one) for of_one in seconds]


def repeated(inputs: tuple[Tensor, ...], batch: int) -> tuple[Tensor, ...]:
    """Return inputs for a batch that repeats one image.

    Args:
        inputs: Arguments for one image, each ``(1, ...)``.
        batch: Length of the batch axis.
    """
    return tuple(tensor.repeat(batch, *[1] * (tensor.dim() - 1)) for tensor in inputs)


def _name(device: torch.device) -> str:
    on_cpu = device.type == "cpu"
    return "cpu" if on_cpu else str(device_module(device).get_device_name(device))


def _layer_latencies(
    layers: Sequence[TimedLayer], space: PruningSpace, device: torch.device
) -> list[LayerLatency]:
    """Latencies of all layers; equal layers at equal widths are measured once."""
    masks = [mask_at(space, level) for level in _LEVELS]
    grids = {layer.name: _Grid.of(layer, masks) for layer in layers}
    alike = {(layer.kind, *grids[layer.name].points): layer for layer in layers}
    makers = [
        layer.at(out_keep, in_keep)
        for layer in alike.values()
        for out_keep, in_keep in product(*grids[layer.name].keeps)
    ]
    seconds = iter(seconds_in_turns(makers, device))
    times = {}
    for key in alike:
        _, out_points, in_points = key
        times[key] = [[next(seconds) for _ in in_points] for _ in out_points]
    return [
        _latency(layer, grids[layer.name], times[layer.kind, *grids[layer.name].points])
        for layer in layers
    ]


@dataclass(frozen=True, eq=False)
class _Grid:
    """The widths at which a layer is timed, and masks that have them; outputs, then inputs."""

    points: tuple[tuple[int, ...], tuple[int, ...]]
    """Output widths and input widths, each ascending."""
    keeps: tuple[list[BoolArray], list[BoolArray]]
    """For each of these widths, a mask that gives it to the layer."""

    @classmethod
    def of(cls, layer: TimedLayer, masks: Sequence[BoolArray]) -> _Grid:
        """Return the grid of a layer, each width once.

        Args:
            layer: The layer to time.
            masks: Masks in ascending order of all widths.
        """
        out = {layer.width("output", keep): keep for keep in masks}
        read = {layer.width("input", keep): keep for keep in masks}
        return cls((tuple(out), tuple(read)), ([*out.values()], [*read.values()]))


def _latency(layer: TimedLayer, grid: _Grid, seconds: list[list[float]]) -> LayerLatency:
    ns: FloatArray = _NS * monotone(np.array(seconds))
    out_points, in_points = grid.points
    return LayerLatency(
        layer=layer.name,
        out_width=layer.out_width,
        in_width=layer.in_width,
        out_points=out_points,
        in_points=in_points,
        ns=tuple(map(tuple, np.rint(ns).astype(np.int64).tolist())),
    )


def fit_table(
    space: PruningSpace,
    layers: Sequence[LayerLatency],
    widths: Sequence[IntArray],
    measured_ns: Sequence[int],
) -> LatencyTable:
    """Fit a latency table to whole networks, starting from layers that were timed alone.

    The model is ``factor * sum of layers + time per byte * bytes written + constant``. The factor
    accounts for caches, which hold other data within a network. None of the three coefficients is
    negative, so the table never falls as widths rise. The relative error is minimised.

    Args:
        space: The space of the networks; its activations are the bytes written.
        layers: Latencies of the layers alone.
        widths: Kept filters per group of each network, ``(num_groups,)``; the dense network first.
        measured_ns: Nanoseconds per pass of each network.
    """
    assert space.activations is not None  # trace() sets them
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
    # Dividing every row by its measurement makes the target 1, so residuals are relative errors.
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
    """Non-negative coefficients ``(num_causes,)`` with which the rows sum to 1 most closely.

    The best non-negative solution is the unconstrained one on some subset of the causes. There are
    three causes, so all subsets are tried.
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
