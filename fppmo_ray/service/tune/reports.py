"""What trials of Ray Tune are given, and what they report, read as feedback."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from fppmo_ray.distribution import Feedback, Proposal, pack_mask


def config_of(proposal: Proposal) -> dict[str, Any]:
    """A proposal as a config, small and flat: Tune makes tags and folder names of it."""
    return {
        "id": proposal.proposal_id,
        "generation": proposal.generation,
        "macs": proposal.macs,
        "mask": pack_mask(proposal.keep),
        "score_seed": list(proposal.score_seed),
    }


def feedback_from(proposal_id: int, result: Mapping[str, Any]) -> Feedback:
    """The feedback in a trial's result; failed where a score is missing or is no finite number.

    Args:
        proposal_id: Of the trial.
        result: With ``val_loss``, ``val_accuracy`` and, optionally, ``rung``.
    """
    for name in ("val_loss", "val_accuracy"):
        value = result.get(name)
        if not isinstance(value, Real) or not math.isfinite(value):
            sentence = f"its trial must report {name} as a finite number, got {value}"
            return Feedback(proposal_id=proposal_id, error=sentence)
    rung = result.get("rung", 0)
    if not isinstance(rung, Integral) or rung < 0:
        sentence = f"its trial must report rung as a whole number >= 0, got {rung}"
        return Feedback(proposal_id=proposal_id, error=sentence)
    return Feedback(
        proposal_id=proposal_id,
        val_loss=float(result["val_loss"]),
        val_accuracy=float(result["val_accuracy"]),
        rung=int(rung),
    )
