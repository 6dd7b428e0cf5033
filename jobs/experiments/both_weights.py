"""What is read of a network that some recipe has fine-tuned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fine_tuning import Tuned, Tuner
from torch import nn


def look_at_both_weights(tuner: Tuner, tuned: Tuned) -> Mapping[str, Any]:
    """Accuracies with the averaged and with the last weights; the test images decide nothing."""
    return {
        "averaged": _look(tuner, tuned.network),
        "last": _look(tuner, tuned.unaveraged()),
        "epochs": tuned.epochs,
    }


def _look(tuner: Tuner, network: nn.Module) -> dict[str, Any]:
    return {**tuner.look_at_held_out(network), "test": tuner.look(network, "test")}
