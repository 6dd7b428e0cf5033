"""The reconstruction: layer by layer, weights that make up for the error that has built up so far.

A refit knows the dense network's inputs alone. In a pruned network every layer also reads what the
layers before it got wrong. So in the order of the forward, every layer's weights get the correction
that takes its output nearest to the dense network's, by least squares on the inputs that it really
has (as in He et al. 2017, 1707.06168, section 3.2). Where its output is added to another branch,
the sum is compared, so that a block makes up for the error that its shortcut carries on.

With patches ``p`` of the layer's inputs, ``e`` the error of its output, and ``lambda`` a share of
the mean diagonal of ``cov(p, p)``, the correction of the weights is
``cov(e, p) (cov(p, p) + lambda)^-1``; it is chosen on images that it was not fitted on.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from fppmo_ray.distribution.space import BoolArray
from fppmo_ray.pruning.calibration.consumers import (
    input_patches,
    made_axis,
    output_rows,
    weight_matrix,
    write_matrix,
)
from fppmo_ray.pruning.calibration.grams import MIN_PATCHES, PATCHES_PER_COLUMN, full_precision
from fppmo_ray.pruning.calibration.layer_outputs import Place, Seen, each_layer, find_places
from fppmo_ray.pruning.extract import Tracing
from fppmo_ray.training.compute import in_mode
from fppmo_ray.training.device import copy_to

logger = logging.getLogger(__name__)

MAX_BYTES = 2 * 1024**3
"""Default memory for the dense network's outputs and one pass over all images together."""
_BATCH = 50
_PARTS = 5  # of which every fifth is held out to choose the ridge by
_RIDGES = 0.01, 0.1, 1.0, 10.0
_WIDE, _RIDGES_WHEN_WIDE = 1024, (0.1,)
"""Above so many columns a layer is solved once and in float32: the time grows with their cube, and
four solutions for 4,608 columns in float64 take about 15 s of a core."""
_FEWEST_IMAGES = 10
_BYTES = 4  # of a number in float32


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerTargets:
    """What the dense network's layers answer to a few images."""

    places: tuple[Place, ...]
    """The layers, in the order of the forward."""
    rows: dict[str, list[Tensor]]
    """By layer, and for each batch of images: compared outputs at some positions, ``(patches,
    outputs)``."""
    wanted: dict[str, float]
    """By layer: about so many patches of each image are used."""
    batches: tuple[tuple[Tensor, ...], ...]
    """The images: for each batch, the forward's inputs."""


