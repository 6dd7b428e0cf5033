"""The inner loop of all training: one step per batch, and the randomness inside the network."""

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

_CHECK_EVERY = 32  # steps between looks at the loss: each one waits for the device
_NETWORK_RANDOMNESS = 1  # tells dropout's seed from that of the images


def make_optimizer(network: nn.Module, recipe: Recipe) -> SGD:
    """The recipe's SGD. Lay the network out first: momentum is laid out like the weights."""
    return SGD(
        [parameter for parameter in network.parameters() if parameter.requires_grad],
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=True,
    )


class TorchGenerators:
    """Torch's own generators, which dropout draws from, for a stretch of training.

    ``states`` are those of the CPU's generator and, on a GPU, of the GPU's own.

    Args:
        images: On the device that is trained on.
        seed: Of the whole run.
        epoch: Of the stretch.
    """

    def __init__(self, images: Images, seed: Seed, epoch: int) -> None:
        self._device = images.labels.device
        with self._forked():
            torch.manual_seed(derive_seed(seed, epoch, _NETWORK_RANDOMNESS))
            self.states = self._read()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Draw for a while, from where the last time ended; leave torch's generators alone."""
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
    """One step per batch at its learning rate, in place.

    Args:
        network: In any mode, which is restored.
        optimizer: From ``make_optimizer``.
        rated_batches: Learning rates, and the batches on the network's device.
        recipe: How to train.
        dtype: Of the passes.
        teacher: The dense network, for distillation.
        place: Where in a training this is, for the error of a diverged one.
        first_step: How steps are counted there.

    Returns:
        Mean loss and accuracy; NaN without batches.

    Raises:
        ValueError: the recipe wants a teacher and there is none.
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
    """The teacher's logits for images, or None for every image where it has no weight."""
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
