"""VGG-16 with batch normalisation for 32 x 32 images.

Thirteen convolutions and one linear layer, named as in github.com/kuangliu/pytorch-cifar; the
original's three wide linear layers (1409.1556) are of no use at 32 pixels.
"""

from __future__ import annotations

from torch import Tensor, nn

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class CifarVGG(nn.Module):
    """Five stages of convolutions, each ending in a halving of the image, then one linear layer."""

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
        """Normalised images (N, 3, 32, 32) to logits (N, num_classes)."""
        logits: Tensor = self.classifier(self.features(images).flatten(1))
        return logits


def vgg16_bn(num_classes: int = 10) -> CifarVGG:
    """VGG-16-BN: 14.7 M parameters, 313.2 M MACs."""
    return CifarVGG(STAGES, num_classes)
