"""Trace channels through a forward pass: which positions of which weights are coupled.

``follow`` runs a network and sees every operation that torch computes. Each axis of each
weight is an array of positions; an operation unites positions (a sum those of its terms, a
convolution the channels it reads with its weight's second axis), moves them about (a reshape, a
concatenation, a shuffle) or keeps them for good (a softmax over channels). An operation without a
rule keeps all that it reads, so that what is not understood is never cut.
"""

from fppmo_ray.pruning.dependency.disjoint_sets import FIXED, DisjointSets
from fppmo_ray.pruning.dependency.operation import Product
from fppmo_ray.pruning.dependency.tracer import RETURNED, Allocation, Dependencies, follow, start

__all__ = [
    "FIXED",
    "RETURNED",
    "Allocation",
    "Dependencies",
    "DisjointSets",
    "Product",
    "follow",
    "start",
]
