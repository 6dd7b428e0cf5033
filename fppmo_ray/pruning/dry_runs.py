"""Whether smaller networks run and cost what the space says, and which operations they perform."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from fppmo_ray.distribution.space import BoolArray
from fppmo_ray.pruning.cast_on_use import CastOnUse
from fppmo_ray.pruning.conditions import Conditions, Inputs, must_run
from fppmo_ray.pruning.copying import WorkingCopy
from fppmo_ray.pruning.extract import Tracing, select
from fppmo_ray.pruning.network_io import FORWARD_ERRORS
from fppmo_ray.pruning.noise import even_noise
from fppmo_ray.pruning.operations import Operations, perform
from fppmo_ray.pruning.shape_only import ShapeOnly, is_large, worthwhile


class DryRuns:
    """Runs networks in the given size and precision; large ones without numbers, if they run so.

    Args:
        copy: Of the dense network, in its own precision.
        conditions: How it can be run.

    Raises:
        ValueError: it does not run.
    """

    def __init__(self, copy: WorkingCopy, conditions: Conditions) -> None:
        self._copy = copy
        self._conditions = conditions
        self._is_large = is_large(copy.original, conditions.image)
        spares = worthwhile(copy.original, conditions.image)
        self._shapes = ShapeOnly(copy.original) if spares else None
        with must_run(conditions.inputs):
            self.dense, self._dense_macs = self.performed(None, conditions.inputs)

    def performed(
        self, twin: nn.Module | None, inputs: Inputs, cast: CastOnUse | None = None
    ) -> tuple[Operations, int]:
        """Return the operations and MACs of the dense network, or of it in another precision.

        Args:
            twin: The network in another precision; None: in its own.
            inputs: A batch; of networks that are not large, the first of it is run.
            cast: Casts weights of the twin that do not have float64; None: there are none.
        """

        def run(network: nn.Module, given: Inputs) -> tuple[Operations, int]:
            with nullcontext() if cast is None else cast.within(network):
                return perform(network, given)

        given = inputs if self._is_large else self.first(inputs)
        if self._shapes is not None:
            shapes = self._shapes if twin is None else ShapeOnly(twin)
            found = shapes.attempt(lambda *fake: run(shapes.network.eval(), fake), given)
            if found is not None:
                return found
            if inputs is self._conditions.inputs:
                self._shapes = None  # it needs numbers
        return run(self._copy.network.eval() if twin is None else twin.eval(), given)

    def first(self, inputs: Inputs) -> Inputs:
        """Return the first of a batch of inputs, or all for a network that does not run on one."""
        pairs = zip(inputs, self._conditions.image, strict=True)
        return tuple(tensor[: len(image)] if image.dim() else tensor for tensor, image in pairs)

    @torch.no_grad()
    def misfit(
        self, tracing: Tracing, keep: BoolArray, *, trains: bool
    ) -> tuple[str | None, Operations | None]:
        """Return how a smaller network does not run, or costs other than the space says.

        Args:
            tracing: The tracing to try.
            keep: The mask.
            trains: Whether it is run in training mode, too, if the dense network runs so.

        Returns:
            The reason, None if there is none; and its operations, if it runs.
        """
        image, batch = self._conditions.image, self._conditions.inputs
        trains = trains and self._conditions.training_error is None
        # A pass of two images of a large network shows its costs, too, if these are twice as many.
        is_double = self._is_large and self._dense_macs == 2 * tracing.space.dense_macs
        macs = (2 if is_double else 1) * tracing.space.macs(keep)

        def performed(network: nn.Module, *inputs: Tensor) -> tuple[Operations, int]:
            single, double = inputs[: len(image)], inputs[len(image) :]
            operations, found = perform(network, double if is_double else single)
            if found == macs and self._is_large and not is_double:
                operations, _ = perform(network, double)
            if found == macs and trains:  # heads that only train must fit too
                with even_noise():
                    network.train()(*double)
            return operations, found

        # Our own steps stay outside: their exceptions are bugs, not properties of the network.
        inputs = (*image, *batch)
        if self._shapes is not None:
            shapes = sharing_extract(self._shapes.network, tracing, keep)
            found = self._shapes.attempt(partial(performed, shapes), inputs)
            if found is not None and found[1] == macs:
                return None, found[0]
        smaller = sharing_extract(self._copy.network.eval(), tracing, keep)
        try:
            operations, counted = performed(smaller, *inputs)
        except FORWARD_ERRORS as error:
            return raises(error), None
        is_right = counted == macs
        return None if is_right else f"it has {counted} MACs instead of {macs}", operations


def sharing_extract(network: nn.Module, tracing: Tracing, keep: BoolArray) -> nn.Module:
    """Return the smaller network of a mask, which shares the parameters that lose nothing.

    Args:
        network: The dense network.
        tracing: Its tracing.
        keep: The mask.
    """
    kept = tracing.kept_indices(keep)
    return select(network, kept, tracing.widths_of_numbers(keep), shares=True)


def raises(error: BaseException) -> str:
    """Return how a smaller network fails, in one line."""
    return f"the smaller network raises {type(error).__name__}: {error}".splitlines()[0]