@torch.no_grad()
def layer_targets(
    dense: nn.Module,
    tracing: Tracing,
    images: Sequence[Tensor],
    *,
    max_bytes: int = MAX_BYTES,
) -> LayerTargets | None:
    """Return the outputs of all layers of the dense network for a few images.

    Args:
        dense: The traced network.
        tracing: Its tracing.
        images: The forward's inputs, each (n, ...), on the network's device. A hundred give a
            result, a thousand a better one.
        max_bytes: Memory that this and ``reconstruct`` may take; more images than fit are not used.

    Returns:
        The outputs; None where the memory does not hold those of ten images, or there are fewer.
    """
    few = [tensor[:2] for tensor in images]
    found = [p for p in find_places(dense, few) if _is_known(dense, tracing, p, max_bytes)]
    sizes = _sizes(dense, found, few)
    places = [place for place in found if place.layer in sizes]
    num_images = _affordable(dense, sizes, len(images[0]), max_bytes)
    if num_images < _FEWEST_IMAGES or not places:
        return None
    size = min(_BATCH, num_images // _PARTS)  # so that there are at least as many batches
    batches = tuple(zip(*(torch.split(t[:num_images], size) for t in images), strict=True))
    wanted = {
        place.layer: _num_wanted(dense.get_submodule(place.layer)) / num_images for place in places
    }
    targets = LayerTargets(
        places=tuple(places),
        rows={place.layer: [] for place in places},
        wanted=wanted,
        batches=batches,
    )
    for index, batch in enumerate(batches):

        def note(place: Place, seen: Seen, batch: Any = batch, index: int = index) -> None:
            layer, wanted = dense.get_submodule(place.layer), targets.wanted[place.layer]
            count = math.ceil(wanted * len(batch[0]))
            targets.rows[place.layer].append(output_rows(layer, seen.compared, count, index))

        with in_mode(dense, training=False), each_layer(dense, places, note), full_precision():
            dense(*batch)
    return targets


@torch.no_grad()
def reconstruct(
    pruned: nn.Module, tracing: Tracing, keep: BoolArray, targets: LayerTargets
) -> None:
    """Correct, in place, the layers of a pruned network one after the other.

    A correction that does not bring the layer nearer to the dense one on images that it was not
    fitted on is not made. Batch norms end with the statistics of these images, so they need no
    recalibration afterwards.

    Args:
        pruned: ``extract(dense, tracing, keep)``, refitted and recalibrated.
        tracing: The dense network's tracing.
        keep: The mask, ``(num_filters,)``, True = kept.
        targets: The dense network's outputs, from ``layer_targets``.
    """
    kept = tracing.kept_indices(keep)
    sizes = [len(batch[0]) for batch in targets.batches]

    def correct(place: Place, seen: Seen) -> Tensor | None:
        layer: Any = pruned.get_submodule(place.layer)
        norm: Any = None if place.norm is None else pruned.get_submodule(place.norm)
        outputs = kept.get((f"{place.layer}.weight", made_axis(layer)))
        fit, held_out = _Moments(), _Moments()
        for index, (rows, inputs, output, compared) in enumerate(
            zip(
                targets.rows[place.layer],
                *(torch.split(t, sizes) for t in (seen.inputs, seen.output, seen.compared)),
                strict=True,
            )
        ):
            count = math.ceil(targets.wanted[place.layer] * sizes[index])
            if outputs is not None:
                rows = rows[:, copy_to(rows.device, torch.from_numpy(outputs))]
            wrong = rows - output_rows(layer, compared, count, index)
            part = held_out if index % _PARTS == _PARTS - 1 else fit
            part.add(input_patches(layer, inputs, output, count, index), wrong)
        has_offset = norm is not None or layer.bias is not None
        found = _correction(fit, held_out, has_offset=has_offset)
        if found is None:
            return None
        if norm is None:
            _add_to_layer(layer, *found)
            again: Tensor = layer(seen.inputs)
            return again
        _add_through_norm(layer, norm, *found, moments=fit)
        normed: Tensor = norm(layer(seen.inputs))
        return normed

    with (
        in_mode(pruned, training=False),
        each_layer(pruned, targets.places, correct, _recalibrate),
        full_precision(),
    ):
        pruned(*(torch.cat(parts) for parts in zip(*targets.batches, strict=True)))


@dataclass(eq=False)
class _Moments:
    """Sums over patches, each for all groups of a convolution: (groups, ...)."""

    count: int = 0
    patches: Any = 0.0
    """Sum of the patches, (groups, columns)."""
    wrong: Any = 0.0
    """Sum of the errors, (groups, outputs per group)."""
    gram: Any = 0.0
    """Sum of products of patches, (groups, columns, columns)."""
    cross: Any = 0.0
    """Sum of products of patches and errors, (groups, columns, outputs per group)."""

    def add(self, patches: Tensor, wrong: Tensor) -> None:
        """Add the patches of some images, and the errors of the outputs at their positions.

        Args:
            patches: (n, groups, columns).
            wrong: The dense network's outputs minus the pruned one's, (n, outputs).
        """
        if patches.dtype not in (torch.float32, torch.float64):
            patches, wrong = patches.float(), wrong.float()
        patches = patches.transpose(0, 1)
        errors = torch.unflatten(wrong, 1, (len(patches), -1)).transpose(0, 1)
        self.count += patches.shape[1]
        self.patches = self.patches + patches.sum(1, dtype=torch.float64)
        self.wrong = self.wrong + errors.sum(1, dtype=torch.float64)
        self.gram = self.gram + (patches.mT @ patches).double()
        self.cross = self.cross + (patches.mT @ errors).double()

    def means(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the four sums divided by the number of patches."""
        patches, wrong, gram, cross = (
            total / self.count for total in (self.patches, self.wrong, self.gram, self.cross)
        )
        return patches, wrong, gram, cross


def _correction(
    fit: _Moments, held_out: _Moments, *, has_offset: bool
) -> tuple[Tensor, Tensor] | None:
    """Return what to add to weights (groups, columns, outputs) and offsets (groups, outputs).

    Among several ridges, the one whose correction leaves the smallest squared error on the held-out
    images; None where none leaves less than no correction does.
    """
    patch, wrong, gram, cross = fit.means()
    is_finite = torch.isfinite(cross).all()
    if has_offset:
        gram = gram - patch[:, :, None] * patch[:, None, :]
        cross = cross - patch[:, :, None] * wrong[:, None, :]
    unseen = held_out.means()
    scale = gram.diagonal(dim1=1, dim2=2).mean(1)
    least, best = torch.zeros_like(scale[0]), (torch.zeros_like(cross), torch.zeros_like(wrong))
    is_wide = gram.shape[2] > _WIDE
    for ridge in _RIDGES_WHEN_WIDE if is_wide else _RIDGES:
        damped = gram.clone()
        # An input that is 0 everywhere says nothing; any positive number makes it invertible.
        damped.diagonal(dim1=1, dim2=2).add_(torch.where(scale > 0, ridge * scale, 1.0)[:, None])
        # Without a check, for which a GPU would have to be waited: a failure's change is NaN.
        solved = torch.float32 if is_wide else torch.float64
        factor = torch.linalg.cholesky_ex(damped.to(solved)).L
        weights = torch.cholesky_solve(cross.to(solved), factor).double()
        offset = torch.zeros_like(wrong)
        if has_offset:
            offset = wrong - (patch[:, None, :] @ weights)[:, 0]
        change = _change_of_error(unseen, weights, offset)
        is_better = change < least
        least = torch.where(is_better, change, least)
        found = zip((weights, offset), best, strict=True)
        weights, offset = (torch.where(is_better, new, old) for new, old in found)
        best = weights, offset
    change_of_best = float(torch.where(is_finite, least, torch.nan))  # the layer's only wait
    if math.isnan(change_of_best):
        raise ValueError(
            "a pruned network's activations are not finite on the given images; check the images, "
            "and the network's weights"
        )
    return best if change_of_best < 0 else None


def _change_of_error(
    means: tuple[Tensor, Tensor, Tensor, Tensor], weights: Tensor, offset: Tensor
) -> Tensor:
    """Return by how much a correction changes the mean squared error of the held-out images.

    ``E |e - W p - b|^2 - E |e|^2``, summed over groups and outputs.
    """
    patch, wrong, gram, cross = means
    predicted = (patch[:, None, :] @ weights)[:, 0]  # E[W p]
    change = (weights * (gram @ weights)).sum() - 2 * (weights * cross).sum()
    return change + (offset * (2 * predicted + offset - 2 * wrong)).sum()


def _add_to_layer(layer: Any, weights: Tensor, offset: Tensor) -> None:
    write_matrix(layer, weight_matrix(layer) + weights.mT)
    if layer.bias is not None:
        layer.bias += offset.flatten().to(layer.bias.dtype)


def _add_through_norm(
    layer: Any, norm: Any, weights: Tensor, offset: Tensor, *, moments: _Moments
) -> None:
    """Add a correction of the norm's output to the layer before it and to the norm.

    The rows of the layer's weights keep their length, and the norm gets the new outputs'
    statistics, so that a training starts as it would have started.
    """
    matrix = weight_matrix(layer)  # (groups, outputs, columns)
    # The norm in eval mode is z = scale y + shift of the layer's output y = W p + bias.
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    bias = 0.0 if layer.bias is None else layer.bias.double()
    shift = norm.bias.double() + scale * (bias - norm.running_mean.double())  # z = scale W p + ...
    wanted = matrix * scale.reshape(*matrix.shape[:2], 1) + weights.mT
    before, after = (m.norm(dim=2, keepdim=True) for m in (matrix, wanted))
    stretch = torch.where((before > 0) & (after > 0), after / before.clamp(min=1e-30), 1.0)
    rows = wanted / stretch
    # Statistics of y, from the moments of the patches.
    patch, _, gram, _ = moments.means()
    mean = (rows @ patch[:, :, None])[:, :, 0]
    second = (rows * (rows @ gram)).sum(2)
    var = (second - mean**2).clamp(min=0.0)
    write_matrix(layer, rows)
    norm.running_mean.copy_(mean.flatten() + bias)
    norm.running_var.copy_(var.flatten())
    new_scale = stretch[:, :, 0]
    norm.weight.copy_((new_scale * torch.sqrt(var + norm.eps)).flatten())
    norm.bias.copy_(shift + (offset + new_scale * mean).flatten())


def _recalibrate(norm: _BatchNorm, inputs: Tensor) -> None:
    """Give a batch norm that no layer's correction has set the statistics of its input."""
    if norm.running_mean is None or norm.running_var is None:
        return
    axes = [axis for axis in range(inputs.dim()) if axis != 1]
    var, mean = torch.var_mean(inputs.float(), axes)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)


def _is_known(dense: nn.Module, tracing: Tracing, place: Place, max_bytes: int) -> bool:
    """Whether a layer's outputs are found again in a pruned network, and its moments fit.

    Groups of transposed convolutions lose inputs and outputs in different ways. Sums of products
    take five matrices in float64; the widest linear layers of a VGG would need gigabytes for them.
    """
    layer: Any = dense.get_submodule(place.layer)
    groups, _, columns = weight_matrix(layer).shape
    if 5 * 8 * groups * columns**2 > max_bytes:
        return False
    name = f"{place.layer}.weight"
    is_grouped = isinstance(layer, _ConvTransposeNd) and groups > 1
    return not is_grouped or not {(name, 0), (name, 1)} & tracing.axis_lengths.keys()


def _num_wanted(layer: nn.Module) -> int:
    return max(PATCHES_PER_COLUMN * weight_matrix(layer).shape[2], MIN_PATCHES)


def _sizes(
    dense: nn.Module, places: Sequence[Place], few: Sequence[Tensor]
) -> dict[str, tuple[int, int]]:
    """Return positions and outputs of one image, by layer, where images come one after the other.

    Args:
        dense: The dense network.
        places: The layers.
        few: The forward's inputs for one or two images.
    """
    sizes: dict[str, tuple[int, int]] = {}

    def note(place: Place, seen: Seen) -> None:
        if len(seen.inputs) == len(seen.output) == len(few[0]):
            rows = output_rows(dense.get_submodule(place.layer), seen.output, None)
            sizes[place.layer] = len(rows) // len(few[0]), rows.shape[1]

    with in_mode(dense, training=False), each_layer(dense, places, note):
        dense(*few)
    return sizes


def _affordable(
    dense: nn.Module, sizes: Mapping[str, tuple[int, int]], num_images: int, max_bytes: int
) -> int:
    """Return how many images fit in the memory.

    Args:
        dense: The dense network.
        sizes: Positions and outputs of one image, by layer.
        num_images: Images that there are.
        max_bytes: The memory.
    """
    largest = max((positions * outputs for positions, outputs in sizes.values()), default=0)
    while num_images >= _FEWEST_IMAGES:
        rows = sum(
            min(_num_wanted(dense.get_submodule(name)), positions * num_images) * outputs
            for name, (positions, outputs) in sizes.items()
        )
        # A pass holds a layer's input and output, the sum, a shortcut, and copies of the last two.
        if _BYTES * (rows + 6 * largest * num_images) <= max_bytes:
            break
        num_images = num_images * 7 // 8
    return num_images
