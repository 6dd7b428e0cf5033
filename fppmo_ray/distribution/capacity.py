"""What a pruned network may still learn.

At the same MACs, masks differ in how many parameters they leave: late layers have cheap ones. Long
fine-tuning makes use of them, and a score before it does not show that.
"""

from __future__ import annotations

from fppmo_ray.distribution.space import BoolArray, PruningSpace


def capacity_factor(space: PruningSpace, keep: BoolArray, weight: float) -> float:
    """What the loss of a mask's score is multiplied by before it is compared with others.

    It is ``(parameters left / parameters of the dense network) ** -weight``: with a weight of 2, a
    tenth more parameters make up for a loss that is a fifth higher.

    Args:
        space: Of the mask; it tells the tensors' sizes.
        keep: ``(num_filters,)``, True = kept.
        weight: At least 0, which makes it 1.
    """
    if weight == 0:
        return 1.0
    return float((space.parameters(keep) / space.dense_parameters) ** -weight)


def check_capacity_weight(space: PruningSpace, weight: float) -> None:
    """Refuse a weight where parameters are not known.

    Raises:
        ValueError: the space tells no tensor's size.
    """
    if weight > 0 and not space.tensor_sizes:
        raise ValueError(
            f"capacity_weight = {weight} needs a space with tensor_sizes, got one without; trace "
            "makes such spaces, or take 0"
        )
