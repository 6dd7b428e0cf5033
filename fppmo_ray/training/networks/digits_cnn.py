"""A small CNN for 8 x 8 images of one channel: the demo's network."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class DigitsCNN(nn.Module):
    """Four 3 x 3 convolutions, two at 8 pixels and two at 4, a global pool and a linear layer."""

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
        """Normalised images (N, 1, 8, 8) to logits (N, num_classes)."""
        features = F.relu(self.bn1(self.conv1(images)))
        features = F.relu(self.bn2(self.conv2(features)))
        features = F.max_pool2d(features, 2)
        features = F.relu(self.bn3(self.conv3(features)))
        features = F.relu(self.bn4(self.conv4(features)))
        features = F.adaptive_avg_pool2d(features, 1).flatten(1)
        logits: Tensor = self.linear(features)
        return logits


def digits_cnn(num_classes: int = 10) -> DigitsCNN:
    """The demo's network: 66 k parameters, 1.5 M MACs."""
    return DigitsCNN(num_classes)
