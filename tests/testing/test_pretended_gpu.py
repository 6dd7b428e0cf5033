"""The pretended GPU refuses and counts what a CUDA device refuses and waits for."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from fppmo_ray.testing.pretended_gpu import PretendedGpu


def test_it_computes_what_the_cpu_computes_forward_and_backward(gpu: PretendedGpu) -> None:
    torch.manual_seed(0)
    layer, images = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    expected = layer(images).square().sum()
    [wanted] = torch.autograd.grad(expected, [layer.weight])
    layer.to(gpu.device)
    found = layer(images.to(gpu.device)).square().sum()
    [gradient] = torch.autograd.grad(found, [layer.weight])
    assert gradient.device == gpu.device
    assert torch.equal(found.cpu(), expected)
    assert torch.equal(gradient.cpu(), wanted)


def test_tensors_of_both_devices_do_not_mix(gpu: PretendedGpu) -> None:
    ones = torch.ones(3, device=gpu.device)
    assert (ones * torch.tensor(2.0)).tolist() == [2.0] * 3  # numbers without axes may
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        ones + torch.ones(3)
    with pytest.raises(TypeError, match="can't convert pretend:0 device type tensor to numpy"):
        ones.numpy()


@pytest.mark.parametrize(
    "read",
    [
        lambda tensor: float(tensor[0]),
        lambda tensor: tensor.tolist(),
        lambda tensor: tensor.cpu(),
        lambda tensor: torch.nonzero(tensor),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: torch.zeros(3).copy_(tensor),
    ],
)
def test_reading_its_memory_is_a_wait_and_refused_in_a_capture(
    gpu: PretendedGpu, read: object
) -> None:
    assert callable(read)
    ones = torch.ones(3, device=gpu.device)
    assert gpu.waits.total() == 0
    read(ones)
    assert gpu.waits.total() == 1
    with pytest.raises(RuntimeError, match="stream is capturing"), gpu.graph(gpu.CUDAGraph()):
        read(ones)


def test_copies_from_pinned_memory_are_not_waited_for(gpu: PretendedGpu) -> None:
    pageable, pinned = torch.ones(3), torch.empty(3, pin_memory=True)
    assert pinned.is_pinned()
    assert not pageable.is_pinned()
    assert pageable.pin_memory()[1:].is_pinned()
    pinned.to(gpu.device, non_blocking=True)
    assert gpu.pageable_copies.total() == 0
    pinned.to(gpu.device)
    pageable.to(gpu.device, non_blocking=True)
    torch.zeros(3, device=gpu.device).copy_(pageable)
    assert gpu.pageable_copies.total() == 3


def test_memory_is_counted_and_limited(gpu: PretendedGpu) -> None:
    before = gpu.memory_allocated()
    kept = torch.zeros(1000, device=gpu.device)
    view = kept[10:]
    assert gpu.memory_allocated() - before == 4000
    del kept
    assert gpu.memory_allocated() - before == 4000  # the view still needs it
    del view
    assert gpu.memory_allocated() == before
    gpu.set_per_process_memory_fraction(1e-4)
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros(2**20, device=gpu.device)
    assert gpu.memory_allocated() == before


def test_a_capture_changes_nothing_and_a_replay_repeats_it_on_the_same_memory(
    gpu: PretendedGpu,
) -> None:
    total, given = torch.zeros(2, device=gpu.device), torch.ones(2, device=gpu.device)
    graph = gpu.CUDAGraph()
    with gpu.graph(graph):
        doubled = given * 2
        total.add_(doubled)
    assert total.tolist() == [0, 0]
    given.fill_(3)
    graph.replay()
    given.fill_(5)
    graph.replay()
    assert total.tolist() == [6 + 10] * 2
    assert doubled.tolist() == [10, 10]
    assert gpu.replays == 2


def test_batch_statistics_that_a_schema_does_not_tell_of_are_undone_after_a_capture(
    gpu: PretendedGpu,
) -> None:
    norm = nn.BatchNorm2d(2).to(gpu.device).train()
    images = torch.full((1, 2, 2, 2), 4.0).to(gpu.device)
    graph = gpu.CUDAGraph()
    with gpu.graph(graph), torch.no_grad():
        norm(images)
    assert norm.running_mean is not None
    assert norm.running_mean.tolist() == [0, 0]
    graph.replay()
    assert norm.running_mean.tolist() == pytest.approx([0.4, 0.4])


def test_a_replay_that_reads_freed_memory_is_noticed_and_a_reset_frees_the_graphs_own(
    gpu: PretendedGpu,
) -> None:
    gc.collect()  # what earlier tests left
    before = gpu.memory_allocated()
    given = torch.ones(100, device=gpu.device)
    graph = gpu.CUDAGraph()
    with gpu.graph(graph):
        doubled = given * 2
    del given
    with pytest.raises(RuntimeError, match="reads memory which was freed"):
        graph.replay()
    del doubled
    gc.collect()
    graph.reset()
    assert gpu.memory_allocated() == before
