"""What is read of every network of a comparison, after the same fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fine_tuning import Figures, Tuned, Tuner
from torch import nn


def look_before_and_after(
    tuner: Tuner, tuned: Tuned, *, known: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Accuracies before and after fine-tuning; only now the test images are looked at.

    Args:
        tuner: Of the network.
        tuned: Whose fine-tuning is over.
        known: Figures that are known already.
    """
    return {
        **known,
        "parameters": sum(parameter.numel() for parameter in tuned.network.parameters()),
        "epochs": tuned.epochs,
        "tuning_seconds": tuned.seconds,
        "before": _look(tuner, tuner.untrained(tuned.task, tuned.weights)),
        "after": _look(tuner, tuned.network),
    }


def _look(tuner: Tuner, network: nn.Module) -> dict[str, Figures]:
    return {split: tuner.look(network, split) for split in ("choose_val", "test")}
