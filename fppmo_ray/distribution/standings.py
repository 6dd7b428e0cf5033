"""How the proposals of a search stand: who goes on to a deeper score, and who is best.

Successive halving within a generation: what is cheap is done for all, what is dear for the best
third. All of it is a function of the feedback, in whatever order that arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import cast

from fppmo_ray.distribution.proposal import Feedback
from fppmo_ray.distribution.settings import OptimizerSettings

Wanted = tuple[int, int | None]
"""A proposal's id and the rung to score it at; None: whoever scores decides."""

_MIN_PROMOTED = 2  # one alone has no rank


class Standings:
    """The feedback of a search, by proposal and rung.

    Args:
        settings: Whose ``rungs`` proposals climb, ranked by ``rank_by``, in its rounds.
        factor_of: What a proposal's loss is multiplied by before it is compared, by its id.
    """

    def __init__(
        self, settings: OptimizerSettings, factor_of: Callable[[int], float] = lambda _: 1.0
    ) -> None:
        self._factor_of = factor_of
        self._rungs: Sequence[int | None] = settings.rungs or (None,)
        self._round_of = settings.round_of
        self._by_loss = settings.rank_by == "val_loss"
        self._feedback: dict[Wanted, Feedback] = {}

    def __len__(self) -> int:
        """Feedback that is in."""
        return len(self._feedback)

    def key(self, feedback: Feedback) -> Wanted:
        """What was wanted where this feedback came from."""
        return feedback.proposal_id, None if self._rungs == (None,) else feedback.rung

    def require_ranked(self, feedback: Feedback) -> None:
        """Refuse a score without what scores are ranked by.

        Raises:
            ValueError: it has no accuracy, and ``rank_by`` wants one.
        """
        if not self._by_loss and not feedback.failed and feedback.val_accuracy is None:
            raise ValueError(
                f"rank_by=val_accuracy needs the accuracy of proposal {feedback.proposal_id}; "
                "tell it, or rank by val_loss"
            )

    def add(self, feedback: Feedback) -> bool:
        """Take feedback in; False for a duplicate, which changes nothing."""
        key = self.key(feedback)
        if key in self._feedback:
            return False
        self._feedback[key] = feedback
        return True

    def of(self, ids: Iterable[int]) -> list[Feedback]:
        """All the feedback of these proposals, rung by rung."""
        keys = [(i, rung) for rung in self._rungs for i in ids]
        return [self._feedback[key] for key in keys if key in self._feedback]

    def wanted(self, ids: Sequence[int]) -> list[Wanted]:
        """All that a generation is to be scored at, as far as its feedback says by now.

        Those scored at a rung are ranked once all that were wanted there have ended; the best
        third of them, rounded up and two at least, go on to the next.
        """
        wanted: list[Wanted] = []
        for rung in self._rungs:
            at_rung: list[Wanted] = [(i, rung) for i in ids]
            wanted += at_rung
            if not self._are_in(at_rung):
                break
            ids = sorted(self._best_third(at_rung))
        return wanted

    def is_over(self, ids: Sequence[int]) -> bool:
        """Whether all that is wanted of a generation has ended."""
        return self._are_in(self.wanted(ids))

    def num_scores(self, ids: Sequence[int]) -> int:
        """How many scores a generation takes in all, if no more of them fail."""
        wanted = self.wanted(ids)
        num_wanted = len(wanted)
        reached = self._rungs.index(wanted[-1][1])
        at_rung = sum(rung == self._rungs[reached] for _, rung in wanted)
        if self._are_in(wanted):
            return num_wanted
        for _ in self._rungs[reached + 1 :]:
            at_rung = _third(at_rung)
            num_wanted += at_rung
        return num_wanted

    def failed_together(self, ids: Sequence[int]) -> list[Feedback]:
        """The failures of a generation that is over, where nothing was scored at its last rung."""
        wanted = self.wanted(ids)
        last = [self._feedback[key] for key in wanted if key[1] == wanted[-1][1]]
        return last if all(item.failed for item in last) else []

    def ranked(self, ids: Iterable[int]) -> list[int]:
        """Those that were scored, best first; see ``order``.

        What failed at the last rung it got to has failed.
        """
        last = {item.proposal_id: item for item in self.of(list(ids))}
        scored = [item for item in last.values() if not item.failed]
        return [item.proposal_id for item in sorted(scored, key=self.order)]

    def rankings(self, ids: Iterable[int]) -> list[list[int]]:
        """Those that were scored, best first: a list for every round and rung."""
        scored = sorted((item for item in self.of(list(ids)) if not item.failed), key=self.order)
        by_depth = groupby(scored, key=lambda item: self.order(item)[:2])
        return [[item.proposal_id for item in items] for _, items in by_depth]

    def order(self, feedback: Feedback) -> tuple[int, int, float, int]:
        """The order of scores, best first: later rounds, deeper rungs, better scores, lower ids."""
        proposal_id = feedback.proposal_id
        cost = cast(float, feedback.val_loss if self._by_loss else feedback.val_accuracy)
        cost *= self._factor_of(proposal_id)
        round_ = self._round_of(proposal_id)
        return -round_, -feedback.rung, cost if self._by_loss else -cost, proposal_id

    def _are_in(self, wanted: Iterable[Wanted]) -> bool:
        return all(key in self._feedback for key in wanted)

    def _best_third(self, wanted: Iterable[Wanted]) -> list[int]:
        """Of what has ended at one rung."""
        scored = [item for key in wanted if not (item := self._feedback[key]).failed]
        best = sorted(scored, key=self.order)[: _third(len(scored))]
        return [item.proposal_id for item in best]


def _third(count: int) -> int:
    return min(count, max(_MIN_PROMOTED, -(-count // 3)))
