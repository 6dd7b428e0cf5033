"""The conformance suite: all rules pass it, and rules with typical faults do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from fppmo_ray.distribution import RULES, UpdateRule
from fppmo_ray.distribution.rules import Beliefs, LayerES, RankedGeneration
from fppmo_ray.testing import CHECKS
from fppmo_ray.testing.rule_conformance import searches_repeat


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_conforms(rule: str, check: Callable[[UpdateRule], None]) -> None:
    check(RULES[rule])


@dataclass
class Restless:
    """A rule that moves by a state of its own, which differs from search to search."""

    inner: LayerES = field(default_factory=LayerES)
    calls: int = 0

    def temperature(self, progress: float) -> float:
        return self.inner.temperature(progress)

    def layer_noise(
        self, rng: np.random.Generator, shape: tuple[int, int], progress: float
    ) -> np.ndarray:
        return self.inner.layer_noise(rng, shape, progress)

    def update(self, beliefs: Beliefs, generation: RankedGeneration) -> Beliefs:
        self.calls += 1
        noise = np.random.default_rng(self.calls).standard_normal(len(beliefs.keep_logits))
        return Beliefs(keep_logits=beliefs.keep_logits + noise)


def test_a_rule_with_a_state_of_its_own_is_found() -> None:
    with pytest.raises(AssertionError):
        searches_repeat(Restless())
