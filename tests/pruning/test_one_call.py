"""Pruning in one call: what comes back, what it was chosen by, and what is refused."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from inspect import signature

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fppmo_ray.pruning import extract, one_call, trace
from fppmo_ray.pruning.calibration.divergence import answers, divergence
from fppmo_ray.pruning.one_call import prune, prune_with_report
from fppmo_ray.training import recalibrate_batchnorm

IMAGE = torch.zeros(1, 3, 8, 8)


class Small(nn.Module):
    """Half of the first layer's filters are copies of the other half, with a little noise."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 12, 3, padding=1)
        self.head = nn.Linear(12, 5)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            for tensor in (self.first.weight, self.first.bias, self.bn.weight, self.bn.bias):
                noise = 0.02 * torch.randn(tensor[8:].shape, generator=generator)
                tensor[8:] = tensor[:8] + noise

    def forward(self, images):
        features = F.relu(self.bn(self.first(images)))
        return self.head(F.relu(self.second(features)).mean((2, 3)))


def images(count: int = 96) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_the_network_is_smaller_and_answers_as_before():
    network = Small()
    recalibrate_batchnorm(network, [(images(), None)])  # as training would have left it
    before = copy.deepcopy(network.state_dict())
    smaller = prune(network, IMAGE, images(), macs_cut=0.4, ignore=["second"])
    assert smaller.first.out_channels == 9
    assert not smaller.training
    unseen = torch.randn(64, 3, 8, 8)
    plain = prune(
        network, IMAGE, images(), macs_cut=0.4, importance="l1", refit=False, ignore=["second"]
    )
    assert plain.first.out_channels == 9
    targets = answers(network, [unseen])
    assert divergence(smaller, [unseen], targets) < 0.2 * divergence(plain, [unseen], targets)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_the_report_says_what_was_done():
    network = Small()
    report = prune_with_report(network, IMAGE, images(), macs_cut=0.5)
    kept = extract(network, report.tracing, report.keep)
    shapes = [tuple(p.shape) for p in report.network.parameters()]
    assert shapes == [tuple(p.shape) for p in kept.parameters()]
    space = report.tracing.space
    assert report.macs_cut == 1 - space.macs(report.keep) / space.dense_macs >= 0.5
    assert report.params_cut == 1 - sum(p.numel() for p in kept.parameters()) / sum(
        p.numel() for p in network.parameters()
    )
    assert report.gamma in (0.0, 1.0, 3.0)
    assert report.num_images == 96
    targets = answers(network, [images()])
    distance = divergence(report.network, [images()], targets)
    assert report.divergence == pytest.approx(distance, rel=1e-3)
    refits = {"extract and refit", "recalibrate", "reconstruct"}
    stages = {"trace", "calibrate", "order", "compare", "check"} | refits
    assert set(report.seconds) == stages


def test_a_smaller_network_that_is_not_exact_is_not_returned(monkeypatch):
    def wrong(*arguments, **options):
        tracing = trace(*arguments, **options)
        for part in tracing.slices:
            if part.tensor.endswith("running_mean"):
                part.units[:2] = part.units[1::-1]
        return tracing

    monkeypatch.setattr(one_call, "trace", wrong)
    with pytest.raises(ValueError, match=r"computes something else .*: its output is off by"):
        prune(Small(), IMAGE, images(), macs_cut=0.5)


def test_of_several_gammas_the_one_that_diverges_least_is_taken():
    network = Small()
    alone = [prune_with_report(network, IMAGE, images(), gamma=gamma) for gamma in (0.3, 1, 30)]
    best = prune_with_report(network, IMAGE, images(), gamma=(0.3, 1, 30))
    assert best.divergence == min(report.divergence for report in alone)


@pytest.mark.parametrize("importance", ["l1", "l2", "fpgm", "bn_scale"])
def test_other_criteria_remove_the_same_share_of_every_group(importance):
    network = Small()
    ignored = ["second"] if importance == "bn_scale" else []
    report = prune_with_report(network, IMAGE, images(), importance=importance, ignore=ignored)
    widths = report.tracing.space.widths(report.keep) / report.tracing.space.dense_widths
    assert report.gamma is None
    assert widths.max() - widths.min() < 0.1


def test_taylor_takes_labelled_batches():
    labels = torch.arange(96) % 5
    batches = [(images()[:48], labels[:48]), (images()[48:], labels[48:])]
    report = prune_with_report(Small(), IMAGE, batches, importance="taylor")
    assert report.num_images == 96
    with pytest.raises(ValueError, match="'taylor' needs labels"):
        prune(Small(), IMAGE, images(), importance="taylor")


