"""Files of a network that lies on a GPU: those of the same network on the CPU.

Torch's exporters record the operations of the copy on the CPU. The pretended device intercepts all
operations in Python, so it is switched off while they do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from fppmo_ray.pruning import Tracing, export, extract, load_network, save_network, trace
from fppmo_ray.pruning.export import ExchangeFormat, export_network, open_exported
from fppmo_ray.pruning.files import write_safetensors
from fppmo_ray.testing.pretended_gpu import PretendedGpu

IMAGE = torch.zeros(1, 3, 8, 8)

Pruned = tuple[nn.Module, nn.Module, Tracing, np.ndarray]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 6, 3), nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        features = torch.relu(self.second(torch.relu(self.bn(self.first(images)))))
        return self.head(features.mean((2, 3)))


@pytest.fixture
def pruned(gpu: PretendedGpu) -> Pruned:
    """The same pruned network on the CPU and on the GPU, and how it was pruned."""
    torch.manual_seed(0)
    dense = Net()
    tracing = trace(dense, IMAGE)
    keep = np.arange(tracing.space.num_filters) % 2 == 0
    on_cpu = extract(dense, tracing, keep)
    return on_cpu, copy.deepcopy(on_cpu).to(gpu.device), tracing, keep


def without_modes(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        with _disable_current_modes():
            return function(*arguments)

    return run


@pytest.mark.parametrize("format", ["torchscript", "torch.export"])
def test_an_export_from_a_gpu_is_the_cpus_file(
    pruned: Pruned, format: ExchangeFormat, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, read = export._WAYS[format]
    monkeypatch.setitem(export._WAYS, format, (without_modes(write), without_modes(read)))
    on_cpu, on_gpu, _, _ = pruned
    files = [
        export_network(network, tmp_path / name / "net", format=format, example_inputs=IMAGE)
        for name, network in (("cpu", on_cpu), ("gpu", on_gpu))
    ]
    images = (torch.randn(3, 3, 8, 8),)
    ours, wanted = (without_modes(open_exported(file)[0])(images) for file in files)
    assert all(torch.equal(*pair) for pair in zip(ours, wanted, strict=True))
    if format != "torchscript":  # in which torch numbers the classes of a process
        assert files[0].read_bytes() == files[1].read_bytes()
    assert all(parameter.device.type != "cpu" for parameter in on_gpu.parameters())
    assert all(module.training for module in on_gpu.modules())


def test_a_file_saved_from_a_gpu_is_the_cpus_and_is_loaded_on_the_cpu(
    pruned: Pruned, tmp_path
) -> None:
    on_cpu, on_gpu, tracing, keep = pruned
    found = []
    for name, network in (("cpu", on_cpu), ("gpu", on_gpu)):
        recipe = save_network(network, tmp_path / name / "net", tracing=tracing, keep=keep)
        tensors, _ = write_safetensors(recipe, tmp_path / name / "safe")
        found.append((recipe.with_suffix(".pt").read_bytes(), tensors.read_bytes()))
    assert found[0] == found[1]
    loaded = load_network(recipe, constructor=Net)
    assert all(parameter.device.type == "cpu" for parameter in loaded.parameters())
