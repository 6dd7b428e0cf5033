"""The proof that extraction is exact, carried out on a randomised copy of the network.

The extracted network must compute what the dense one does when the weights that read the removed
channels are zero. A fresh batch norm (mean 0, variance 1, scale 1, shift 0) would hide wrong
indices, so statistics and affine parameters are drawn at random first. Float64 separates a wrong
index from rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fppmo_ray.distribution.space import BoolArray
from fppmo_ray.pruning.conditions import (
    Choices,
    Conditions,
    Inputs,
    Operations,
    cast,
    cast_network,
    eager,
    find_conditions,
    is_real,
    must_run,
    shortened,
)
from fppmo_ray.pruning.copying import copy_network, with_plain_weights
from fppmo_ray.pruning.costs import run_and_count
from fppmo_ray.pruning.extract import Tracing, extract
from fppmo_ray.pruning.network_io import (
    FORWARD_ERRORS,
    ExampleInputs,
    checked,
    opened,
)
from fppmo_ray.pruning.noise import even_noise
from fppmo_ray.pruning.twin import random_mask, randomise, relative_error, zeroed_consumers
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
    network = copy_network(with_plain_weights(opened(model))).cpu()
    with eager():
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            conditions = find_conditions(
                network, checked(example_inputs), lambda inputs: network(*inputs)
            )
        masks = None if keep is None else [keep]
        reason = Proof(network, conditions).disagreement(tracing, masks)
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
    operations on these, else in the given size. Whether a smaller network runs, also in training
    mode, and costs what the space says is tried in the given size and the network's own precision.

    Args:
        network: The network on the CPU, in its own precision.
        conditions: How it can be run.

    Raises:
        ValueError: the network does not run in eval mode.
    """

    def __init__(self, network: nn.Module, conditions: Conditions) -> None:
        self._network = network.eval()
        self._conditions = conditions
        self._attempt = 0
        self._telling: list[bool] = []
        self._sees_choices = False
        self.remark: str | None = None
        """What a user must know of the precision of the last comparison; None: it was float64."""
        self._choose_twin()
        randomise(self._twin)

    def _choose_twin(self) -> None:
        """Take float64 and short images if the network runs so, and find its lowest precision."""
        inputs = self._conditions.inputs
        short = self._short_inputs()
        sizes = [inputs] if short is None else [short, inputs]
        last: Exception = RuntimeError()
        for precision in (torch.float64, None):
            twin = copy_network(self._network)
            if precision is not None:
                cast_network(twin, precision)
            for given in sizes:
                self._twin = twin
                self._inputs = tuple(cast(t, precision) if precision else t for t in given)
                try:
                    with Operations() as operations:
                        _answers(twin, self._first(self._inputs))
                except FORWARD_ERRORS as error:
                    last = error
                else:
                    known = [kind for kind in _TOLERANCES if kind in operations.precisions]
                    self._lowest = max(known, key=_TOLERANCES.__getitem__, default=torch.float64)
                    return
        with must_run(inputs):
            raise last

    def _short_inputs(self) -> Inputs | None:
        """Crops of half the numbers or fewer on which the network performs the same operations."""
        inputs = self._conditions.inputs
        names: list[str] | None = None
        for pixels in _SHORT:
            short = shortened(inputs, pixels)
            if 2 * sum(map(Tensor.numel, short)) > sum(map(Tensor.numel, inputs)):
                continue  # not worth it
            try:
                performed = self._operations(short)
            except FORWARD_ERRORS:
                continue
            names = names or self._operations(inputs)
            if performed == names:
                return short
        return None

    def _operations(self, inputs: Inputs) -> list[str]:
        """Names of the operations that the network performs on the first of a batch of inputs."""
        with Operations() as operations:
            _answers(self._network, self._first(inputs))
        names: list[str] = operations.names
        return names

    def _first(self, inputs: Inputs) -> Inputs:
        """The first of a batch of inputs, or all for a network that does not run on one."""
        pairs = zip(inputs, self._conditions.image, strict=True)
        return tuple(tensor[: len(image)] if image.dim() else tensor for tensor, image in pairs)

    def disagreement(
        self, tracing: Tracing, given: Sequence[BoolArray] | None = None
    ) -> str | None:
        """Return how extracted networks differ from the masked dense one; None if they agree.

        Outputs that are the same for several masks prove nothing. For these, the comparison is
        repeated with other signs of the filters and other batch norms. If none differs, what is
        compared, sorted or rounded to integers on the way is compared, too.

        Args:
            tracing: The tracing to prove.
            given: The masks to try; None: two random ones.
        """
        rng = np.random.default_rng(0)
        masks = given or [random_mask(tracing.space, rng) for _ in range(_NUM_MASKS)]
        for index, keep in enumerate(masks):
            reason = self._misfit(tracing, keep, trains=index == 0)
            if reason is not None:
                return reason
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

    @torch.no_grad()
    def _misfit(self, tracing: Tracing, keep: BoolArray, *, trains: bool) -> str | None:
        """How a smaller network does not run or train, or costs other than the space says."""
        # Our own steps stay outside: their exceptions are bugs, not properties of the network.
        smaller = extract(self._network, tracing, keep)
        macs = tracing.space.macs(keep)
        try:
            with even_noise():
                _, counted = run_and_count(smaller, self._conditions.image)
                if macs != counted:
                    return f"it has {counted} MACs instead of {macs}"
                # Heads that only train must fit too.
                if trains and self._conditions.training_error is None:
                    smaller.train()(*self._conditions.inputs)
        except FORWARD_ERRORS as error:
            return _raises(error)
        return None

    def _difference(
        self, tracing: Tracing, masks: Sequence[BoolArray]
    ) -> tuple[str | None, list[bool]]:
        """How outputs differ from the dense network's, and which of them depend on the mask."""
        # A second comparison, at other widths, need not show again that images do not mix.
        inputs = self._first(self._inputs) if self._telling else self._inputs
        expected: list[list[Tensor]] = []
        for keep in masks:
            smaller = extract(self._twin, tracing, keep)
            with zeroed_consumers(self._twin, tracing, keep):
                dense, chosen = self._answers(self._twin, inputs)
            try:
                outputs, operands = self._answers(smaller, inputs)
            except FORWARD_ERRORS as error:
                return _raises(error), []
            if len(chosen) == len(operands):
                pairs = [_comparable(*pair) for pair in zip(operands, chosen, strict=True)]
                outputs += [one for one, _ in pairs]
                dense += [other for _, other in pairs]
            expected.append(dense)
            reason = self._deviation(outputs, dense)
            if reason is not None:
                return reason, []
        shows = _SHOWS * _TOLERANCES[self._lowest]
        return None, [
            is_real(one) and one.shape == other.shape and relative_error(one, other) > shows
            for one, other in zip(expected[0], expected[-1], strict=False)
        ]

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
    def _answers(self, network: nn.Module, inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
        """All outputs, and what integers and booleans were made of if outputs do not suffice."""
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


_EMPTY = torch.empty(0)
_NOTHING = (
    "none of its outputs changes when filters are removed, which proves nothing; return what the "
    "outputs are computed from, such as logits"
)


def _raises(error: BaseException) -> str:
    return f"the smaller network raises {type(error).__name__}: {error}".splitlines()[0]
