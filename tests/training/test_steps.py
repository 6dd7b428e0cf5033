"""Training that pauses between steps, here or in another process."""

from __future__ import annotations

import io
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fppmo_ray.training import (
    PLAIN_COMPUTE,
    ComputeConfig,
    DType,
    Images,
    Recipe,
    StepTraining,
    build_network,
    evaluate,
    load_dataset,
    open_images,
    recalibrate_batchnorm,
    train_steps,
)

RECIPE = Recipe(batch_size=32, learning_rate=0.05, distillation_weight=0.0)
STEPS = 15  # of six batches an epoch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images() -> Images:
    digits = load_dataset("digits")
    return open_images(digits.train, np.arange(200), digits)


def fresh(seed: int = 0) -> nn.Module:
    """The digits network with dropout, so that torch's own generators matter too."""
    network = build_network("digits_cnn", 10, seed=seed)
    network.linear = nn.Sequential(nn.Dropout(0.2), network.linear)
    return network


def begin(
    network: nn.Module,
    images: Images,
    recipe: Recipe = RECIPE,
    compute: ComputeConfig = PLAIN_COMPUTE,
) -> StepTraining:
    return StepTraining(network, images, recipe, steps=STEPS, seed=(3, 1), compute=compute)


def learnt(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in network.named_parameters()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


@pytest.mark.parametrize(
    ("recipe", "compute"),
    [
        (RECIPE, PLAIN_COMPUTE),
        (RECIPE, ComputeConfig(dtype="bfloat16")),
        (replace(RECIPE, schedule="one_cycle"), PLAIN_COMPUTE),
    ],
    ids=["plain", "bfloat16", "one cycle"],
)
def test_pausing_measuring_and_moving_to_another_process_change_no_bit(
    images: Images, recipe: Recipe, compute: ComputeConfig
) -> None:
    straight = fresh()
    train_steps(straight, images, recipe, steps=STEPS, seed=(3, 1), compute=compute)
    network = fresh()
    training = begin(network, images, recipe, compute)
    for step in (0, 1, 7, 7, STEPS):
        training.run_to(step)
        recalibrate_batchnorm(network, images.batches(100))
        state = through_a_file(training.state())
        torch.manual_seed(step)
        network = fresh(seed=99)  # another process starts with other weights
        training = begin(network, images, recipe, compute)
        training.restore(state)
    assert same(learnt(straight), learnt(network))


def test_stretches_in_one_process_are_the_whole(images: Images) -> None:
    straight, paused = fresh(), fresh()
    train_steps(straight, images, RECIPE, steps=STEPS, seed=(3, 1))
    training = begin(paused, images)
    for step in (2, 6, 11, STEPS):
        training.run_to(step)
    assert same(straight.state_dict(), paused.state_dict())


@pytest.mark.parametrize("step", [0, 4])
def test_a_training_that_goes_back_to_an_earlier_state_keeps_nothing_of_later_steps(
    images: Images, step: int
) -> None:
    straight, network = fresh(), fresh()
    train_steps(straight, images, RECIPE, steps=STEPS, seed=(3, 1))
    training = begin(network, images)
    training.run_to(step)
    state = training.state()
    training.run_to(8)
    training.restore(state)
    training.run_to(STEPS)
    assert same(learnt(straight), learnt(network))


def test_a_state_is_a_copy(images: Images) -> None:
    network = fresh()
    training = begin(network, images)
    training.run_to(3)
    state = training.state()
    before = through_a_file(state)
    training.run_to(6)
    assert same(state["network"], before["network"])
    assert same(state["momentum"], before["momentum"])
    assert not same(state["network"], network.state_dict())


def test_steps_out_of_turn_are_refused(images: Images) -> None:
    training = begin(fresh(), images)
    training.run_to(4)
    for step in (3, STEPS + 1):
        with pytest.raises(ValueError, match=rf"step must be in \[4, 15\], .* got {step}"):
            training.run_to(step)


def test_a_diverged_stretch_names_the_step_of_the_whole(images: Images) -> None:
    training = begin(fresh(), images, replace(RECIPE, learning_rate=1e30))
    training.run_to(1)
    with pytest.raises(RuntimeError, match=r"diverged: the loss became (nan|inf) by step 5,"):
        training.run_to(6)


def test_a_foreign_state_is_refused(images: Images) -> None:
    training = begin(fresh(), images)
    with pytest.raises(ValueError, match="lacks 'momentum'; it is not that of a training"):
        training.restore({"network": {}})
    other = StepTraining(build_network("digits_cnn", 10), images, RECIPE, steps=STEPS, seed=0)
    with pytest.raises(ValueError, match="holds the weights of another network"):
        training.restore(other.state())


def test_a_paused_training_that_is_dropped_lets_its_network_go(images: Images) -> None:
    network = fresh()
    training = begin(network, images)
    training.run_to(3)
    gone = weakref.ref(network)
    del network, training
    assert gone() is None


def test_cuda_graphs_without_a_gpu_are_refused(images: Images) -> None:
    with pytest.raises(ValueError, match="CUDA graphs need a CUDA device, the images are on cpu"):
        begin(fresh(), images, compute=ComputeConfig(cuda_graphs=True)).run_to(1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_replayed_steps_learn_what_launched_ones_do_and_leave_nothing_behind(dtype: DType) -> None:
    digits = load_dataset("digits")
    on_gpu = open_images(digits.train, np.arange(200), digits, "cuda")
    losses = []
    for cuda_graphs in (False, True):
        network = build_network("digits_cnn", 10).cuda()
        compute = ComputeConfig(dtype=dtype, cuda_graphs=cuda_graphs)
        training = begin(network, on_gpu, compute=compute)
        for step in (0, 7, STEPS):
            training.run_to(step)
            recalibrate_batchnorm(network, on_gpu.batches(100), dtype=dtype)
        losses.append(evaluate(network, on_gpu.batches(100)).loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3 if dtype == "float32" else 5e-2)


def test_a_few_steps_are_a_short_training_whose_peak_is_low(images: Images) -> None:
    by_length, explicit = fresh(), fresh()
    recipe = replace(RECIPE, learning_rate=None, epochs=100)
    train_steps(by_length, images, recipe, steps=6, seed=(3, 1))
    train_steps(explicit, images, replace(RECIPE, learning_rate=0.02), steps=6, seed=(3, 1))
    assert images.num_training_batches(RECIPE.batch_size) == 6  # one epoch
    assert same(learnt(by_length), learnt(explicit))