def test_batches_and_one_tensor_give_the_same_network():
    one = prune(Small(), IMAGE, images())
    other = prune(Small(), IMAGE, [images()])
    for first, second in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(first, second)


def test_further_cuts_and_multiples_hold():
    report = prune_with_report(
        Small(), IMAGE, images(), macs_cut=0, further_cuts={"params": 0.6}, width_multiple=4
    )
    assert report.params_cut >= 0.6
    assert all(width % 4 == 0 for width in report.tracing.space.widths(report.keep))


def test_prune_takes_what_prune_with_report_takes_and_says_so() -> None:
    ours, reported = signature(prune), signature(prune_with_report)
    assert ours.parameters == reported.parameters
    assert list(ours.parameters)[:3] == ["network", "example_inputs", "images"]
    assert ours.return_annotation == "nn.Module"
    assert pickle.loads(pickle.dumps(prune)) is prune


def test_masks_that_several_gammas_share_are_tried_once(monkeypatch) -> None:
    tried = []

    def noted(network, tracing, keep):
        tried.append(keep.tobytes())
        return extract(network, tracing, keep)

    monkeypatch.setattr(one_call, "extract", noted)
    report = prune_with_report(Small(), IMAGE, images(), gamma=(1.0, 1.0, 1.0 + 1e-12, 30.0))
    assert len(tried) == len(set(tried)) <= 2
    assert report.gamma in (1.0, 30.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"macs_cut": 1.2}, r"macs_cut must be in \(0, 1\)"),
        ({"macs_cut": 0.999}, "macs_cut must be at most"),
        ({"importance": "best"}, "importance must be one of obs, l1"),
        ({"gamma": -1.0}, "gamma must be finite and >= 0"),
        ({"gamma": ()}, "one number >= 0 or several, got none"),
        ({"further_cuts": {"latency": 0.3}}, "needs a space that tells a table of latencies"),
        ({"ignore": ["third"]}, "layers that the network does not have"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        prune(Small(), IMAGE, images(), **options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "expected batches of images without labels, got none"),
        (torch.zeros(0, 3, 8, 8), "expected batches of images without labels, got none"),
        (torch.zeros(3, 8, 8), "begin with the network's inputs, tensors with a batch axis"),
        (["photo.png"], r"inputs, tensors with a batch axis .* got \['str'\]"),
    ],
)
def test_what_are_no_images_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        prune(Small(), IMAGE, given)


def test_a_network_without_batch_norm_is_pruned_too():
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 5),
    )
    torch.manual_seed(0)
    report = prune_with_report(network, IMAGE, images(), macs_cut=0.3)
    plain = prune_with_report(network, IMAGE, images(), macs_cut=0.3, refit=False)
    assert report.divergence < plain.divergence


def test_outputs_that_are_no_logits_are_compared_by_squared_error():
    dense = nn.Conv2d(3, 3, 1)
    other = copy.deepcopy(dense)
    batch = images(32)
    with torch.no_grad():
        other.bias += 0.5
        variance = dense(batch).var(correction=0)
    targets = answers(dense, [batch])
    assert divergence(other, [batch], targets) == pytest.approx(float(0.25 / variance), rel=1e-4)
    assert divergence(dense, [batch], targets) == 0


def test_it_needs_no_ray():
    code = "import sys, fppmo_ray.pruning.one_call; print('ray' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


def test_distillation_brings_the_network_closer_to_the_dense_one_on_other_images():
    network = Small()
    recalibrate_batchnorm(network, [images()])
    unseen = torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    targets = answers(network, [unseen])

    def distance(distill_steps: int) -> float:
        options = {"macs_cut": 0.6, "refit": False}  # a refit leaves next to nothing to learn here
        smaller = prune(network, IMAGE, images(), distill_steps=distill_steps, **options)
        return divergence(smaller, [unseen], targets)

    assert distance(60) < 0.8 * distance(0)
    assert distance(3) == distance(3)


def test_the_images_of_the_distillation_are_augmented_if_asked_for():
    seen = []

    def flipped(batch: torch.Tensor) -> torch.Tensor:
        seen.append(batch)
        return batch.flip(3)

    report = prune_with_report(Small(), IMAGE, images(), distill_steps=2, augment=flipped)
    assert [tuple(batch.shape) for batch in seen] == [(96, 3, 8, 8)] * 2
    assert report.seconds["distill"] > 0
    with pytest.raises(ValueError, match="distill_steps must be >= 0, got -1"):
        prune(Small(), IMAGE, images(), distill_steps=-1)
