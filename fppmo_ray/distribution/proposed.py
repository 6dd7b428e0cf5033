"""What was proposed so far: masks, and the noise that they were sampled with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fppmo_ray.distribution.proposal import pack_mask, unpack_mask
from fppmo_ray.distribution.rules import LookBack, RankedGeneration, Ranking
from fppmo_ray.distribution.settings import OptimizerSettings
from fppmo_ray.distribution.space import BoolArray, FloatArray, PruningSpace


class Proposed:
    """The masks of all generations asked for, by the ids of their proposals.

    Args:
        space: Of the masks.
        settings: Which ids belong to which generation, from its first on.
    """

    def __init__(self, space: PruningSpace, settings: OptimizerSettings) -> None:
        self._space = space
        self._settings = settings
        self._first = settings.first_generation
        self._masks: list[str] = []
        self._layer_noise: list[FloatArray] = []

    def __len__(self) -> int:
        """Proposals."""
        return len(self._masks)

    @property
    def next_generation(self) -> int:
        """The one to add: all before it have been."""
        return self._first + len(self._layer_noise)

    def add(self, layer_noise: FloatArray, masks: Sequence[BoolArray]) -> None:
        """Take in the next generation: its noise ``(population, num_groups)`` and masks."""
        self._layer_noise.append(layer_noise)
        self._masks.extend(pack_mask(keep) for keep in masks)

    def mask(self, proposal_id: int) -> BoolArray:
        """A copy, ``(num_filters,)``."""
        first_id = self._settings.ids(self._first).start
        return unpack_mask(self._masks[proposal_id - first_id], self._space.num_filters)

    def ranked(self, generation: int, ids: Sequence[int], rankings: LookBack) -> RankedGeneration:
        """Proposals of one generation for a rule to learn from, the best first."""
        rows = np.array(ids) - self._settings.ids(generation).start
        return RankedGeneration(
            space=self._space,
            keep=np.stack([self.mask(proposal_id) for proposal_id in ids]),
            layer_noise=self._layer_noise[generation - self._first][rows],
            rankings=rankings,
        )

    def ranking(self, generation: int, ids: Sequence[int]) -> Ranking:
        """Proposals up to a generation whose scores may be compared, the best first."""
        return Ranking(
            keep=np.stack([self.mask(proposal_id) for proposal_id in ids]),
            age=generation - np.array(ids) // self._settings.population_size,
        )
