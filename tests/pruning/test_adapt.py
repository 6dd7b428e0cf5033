"""Adaptation: dense weights that serve many masks, a function of their arguments alone."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fppmo_ray.distribution import Budget
from fppmo_ray.pruning import extract, trace
from fppmo_ray.pruning.adapt import adapt_epoch
from fppmo_ray.training import (
    ComputeConfig,
    Recipe,
    TrainingState,
    build_network,
    evaluate,
    fine_tune,
    load_dataset,
    open_images,
    recalibrate_batchnorm,
    state_from_bytes,
    state_to_bytes,
    train_epoch,
)

RECIPE = Recipe(epochs=2, batch_size=32, learning_rate=0.05, distillation_weight=0.5)


@pytest.fixture(scope="module")
def images():
    digits = load_dataset("digits")
    return open_images(digits.train, np.arange(192), digits)


@pytest.fixture(scope="module")
def dense(images) -> nn.Module:
    network = build_network("digits_cnn", 10, seed=0)
    fine_tune(network, images, replace(RECIPE, epochs=10, distillation_weight=0.0), seed=0)
    return network.eval()


@pytest.fixture(scope="module")
def tracing(dense):
    return trace(dense, torch.zeros(1, 1, 8, 8))


def random_masks(tracing, count: int) -> list[np.ndarray]:
    budget, rng = Budget.from_cut(tracing.space, 0.5), np.random.default_rng(0)
    return [budget.fill(rng.random(tracing.space.num_filters)) for _ in range(count)]


def adapt(dense, tracing, masks, images, *, in_files: bool = False, recipe=RECIPE, **others):
    """The state after all epochs."""
    teacher, state = copy.deepcopy(dense), None
    network = copy.deepcopy(dense)
    for epoch in range(recipe.epochs):
        if in_files:  # another process, that knows nothing but the state
            network = build_network("digits_cnn", 10, seed=7)
            network.train(epoch == 0)
            if state is None:
                network.load_state_dict(dense.state_dict())
            else:
                state = state_from_bytes(state_to_bytes(state))
        state, report = adapt_epoch(
            network,
            tracing,
            np.array(masks),
            images,
            recipe,
            epoch=epoch,
            seed=(3, 1),
            state=state,
            teacher=teacher,
            **others,
        )
        assert report.epoch == epoch
    assert "forward" not in network.__dict__
    return state


def assert_equal(state: TrainingState, tensors: dict[str, Tensor]) -> None:
    assert state.network.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(state.network[name], tensor), name


def loss_under(network: nn.Module, tracing, masks, images) -> float:
    """Mean over masks, recalibrated."""
    losses = []
    for keep in masks:
        smaller = extract(network, tracing, keep)
        recalibrate_batchnorm(smaller, images.batches(96))
        losses.append(evaluate(smaller, images.batches(96)).loss)
    return float(np.mean(losses))


def test_adapted_weights_serve_masks_that_they_have_not_seen(dense, tracing, images) -> None:
    *masks, unseen = random_masks(tracing, 9)
    adapted = copy.deepcopy(dense)
    recipe = replace(RECIPE, epochs=5)
    adapted.load_state_dict(adapt(dense, tracing, masks, images, recipe=recipe).network)
    before, after = (loss_under(item, tracing, [unseen], images) for item in (dense, adapted))
    assert after < 0.8 * before


def test_an_adaptation_interrupted_between_epochs_ends_alike(dense, tracing, images) -> None:
    masks = random_masks(tracing, 4)  # 6 steps an epoch: each begins with another mask
    whole = adapt(dense, tracing, masks, images)
    assert_equal(adapt(dense, tracing, masks, images, in_files=True), whole.network)


def test_filters_that_no_mask_keeps_only_decay_and_the_caller_s_network_is_whole_again(
    dense, tracing, images
) -> None:
    [keep] = random_masks(tracing, 1)
    recipe = replace(RECIPE, epochs=1, weight_decay=0.0)
    state = adapt(dense, tracing, [keep], images, recipe=recipe)
    gone = ~keep[:32]  # of conv1, the first group
    assert tracing.space.groups[0].name == "conv1"
    before, after = dense.conv1.weight, state.network["conv1.weight"]
    assert gone.any()
    assert torch.equal(after[gone], before[gone])
    assert not torch.equal(after[~gone], before[~gone])


def test_under_the_full_mask_it_is_plain_training_but_for_the_statistics(
    dense, tracing, images
) -> None:
    full = np.ones(tracing.space.num_filters, dtype=bool)
    recipe = replace(RECIPE, epochs=1)
    adapted = adapt(dense, tracing, [full], images, recipe=recipe)
    plain = copy.deepcopy(dense)
    train_epoch(
        plain, images, recipe, epoch=0, seed=(3, 1), state=None, teacher=copy.deepcopy(dense)
    )
    for name, parameter in plain.named_parameters():
        assert torch.equal(adapted.network[name], parameter), name


def test_the_configured_arithmetic_is_used(dense, tracing, images) -> None:
    masks, recipe = random_masks(tracing, 2), replace(RECIPE, epochs=1)
    states = [
        adapt(dense, tracing, masks, images, recipe=recipe, compute=ComputeConfig(dtype=dtype))
        for dtype in ("float32", "bfloat16")
    ]
    weights = [state.network["conv2.weight"] for state in states]
    assert not torch.equal(*weights)
    torch.testing.assert_close(*weights, rtol=0.1, atol=0.02)


def test_without_masks_or_with_those_of_another_network_it_is_refused(
    dense, tracing, images
) -> None:
    with pytest.raises(ValueError, match="adapted to masks, got none"):
        adapt(dense, tracing, [], images)
    with pytest.raises(ValueError, match="another network"):
        adapt(dense, tracing, [np.ones(5, dtype=bool)], images)
