"""Training steps as CUDA graphs, on a pretended GPU: what they learn, launch, wait for and free."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fppmo_ray.pruning import extract, trace
from fppmo_ray.testing.pretended_gpu import PretendedGpu
from fppmo_ray.training import (
    ComputeConfig,
    Images,
    Recipe,
    TrainingState,
    build_network,
    evaluate,
    example_batch,
    load_dataset,
    open_images,
    train_epoch,
    train_steps,
)
from fppmo_ray.training.feature_match import FeatureMatch

DIGITS = load_dataset("digits")
PLAIN = Recipe(batch_size=32, epochs=2, distillation_weight=0.0)
DISTILLED = Recipe(batch_size=32, epochs=2, distillation_weight=0.5, clip_norm=1.0)
LAUNCHED, GRAPHS = ComputeConfig(), ComputeConfig(cuda_graphs=True)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images_on(device: torch.device | str) -> Images:
    return open_images(DIGITS.train, np.arange(300), DIGITS, device)


def fresh(seed: int = 0) -> nn.Module:
    """The digits network with dropout, so that torch's own generators matter too."""
    network = build_network("digits_cnn", 10, seed=seed)
    network.linear = nn.Sequential(nn.Dropout(0.2), network.linear)
    return network


def trained(device: torch.device | str, compute: ComputeConfig, recipe: Recipe) -> TrainingState:
    """Return the state after all epochs of a recipe, of 9 steps each."""
    network, teacher = fresh().to(device), build_network("digits_cnn", 10, seed=1).to(device)
    images, state = images_on(device), None
    for epoch in range(recipe.epochs):
        state, _ = train_epoch(
            network,
            images,
            recipe,
            epoch=epoch,
            seed=0,
            state=state,
            compute=compute,
            teacher=teacher,
            matches=[FeatureMatch(module="bn4", channels=np.arange(64)[::-1].copy())],
        )
    assert state is not None
    return state


def differences(one: TrainingState, other: TrainingState) -> list[float]:
    """Largest difference of every tensor, as a share of its largest number."""
    return [
        float((mine - its).abs().max() / mine.abs().max().clamp(min=1e-6))
        for a, b in ((one.network, other.network), (one.momentum, other.momentum))
        for mine, its in zip(a.values(), b.values(), strict=True)
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", [PLAIN, DISTILLED])
def test_whole_trainings_learn_on_a_gpu_what_they_learn_on_a_cpu_launched_and_replayed(
    gpu: PretendedGpu, recipe: Recipe, dtype: str
) -> None:
    computes = [replace(compute, dtype=dtype) for compute in (LAUNCHED, GRAPHS)]
    on_cpu = trained("cpu", computes[0], recipe)
    launched, replayed = (trained(gpu.device, compute, recipe) for compute in computes)
    assert gpu.replays == 2 * 6  # of nine steps in an epoch, three are launched
    # The fused optimizer rounds differently; with bfloat16 that can turn a weight to its neighbour.
    limit = 1e-4 if dtype == "float32" else 2e-2
    assert max(differences(on_cpu, launched)) < limit, dtype
    assert max(differences(launched, replayed)) == 0


def test_replayed_steps_equal_launched_ones_over_many_masks_and_leave_no_memory_behind(
    gpu: PretendedGpu,
) -> None:
    dense = build_network("digits_cnn", 10).eval()
    tracing = trace(dense, example_batch(DIGITS))
    dense.to(gpu.device)
    images, rng = images_on(gpu.device), np.random.default_rng(0)

    def loss(keep: np.ndarray, compute: ComputeConfig) -> float:
        network = extract(dense, tracing, keep)
        train_steps(network, images, PLAIN, steps=6, seed=0, compute=compute)
        return evaluate(network, images.batches(100, np.arange(100))).loss

    loss(np.ones(tracing.space.num_filters, dtype=bool), GRAPHS)
    gc.collect()
    gc.disable()
    try:
        before, losses = gpu.memory_allocated(), set()
        for _ in range(6):
            keep = rng.random(tracing.space.num_filters) < 0.6
            replayed = loss(keep, GRAPHS)
            assert replayed == loss(keep, LAUNCHED)
            losses.add(replayed)
            assert gpu.memory_allocated() == before
    finally:
        gc.enable()
    assert len(losses) == 6


def test_a_training_waits_for_the_gpu_once_in_32_steps_and_copies_nothing_it_waits_for(
    gpu: PretendedGpu,
) -> None:
    network, images = fresh().to(gpu.device), images_on(gpu.device)
    for compute in (LAUNCHED, GRAPHS):
        gpu.reset_counts()
        train_steps(network, images, PLAIN, steps=64, seed=0, compute=compute)
        assert gpu.waits.total() == 64 // 32 + 2  # at the end, the loss is checked and read
        assert gpu.pageable_copies.total() == 0


def test_a_replayed_step_launches_no_more_than_its_batch_and_the_learning_rate(
    gpu: PretendedGpu,
) -> None:
    network, teacher = fresh().to(gpu.device), fresh(1).to(gpu.device)
    images = images_on(gpu.device)

    def launches(steps: int, compute: ComputeConfig) -> int:
        gpu.reset_counts()
        train_steps(
            network, images, DISTILLED, steps=steps, seed=0, compute=compute, teacher=teacher
        )
        return gpu.launches.total()

    launches(4, LAUNCHED)  # lays the weights out
    # Eleven kernels gather, augment and normalise a batch, two put it in place, one sets the rate.
    assert launches(8, GRAPHS) - launches(7, GRAPHS) <= 14
    assert launches(8, LAUNCHED) - launches(7, LAUNCHED) > 100


def test_a_step_updates_all_weights_at_once_and_counts_no_batches(gpu: PretendedGpu) -> None:
    network, images = fresh().to(gpu.device), images_on(gpu.device)

    def launches(steps: int) -> Counter[str]:
        gpu.reset_counts()
        train_steps(network, images, PLAIN, steps=steps, seed=0)
        return Counter(gpu.launches)

    launches(1)  # lays the weights out
    per_step = launches(3)
    per_step.subtract(launches(2))
    assert per_step["aten._fused_sgd_.tensor_lr"] == 1
    assert per_step["aten.add_.Tensor"] == 1  # the sums of the loss, and no batch norm's counter


def test_a_teachers_weights_are_converted_once_for_all_steps(gpu: PretendedGpu) -> None:
    network, teacher = fresh().to(gpu.device), build_network("digits_cnn", 10).to(gpu.device)
    formats: list[torch.dtype] = []
    for module in teacher.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda conv, _: formats.append(conv.weight.dtype))
    before = [weight.dtype for weight in teacher.parameters()]
    compute = replace(LAUNCHED, dtype="bfloat16")
    images = images_on(gpu.device)
    train_steps(network, images, DISTILLED, steps=3, seed=0, compute=compute, teacher=teacher)
    assert formats == [torch.bfloat16] * 3 * 4
    assert [weight.dtype for weight in teacher.parameters()] == before


