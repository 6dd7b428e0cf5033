"""Networks for CIFAR-10 that the studies prune beside ResNets.

python jobs/baseline.py --data DIR --network jobs.experiments.subjects:mobile_net \
        --search-val-rows search_val_rows.npy --fine-tune-epochs 12 --learning-rate 0.1 \
        --schedule one_cycle --dtype bfloat16 --output baselines/mobile_net
"""

from __future__ import annotations

from torch import nn

from fppmo_ray.training.small_networks import CifarVGG

_NUM_CLASSES = 10
_VGG16_STAGES = ((32, 32), (64, 64), (128, 128, 128), (256, 256, 256), (256, 256, 256))
# Expansion, channels, blocks and stride of each stage (1801.04381, table 2), with strides for
# images of 32 x 32 pixels.
_MOBILE_STAGES = (
    *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 1)),
    *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
)


def half_vgg() -> nn.Module:
    """Return a VGG-16 with batch norm and half of its filters: 3.7 M parameters, 79 M MACs."""
    return CifarVGG(_VGG16_STAGES, _NUM_CLASSES)


def mobile_net() -> nn.Module:
    """Return torchvision's MobileNetV2 at half width for 32 x 32 pixels: depthwise blocks."""
    from torchvision.models import MobileNetV2

    network: nn.Module = MobileNetV2(
        num_classes=_NUM_CLASSES,
        width_mult=0.5,
        inverted_residual_setting=[list(stage) for stage in _MOBILE_STAGES],
        dropout=0.0,
    )
    first = network.get_submodule("features.0.0")
    assert isinstance(first, nn.Conv2d)
    first.stride = (1, 1)
    return network
