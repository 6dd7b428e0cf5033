"""Dependency tracing: which positions of which weights must be kept or removed together.

``record_pass`` runs a network and intercepts every operation that torch computes. Each axis of each
weight is an array of positions. The rule of an operation unites positions (a sum those of its
terms, a convolution its input channels with its weight's second axis), moves them (a reshape, a
concatenation, a shuffle) or keeps them (a softmax over channels). An operation without a rule keeps
all positions that it reads, so nothing is pruned that is not understood.
"""

from fppmo_ray.pruning.dependency.disjoint_sets import FIXED, DisjointSets
from fppmo_ray.pruning.dependency.operation import Product
from fppmo_ray.pruning.dependency.rules import RuleError
from fppmo_ray.pruning.dependency.tracer import (
    RETURNED,
    Allocation,
    Dependencies,
    independent,
    record_pass,
)

__all__ = [
    "FIXED",
    "RETURNED",
    "Allocation",
    "Dependencies",
    "DisjointSets",
    "Product",
    "RuleError",
    "independent",
    "record_pass",
]
