from __future__ import annotations

import math

import pytest
import torch

from fppmo_ray.training import Recipe
from fppmo_ray.training.distill import FEW_IMAGES
from fppmo_ray.training.recipe import feature_weight_of, learning_rate_at, peak_rate, training_loss

LOGITS = torch.log(torch.tensor([[0.5, 0.5], [0.2, 0.8]]))
LABELS = torch.tensor([0, 1])
CROSS_ENTROPY = -(math.log(0.5) + math.log(0.8)) / 2


def test_cosine_falls_from_the_peak_to_zero():
    recipe = Recipe(learning_rate=0.2)
    rates = [learning_rate_at(recipe, progress) for progress in (0, 1 / 3, 0.5, 2 / 3, 1)]
    assert rates == pytest.approx([0.2, 0.15, 0.1, 0.05, 0])


@pytest.mark.parametrize(
    ("epochs", "rate"),
    [
        (0, 0.02),
        (0.1, 0.02),
        (1, 0.02),
        (math.sqrt(6), math.sqrt(0.02 * 0.05)),
        (6, 0.05),
        (99, 0.05),
    ],
)
def test_the_peak_follows_the_length_of_a_training_unless_it_is_given(epochs: float, rate: float):
    assert peak_rate(Recipe(), epochs) == pytest.approx(rate)
    assert peak_rate(Recipe(learning_rate=0.3), epochs) == 0.3


@pytest.mark.parametrize(
    ("epochs", "weight"),
    [(0, 10.0), (1, 10.0), (6, 10.0), (6 * 10**0.5, 5.0), (60, 0.0), (300, 0.0)],
)
def test_features_lead_short_trainings_alone(epochs: float, weight: float) -> None:
    assert feature_weight_of(Recipe(), epochs) == pytest.approx(weight)
    assert feature_weight_of(Recipe(feature_weight=3.0), epochs) == 3.0
    assert FEW_IMAGES.feature_weight == 10.0  # its steps go over the same images many times


def test_the_schedule_has_the_peak_that_suits_the_recipes_epochs():
    assert learning_rate_at(Recipe(epochs=1), 0) == pytest.approx(0.02)
    assert learning_rate_at(Recipe(epochs=6), 0.5) == pytest.approx(0.025)


def test_one_cycle_rises_to_the_peak_before_it_falls():
    recipe = Recipe(learning_rate=0.2, schedule="one_cycle")
    rates = [learning_rate_at(recipe, progress) for progress in (0, 0.15, 0.3, 0.65, 1)]
    assert rates == pytest.approx([0.008, 0.104, 0.2, 0.1, 0])


def test_without_a_teacher_the_loss_is_cross_entropy():
    assert training_loss(LOGITS, LABELS, Recipe(), None).item() == pytest.approx(CROSS_ENTROPY)


def test_label_smoothing_gives_every_class_a_share():
    expected = 0.9 * CROSS_ENTROPY - 0.1 * (2 * math.log(0.5) + math.log(0.2 * 0.8)) / 4
    loss = training_loss(LOGITS, LABELS, Recipe(label_smoothing=0.1), None)
    assert loss.item() == pytest.approx(expected)


def test_distillation_is_the_divergence_from_the_teacher_times_temperature_squared():
    teacher = torch.log(torch.tensor([[0.9, 0.1], [0.2, 0.8]])) * 2
    recipe = Recipe(distillation_weight=0.25, distillation_temperature=2.0)
    # Halved logits: the teacher says (0.9, 0.1), the student (1/2, 1/2), for the first image;
    # (0.2, 0.8) and, from roots of 0.2 and 0.8, (1/3, 2/3) for the second.
    divergences = [
        0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5),
        0.2 * math.log(0.2 * 3) + 0.8 * math.log(0.8 * 3 / 2),
    ]
    expected = 0.75 * CROSS_ENTROPY + 0.25 * 4 * sum(divergences) / 2
    assert training_loss(LOGITS, LABELS, recipe, teacher).item() == pytest.approx(expected)


def test_a_perfect_student_has_nothing_to_learn_from_its_teacher():
    recipe = Recipe(distillation_weight=1.0)
    assert training_loss(LOGITS, LABELS, recipe, LOGITS + 3).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ({"epochs": -1}, "epochs must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"learning_rate": math.nan}, "learning_rate must be finite and > 0, got nan"),
        ({"learning_rate": math.inf}, "learning_rate must be finite and > 0, got inf"),
        ({"momentum": 0.0}, r"momentum must be in \(0, 1\), got 0.0"),
        ({"weight_decay": -1e-4}, "weight_decay must be finite and >= 0"),
        ({"schedule": "linear"}, r"schedule must be one of .*, got 'linear'"),
        ({"label_smoothing": 1.0}, "label_smoothing must be in"),
        ({"distillation_weight": 1.1}, "distillation_weight must be in"),
        ({"distillation_temperature": 0.0}, "distillation_temperature must be > 0"),
        ({"clip_norm": 0.0}, "clip_norm must be None or > 0, got 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(setting, complaint):
    with pytest.raises(ValueError, match=complaint):
        Recipe(**setting)
