"""Nothing of a proposal outlives its score, and none takes more of a GPU than its share."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fppmo_ray import Recipe, Resources, Scoring, SearchSettings, load_dataset
from fppmo_ray.distribution import Proposal
from fppmo_ray.pruning import extract
from fppmo_ray.service.image_task import image_classification
from fppmo_ray.service.problem import build_problem
from fppmo_ray.service.worker import PruningWorker
from fppmo_ray.service.worker_protocol import WeightsSnapshot, digest, to_arrays
from fppmo_ray.training import build_network


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Bench:
    """A worker in this process, and a mask for it to score."""

    def __init__(self, resources: Resources) -> None:
        network = build_network("digits_cnn", 10)
        settings = SearchSettings(
            macs_cut=0.5, fine_tune=Recipe(epochs=0), scoring=Scoring(score_steps=4)
        )
        task = image_classification(load_dataset("digits"))
        problem = build_problem(network, task, settings, resources=resources)
        keep = np.arange(problem.space.num_filters) % 2 == 0
        self.proposal = Proposal(proposal_id=0, generation=0, keep=keep, macs=0)
        arrays = to_arrays(network)
        self.weights = WeightsSnapshot(
            sha256=digest(arrays), arrays=arrays, compute=problem.compute
        )
        self.worker = PruningWorker(problem, 0)

    def score(self) -> float | None:
        return self.worker.score(self.weights, self.proposal).val_loss


@pytest.mark.usefixtures("threads")
def test_a_score_leaves_nothing_alive_of_its_network_even_without_garbage_collection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(Resources())
    remains: list[weakref.ref[Any]] = []

    def watched(*arguments: Any) -> nn.Module:
        network: nn.Module = extract(*arguments)
        remains.extend(weakref.ref(module) for module in network.modules())
        remains.extend(weakref.ref(parameter) for parameter in network.parameters())
        return network

    monkeypatch.setattr(sys.modules["fppmo_ray.pruning.score"], "extract", watched)
    gc.collect()
    gc.disable()
    try:
        bench.score()
        alive = [reference() for reference in remains if reference() is not None]
    finally:
        gc.enable()
    assert len(remains) > 10
    assert [type(item).__name__ for item in alive] == []


@pytest.mark.gpu
def test_gpu_memory_is_where_it_was_after_a_score_and_a_worker_is_held_to_its_share() -> None:
    bench = Bench(Resources(gpus=0.25))
    bench.score()  # cuDNN and cuBLAS keep work spaces
    gc.disable()
    try:
        before = torch.cuda.memory_allocated()
        losses = {bench.score() for _ in range(3)}
        after = torch.cuda.memory_allocated()
    finally:
        gc.enable()
    assert after == before
    assert len(losses) >= 1
    share = torch.cuda.get_device_properties(0).total_memory // 4
    with pytest.raises(torch.OutOfMemoryError):
        _ = _bytes_on_gpu(share + 2**20)
    torch.cuda.set_per_process_memory_fraction(1.0)


def _bytes_on_gpu(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device="cuda")
