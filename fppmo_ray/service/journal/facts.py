"""The facts a search writes into its journal, one JSON line each.

Together they are the search's state: replaying them gives back the probability model, the scores,
and the point that baseline training and fine-tuning had reached. Proposals and feedback are facts
as they are; a mask is an array in memory and base64 text of its packed bits in the journal.
"""

from __future__ import annotations

from binascii import a2b_base64, b2a_base64
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import UnionType
from typing import Any

from fppmo_ray.distribution import BoolArray, Feedback, Merit, Proposal
from fppmo_ray.distribution.proposal import PackedMask, fault_of

FORMAT = 3
"""Format number of the journal, in its first line."""


@dataclass(frozen=True, kw_only=True)
class Started:
    """The search began. A driver that resumes it must have the same ``identity``."""

    search_id: str
    """Identifier of the search, the same after every resume."""
    identity: dict[str, Any]
    """Settings, device type, threads, versions, and digests of network, space and data."""
    versions: dict[str, str]
    """Versions of the packages that began the search."""
    groups: list[str]
    """Names of the channel groups, in the order of the masks."""
    num_filters: int
    """Length of a mask."""
    dense_macs: int
    """Multiply-accumulates of the dense network."""
    dense_parameters: int = 0
    """Parameters of the dense network; 0 where the space does not know tensor sizes."""
    images: dict[str, int] = field(default_factory=dict)
    """Number of images to ``train``, ``score``, ``choose`` and ``test`` on; empty where only the
    task's functions know."""
    at: float | None = None
    """When the search began, in Unix time."""
    format: int = FORMAT
    """Format number of the journal."""

    @property
    def merit(self) -> Merit:
        """The order of the search's scores."""
        return Merit(
            rank_by=self.setting("scoring.rank_by", str),
            capacity_weight=self.setting("scoring.capacity_weight", float | int),
            dense_parameters=self.dense_parameters,
        )

    def setting(self, path: str, kind: type | UnionType) -> Any:
        """Return a setting of the search.

        Args:
            path: Names of the group and the setting, such as ``scoring.rank_by``.
            kind: Its type.

        Raises:
            ValueError: there is no such setting, or it is of another type.
        """
        value: Any = self.identity
        for name in ("settings", *path.split(".")):
            value = value.get(name) if isinstance(value, dict) else None
        if not isinstance(value, kind):
            raise ValueError(
                f"the journal's first line should tell the search's setting {path}, got "
                f"{value!r:.40}; was it written by another program, or changed by hand?"
            )
        return value


@dataclass(frozen=True, kw_only=True)
class ComputeChosen:
    """How all passes of the search are computed, whatever a later measurement would say."""

    compute: dict[str, Any]
    """Fields of the ``ComputeConfig`` of scores."""
    trials: list[dict[str, Any]]
    """Measurements, in order; none unless autotuning was asked for."""
    why: str
    """Reason for people."""
    training: dict[str, Any] | None = None
    """Fields of the ``ComputeConfig`` of whole trainings; None: that of scores."""


