"""What travels between the probability model and the workers: proposals and feedback."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass

import numpy as np

from fppmo_ray.distribution.space import BoolArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Proposal:
    """A candidate mask. It already meets its MACs budget; workers never repair it."""

    proposal_id: int
    """Unique within a search, counted from 0 in the order of asking."""
    generation: int
    keep: BoolArray
    """``(num_filters,)``, True = kept."""
    macs: int
    """Exact multiply-accumulates of the pruned network."""
    score_seed: tuple[int, int]
    """(search seed, generation): common random numbers for all proposals of a generation."""
    rung: int | None = None
    """How deep to score it (fine-tuning steps, say); None: whoever scores decides."""
    macs_cut: float | None = None
    """The one it is for, of several; None in a search for a single budget."""


@dataclass(frozen=True, eq=False)
class Finalist:
    """A mask worth rescoring at the end of a search."""

    name: str
    """``mode``, ``averaged mode``, ``sample <id>`` or ``importance-only``."""
    keep: BoolArray
    """``(num_filters,)``, True = kept."""
    macs_cut: float | None = None
    """The one it is for, of several; None in a search for a single budget."""


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """How a proposal fared: its score on search-val, or the error it ended with.

    A failed proposal is a state, never a fake value: with ``error`` set, the numbers are None.
    """

    proposal_id: int
    val_loss: float | None = None
    """What is to become small, finite: mean cross-entropy on search-val, or minus a score."""
    val_accuracy: float | None = None
    """Share of search-val images classified rightly, in [0, 1]; None where nothing is classified.
    """
    error: str | None = None
    rung: int = 0
    """How deep the score is, >= 0: fine-tuning steps, say. Of two rungs the deeper ranks first,
    whatever the scores: what was stopped early was stopped for being worse."""

    def __post_init__(self) -> None:
        if self.rung < 0:
            raise ValueError(
                f"rung of proposal {self.proposal_id} must be at least 0, got {self.rung}"
            )
        if self.error is not None:
            if self.val_loss is not None or self.val_accuracy is not None:
                raise ValueError(
                    f"feedback of failed proposal {self.proposal_id} must have no score, got "
                    f"loss {self.val_loss} and accuracy {self.val_accuracy}"
                )
            return
        for name in ("val_loss", "val_accuracy"):
            value = getattr(self, name)
            if value is None and name == "val_accuracy":
                continue
            if value is None or not math.isfinite(value):
                raise ValueError(
                    f"{name} of proposal {self.proposal_id} must be finite, got {value}; "
                    "report a failed proposal with error='...' and no score"
                )

    @property
    def failed(self) -> bool:
        """Whether the proposal ended with an error instead of a score."""
        return self.error is not None


def pack_mask(keep: BoolArray) -> str:
    """A mask as base64 text of its packed bits, for the journal."""
    return base64.b64encode(np.packbits(keep).tobytes()).decode("ascii")


def unpack_mask(text: str, num_filters: int) -> BoolArray:
    """The mask ``(num_filters,)`` that ``pack_mask`` wrote.

    Raises:
        ValueError: the text holds another number of filters.
    """
    bits = np.frombuffer(base64.b64decode(text), dtype=np.uint8)
    if len(bits) != -(-num_filters // 8):
        raise ValueError(
            f"expected a mask of {num_filters} filters in {-(-num_filters // 8)} bytes, "
            f"got {len(bits)} bytes; the mask belongs to another network"
        )
    return np.unpackbits(bits, count=num_filters).astype(bool)
