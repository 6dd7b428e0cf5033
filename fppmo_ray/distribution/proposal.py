"""The two records of a search: a proposal, which is a mask to score, and its feedback.

The optimizer, the workers' calls, the journal, the progress and Ray Tune all speak these two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fppmo_ray.distribution.merit import HasScore
from fppmo_ray.distribution.space import BoolArray

LARGEST_FIGURE = 1e100
"""Largest size of a score's figure."""


def fault_of(figure: float) -> str | None:
    """Return what forbids a number as a figure of a score, such as ``not finite``; else None.

    Figures are averaged and squared, which numbers near the largest float would overflow.
    """
    if abs(figure) <= LARGEST_FIGURE:
        return None
    is_infinite = abs(figure) == math.inf or figure != figure  # NaN alone differs from itself
    return "not finite" if is_infinite else f"beyond {LARGEST_FIGURE:g} in size"


def score_of(feedback: HasScore) -> float | None:
    """Return the figure that people read; see ``Feedback.score``."""
    if feedback.val_accuracy is not None or feedback.val_loss is None:
        return feedback.val_accuracy
    return -feedback.val_loss


class PackedMask(NamedTuple):
    """A mask as bits, an eighth of a byte per filter."""

    bits: bytes
    """The bits, filled up with zeros to whole bytes."""
    num_filters: int
    """Length of the mask."""

    @classmethod
    def of(cls, keep: BoolArray) -> PackedMask:
        """Return a mask ``(num_filters,)`` as bits."""
        return cls(np.packbits(keep).tobytes(), len(keep))

    @classmethod
    def of_each(cls, masks: BoolArray) -> list[PackedMask]:
        """Return masks ``(num_masks, num_filters)`` as bits."""
        return [cls(bits.tobytes(), masks.shape[1]) for bits in np.packbits(masks, axis=1)]

    def keep(self) -> BoolArray:
        """Return the mask as a new array, ``(num_filters,)``, True = kept."""
        bits = np.frombuffer(self.bits, dtype=np.uint8)
        return np.unpackbits(bits, count=self.num_filters).astype(bool)


@dataclass(frozen=True, eq=False, slots=True, init=False)
class Proposal:
    """A candidate mask. It meets its budget; workers never repair it.

    A driver keeps all of a search's proposals, so the mask is held as bits.
    """

    proposal_id: int
    """Unique within a search, counted from 0 in the order of asking."""
    generation: int
    """Round of proposals that it belongs to, counted from 0."""
    packed: PackedMask
    """The mask as bits."""
    macs: int
    """Exact multiply-accumulates of the pruned network for one input."""
    parameters: int
    """Exact parameters of the pruned network; 0 where the space does not know tensor sizes."""
    score_seed: tuple[int, int]
    """(search seed, generation): all proposals of a generation share their random numbers."""
    macs_cut: float | None
    """Budget that the mask is for, in a search with several budgets; else None."""

    def __init__(
        self,
        *,
        proposal_id: int,
        generation: int,
        keep: BoolArray | PackedMask,
        macs: int,
        parameters: int = 0,
        score_seed: tuple[int, int] = (0, 0),
        macs_cut: float | None = None,
    ) -> None:
        """Make a proposal.

        Args:
            proposal_id: See the attribute.
            generation: See the attribute.
            keep: The mask ``(num_filters,)``, True = kept, or its bits.
            macs: See the attribute.
            parameters: See the attribute.
            score_seed: See the attribute.
            macs_cut: See the attribute.
        """
        packed = keep if isinstance(keep, PackedMask) else PackedMask.of(keep)
        object.__setattr__(self, "proposal_id", proposal_id)
        object.__setattr__(self, "generation", generation)
        object.__setattr__(self, "packed", packed)
        object.__setattr__(self, "macs", macs)
        object.__setattr__(self, "parameters", parameters)
        object.__setattr__(self, "score_seed", score_seed)
        object.__setattr__(self, "macs_cut", macs_cut)

    @property
    def keep(self) -> BoolArray:
        """The mask as a new array, ``(num_filters,)``, True = kept."""
        return self.packed.keep()

    # A model that a long journal is replayed to sends all of its proposals. What dataclasses do
    # here looks up the fields of each, and takes nearly twice as long.
    def __reduce__(self) -> tuple[Callable[..., Proposal], tuple[object, ...]]:
        macs, seed = self.macs, self.score_seed
        entries = (self.proposal_id, self.generation, self.packed, macs, self.parameters, seed)
        return _proposal, (*entries, self.macs_cut)


def _proposal(
    proposal_id: int,
    generation: int,
    keep: PackedMask,
    macs: int,
    parameters: int,
    score_seed: tuple[int, int],
    macs_cut: float | None,
) -> Proposal:
    """Return what ``Proposal.__reduce__`` took apart."""
    return Proposal(
        proposal_id=proposal_id,
        generation=generation,
        keep=keep,
        macs=macs,
        parameters=parameters,
        score_seed=score_seed,
        macs_cut=macs_cut,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Feedback:
    """The result of scoring a proposal: its score on search-val, or the error it ended with.

    A failed proposal is a state, never a fake value: with ``error`` set, the figures are None.

    Raises:
        ValueError: a figure is missing, not finite or absurdly large, or a failure has figures.
    """

    proposal_id: int
    """The proposal that was scored."""
    val_loss: float | None = None
    """Figure to become small, finite: the mean loss on search-val, or minus a task's own score."""
    val_accuracy: float | None = None
    """Share of search-val images classified rightly, in [0, 1]; None where nothing is classified.
    """
    error: str | None = None
    """Why the proposal has no score."""
    steps: int = 0
    """Fine-tuning steps inside the score, >= 0. Scores of different depths are not compared: the
    deeper one ranks first."""
    seconds: float | None = None
    """Time that the worker spent on the score."""
    worker: str = ""
    """The worker that gave it: slot, host and process."""
    at: float | None = None
    """Unix time when the driver heard of it."""

    def __post_init__(self) -> None:
        loss, accuracy = self.val_loss, self.val_accuracy
        if self.error is None and self.steps >= 0 and loss is not None:
            # Most feedback by far; long journals have a hundred thousand.
            if abs(loss) <= LARGEST_FIGURE and (
                accuracy is None or abs(accuracy) <= LARGEST_FIGURE
            ):
                return
        if self.steps < 0:
            raise ValueError(
                f"steps of proposal {self.proposal_id} must be at least 0, got {self.steps}"
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
            fault = "missing" if value is None else fault_of(value)
            if fault is not None:
                raise ValueError(
                    f"{name} of proposal {self.proposal_id} must be finite, got {value}, which is "
                    f"{fault}; report a failed proposal with error='...' and no score"
                )

    @property
    def failed(self) -> bool:
        """Whether the proposal ended with an error instead of a score."""
        return self.error is not None

    @property
    def score(self) -> float | None:
        """The figure that people read: the accuracy, else the score of the user's own task."""
        return score_of(self)


@dataclass(frozen=True, kw_only=True, eq=False)
class Finalist:
    """A mask worth rescoring at the end of a search."""

    name: str
    """``mode``, ``averaged mode``, ``sample <id>``, ``allocation`` or ``importance-only``."""
    keep: BoolArray
    """The mask, ``(num_filters,)``, True = kept."""
    parameters: int = 0
    """Exact parameters of the pruned network; 0 where the space does not know tensor sizes."""
    macs_cut: float | None = None
    """Budget that the mask is for, in a search with several budgets; else None."""
