"""The training loop: one SGD step per batch, with reproducible dropout."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, distributed, nn
from torch.optim import SGD

from fppmo_ray.training.batchnorm import batches_counted_at_end
from fppmo_ray.training.compute import (
    ComputeConfig,
    DType,
    autocast,
    in_mode,
    lowered_weights,
)
from fppmo_ray.training.cuda_graphs import replayed
from fppmo_ray.training.device import device_module
from fppmo_ray.training.feature_match import FeatureComparison, FeatureMatch, compare_on
from fppmo_ray.training.images import Batch, Images, Seed, derive_seed
from fppmo_ray.training.recipe import Recipe, feature_weight_of, peak_rate, training_loss

logger = logging.getLogger(__name__)

CHECK_EVERY = 32
"""Steps between checks of the loss, each of which waits for the device."""
_DROPOUT_STREAM = 1  # separates the seed of dropout from the seed of the images


def make_optimizer(network: nn.Module, recipe: Recipe) -> SGD:
    """Return the recipe's SGD optimizer for the parameters that are trained.

    Call ``lay_out`` before: momentum takes the memory layout that the weights have at the first
    step.

    On a GPU all parameters are updated by a few kernels, which read the learning rate from the
    GPU's memory, so that a CUDA graph can be replayed with another one.

    Args:
        network: The network to train.
        recipe: Gives momentum, weight decay and the peak learning rate.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    on_gpu = bool(parameters) and parameters[0].device.type != "cpu"
    optimizer = SGD(
        parameters,
        lr=peak_rate(recipe),
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=True,
        fused=on_gpu or None,
    )
    if on_gpu:
        rate = torch.full((), peak_rate(recipe), device=parameters[0].device)
        optimizer.param_groups[0]["lr"] = rate
    return optimizer


def set_learning_rate(optimizer: SGD, rate: float) -> None:
    """Set the learning rate of the next steps, in place.

    Args:
        optimizer: An optimizer from ``make_optimizer``.
        rate: The learning rate.
    """
    [group] = optimizer.param_groups
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


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
            for state in self.states[1:]:
                device_module(self._device).set_rng_state(state, self._device)
            yield
            self.states = self._read()

    @property
    def _on_gpu(self) -> bool:
        return self._device.type != "cpu"

    @contextmanager
    def _forked(self) -> Iterator[None]:
        devices = [self._device] if self._on_gpu else []
        with torch.random.fork_rng(devices, device_type=self._device.type):
            yield

    def _read(self) -> list[Tensor]:
        devices = [self._device] if self._on_gpu else []
        return [
            torch.get_rng_state(),
            *(device_module(device).get_rng_state(device) for device in devices),
        ]


def train_on_batches(
    network: nn.Module,
    optimizer: SGD,
    rated_batches: Iterable[tuple[float, Batch]],
    recipe: Recipe,
    *,
    compute: ComputeConfig,
    teacher: nn.Module | None,
    matches: Sequence[FeatureMatch] = (),
    place: str = "",
    first_step: int = 0,
) -> tuple[float, float]:
    """Take one optimizer step per batch, in place.

    Args:
        network: The network to train; its mode is restored at the end.
        optimizer: The network's optimizer, from ``make_optimizer``.
        rated_batches: Pairs of a learning rate and a batch on the network's device; all batches are
            of equal size.
        recipe: Gives the loss and the gradient clipping.
        compute: How the passes are computed.
        teacher: The dense network, for distillation; None where the recipe's weight is 0.
        matches: Where the features of both are compared.
        place: Position in the training for the error message of divergence: ``epoch 3, ``.
        first_step: Number of the first step in that message.

    Returns:
        Mean training loss and accuracy over the batches; NaN without batches.

    Raises:
        ValueError: the recipe needs a teacher and there is none; CUDA graphs are configured and
            there is no GPU.
        RuntimeError: training diverged, or the steps cannot be captured in a CUDA graph.
    """
    device = optimizer.param_groups[0]["params"][0].device
    # Sums stay on the device: reading them would wait for it at every step.
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    num_images = num_steps = 0
    feature_weight = feature_weight_of(recipe)
    comparison = compare_on(matches if feature_weight > 0 else (), device)
    with ExitStack() as stack:
        stack.enter_context(in_mode(network, training=True))
        answers = stack.enter_context(_teacher_answers(teacher, recipe, compute.dtype, comparison))
        stack.enter_context(batches_counted_at_end(network, lambda: num_steps))

        def add_gradients(images: Tensor, labels: Tensor, share: float) -> Tensor:
            with autocast(device, compute.dtype):
                with comparison.outputs_of(network) as features:
                    logits = network(images)
                teacher_logits, wished = answers(images)
            loss = training_loss(logits, labels, recipe, teacher_logits)
            if teacher_logits is not None:
                loss = loss + feature_weight * comparison.error(features, wished)
            part = loss if share == 1 else loss * share
            part.backward()  # type: ignore[no-untyped-call]
            num_right = (logits.detach().argmax(1) == labels).sum()
            return torch.stack([loss.detach() * len(labels), num_right]).double()

        sum_gradients = _InParts(add_gradients, optimizer, device)

        def step(images: Tensor, labels: Tensor) -> None:
            sums = sum_gradients(images, labels)
            if recipe.clip_norm is not None:
                nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], recipe.clip_norm)
            optimizer.step()
            totals.add_(sums)

        run = stack.enter_context(replayed(step, device)) if compute.cuda_graphs else step
        stack.callback(optimizer.zero_grad)  # before a graph is freed that holds the gradients
        for rate, (images, labels) in rated_batches:
            set_learning_rate(optimizer, rate)
            run(images, labels)
            num_images, num_steps = num_images + len(labels), num_steps + 1
            last = first_step + num_steps - 1
            if last % CHECK_EVERY == CHECK_EVERY - 1:
                check_finite(
                    totals, "fine-tuning", f"{place}step {last}, at learning rate {rate:.3g}"
                )
    if not num_images:
        return math.nan, math.nan
    check_finite(totals, "fine-tuning", f"{place}step {last}, at learning rate {rate:.3g}")
    loss_sum, right_sum = totals.tolist()
    return loss_sum / num_images, right_sum / num_images


