"""Following channels through a forward pass: which positions of which weights go together.

``follow`` runs a network and sees every operation that torch computes. Each axis of each
weight is an array of positions; an operation unites positions (a sum those of its terms, a
convolution the channels it reads with its weight's second axis), moves them about (a reshape, a
concatenation, a shuffle) or keeps them for good (a softmax over channels). An operation without a
rule keeps all that it reads, so that what is not understood is never cut.
"""

from fppmo_ray.pruning.following.call import Product
from fppmo_ray.pruning.following.follower import RETURNED, Following, follow, start
from fppmo_ray.pruning.following.storages import Allocation
from fppmo_ray.pruning.following.units import FIXED, Units

__all__ = ["FIXED", "RETURNED", "Allocation", "Following", "Product", "Units", "follow", "start"]
