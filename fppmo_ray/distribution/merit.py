"""Which of two scores is better: the one place that decides it.

The optimizer, the choice among finalists, Ray Tune, the log, the metrics, the status and the report
all order scores by a ``Merit``, so "best" means the same proposal everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar, get_args

RankBy = Literal["val_loss", "val_accuracy"]
"""The figure that orders scores: the lower loss or the higher accuracy is better."""


class HasScore(Protocol):
    """Anything with the figures of a score: feedback, a finalist's score, a mean of scores."""

    @property
    def val_loss(self) -> float | None:
        """Loss on held-out images, or minus the score of a user's own task."""

    @property
    def val_accuracy(self) -> float | None:
        """Accuracy in [0, 1]; None where nothing is classified."""


class IsFeedback(HasScore, Protocol):
    """A proposal's feedback, or the part of it that its place among others depends on."""

    @property
    def proposal_id(self) -> int:
        """The proposal that was scored."""

    @property
    def steps(self) -> int:
        """Fine-tuning steps inside the score, >= 0."""

    @property
    def failed(self) -> bool:
        """Whether the proposal ended with an error instead of a score."""


_Feedback = TypeVar("_Feedback", bound=IsFeedback)


@dataclass(frozen=True, kw_only=True)
class Merit:
    """The order of a search's scores.

    Long fine-tuning makes use of the parameters that a mask leaves, which a score before it does
    not show: at equal MACs, masks that keep more parameters recover better (Spearman 0.49 with the
    final loss over 84 masks of ResNet-20). So losses are multiplied by
    ``(parameters / dense_parameters) ** -capacity_weight`` before they are compared, and losses
    below 0 are divided by it.

    Raises:
        ValueError: a setting is out of its range.
    """

    rank_by: RankBy = "val_loss"
    """The figure that is compared."""
    capacity_weight: float = 0.0
    """Exponent of the capacity factor, >= 0; 0 compares the losses themselves."""
    dense_parameters: int = 0
    """Parameters of the dense network, > 0 where ``capacity_weight`` is."""

    def __post_init__(self) -> None:
        if self.rank_by not in get_args(RankBy):
            raise ValueError(f"rank_by must be val_loss or val_accuracy, got {self.rank_by!r}")
        is_usable = self.capacity_weight == 0 or self.rank_by == "val_loss"
        if not (self.capacity_weight >= 0 and is_usable):
            raise ValueError(
                "capacity_weight must be at least 0, and 0 where rank_by is not val_loss, got "
                f"{self.capacity_weight} with rank_by {self.rank_by}"
            )
        if self.capacity_weight and self.dense_parameters <= 0:
            raise ValueError(
                f"capacity_weight = {self.capacity_weight} needs the dense network's parameters, "
                f"got {self.dense_parameters}; give them, or take capacity_weight = 0"
            )

    def cost(self, score: HasScore, parameters: int) -> float:
        """Return the number that is compared: the lower of two costs is the better score.

        Args:
            score: Finite figures; an accuracy if ``rank_by`` wants one.
            parameters: Number of parameters that the scored mask leaves, > 0 where
                ``capacity_weight`` is.

        Raises:
            ValueError: the score lacks the figure that is compared, or ``parameters`` is not above
                0 where ``capacity_weight`` is.
        """
        figure = score.val_loss if self.rank_by == "val_loss" else score.val_accuracy
        if figure is None:
            raise ValueError(
                f"rank_by={self.rank_by} needs a score with {self.rank_by}, got one without; "
                "report it, or rank by another figure"
            )
        if self.rank_by == "val_accuracy":
            return -figure
        if self.capacity_weight == 0:
            return figure
        factor = self._capacity_factor(parameters)
        # The factor is larger for fewer parameters, and has to make losses below 0 worse as well.
        return figure * factor if figure >= 0 else figure / factor

    def key(self, feedback: IsFeedback, parameters: int) -> tuple[int, float, int]:
        """Return the sort key of a scored proposal; the best one has the least key.

        Deeper scores come first whatever their figures, since a scheduler that stopped a trial
        early did so because it was worse. Ties go to the lower id, so that the order of arrival
        does not matter.

        Args:
            feedback: A score, not a failure.
            parameters: Number of parameters that the proposal's mask leaves.
        """
        return -feedback.steps, self.cost(feedback, parameters), feedback.proposal_id

    def ranked(
        self, feedback: Iterable[_Feedback], parameters_of: Callable[[int], int]
    ) -> list[_Feedback]:
        """Return the scores, best first.

        Args:
            feedback: Feedback of different proposals; failures are left out.
            parameters_of: Gives the number of parameters that a proposal's mask leaves, by its id.
        """
        scored = [item for item in feedback if not item.failed]
        return sorted(scored, key=lambda item: self.key(item, parameters_of(item.proposal_id)))

    def best(
        self, feedback: Iterable[_Feedback], parameters_of: Callable[[int], int]
    ) -> _Feedback | None:
        """Return the first of ``ranked``, or None if nothing has a score.

        Args:
            feedback: See ``ranked``.
            parameters_of: See ``ranked``.
        """
        scored = (item for item in feedback if not item.failed)
        return min(
            scored,
            key=lambda item: self.key(item, parameters_of(item.proposal_id)),
            default=None,
        )

    def _capacity_factor(self, parameters: int) -> float:
        if parameters <= 0:
            raise ValueError(
                f"capacity_weight = {self.capacity_weight} needs the parameters that a mask "
                f"leaves, got {parameters}; give them with it, or take capacity_weight = 0"
            )
        return float((parameters / self.dense_parameters) ** -self.capacity_weight)
