"""Distillation: what is learned, and from what."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import islice, repeat

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fppmo_ray.training import Augmentation, Dataset, ImageArrays, open_images
from fppmo_ray.training.distill import (
    FEW_IMAGES,
    answer_distance,
    distill,
    endless_batches,
)
from fppmo_ray.training.feature_match import FeatureMatch, relative_error


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are too small for more to help
    yield
    torch.set_num_threads(before)


class Network(nn.Module):
    def __init__(self, width: int = 8, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 5)

    def forward(self, images):
        return self.head(F.relu(self.bn(self.first(images))).mean((2, 3)))


def batches(number: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 3, 6, 6, generator=generator) for _ in range(number)]


def test_the_student_comes_closer_to_the_teachers_answers_on_other_images():
    teacher, student = Network().eval(), Network(seed=1)
    unseen = torch.cat(batches(8, seed=5))
    target = teacher(unseen)
    before = answer_distance(student.eval()(unseen), target, 4.0)
    weights = copy.deepcopy(teacher.state_dict())
    distill(student, teacher, batches(80), steps=80)
    assert answer_distance(student.eval()(unseen), target, 4.0) < 0.5 * before
    assert all(torch.equal(weights[name], part) for name, part in teacher.state_dict().items())


def test_features_are_learned_where_they_are_compared():
    teacher, student = Network().eval(), Network(width=5, seed=1)
    channels = np.array([0, 2, 3, 6, 7])
    match = FeatureMatch(module="bn", channels=channels)
    unseen = torch.cat(batches(8, seed=5))

    def error() -> float:
        with torch.no_grad():
            own, other = (net.bn(net.first(unseen)) for net in (student.eval(), teacher))
            return float(relative_error(own, other[:, channels]))

    before = error()
    distill(student, teacher, batches(80), steps=80, matches=[match])
    assert error() < 0.5 * before
    assert not any(module._forward_hooks for module in (*student.modules(), *teacher.modules()))


def test_however_steep_the_gradients_the_first_step_is_short():
    teacher, student = Network().eval(), Network(seed=1)
    with torch.no_grad():
        student.bn.weight.mul_(1e4)  # as behind a layer whose outputs hardly vary
    before = copy.deepcopy(student)
    distill(student, teacher, batches(1), steps=1, recipe=replace(FEW_IMAGES, weight_decay=0.0))
    pairs = zip(student.parameters(), before.parameters(), strict=True)
    moved = torch.cat([(after - start).detach().flatten() for after, start in pairs])
    # Rate of 0.01, a 25th of it at first; norm of 10; Nesterov's momentum of 0.9 counts in advance.
    assert float(moved.norm()) == pytest.approx(0.01 / 25 * 10 * 1.9, rel=0.01)


def test_equal_answers_have_no_distance():
    output = Network().eval()(batches(1)[0]).detach()
    assert float(answer_distance(output, output, 4.0)) == pytest.approx(0, abs=1e-6)
    assert float(relative_error(output, output)) == 0


def test_the_distance_of_logits_is_the_divergence_times_the_squared_temperature():
    output, target = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 0.0]])
    wished, own = torch.softmax(target / 2, dim=1), torch.softmax(output / 2, dim=1)
    expected = 4 * float((wished * (wished / own).log()).sum())
    assert float(answer_distance(output, target, 2.0)) == pytest.approx(expected, rel=1e-5)


def test_other_answers_are_compared_by_squared_error_over_variance():
    target = torch.tensor([[[1.0, 3.0]]])  # variance 1
    assert float(answer_distance(target + 0.5, target, 4.0)) == pytest.approx(0.25)
    assert float(relative_error(torch.ones(2), torch.zeros(2))) == 1  # a constant target


@pytest.mark.parametrize(
    ("number", "options", "message"),
    [
        (3, {"steps": 4}, "4 steps need as many batches, got 3"),
        (3, {"steps": -1}, "must be >= 0, got -1"),
    ],
)
def test_what_cannot_be_done_is_refused(number, options, message):
    with pytest.raises(ValueError, match=message):
        distill(Network(), Network(), batches(number), **options)


def test_a_loss_that_is_not_finite_is_an_error():
    endless = repeat(torch.full((4, 3, 6, 6), float("nan")))
    with pytest.raises(RuntimeError, match="the loss became nan by step 2;"):
        distill(Network(), Network(), endless, steps=3)
    with pytest.raises(RuntimeError, match="the loss became nan by step 31;"):
        distill(Network(), Network(), endless, steps=100)


def test_a_distillation_waits_for_the_gpu_once_in_32_steps(gpu):
    networks = {}
    for device in (torch.device("cpu"), gpu.device):
        student, teacher = Network(4, seed=1).to(device), Network().to(device)
        match = FeatureMatch(module="bn", channels=np.array([0, 2, 3, 5]))
        images = [batch.to(device) for batch in batches(70)]
        gpu.reset_counts()
        distill(student, teacher, images, steps=70, matches=[match])
        waits, copies = gpu.waits.total(), gpu.pageable_copies.total()
        counted = gpu.launches["aten.add_.Tensor"]
        networks[device.type] = student.cpu().state_dict()
    assert waits == 2 + 1  # after steps 32 and 64, and at the end
    assert copies == 0
    assert counted == 1  # the batches of the batch norm, at the end
    on_cpu, on_gpu = networks.values()
    assert int(on_gpu["bn.num_batches_tracked"]) == 70
    for name, weights in on_cpu.items():
        assert torch.allclose(on_gpu[name].float(), weights.float(), rtol=1e-3, atol=1e-4), name


def test_the_batches_of_a_few_images_never_end_and_follow_the_seed():
    pixels = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3)).astype(np.uint8)
    images = ImageArrays(pixels, np.zeros(10, dtype=np.int64))
    dataset = Dataset(
        name="few",
        train=images,
        test=images,
        num_classes=1,
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
        augmentation=Augmentation(padding=1, flip=True),
    )
    few = open_images(images, None, dataset)
    first, same, other = (list(islice(endless_batches(few, 4, seed=seed), 7)) for seed in (0, 0, 1))
    assert [len(part) for part, _ in first] == [4] * 7
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first[0][0], other[0][0])


class TwoHeads(nn.Module):
    """Takes two images and answers with logits and a number."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.head, self.number = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), nn.Linear(4, 1)

    def forward(self, left, right):
        features = F.relu(self.first(left) + self.first(right)).mean((2, 3))
        return {"logits": self.head(features), "number": self.number(features)}


def test_networks_of_several_inputs_and_outputs_are_distilled_by_all_of_them():
    teacher, student = TwoHeads(0), TwoHeads(1)
    left, right = batches(2, seed=5)

    def errors() -> list[float]:
        with torch.no_grad():
            own, other = student(left, right), teacher(left, right)
        return [float(answer_distance(own[name], other[name], 4.0)) for name in own]

    before = errors()
    pairs = [(one, other, "a name") for one, other in zip(batches(60), batches(60, 1), strict=True)]
    recipe = replace(FEW_IMAGES, clip_norm=1.0, learning_rate=0.02)
    distill(student, teacher, pairs, steps=60, num_inputs=2, recipe=recipe)
    assert all(after < 0.9 * first for after, first in zip(errors(), before, strict=True))
