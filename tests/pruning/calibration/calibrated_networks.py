"""Small networks with consumers of every kind, and what their layers read, computed plainly."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGES = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
IMAGE = torch.zeros(1, 3, 8, 8)


class Chain(nn.Module):
    """Two convolutions, an operation between them that the subclass gives, and a head."""

    def __init__(self, read: int = 8, **conv) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(read, 6, 3, **({"padding": 1} | conv))
        self.head = nn.Linear(6, 4)

    def between(self, features: Tensor) -> Tensor:
        return F.relu(features)

    def forward(self, images: Tensor) -> Tensor:
        features = self.second(self.between(self.bn(self.first(images))))
        return self.head(F.relu(features).mean((2, 3)))


class Concatenated(Chain):
    def __init__(self) -> None:
        super().__init__(read=16)

    def between(self, features: Tensor) -> Tensor:
        return torch.cat([F.relu(features), F.relu(-features)], dim=1)


class Flattened(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6 * 8 * 8, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.flatten(F.relu(self.second(F.relu(self.first(images)))), 1))


class Shuffled(Chain):
    """Channels change places between the layer that makes them and the one that reads them."""

    def between(self, features: Tensor) -> Tensor:
        images, channels, height, width = features.shape
        pairs = F.relu(features).view(images, 2, channels // 2, height, width).transpose(1, 2)
        return pairs.reshape(images, channels, height, width)


class Depthwise(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def between(self, features: Tensor) -> Tensor:
        return F.relu(self.depthwise(F.relu(features)))


class Grouped(Chain):
    def __init__(self) -> None:
        super().__init__(read=12)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)

    def between(self, features: Tensor) -> Tensor:
        return F.relu(self.grouped(F.relu(features)))


class Transposed(Chain):
    def __init__(self, groups: int = 1) -> None:
        super().__init__(read=10)
        self.up = nn.ConvTranspose2d(8, 10, 3, stride=2, padding=1, groups=groups)

    def between(self, features: Tensor) -> Tensor:
        return F.relu(self.up(F.relu(features)))


class ReadTwice(Chain):
    """Two layers read the first one's filters."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Conv2d(8, 6, 1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.bn(self.first(images)))
        return self.head(F.relu(self.second(features) + self.side(features)).mean((2, 3)))


class DoubledConv(nn.Conv2d):
    """Computes with another weight than the one it holds."""

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images, 2 * self.weight, self.bias, padding=1)


class Doubled(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.second = DoubledConv(8, 6, 3)


def made(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network in float64 and eval mode with random weights and batch-norm statistics."""
    generator = torch.Generator().manual_seed(seed)
    network = network.double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(torch.randn(len(module.bias), generator=generator) * 0.3)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
    return network


def with_twin_filters(network: nn.Module) -> nn.Module:
    """Make filters 4 to 7 of the first layer equal to filters 0 to 3, in place."""
    with torch.no_grad():
        for layer in (network.first, network.bn, getattr(network, "depthwise", nn.Identity())):
            for tensor in (*layer.parameters(), *layer.buffers()):
                if tensor.dim():
                    tensor[4:] = tensor[:4]
    return network
