"""torchvision's networks: everything can be pruned, and the cost is torch's own count."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fppmo_ray.pruning import extract, load_network, save_network, trace

SLOW = pytest.mark.slow


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    models = importlib.import_module("torchvision.models")
    arguments = {"init_weights": False} if name == "googlenet" else {}
    return getattr(models, name)(**arguments)


@pytest.mark.parametrize(
    ("name", "size", "num_groups"),
    [
        ("resnet18", 64, 12),
        ("mobilenet_v2", 64, 25),
        ("resnet50", 64, 37),
        pytest.param("resnet101", 64, 71, marks=SLOW),
        pytest.param("resnext50_32x4d", 64, 37, marks=SLOW),
        ("densenet121", 64, 120),
        ("googlenet", 64, 61),
        pytest.param("vgg16_bn", 32, 15, marks=SLOW),
        pytest.param("efficientnet_b0", 64, 40, marks=SLOW),
        ("shufflenet_v2_x0_5", 64, 20),
    ],
)
def test_every_group_can_be_pruned_and_macs_are_exact(
    name: str, size: int, num_groups: int
) -> None:
    network = build(name)
    images = torch.randn(2, 3, size, size)
    tracing = trace(network, images[:1])
    assert len(tracing.space.groups) == num_groups
    assert tracing.left_whole == ()
    keep = np.random.default_rng(0).random(tracing.space.num_filters) < 0.5
    keep[tracing.space.offsets] = True
    smaller = extract(network, tracing, keep)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        smaller.eval()(images[:1])
    assert tracing.space.macs(keep) == counter.get_total_flops() // 2
    smaller.train()(images)


@pytest.mark.parametrize("name", ["mobilenet_v2", "mnasnet0_5"])  # the latter's state has versions
def test_a_torchvision_network_is_rebuilt_by_name(name: str, tmp_path) -> None:
    network = build(name)
    images = torch.randn(1, 3, 64, 64)
    tracing = trace(network, images)
    keep = np.arange(tracing.space.num_filters) % 2 == 0
    smaller = extract(network, tracing, keep).eval()
    source = {"constructor": f"torchvision.models:{name}", "arguments": {"weights": "DEFAULT"}}
    path = save_network(smaller, tmp_path / "n", tracing=tracing, keep=keep, source=source)
    with torch.no_grad():
        assert torch.equal(load_network(path)(images), smaller(images))


def test_a_segmentation_network_with_outputs_by_name_is_pruned_throughout() -> None:
    models = importlib.import_module("torchvision.models.segmentation")
    torch.manual_seed(0)
    network = models.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5)
    images = torch.randn(2, 3, 64, 64)
    tracing = trace(network, images[:1])
    assert tracing.left_whole == ()
    assert len(tracing.space.groups) == 30
    smaller = extract(network, tracing, np.arange(tracing.space.num_filters) % 2 == 0)
    assert smaller.eval()(images)["out"].shape == (2, 5, 64, 64)


@SLOW
def test_a_segmentation_network_on_a_resnet_is_pruned_throughout() -> None:
    models = importlib.import_module("torchvision.models.segmentation")
    torch.manual_seed(0)
    network = models.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=3)
    images = torch.randn(2, 3, 64, 64)
    tracing = trace(network, images[:1])
    assert tracing.left_whole == ()
    keep = np.arange(tracing.space.num_filters) % 2 == 0
    smaller = extract(network, tracing, keep).eval()
    assert smaller(images)["out"].shape == (2, 3, 64, 64)
    assert sum(p.numel() for p in smaller.parameters()) == tracing.space.parameters(keep)


@pytest.fixture
def detector(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A Faster R-CNN of small images and few boxes."""
    # Without its own kernels torchvision would compile roi_align, for minutes and with a warning.
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    models = importlib.import_module("torchvision.models.detection")
    torch.manual_seed(0)
    network: nn.Module = models.fasterrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=3,
        min_size=64,
        max_size=64,
        rpn_post_nms_top_n_test=8,
        box_detections_per_img=8,
    )
    return network


IMAGE = torch.zeros(1, 3, 64, 64)


@SLOW
def test_a_detection_network_is_followed_in_eval_mode_for_it_does_not_train_without_boxes(
    detector: nn.Module,
) -> None:
    with (
        pytest.warns(UserWarning, match="targets should not be none when in training mode"),
        pytest.warns(UserWarning, match="channel groups left whole"),
    ):
        tracing = trace(detector, IMAGE)
    assert set(tracing.left_whole) == {
        "backbone.fpn.layer_blocks.0.0",
        "rpn.head.cls_logits",
        "rpn.head.bbox_pred",
    }
    keep = np.arange(tracing.space.num_filters) % 2 == 0
    smaller = extract(detector, tracing, keep).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        [found] = smaller(IMAGE)
    assert set(found) == {"boxes", "labels", "scores"}
    assert counter.get_total_flops() == 2 * tracing.space.macs(keep)


@SLOW
def test_a_detection_network_is_pruned_through_its_backbone(detector: nn.Module) -> None:
    backbone = detector.backbone
    assert isinstance(backbone, nn.Module)
    tracing = trace(backbone, IMAGE)
    assert tracing.left_whole == ()  # what the pyramid hands out has no reader in the backbone
    smaller = extract(backbone, tracing, np.arange(tracing.space.num_filters) % 2 == 0)
    levels = backbone.eval()(IMAGE)
    assert {name: part.shape for name, part in smaller.eval()(IMAGE).items()} == {
        name: part.shape for name, part in levels.items()
    }
