"""Training for some steps, which may pause between any two of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, count, islice
from typing import Any

from torch import nn

from fppmo_ray.training.checkpoints import TrainingState, capture, restore
from fppmo_ray.training.compute import PLAIN_COMPUTE, ComputeConfig, lay_out, replayed_cuda_graphs
from fppmo_ray.training.images import Batch, Images, Seed
from fppmo_ray.training.recipe import Recipe, learning_rate_at
from fppmo_ray.training.sgd import TorchGenerators, make_optimizer, train_on_batches


def train_steps(
    network: nn.Module,
    images: Images,
    recipe: Recipe,
    *,
    steps: int,
    seed: Seed,
    compute: ComputeConfig = PLAIN_COMPUTE,
    teacher: nn.Module | None = None,
) -> None:
    """Train for some steps, in place, with the schedule laid over just these.

    Args:
        network: On the device of the images.
        images: Search-train.
        recipe: Its ``epochs`` play no part.
        steps: Batches to train on, at least 0.
        seed: Of all that is random.
        compute: How the passes are computed.
        teacher: The dense network, for distillation.

    Raises:
        ValueError: ``steps`` is negative, or the recipe wants a teacher and there is none.
        RuntimeError: training diverged.
    """
    training = StepTraining(
        network, images, recipe, steps=steps, seed=seed, compute=compute, teacher=teacher
    )
    training.run_to(steps)


class StepTraining:
    """``train_steps`` in stretches: pausing changes no bit of where it ends.

    Between stretches the network may be evaluated and its batch norm recalibrated: training looks
    at the batches' own statistics.

    Args:
        network: On the device of the images; trained in place.
        images: Search-train.
        recipe: Its ``epochs`` play no part.
        steps: Of the whole training, at least 0: the schedule is laid over these.
        seed: Of all that is random.
        compute: How the passes are computed.
        teacher: The dense network, for distillation.

    Raises:
        ValueError: ``steps`` is negative.
    """

    def __init__(
        self,
        network: nn.Module,
        images: Images,
        recipe: Recipe,
        *,
        steps: int,
        seed: Seed,
        compute: ComputeConfig = PLAIN_COMPUTE,
        teacher: nn.Module | None = None,
    ) -> None:
        if steps < 0:
            raise ValueError(f"steps must be at least 0, got {steps}")
        self._network = network
        self._images = images
        self._recipe = recipe
        self._steps = steps
        self._seed = seed
        self._teacher = teacher
        self._compute = compute
        lay_out(network, compute)
        self._optimizer = make_optimizer(network, recipe)
        self._generators = TorchGenerators(images, seed, 0)
        self._steps_done = 0
        self._batches = _batches(images, recipe, seed, 0)

    def run_to(self, step: int) -> None:
        """Train until ``step`` steps are done in all.

        Raises:
            ValueError: that many are done already, or are more than all; the recipe wants a
                teacher and there is none.
            RuntimeError: training diverged, or the passes cannot be captured.
        """
        done, steps = self._steps_done, self._steps
        if not done <= step <= steps:
            raise ValueError(f"step must be in [{done}, {steps}], those still to do, got {step}")
        rates = (learning_rate_at(self._recipe, i / steps) for i in range(done, step))
        batches = islice(self._batches, step - done)
        with self._passes(step - done), self._generators.in_use():
            train_on_batches(
                self._network,
                self._optimizer,
                zip(rates, batches, strict=True),
                self._recipe,
                dtype=self._compute.dtype,
                teacher=self._teacher,
                first_step=done,
            )
        self._steps_done = step

    def _passes(self, steps: int) -> AbstractContextManager[None]:
        """How the passes of so many steps are run."""
        if not (self._compute.cuda_graphs and steps):
            return nullcontext()
        sample, _ = next(_batches(self._images, self._recipe, self._seed, 0))
        return replayed_cuda_graphs(self._network, sample, self._compute.dtype)

    def state(self) -> dict[str, Any]:
        """Where the training stands, as tensors and numbers on the CPU; a copy."""
        state = capture(self._network, self._optimizer, 0)
        return {
            "network": state.network,
            "momentum": state.momentum,
            "steps_done": self._steps_done,
            "generators": list(self._generators.states),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on, in place, from where an equal training stood.

        Raises:
            ValueError: the state is none of these, or another network's.
        """
        try:
            training = TrainingState(
                network=state["network"], momentum=state["momentum"], epochs_done=0
            )
            self._generators.states = list(state["generators"])
            self._steps_done = state["steps_done"]
        except KeyError as error:
            raise ValueError(f"the state lacks {error}; it is not that of a training") from error
        restore(training, self._network, self._optimizer)
        self._batches = _batches(self._images, self._recipe, self._seed, self._steps_done)


def _batches(images: Images, recipe: Recipe, seed: Seed, steps_done: int) -> Iterator[Batch]:
    """Epoch after epoch, from the batch after so many steps."""
    epoch, batch = divmod(steps_done, images.num_training_batches(recipe.batch_size))
    epochs = (images.training_batches(recipe.batch_size, seed=seed, epoch=e) for e in count(epoch))
    return islice(chain.from_iterable(epochs), batch, None)
