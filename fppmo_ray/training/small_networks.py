"""Networks for small images: ResNets and a VGG for CIFAR, and a CNN for digits.

The ResNets are those of He et al. 2016 (1512.03385, section 4.2). Their module names and numerics
are those of github.com/akamaster/pytorch_resnet_cifar10, whose public weights load unchanged.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

_VGG16_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

Shortcut = Literal["A", "B"]
"""Option A pads with zero channels, option B projects with a 1 x 1 convolution (1512.03385)."""


class PaddedShortcut(nn.Module):
    """Option-A shortcut: every second pixel, with zeros as the new channels; no parameters.

    Args:
        new_channels: Number of zero channels to add.
    """

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.before = new_channels // 2
        self.after = new_channels - self.before

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C + new_channels, H / 2, W / 2)."""
        return F.pad(images[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with a shortcut around them.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the first convolution, 1 or 2.
        shortcut: Option of the shortcut where the shape changes.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int, shortcut: Shortcut
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride, shortcut)

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        residual = F.relu(self.bn1(self.conv1(images)))
        residual = self.bn2(self.conv2(residual))
        return F.relu(residual + self.shortcut(images))


def _shortcut(in_channels: int, out_channels: int, stride: int, option: Shortcut) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if option == "A":
        return PaddedShortcut(out_channels - in_channels)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class CifarResNet(nn.Module):
    """ResNet of 6 n + 2 weighted layers: stages of 16, 32 and 64 channels at 32, 16 and 8 pixels.

    Args:
        blocks_per_stage: Residual blocks n of each stage, >= 1.
        num_classes: Width of the last layer.
        shortcut: Option of the shortcuts between stages.
    """

    def __init__(self, blocks_per_stage: int, num_classes: int, shortcut: Shortcut) -> None:
        super().__init__()
        if shortcut not in ("A", "B"):
            raise ValueError(f"shortcut must be 'A' or 'B', got {shortcut!r}")
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(blocks_per_stage, 16, 16, stride=1, shortcut=shortcut)
        self.layer2 = _stage(blocks_per_stage, 16, 32, stride=2, shortcut=shortcut)
        self.layer3 = _stage(blocks_per_stage, 32, 64, stride=2, shortcut=shortcut)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (N, 3, 32, 32) to logits (N, num_classes)."""
        features = F.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(features)))
        features = F.adaptive_avg_pool2d(features, 1).flatten(1)
        logits: Tensor = self.linear(features)
        return logits


def _stage(
    num_blocks: int, in_channels: int, out_channels: int, *, stride: int, shortcut: Shortcut
) -> nn.Sequential:
    first = ResidualBlock(in_channels, out_channels, stride=stride, shortcut=shortcut)
    others = [
        ResidualBlock(out_channels, out_channels, stride=1, shortcut=shortcut)
        for _ in range(num_blocks - 1)
    ]
    return nn.Sequential(first, *others)


def resnet20(num_classes: int = 10, *, shortcut: Shortcut = "A") -> CifarResNet:
    """Return a ResNet-20: 0.27 M parameters, 40.6 M MACs (option A).

    Args:
        num_classes: Width of the last layer.
        shortcut: Option of the shortcuts between stages.
    """
    return CifarResNet(3, num_classes, shortcut)


def resnet32(num_classes: int = 10, *, shortcut: Shortcut = "A") -> CifarResNet:
    """Return a ResNet-32: 0.46 M parameters, 68.9 M MACs (option A).

    Args:
        num_classes: Width of the last layer.
        shortcut: Option of the shortcuts between stages.
    """
    return CifarResNet(5, num_classes, shortcut)


def resnet44(num_classes: int = 10, *, shortcut: Shortcut = "A") -> CifarResNet:
    """Return a ResNet-44: 0.66 M parameters, 97.2 M MACs (option A).

    Args:
        num_classes: Width of the last layer.
        shortcut: Option of the shortcuts between stages.
    """
    return CifarResNet(7, num_classes, shortcut)


def resnet56(num_classes: int = 10, *, shortcut: Shortcut = "A") -> CifarResNet:
    """Return a ResNet-56: 0.85 M parameters, 125.5 M MACs (option A).

    Args:
        num_classes: Width of the last layer.
        shortcut: Option of the shortcuts between stages.
    """
    return CifarResNet(9, num_classes, shortcut)


def resnet110(num_classes: int = 10, *, shortcut: Shortcut = "A") -> CifarResNet:
    """Return a ResNet-110: 1.73 M parameters, 252.9 M MACs (option A).

    Args:
        num_classes: Width of the last layer.
        shortcut: Option of the shortcuts between stages.
    """
    return CifarResNet(18, num_classes, shortcut)


class CifarVGG(nn.Module):
    """VGG with batch norm: stages of 3 x 3 convolutions and max-pooling, then one linear layer.

    Args:
        stages: Channels of each convolution, stage by stage.
        num_classes: Width of the last layer.
    """

    def __init__(self, stages: tuple[tuple[int, ...], ...], num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        in_channels = 3
        for widths in stages:
            for width in widths:
                layers += [nn.Conv2d(in_channels, width, 3, padding=1), nn.BatchNorm2d(width)]
                layers += [nn.ReLU(inplace=True)]
                in_channels = width
            layers += [nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(in_channels, num_classes)
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (N, 3, 32, 32) to logits (N, num_classes)."""
        logits: Tensor = self.classifier(self.features(images).flatten(1))
        return logits


def vgg16_bn(num_classes: int = 10) -> CifarVGG:
    """Return a VGG-16-BN: 14.7 M parameters, 313.2 M MACs."""
    return CifarVGG(_VGG16_STAGES, num_classes)


class DigitsCNN(nn.Module):
    """Small CNN for 8 x 8 grey images: four convolutions, a global pool and a linear layer.

    Args:
        num_classes: Width of the last layer.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(64)
        self.conv4 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.bn4 = nn.BatchNorm2d(64)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (N, 1, 8, 8) to logits (N, num_classes)."""
        features = F.relu(self.bn1(self.conv1(images)))
        features = F.relu(self.bn2(self.conv2(features)))
        features = F.max_pool2d(features, 2)
        features = F.relu(self.bn3(self.conv3(features)))
        features = F.relu(self.bn4(self.conv4(features)))
        features = F.adaptive_avg_pool2d(features, 1).flatten(1)
        logits: Tensor = self.linear(features)
        return logits


def digits_cnn(num_classes: int = 10) -> DigitsCNN:
    """Return the demo's network: 66 k parameters, 1.5 M MACs."""
    return DigitsCNN(num_classes)
