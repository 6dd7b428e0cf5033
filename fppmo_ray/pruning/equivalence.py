"""The proof that extraction is exact, carried out on a randomised copy of the network.

The extracted network must compute what the dense one does when the weights that read the removed
channels are zero. A fresh batch norm (mean 0, variance 1, scale 1, shift 0) would hide wrong
indices, so statistics and affine parameters are drawn at random first. Float64 separates a wrong
index from rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from fppmo_ray.distribution.space import BoolArray, IntArray
from fppmo_ray.pruning.cast_on_use import READ_BY, CastOnUse, Zeroed, castable_weights
from fppmo_ray.pruning.conditions import (
    Choices,
    Conditions,
    Inputs,
    cast,
    eager,
    find_conditions,
    must_run,
    shortened,
)
from fppmo_ray.pruning.copying import WorkingCopy, with_plain_weights
from fppmo_ray.pruning.dry_runs import DryRuns, raises, sharing_extract
from fppmo_ray.pruning.extract import Tracing
from fppmo_ray.pruning.network_io import (
    FORWARD_ERRORS,
    ExampleInputs,
    checked,
    opened,
)
from fppmo_ray.pruning.noise import even_noise
from fppmo_ray.pruning.operations import are_alike, is_real
from fppmo_ray.pruning.shape_only import is_large
from fppmo_ray.pruning.twin import (
    cast_copy,
    mask_of_widths,
    random_mask,
    randomise,
    relative_error,
    zeroed_consumers,
)
from fppmo_ray.training.outputs import flat_tensors

_TOLERANCES = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 0.02,
    torch.bfloat16: 0.1,
}
"""Largest allowed error, relative to the largest magnitude of an output, by the lowest precision
in which the network computes: some hundred times what rounding leaves, or less for halves."""
_SHOWS = 4
"""An output depends on the removed filters if it changes by so many times the tolerance."""
_NUM_MASKS = 2
_ATTEMPTS = 6
_SHORT = (64, 96)  # pixels: two or three in the last stage of most networks, which divide by 32


def check_equivalence(
    model: nn.Module,
    tracing: Tracing,
    example_inputs: ExampleInputs,
    *,
    keep: BoolArray | None = None,
) -> None:
    """Check that extraction is exact, on one mask or on two random ones.

    The outputs must agree to 1e-9 in float64 with those of the dense network whose consumers have
    zero weights for the removed channels, and the MACs must be those of the space. A network that
    computes in a lower precision, whatever that of its weights, is compared to 1e-4 (float32).

    Args:
        model: The traced network; not changed.
        tracing: What ``trace`` returned for it.
        example_inputs: As for ``trace``.
        keep: The mask to check, bool ``(num_filters,)``; None: two random masks.

    Raises:
        ValueError: extraction is not exact; the message says how the networks differ.
    """
    copy = WorkingCopy(with_plain_weights(opened(model)))
    with eager():
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            conditions = find_conditions(
                copy.network, checked(example_inputs), lambda inputs: copy.network(*inputs)
            )
        masks = None if keep is None else [keep]
        reason = Proof(copy, conditions).disagreement(tracing, masks)
    if reason is None:
        return
    if keep is None:
        raise ValueError(f"extraction is not exact for this network: {reason}; trace it again")
    raise ValueError(
        "the smaller network of this mask computes something else than the dense one without the "
        f"removed filters: {reason}; its code seems to decide by widths: exclude the layers of "
        "these widths by `ignore`, or take another mask"
    )


class Proof:
    """Compares extracted networks with the dense one, on a randomised copy of it.

    The numbers are compared on images of 64 or 96 pixels if the network performs the same
    operations on these, else in the given size. ``DryRuns`` tries whether a smaller network runs,
    and what it costs, in the given size.

    Args:
        copy: Of the network, in its own precision.
        conditions: How it can be run.

    Raises:
        ValueError: the network does not run in eval mode.
    """

    def __init__(self, copy: WorkingCopy, conditions: Conditions) -> None:
        self._dry = DryRuns(copy, conditions)
        self._network = copy.original
        self._attempt = 0
        self._telling: list[bool] = []
        self._sees_choices = False
        self._proven: list[tuple[BoolArray, nn.Module]] = []
        self._proven_axes: object = None
        self._is_large = is_large(self._network, conditions.image)
        self.remark: str | None = None
        """What a user must know of the precision of the last comparison; None: it was float64."""
        self._choose_twin(conditions.inputs)
        randomise(self._twin.eval())

    def _choose_twin(self, inputs: Inputs) -> None:
        """Take float64 and short images if the network runs so, and find its lowest precision."""
        found = castable_weights(self._network)
        shared = [found[name] for name in found.keys() - self._dry.dense.read_otherwise(READ_BY)]
        kinds: list[tuple[torch.dtype | None, list[nn.Parameter]]]
        kinds = [(torch.float64, shared)] if shared else []
        last: Exception | None = None
        for precision, borrowed in (*kinds, (torch.float64, []), (None, [])):
            self._twin = cast_copy(self._network, precision, borrowed)
            self._cast = CastOnUse() if borrowed else None
            last = self._choose_size(inputs, precision)
            if last is None and (not borrowed or self._lowest == torch.float64):
                return
        with must_run(inputs):
            raise last or RuntimeError("the network could not be followed")

    def _choose_size(self, inputs: Inputs, precision: torch.dtype | None) -> Exception | None:
        """Take the shortest images on which the twin runs; what it raises if there are none."""
        sizes = [shortened(inputs, pixels) for pixels in _SHORT]
        size = sum(map(Tensor.numel, inputs))
        sizes = [s for s in sizes if 2 * sum(map(Tensor.numel, s)) <= size]  # else not worth it
        last: Exception | None = None
        for given in (*sizes, inputs):
            self._inputs = tuple(cast(t, precision) if precision else t for t in given)
            # In the given size precisions count alone, which one image shows.
            tried = self._dry.first(self._inputs) if given is inputs else self._inputs
            try:
                performed, _ = self._dry.performed(self._twin, tried, self._cast)
                names = [performed.names]
                if given is not inputs and self._dry.dense.names not in names:  # it casts
                    names.append(self._dry.performed(None, given)[0].names)
            except FORWARD_ERRORS as error:
                last = error
                continue
            if given is inputs or self._dry.dense.names in names:
                known = [kind for kind in _TOLERANCES if kind in performed.precisions]
                self._lowest = max(known, key=_TOLERANCES.__getitem__, default=torch.float64)
                return None
        return last

    @property
    def asks_in(self) -> str | None:
        """Where the network's code first turns a tensor into a Python number; None: nowhere."""
        return self._dry.dense.asks_in

    def disagreement(
        self,
        tracing: Tracing,
        given: Sequence[BoolArray] | None = None,
        *,
        by_operations: bool = False,
    ) -> str | None:
        """Return how extracted networks differ from the masked dense one; None if they agree.

        Outputs that are the same for several masks prove nothing. For these, the comparison is
        repeated with other signs of the filters and other batch norms. If none differs, what is
        compared, sorted or rounded to integers on the way is compared, too.

        Args:
            tracing: The tracing to prove.
            given: The masks to try; None: two random ones.
            by_operations: Whether networks that perform the dense network's operations, one by one,
                need no numbers, since others of these groups have been proven by numbers.
        """
        reason = self._disagreement(tracing, given, by_operations)
        if reason is None or self.asks_in is None:
            return reason
        return (
            f"{reason}; the network's code asks for values of tensors ({self.asks_in}), so other "
            "modules may run without these filters: name them and the layers before in `ignore`"
        )

    def _disagreement(
        self, tracing: Tracing, given: Sequence[BoolArray] | None, by_operations: bool
    ) -> str | None:
        rng = np.random.default_rng(0)
        masks = given or [random_mask(tracing.space, rng) for _ in range(_NUM_MASKS)]
        axes = [(part.tensor, part.axis, part.units.tobytes()) for part in tracing.slices]
        if axes != self._proven_axes:
            self._proven, self._proven_axes = [], axes
        are_same = by_operations
        for index, keep in enumerate(masks):
            if index == 0 or by_operations or given is None:
                reason, performed = self._dry.misfit(tracing, keep, trains=index == 0)
                if reason is not None:
                    return reason
                are_same = are_same and are_alike(self._dry.dense, performed)
        if are_same:
            return None
        reason = self._no_proof(tracing, masks)
        if reason == _NOTHING and not self._sees_choices:
            self._sees_choices, self._telling = True, []
            reason = self._no_proof(tracing, masks)
        return reason

    def _no_proof(self, tracing: Tracing, masks: Sequence[BoolArray]) -> str | None:
        """Why outputs do not prove that smaller networks are right; None if they do."""
        telling: list[bool] = []
        for attempt in range(_ATTEMPTS):
            if attempt > 0:
                self._attempt += 1
                self._proven = []
                self._own_weights()
                randomise(self._twin, self._attempt)
            reason, shown = self._difference(tracing, masks)
            if reason is not None or len(masks) == 1:
                return reason
            # Fewer images may have fewer outputs.
            telling = [one or other for one, other in zip(telling or shown, shown, strict=False)]
            # An output that never depends on a filter, such as a loss of 0, is given up early.
            expected = [*self._telling, *[True] * len(telling)]
            if all(t or not e for t, e in zip(telling, expected, strict=False)) or (
                any(telling) and attempt >= 2
            ):
                self._telling = telling
                return None
        return _NOTHING

    def _own_weights(self) -> None:
        """Give the twin weights of its own, which may be drawn."""
        if self._cast is not None:
            self._twin, self._cast = cast_copy(self._network, torch.float64).eval(), None
            randomise(self._twin)

    def _difference(
        self, tracing: Tracing, masks: Sequence[BoolArray]
    ) -> tuple[str | None, list[bool]]:
        """How outputs differ from the dense network's, and which of them depend on the mask."""
        expected: list[list[Tensor]] = []
        for index, keep in enumerate(masks):
            inputs = self._batch(masks, index)
            smaller = sharing_extract(self._twin, tracing, keep)
            # Smaller networks have been proven on single images only.
            within, larger = (None, self._twin) if inputs is self._inputs else self._larger(keep)
            with zeroed_consumers(larger, tracing, keep, within, casts=bool(self._cast)) as zeroed:
                dense, chosen = self._answers(larger, inputs, zeroed)
            try:
                outputs, operands = self._answers(smaller, inputs)
            except FORWARD_ERRORS as error:
                return raises(error), []
            if len(chosen) == len(operands):
                pairs = [_comparable(*pair) for pair in zip(operands, chosen, strict=True)]
                outputs += [one for one, _ in pairs]
                dense += [other for _, other in pairs]
            expected.append(dense)
            reason = self._deviation(outputs, dense)
            if reason is not None:
                return reason, []
            if self._is_large and len(masks) > 1:
                self._proven.append((keep, smaller))
                del self._proven[1:-1]  # each takes memory
        shows = _SHOWS * _TOLERANCES[self._lowest]
        return None, [
            is_real(one) and one.shape == other.shape and relative_error(one, other) > shows
            for one, other in map(_of_one_length, expected[0], expected[-1])
        ]

    def masks(
        self, tracing: Tracing, widths: Sequence[IntArray], rng: np.random.Generator
    ) -> list[BoolArray]:
        """Return a mask for every one of given widths.

        For a large network they lie in one another where they can, the widest first: a network that
        has been proven stands for the dense one in the proof of those that lie in its mask.

        Args:
            tracing: The tracing to prove.
            widths: Kept filters per group, each ``(num_groups,)``.
            rng: Source of randomness.
        """
        masks = [keep for keep, _ in self._proven[:1] if len(keep) == tracing.space.num_filters]
        if not masks:
            return [mask_of_widths(tracing.space, width, rng) for width in widths]
        for width in sorted(widths, key=lambda width: -int(width.sum())):
            masks.append(mask_of_widths(tracing.space, width, rng, *masks[-1:]))
        return masks[-len(widths) :]

    def _larger(self, keep: BoolArray) -> tuple[BoolArray | None, nn.Module]:
        """The smallest proven network that has all filters of a mask, with its own mask."""
        found = [one for one in self._proven if not (keep & ~one[0]).any()]
        return min(found, key=lambda one: int(one[0].sum()), default=(None, self._twin))

    def _batch(self, masks: Sequence[BoolArray], index: int) -> Inputs:
        """The inputs to compare on: two images if this shows that they do not mix, else one.

        Every proof ends with two images. A large network has them only at its smallest widths,
        which are tried last, and where a single mask is tried.
        """
        is_last, is_first_proof = index == len(masks) - 1, not self._telling
        if self._is_large:
            has_two = is_last and not (is_first_proof and len(masks) > 1)
        else:
            has_two = is_last or is_first_proof
        return self._inputs if has_two else self._dry.first(self._inputs)

    def _deviation(self, outputs: list[Tensor], expected: list[Tensor]) -> str | None:
        """How outputs are other than expected; None if they are equal but for rounding."""
        shapes = [tuple(output.shape) for output in outputs]
        if shapes != [tuple(output.shape) for output in expected]:
            return f"its outputs have other shapes: {shapes}"
        errors = [relative_error(*pair) for pair in zip(outputs, expected, strict=True)]
        worst = max((error if error == error else float("inf") for error in errors), default=0.0)
        if worst > _TOLERANCES[self._lowest]:
            return f"its output is off by {worst:.1e} of the largest value"
        if worst > _TOLERANCES[torch.float64]:
            self.remark = (
                f"the network computes in {str(self._lowest).removeprefix('torch.')} whatever the "
                f"precision of its weights, so extraction is proven to {worst:.0e} of the largest "
                "output only, and not to 1e-9"
            )
        return None

    @torch.no_grad()
    def _answers(
        self, network: nn.Module, inputs: Inputs, zeroed: Zeroed | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """All outputs, and what integers and booleans were made of if outputs do not suffice."""
        with nullcontext() if self._cast is None else self._cast.within(network, zeroed):
            if not self._sees_choices:
                return _answers(network, inputs), []
            with Choices() as choices:
                return _answers(network, inputs), choices.operands


@torch.no_grad()
def _answers(network: nn.Module, inputs: Inputs) -> list[Tensor]:
    with even_noise():
        return flat_tensors(network(*inputs))


def _comparable(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors, or empty ones where they have fewer channels than one another."""
    return (one, other) if one.shape == other.shape else (_EMPTY, _EMPTY)


def _of_one_length(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two outputs, of which one may be of two images and the other of the first of these."""
    if one.dim() == other.dim() > 0:
        length = min(len(one), len(other))
        return one[:length], other[:length]
    return one, other


_EMPTY = torch.empty(0)
_NOTHING = (
    "none of its outputs changes when filters are removed, which proves nothing; return what the "
    "outputs are computed from, such as logits"
)