@dataclass(frozen=True, kw_only=True)
class LatencyMeasured:
    """The latency table was measured. Masks follow from it, so it is kept as an artifact."""

    artifact: str
    """Name of the table's file."""
    sha256: str
    """Digest of the file."""
    batch: int
    """Images per pass; 0 where only the user's clock knows."""
    dense_ms: float
    """Measured latency of the dense network, in milliseconds."""
    median_error: float
    """Relative error of the table, the median over masks that it was not fitted to."""
    device: str
    """Name of the device that it was measured on, or of the user's clock."""

    def __str__(self) -> str:
        place = f"at batch {self.batch} on {self.device}" if self.batch else f"by {self.device}"
        return (
            f"dense {self.dense_ms:.3g} ms {place}; the table is "
            f"off by {100 * self.median_error:.1f} % (median)"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class ClockRead:
    """The user's clock was read, which a driver that resumes need not do again."""

    keep: BoolArray
    """Mask of the network that was timed, ``(num_filters,)``."""
    milliseconds: float
    """What the clock returned."""


@dataclass(frozen=True, kw_only=True)
class EpochFinished:
    """A training finished an epoch; the checkpoint was durable before this line."""

    task: str
    """Name of the training."""
    epoch: int
    """Epoch, counted from 0."""
    train_loss: float | None
    """Mean training loss; None where a user's own function trains."""
    seconds: float
    """Time that the epoch took."""
    artifact: str
    """Name of the checkpoint's file."""
    sha256: str
    """Digest of the file."""


@dataclass(frozen=True, kw_only=True)
class WeightsFrozen:
    """The dense weights that all masks are scored on, from here to the end of the search."""

    sha256: str
    """Digest of the weights."""


@dataclass(frozen=True, kw_only=True)
class DenseScored:
    """The dense network was evaluated on search-val, before any filter was removed."""

    accuracy: float
    """Share of images classified correctly, in [0, 1]."""
    half_interval: float
    """Half of the accuracy's 95 % interval."""
    num_images: int
    """Number of images."""
    num_classes: int
    """Number of classes."""
    chance: float
    """Accuracy of always answering the most frequent class."""
    is_chance: bool
    """Whether the interval reaches down to ``chance``."""
    reordered_accuracy: float
    """Accuracy if each class were the output that it is most often taken for."""

    def __str__(self) -> str:
        return (
            f"{100 * self.accuracy:.1f} % ± {100 * self.half_interval:.1f} on "
            f"{self.num_images:,} held-out images, chance {100 * self.chance:.1f} %"
        )


@dataclass(frozen=True, kw_only=True)
class ImportanceMeasured:
    """The importance of every filter was measured, and kept as an array of float64."""

    criterion: str
    """Name of the criterion."""
    artifact: str
    """Name of the array's file."""
    sha256: str
    """Digest of the file."""
    curves_artifact: str | None = None
    """Name of the file with the error curves of all groups, one after the other; None: they were
    not measured."""
    curves_sha256: str | None = None
    """Digest of that file."""


@dataclass(frozen=True, kw_only=True)
class AllocationChosen:
    """The widths that a budget starts at were chosen among allocations."""

    budget: int
    """Number of the budget, counted from 0 by ascending cut."""
    gamma: float
    """Weight of the parameters in the chosen allocation."""
    costs: list[float]
    """Costs of the allocations that were scored, by ascending gamma; none where nothing was to be
    chosen."""


@dataclass(frozen=True, kw_only=True)
class Updated:
    """The distribution moved; a summary for people, not needed to replay."""

    generation: int
    """Number of generations that have made their update."""
    keep_share: list[float]
    """Expected share of kept filters of each group."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rescored:
    """A finalist was scored with a fresh seed.

    On choose-val for the choice; the importance-only mask also on search-val, like a proposal, for
    the noise of a score.
    """

    finalist: str
    """Name of the finalist."""
    keep: BoolArray
    """The mask, ``(num_filters,)``, True = kept."""
    split: str
    """``choose_val`` or ``search_val``."""
    repeat: int
    """Number of the fresh seed, counted from 0."""
    val_loss: float
    """Loss, or minus the score of a user's own task."""
    val_accuracy: float | None
    """Accuracy in [0, 1]; None where nothing is classified."""
    seconds: float
    """Time that the worker spent on the score."""

    def __post_init__(self) -> None:
        figures = (
            [self.val_loss] if self.val_accuracy is None else [self.val_loss, self.val_accuracy]
        )
        for figure in figures:
            if (fault := fault_of(figure)) is not None:
                raise ValueError(f"a score of finalist {self.finalist} is {fault}: {figure}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Chosen:
    """The finalist with the best mean score on choose-val, by the order that ranks proposals."""

    finalist: str
    """Name of the finalist."""
    keep: BoolArray
    """The mask, ``(num_filters,)``, True = kept."""
    macs_cut: float | None = None
    """Budget that it is for, in a search with several budgets; else None."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The results were written; nothing is left to do. Of several such facts the last counts."""

    artifacts: dict[str, str]
    """SHA-256 of each file: the result, and the chosen networks' weights and recipes."""
    at: float | None = None
    """When the search finished, in Unix time."""


Fact = (
    Started
    | ComputeChosen
    | LatencyMeasured
    | ClockRead
    | EpochFinished
    | WeightsFrozen
    | DenseScored
    | ImportanceMeasured
    | AllocationChosen
    | Proposal
    | Feedback
    | Updated
    | Rescored
    | Chosen
    | Finished
)


def pack_mask(keep: BoolArray) -> str:
    """Return a mask as base64 text of its packed bits."""
    return b2a_base64(PackedMask.of(keep).bits, newline=False).decode("ascii")


def unpack_mask(text: str, num_filters: int) -> BoolArray:
    """Return the mask ``(num_filters,)`` that ``pack_mask`` wrote.

    Args:
        text: Base64 text of the packed bits.
        num_filters: Length of the mask.

    Raises:
        ValueError: the text holds another number of filters.
    """
    return packed_mask(text, num_filters).keep()


def packed_mask(text: str | bytes, num_filters: int) -> PackedMask:
    """Return the mask that ``pack_mask`` wrote, still as bits.

    Args:
        text: The text.
        num_filters: Length of the mask.

    Raises:
        ValueError: the text holds another number of filters.
    """
    bits = a2b_base64(text)
    if len(bits) != -(-num_filters // 8):
        raise ValueError(
            f"expected a mask of {num_filters} filters in {-(-num_filters // 8)} bytes, "
            f"got {len(bits)} bytes; the mask belongs to another network"
        )
    return PackedMask(bits, num_filters)


def latest_feedback(facts: Iterable[Fact]) -> dict[int, Feedback]:
    """Return the feedback of each proposal by its id; of two lines the later one counts."""
    return {fact.proposal_id: fact for fact in facts if isinstance(fact, Feedback)}
