"""The facts a search writes into its journal, one JSON line each.

Together they are the search's state: replaying them gives back the probability model, the scores,
and the point that baseline training and fine-tuning had reached.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, get_args


@dataclass(frozen=True, kw_only=True)
class Started:
    """The search began. ``identity`` must be the same for whoever resumes it."""

    search_id: str
    identity: dict[str, Any]
    """Settings, device type, threads and digests of network, space and data."""
    versions: dict[str, str]
    groups: list[str]
    """Names of the channel groups, in the order of the masks."""
    dense_macs: int


@dataclass(frozen=True, kw_only=True)
class ComputeChosen:
    """How all passes of the search are computed, whatever a later measurement would say."""

    compute: dict[str, Any]
    trials: list[dict[str, Any]]
    """What was measured, in this order; none where everything was asked for."""
    why: str


@dataclass(frozen=True, kw_only=True)
class LatencyMeasured:
    """The table that tells every mask's latency; masks follow from it, so it is kept."""

    artifact: str
    sha256: str
    batch: int
    """Images per pass."""
    dense_ms: float
    """Of the dense network, as measured."""
    median_error: float
    """Of the table, relative, on masks that it was not fitted to."""
    device: str

    def __str__(self) -> str:
        """For people."""
        return (
            f"dense {self.dense_ms:.3g} ms at batch {self.batch} on {self.device}; the table is "
            f"off by {100 * self.median_error:.1f} % (median)"
        )


@dataclass(frozen=True, kw_only=True)
class EpochFinished:
    """A training task ended an epoch; the checkpoint was durable before this line."""

    task: str
    epoch: int
    train_loss: float | None
    """None where the user's own function trains."""
    seconds: float
    artifact: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class RoundStarted:
    """The shared dense weights are frozen from here to the next round."""

    round: int
    weights_sha256: str


@dataclass(frozen=True, kw_only=True)
class ImportanceMeasured:
    """What the weights alone say of each filter, kept as an array of float64."""

    round: int
    criterion: str
    artifact: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The probability model proposed a mask."""

    id: int
    generation: int
    macs: int
    mask: str
    macs_cut: float | None = None
    """The one it is for, of several budgets."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A worker scored a proposal on search-val, at one of its rungs."""

    id: int
    round: int
    rung: int
    """Fine-tuning steps inside the score; scores of different rungs are never compared."""
    val_loss: float
    """Minus the score, where the task is the user's own."""
    val_accuracy: float | None
    """None where the task is the user's own."""
    seconds: float
    """Spent on the score by the worker."""
    worker: str
    at: float
    """Unix time when the driver heard of it."""

    @property
    def score(self) -> float:
        """What people read: the accuracy; where there is none, the score of the user's own task."""
        return -self.val_loss if self.val_accuracy is None else self.val_accuracy


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A score of a proposal ended by an error of the proposal's own."""

    id: int
    error: str
    rung: int | None = None
    """Fine-tuning steps inside the score; None in journals of when all scores had the same."""


@dataclass(frozen=True, kw_only=True)
class Updated:
    """The distribution moved; a summary for people, not needed to replay."""

    generation: int
    keep_share: list[float]
    """Expected share of kept filters of each group."""


@dataclass(frozen=True, kw_only=True)
class Rescored:
    """A finalist was scored with a fresh seed.

    On choose-val for the choice; the importance-only mask also on search-val, like a proposal, for
    the noise of a score.
    """

    finalist: str
    split: str
    repeat: int
    mask: str
    val_loss: float
    val_accuracy: float | None
    rung: int | None = None
    """Fine-tuning steps inside the score; None in journals of when it was that of proposals."""
    seconds: float | None = None
    """Spent on the score by the worker; None in journals of before it was kept."""
    stage: int = 0


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The finalist with the best mean score on choose-val, by what ranks the proposals."""

    finalist: str
    mask: str
    macs_cut: float | None = None
    """The one it is for, of several budgets: each has its own choice."""
    stage: int = 0
    """Of gradual pruning: the masks of the next one lie within this one."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The result was written; nothing is left to do."""

    artifact: str
    sha256: str


Fact = (
    Started
    | ComputeChosen
    | LatencyMeasured
    | EpochFinished
    | RoundStarted
    | ImportanceMeasured
    | Asked
    | Scored
    | Failed
    | Updated
    | Rescored
    | Chosen
    | Finished
)

_KINDS: dict[str, type[Fact]] = {kind.__name__: kind for kind in get_args(Fact)}


def ends_of_scores(facts: Iterable[Fact]) -> dict[tuple[int, int | None], Scored | Failed]:
    """How each score ended, by proposal and rung; of two facts the later counts."""
    ends: dict[tuple[int, int | None], Scored | Failed] = {}
    for fact in facts:
        if isinstance(fact, Scored | Failed):
            ends.pop((fact.id, None), None)  # a failure without a rung, that was tried again
            ends[fact.id, fact.rung] = fact
    return ends


def fact_to_json(fact: Fact) -> dict[str, Any]:
    """The fact as a JSON object whose ``fact`` entry names its kind."""
    return {"fact": type(fact).__name__, **asdict(fact)}


def fact_from_json(data: dict[str, Any]) -> Fact:
    """The fact that ``fact_to_json`` described.

    Raises:
        ValueError: the kind is unknown or its entries do not fit.
    """
    entries = dict(data)
    name = entries.pop("fact", None)
    if name not in _KINDS:
        raise ValueError(f"expected a fact of {', '.join(_KINDS)}, got {name!r}")
    try:
        return _KINDS[name](**entries)
    except TypeError as error:
        raise ValueError(f"the entries of fact {name} do not fit: {error}") from error
