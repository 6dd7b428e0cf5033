"""The probability model: which masks to try next, given how earlier ones scored.

A *space* (``PruningSpace``) lists the channel groups whose filters can go, and gives the exact
MACs of every mask. An *optimizer* (``MaskOptimizer``) asks for *proposals*, masks that meet the
budget, one *generation* at a time, and is told *feedback*, their scores or errors; an *update
rule* turns a generation's ranks into the next *beliefs*, the keep-logit of every filter. A *merit*
says which of two scores is better. At the end the optimizer names the *finalists*, masks worth
rescoring. The package is plain numpy and touches no network.

Example:
    A search without Ray. ``network`` is a trained CNN, ``images`` an input of it, and ``loss_of``
    your own function, which returns the loss of a network on held-out data:

    >>> from fppmo_ray.distribution import Feedback, MaskOptimizer, OptimizerSettings
    >>> from fppmo_ray.pruning import extract, importance, trace
    >>> tracing = trace(network, images)
    >>> settings = OptimizerSettings(macs_cut=0.5, num_proposals=64)
    >>> optimizer = MaskOptimizer(tracing.space, importance(network, tracing, "l1"), settings)
    >>> while not optimizer.finished:
    ...     for proposal in optimizer.ask():
    ...         loss = loss_of(extract(network, tracing, proposal.keep))
    ...         optimizer.tell(Feedback(proposal_id=proposal.proposal_id, val_loss=loss))
    >>> finalists = [extract(network, tracing, item.keep) for item in optimizer.finalists()]
    >>> smaller = min(finalists, key=loss_of)
"""

from fppmo_ray.distribution.budget import Budget
from fppmo_ray.distribution.merit import Merit, RankBy
from fppmo_ray.distribution.optimizer import MaskOptimizer
from fppmo_ray.distribution.proposal import Feedback, Finalist, Proposal
from fppmo_ray.distribution.rules import RULES, UpdateRule
from fppmo_ray.distribution.settings import OptimizerSettings
from fppmo_ray.distribution.space import (
    BoolArray,
    ChannelGroup,
    FloatArray,
    IntArray,
    LayerCost,
    PruningSpace,
    Width,
    legal_min_width,
)

__all__ = [
    "RULES",
    "BoolArray",
    "Budget",
    "ChannelGroup",
    "Feedback",
    "Finalist",
    "FloatArray",
    "IntArray",
    "LayerCost",
    "MaskOptimizer",
    "Merit",
    "OptimizerSettings",
    "Proposal",
    "PruningSpace",
    "RankBy",
    "UpdateRule",
    "Width",
    "legal_min_width",
]
