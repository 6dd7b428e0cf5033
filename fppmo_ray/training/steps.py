"""Train a network for a number of steps, with pauses between any two of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, count, islice
from typing import Any

from torch import nn

from fppmo_ray.training.checkpoints import TrainingState, capture, restore
from fppmo_ray.training.compute import PLAIN_COMPUTE, ComputeConfig, lay_out
from fppmo_ray.training.feature_match import FeatureMatch
from fppmo_ray.training.images import Batch, Images, Seed
from fppmo_ray.training.recipe import Recipe, feature_weight_of, learning_rate_at, peak_rate
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
    matches: Sequence[FeatureMatch] = (),
) -> None:
    """Train for a number of steps, in place, with the learning-rate schedule laid over these steps.

    Args:
        network: A network on the device of the images.
        images: Search-train images.
        recipe: Recipe of the steps; its ``epochs`` is not used.
        steps: Number of batches to train on, >= 0.
        seed: Random seed of the training.
        compute: How the passes are computed.
        teacher: The dense network, for distillation; None where the recipe's weight is 0.
        matches: Where the features of both are compared.

    Raises:
        ValueError: ``steps`` is negative, or the recipe needs a teacher and there is none.
        RuntimeError: training diverged.
    """
    training = StepTraining(
        network,
        images,
        recipe,
        steps=steps,
        seed=seed,
        compute=compute,
        teacher=teacher,
        matches=matches,
    )
    training.run_to(steps)


class StepTraining:
    """A training of a number of steps that can pause; pausing changes no bit of the result.

    During a pause the network may be evaluated and its batch norm recalibrated, because training
    uses the batches' own statistics.

    Args:
        network: A network on the device of the images; it is trained in place.
        images: Search-train images.
        recipe: Recipe of the steps; its ``epochs`` is not used.
        steps: Number of all steps, >= 0; the learning-rate schedule is laid over them.
        seed: Random seed of the training.
        compute: How the passes are computed.
        teacher: The dense network, for distillation; None where the recipe's weight is 0.
        matches: Where the features of both are compared.

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
        matches: Sequence[FeatureMatch] = (),
    ) -> None:
        if steps < 0:
            raise ValueError(f"steps must be at least 0, got {steps}")
        self._network = network
        self._images = images
        epochs = steps / images.num_training_batches(recipe.batch_size)
        self._recipe = recipe = replace(
            recipe,
            learning_rate=peak_rate(recipe, epochs),
            feature_weight=feature_weight_of(recipe, epochs),
        )
        self._steps = steps
        self._seed = seed
        self._teacher, self._matches = teacher, matches
        self._compute = compute
        lay_out(network, compute)
        self._optimizer = make_optimizer(network, recipe)
        self._generators = TorchGenerators(images, seed, 0)
        self._steps_done = 0
        self._batches = _batches(images, recipe, seed, 0)

    def run_to(self, step: int) -> None:
        """Train until a number of steps are done in all.

        Args:
            step: Number of steps done afterwards, from those done so far up to all steps.

        Raises:
            ValueError: ``step`` is out of that range; the recipe needs a teacher and there is none.
            RuntimeError: training diverged, or the passes cannot be captured.
        """
        done, steps = self._steps_done, self._steps
        if not done <= step <= steps:
            raise ValueError(f"step must be in [{done}, {steps}], those still to do, got {step}")
        rates = (learning_rate_at(self._recipe, i / steps) for i in range(done, step))
        batches = islice(self._batches, step - done)
        with self._generators.in_use():
            train_on_batches(
                self._network,
                self._optimizer,
                zip(rates, batches, strict=True),
                self._recipe,
                compute=self._compute,
                teacher=self._teacher,
                matches=self._matches,
                first_step=done,
            )
        self._steps_done = step

    def state(self) -> dict[str, Any]:
        """Return a copy of the training's state, as tensors and numbers on the CPU."""
        state = capture(self._network, self._optimizer, 0)
        return {
            "network": state.network,
            "momentum": state.momentum,
            "steps_done": self._steps_done,
            "generators": list(self._generators.states),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue, in place, from the state of a training with equal arguments.

        Args:
            state: A state that ``state()`` returned.

        Raises:
            ValueError: the state is incomplete or belongs to another network.
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
    """Yield the training batches that follow a number of steps, epoch after epoch."""
    epoch, batch = divmod(steps_done, images.num_training_batches(recipe.batch_size))
    epochs = (images.training_batches(recipe.batch_size, seed=seed, epoch=e) for e in count(epoch))
    return islice(chain.from_iterable(epochs), batch, None)
