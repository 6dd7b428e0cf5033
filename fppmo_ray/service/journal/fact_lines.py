"""Most lines of a long journal, read without a parser of JSON: proposals and their feedback."""

from __future__ import annotations

import re
from sys import intern
from typing import NamedTuple

from fppmo_ray.distribution import Feedback, Proposal
from fppmo_ray.distribution.proposal import LARGEST_FIGURE, score_of
from fppmo_ray.service.journal.fact_json import shared_seed
from fppmo_ray.service.journal.facts import Fact, packed_mask

# Numbers as JSON writes them; of floats, those that show that they are none of its whole numbers.
_INT = rb"(?:0|[1-9]\d{0,17}+)"
_FLOAT = rb"-?(?:0|[1-9]\d*+)(?:\.\d++(?:e[-+]?\d++)?|e[-+]?\d++)"
_END = rb',"sum":".{16}"}\n'  # compared before
_match_proposal = re.compile(
    rb'{"fact":"Proposal","proposal_id":(%b),"generation":(%b),"macs":(%b),"parameters":(%b),'
    rb'"score_seed":\[(%b),(%b)\],(?:"macs_cut":(%b),)?"keep":"([\w+/=]*+)"%b'
    % (_INT, _INT, _INT, _INT, _INT, _INT, _FLOAT, _END)
).fullmatch
_match_feedback = re.compile(
    rb'{"fact":"Feedback","proposal_id":(%b),"val_loss":(%b),(?:"val_accuracy":(%b),)?'
    rb'"steps":(%b),"seconds":(%b),"worker":"([ !#-\[\]-~]*+)","at":([1-9]\d{0,10}\.\d++)%b'
    % (_INT, _FLOAT, _FLOAT, _INT, _FLOAT, _END)
).fullmatch


class Asked(NamedTuple):
    """The part of a proposal that the order of scores depends on."""

    proposal_id: int
    """See ``Proposal``."""
    parameters: int
    """See ``Proposal``."""
    macs_cut: float | None
    """See ``Proposal``."""


class Told(NamedTuple):
    """The part of a proposal's feedback that the order of scores depends on."""

    proposal_id: int
    """See ``Feedback``."""
    val_loss: float | None
    """See ``Feedback``."""
    val_accuracy: float | None
    """See ``Feedback``."""
    steps: int
    """See ``Feedback``."""

    @property
    def failed(self) -> bool:
        """Whether the proposal ended with an error instead of a score."""
        return self.val_loss is None

    @property
    def score(self) -> float | None:
        """See ``Feedback``."""
        return score_of(self)


Line = Fact | Asked | Told
"""What a line of a journal holds, or the part of it that was read."""


def ordinary(line: bytes, num_filters: int) -> Proposal | Feedback | None:
    """Return the fact of a line as most of them are written.

    Args:
        line: The line; its checksum has been looked at.
        num_filters: Length of a mask.

    Returns:
        None if the line holds something else, or the same in another spelling: parse it.

    Raises:
        ValueError: a figure is not finite, or the mask is of another length.
    """
    if (found := _match_proposal(line)) is not None:
        proposal_id, generation, macs, parameters, *seed, macs_cut, keep = found.groups()
        return Proposal(
            proposal_id=int(proposal_id),
            generation=int(generation),
            keep=packed_mask(keep, num_filters),
            macs=int(macs),
            parameters=int(parameters),
            score_seed=shared_seed((int(seed[0]), int(seed[1]))),
            macs_cut=_number(macs_cut),
        )
    if (found := _match_feedback(line)) is None:
        return None
    proposal_id, loss, accuracy, steps, seconds, worker, at = found.groups()
    return Feedback(
        proposal_id=int(proposal_id),
        val_loss=float(loss),
        val_accuracy=_number(accuracy),
        steps=int(steps),
        seconds=float(seconds),
        worker=intern(worker.decode()),
        at=float(at),
    )


def skimmed(line: bytes, _num_filters: int) -> Asked | Told | None:
    """Return what orders scores of a line as most of them are written; None: parse it."""
    if (found := _match_proposal(line)) is not None:
        proposal_id, parameters, cut = found.group(1, 4, 7)
        return Asked(int(proposal_id), int(parameters), None if cut is None else float(cut))
    if (found := _match_feedback(line)) is None:
        return None
    proposal_id, loss, text, steps = found.group(1, 2, 3, 4)
    figure, accuracy = float(loss), None if text is None else float(text)
    is_usual = abs(figure) <= LARGEST_FIGURE and abs(accuracy or 0.0) <= LARGEST_FIGURE
    return Told(int(proposal_id), figure, accuracy, int(steps)) if is_usual else None


def reduced(fact: Fact) -> Line:
    """Return what orders scores of a proposal or of its feedback; other facts as they are."""
    if isinstance(fact, Proposal):
        return Asked(fact.proposal_id, fact.parameters, fact.macs_cut)
    if isinstance(fact, Feedback):
        return Told(fact.proposal_id, fact.val_loss, fact.val_accuracy, fact.steps)
    return fact


def _number(text: bytes | None) -> float | None:
    return None if text is None else float(text)
