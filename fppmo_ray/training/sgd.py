"""The training loop: one SGD step per batch, with reproducible dropout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import SGD

from fppmo_ray.training.compute import DType, autocast, in_mode
from fppmo_ray.training.images import Batch, Images, Seed, derive_seed
from fppmo_ray.training.recipe import Recipe, training_loss

_CHECK_EVERY = 32  # steps between checks of the loss, each of which waits for the device
_DROPOUT_STREAM = 1  # separates the seed of dropout from the seed of the images


def make_optimizer(network: nn.Module, recipe: Recipe) -> SGD:
    """Return the recipe's SGD optimizer for the parameters that are trained.

    Call ``lay_out`` before: momentum takes the memory layout that the weights have at the first
    step.

    Args:
        network: The network to train.
        recipe: Gives momentum, weight decay and the peak learning rate.
    """
    return SGD(
        [parameter for parameter in network.parameters() if parameter.requires_grad],
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=True,
    )


class TorchGenerators:
    """States of torch's own generators, which dropout draws from, for a stretch of training.

    ``states`` holds the state of the CPU's generator and, on a GPU, of the GPU's generator.

    Args:
        images: Images on the device that trains.
        seed: Random seed of the whole run.
        epoch: Number of the stretch, counted from 0.
    """

    def __init__(self, images: Images, seed: Seed, epoch: int) -> None:
        self._device = images.labels.device
        with self._forked():
            torch.manual_seed(derive_seed(seed, epoch, _DROPOUT_STREAM))
            self.states = self._read()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Install the saved states; at the end save them again and restore torch's own states."""
        with self._forked():
            torch.set_rng_state(self.states[0])
            if self._on_gpu:
                torch.cuda.set_rng_state(self.states[1], self._device)
            yield
            self.states = self._read()

    @property
    def _on_gpu(self) -> bool:
        return self._device.type == "cuda"

    @contextmanager
    def _forked(self) -> Iterator[None]:
        with torch.random.fork_rng([self._device] if self._on_gpu else []):
            yield

    def _read(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        return [*states, torch.cuda.get_rng_state(self._device)] if self._on_gpu else states


def train_on_batches(
    network: nn.Module,
    optimizer: SGD,
    rated_batches: Iterable[tuple[float, Batch]],
    recipe: Recipe,
    *,
    dtype: DType,
    teacher: nn.Module | None,
    place: str = "",
    first_step: int = 0,
) -> tuple[float, float]:
    """Take one optimizer step per batch, in place.

    Args:
        network: The network to train; its mode is restored at the end.
        optimizer: The network's optimizer, from ``make_optimizer``.
        rated_batches: Pairs of a learning rate and a batch on the network's device.
        recipe: Gives the loss and the gradient clipping.
        dtype: Number format of the passes.
        teacher: The dense network, for distillation; None where the recipe's weight is 0.
        place: Position in the training for the error message of divergence: ``epoch 3, ``.
        first_step: Number of the first step in that message.

    Returns:
        Mean training loss and accuracy over the batches; NaN without batches.

    Raises:
        ValueError: the recipe needs a teacher and there is none.
        RuntimeError: training diverged.
    """
    totals = torch.zeros(2, dtype=torch.float64)
    num_images = 0
    with in_mode(network, training=True), _teacher_logits(teacher, recipe) as answers:
        for step, (rate, (images, labels)) in enumerate(rated_batches, start=first_step):
            optimizer.param_groups[0]["lr"] = rate
            with autocast(images.device, dtype):
                logits = network(images)
                teacher_logits = answers(images)
            loss = training_loss(logits, labels, recipe, teacher_logits)
            _step(optimizer, loss, recipe.clip_norm)
            num_right = (logits.detach().argmax(1) == labels).sum()
            # Sums stay on the device: reading them would wait for it at every step.
            sums = torch.stack([loss.detach() * len(labels), num_right]).double()
            totals = totals.to(sums.device) + sums
            num_images += len(labels)
            if step % _CHECK_EVERY == _CHECK_EVERY - 1:
                _check_finite(totals, rate, f"{place}step {step}")
    if not num_images:
        return math.nan, math.nan
    _check_finite(totals, rate, f"{place}step {step}")
    loss_sum, right_sum = totals.tolist()
    return loss_sum / num_images, right_sum / num_images


def _step(optimizer: SGD, loss: Tensor, clip_norm: float | None) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip_norm)
    optimizer.step()


def _check_finite(totals: Tensor, rate: float, place: str) -> None:
    loss_sum = float(totals[0])
    if not math.isfinite(loss_sum):
        raise RuntimeError(
            f"fine-tuning diverged: the loss became {loss_sum} by {place}, at learning rate "
            f"{rate:.3g}; lower the learning rate or set clip_norm"
        )


@contextmanager
def _teacher_logits(
    teacher: nn.Module | None, recipe: Recipe
) -> Iterator[Callable[[Tensor], Tensor | None]]:
    """Yield a function from images to the teacher's logits, or to None without a teacher."""
    if recipe.distillation_weight == 0:
        yield lambda images: None
        return
    if teacher is None:
        raise ValueError(
            f"a recipe with distillation_weight {recipe.distillation_weight} needs a teacher; "
            "pass the dense network, or set the weight to 0"
        )
    with in_mode(teacher, training=False):
        yield torch.no_grad()(teacher)