class _InParts:
    """Sums up the gradients of a batch, in several parts once the whole does not fit into memory.

    Batch norms then normalise by the statistics of a part.

    Args:
        add_gradients: Adds the gradients of a part, times its share of the batch, and returns sums.
        optimizer: Its gradients are dropped before a batch.
        device: The device that may run out of memory.
    """

    def __init__(
        self,
        add_gradients: Callable[[Tensor, Tensor, float], Tensor],
        optimizer: SGD,
        device: torch.device,
    ) -> None:
        self._add_gradients = add_gradients
        self._optimizer = optimizer
        self._device = device
        self._num_parts = 1

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        while (sums := self._sums(images, labels)) is None:
            self._num_parts *= 2
            self._optimizer.zero_grad()
            device_module(self._device).empty_cache()
            logger.warning(
                "a batch of %d images does not fit into the GPU's memory: its gradients are summed "
                "up over %d parts; let fewer workers share a GPU, or take smaller batches",
                *(len(labels), self._num_parts),
            )
        return sums

    def _sums(self, images: Tensor, labels: Tensor) -> Tensor | None:
        """Return the sums of a batch; None if the memory is too small for its parts."""
        self._optimizer.zero_grad()
        size = -(-len(labels) // self._num_parts)
        parts = zip(torch.split(images, size), torch.split(labels, size), strict=True)
        try:
            sums = [self._add_gradients(*part, len(part[1]) / len(labels)) for part in parts]
            return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)
        except torch.OutOfMemoryError:
            # Other processes would wait for gradients that never come.
            is_shared = distributed.is_available() and distributed.is_initialized()
            if is_shared or size == 1 or device_module(self._device).is_current_stream_capturing():
                raise
            return None


def check_finite(losses: Tensor, training: str, place: str) -> None:
    """Raise if a sum of losses is not finite; a GPU is waited for.

    Args:
        losses: The sum, its only or first entry.
        training: What is trained, for the message: ``the distillation``.
        place: The last step, for the message: ``epoch 3, step 12``.

    Raises:
        RuntimeError: training diverged.
    """
    loss = float(losses.flatten()[0])
    if not math.isfinite(loss):
        raise RuntimeError(
            f"{training} diverged: the loss became {loss} by {place}; lower the learning rate or "
            "set clip_norm"
        )


@contextmanager
def _teacher_answers(
    teacher: nn.Module | None, recipe: Recipe, dtype: DType, comparison: FeatureComparison
) -> Iterator[Callable[[Tensor], tuple[Tensor | None, dict[str, Tensor]]]]:
    """Yield a function from images to the teacher's logits and features; None without a teacher."""
    if recipe.distillation_weight == 0:
        yield lambda images: (None, {})
        return
    if teacher is None:
        raise ValueError(
            f"a recipe with distillation_weight {recipe.distillation_weight} needs a teacher; "
            "pass the dense network, or set the weight to 0"
        )

    @torch.no_grad()
    def answers(images: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
        with comparison.outputs_of(teacher) as features:
            return teacher(images), features

    with in_mode(teacher, training=False), lowered_weights(teacher, dtype):
        yield answers
