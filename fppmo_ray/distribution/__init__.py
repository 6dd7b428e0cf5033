"""The probability model: which masks to try next, given how earlier ones fared.

A *space* (``PruningSpace``) lists the channel groups whose filters can go, and gives the exact
MACs of every mask. An *optimizer* (``MaskOptimizer``) asks for *proposals*, masks that meet the
MACs budget, one *generation* at a time, and is told *feedback*, their scores or errors; an *update
rule* turns a generation's ranks into the next *beliefs*, the keep-logit of every filter. At the
end it names the *finalists*, masks worth rescoring. Plain numpy: no network is touched here.
"""

from fppmo_ray.distribution.budget import Budget
from fppmo_ray.distribution.inheritance import Inheritance
from fppmo_ray.distribution.optimizer import MaskOptimizer
from fppmo_ray.distribution.proposal import (
    Feedback,
    Finalist,
    Proposal,
    pack_mask,
    unpack_mask,
)
from fppmo_ray.distribution.rules import RULES, UpdateRule
from fppmo_ray.distribution.settings import OptimizerSettings, RankBy
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
from fppmo_ray.distribution.standings import Standings

__all__ = [
    "RULES",
    "BoolArray",
    "Budget",
    "ChannelGroup",
    "Feedback",
    "Finalist",
    "FloatArray",
    "Inheritance",
    "IntArray",
    "LayerCost",
    "MaskOptimizer",
    "OptimizerSettings",
    "Proposal",
    "PruningSpace",
    "RankBy",
    "Standings",
    "UpdateRule",
    "Width",
    "legal_min_width",
    "pack_mask",
    "unpack_mask",
]
