"""Update rules: how the ranks of a generation's proposals move the probability model.

A rule is one small file, a frozen dataclass of step sizes whose methods are pure functions of
the beliefs. To add one, answer to ``UpdateRule`` and enter it in ``RULES``.
"""

from fppmo_ray.distribution.rules.elite import Elite
from fppmo_ray.distribution.rules.layer_es import WIDTHS, LayerES
from fppmo_ray.distribution.rules.random_masks import RandomMasks
from fppmo_ray.distribution.rules.ridge import Ridge
from fppmo_ray.distribution.rules.rule import (
    Beliefs,
    LookBack,
    RankedGeneration,
    Ranking,
    UpdateRule,
)

RULES: dict[str, UpdateRule] = {
    "ridge": Ridge(),
    "elite": Elite(),
    "layer_es": LayerES(),
    "widths": WIDTHS,
    "random": RandomMasks(),
}

__all__ = [
    "RULES",
    "WIDTHS",
    "Beliefs",
    "Elite",
    "LayerES",
    "LookBack",
    "RandomMasks",
    "RankedGeneration",
    "Ranking",
    "Ridge",
    "UpdateRule",
]