def test_weights_are_converted_once_for_all_passes_without_gradients(gpu: PretendedGpu) -> None:
    network, images = build_network("digits_cnn", 10).to(gpu.device), images_on(gpu.device)

    def conversions(num_batches: int) -> int:
        gpu.reset_counts()
        batches = images.batches(10, np.arange(10 * num_batches))
        evaluate(network, batches, dtype="bfloat16")
        return gpu.launches["aten._to_copy.default"]

    before = [weight.dtype for weight in network.parameters()]
    # In every pass: pixels, images, logits, sums.
    assert conversions(6) - conversions(2) == 4 * 4
    assert [weight.dtype for weight in network.parameters()] == before
    found = evaluate(network, images.batches(100), dtype="bfloat16")
    expected = evaluate(network.cpu(), images_on("cpu").batches(100), dtype="bfloat16")
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)


class Undecided(nn.Module):
    """Reads a tensor's value in training."""

    def __init__(self) -> None:
        super().__init__()
        self.network = build_network("digits_cnn", 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits if logits.sum() < 1e9 else -logits


def test_a_step_that_cannot_be_captured_says_so(gpu: PretendedGpu) -> None:
    network, images = Undecided().to(gpu.device), images_on(gpu.device)
    with pytest.raises(RuntimeError, match="the training step cannot be captured in a CUDA graph"):
        train_steps(network, images, PLAIN, steps=9, seed=0, compute=GRAPHS)


def test_batches_are_counted_as_torch_counts_them(gpu: PretendedGpu) -> None:
    on_cpu, on_gpu = (
        trained(device, GRAPHS if device != "cpu" else LAUNCHED, PLAIN)
        for device in ("cpu", gpu.device)
    )
    counters = [name for name in on_cpu.network if name.endswith("num_batches_tracked")]
    assert counters
    for state in (on_cpu, on_gpu):
        assert {int(state.network[name]) for name in counters} == {18}


def without_batchnorm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10)),
    )


@pytest.mark.parametrize("compute", [LAUNCHED, GRAPHS])
def test_a_batch_that_does_not_fit_into_the_memory_is_trained_on_in_parts_to_the_same_end(
    gpu: PretendedGpu, caplog: pytest.LogCaptureFixture, compute: ComputeConfig
) -> None:
    images = images_on(gpu.device)
    recipe = Recipe(batch_size=128, distillation_weight=0.0, clip_norm=1.0)

    def trained_within(limit: int | None) -> tuple[dict[str, Tensor], int]:
        """Return the weights, and the most bytes that were in use."""
        network = without_batchnorm().to(gpu.device)
        base = gpu.memory_allocated()
        gpu.reset_peak_memory_stats()
        if limit is not None:
            gpu.memory.limit = base + limit
        train_steps(network, images, recipe, steps=6, seed=0, compute=compute)
        gpu.memory.limit = 2**40
        weights = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
        return weights, gpu.max_memory_allocated() - base

    whole, needed = trained_within(None)
    assert not caplog.messages
    parts, _ = trained_within(needed * 2 // 3)
    assert caplog.messages == [
        "a batch of 128 images does not fit into the GPU's memory: its gradients are summed up "
        "over 2 parts; let fewer workers share a GPU, or take smaller batches"
    ]
    for name, weights in whole.items():
        assert torch.allclose(parts[name], weights, rtol=1e-4, atol=1e-6), name


def test_a_single_image_that_does_not_fit_ends_the_training(gpu: PretendedGpu) -> None:
    network, images = without_batchnorm().to(gpu.device), images_on(gpu.device)
    gpu.memory.limit = gpu.memory_allocated() + 20_000
    recipe = Recipe(batch_size=4, distillation_weight=0.0)
    with pytest.raises(torch.OutOfMemoryError):
        train_steps(network, images, recipe, steps=1, seed=0)
