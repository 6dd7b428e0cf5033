"""Everything that decides a search's trajectory, besides its feedback."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from fppmo_ray.distribution.budget import check_macs_cuts
from fppmo_ray.distribution.limits import Resource, check_cut
from fppmo_ray.distribution.rules import RULES, UpdateRule

RankBy = Literal["val_loss", "val_accuracy"]
"""The score by which proposals are ranked: the lower loss or the higher accuracy is better."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Everything that decides a search's trajectory, besides its feedback.

    Raises:
        ValueError: a setting is out of its range.
    """

    macs_cut: float | tuple[float, ...]
    """Share of the dense network's MACs to remove, in (0, 1). Several, ascending, make as many
    budgets, each of which gets an even share of every generation's proposals. Beside another cut it
    may be 0, which limits no MACs."""
    num_proposals: int
    """Proposals over the whole search, at least ``population_size``. Noise cools down over
    them, so a finished search cannot be extended."""
    rule: str | UpdateRule = "layer_es"
    """A name in ``RULES``, or a rule with steps of its own."""
    population_size: int = 16
    """Proposals per generation, at least 2; the last generation takes what is left."""
    lag: int = 1
    """Generations that may be sampled before the feedback of the one before is in, >= 0:
    generation g comes from the beliefs after the update of generation g - 1 - lag."""
    seed: int = 0
    """Of all randomness, >= 0."""
    rank_by: RankBy = "val_loss"
    """Loss tells more than accuracy on few images."""
    capacity_weight: float = 0.0
    """How much the parameters that a mask leaves count when losses are ranked, >= 0; see
    ``capacity_factor``."""
    rungs: tuple[int, ...] = ()
    """Depths of scores (fine-tuning steps, say), ascending, >= 0: all proposals are scored at the
    first, the best third of a generation at the second, and so on. Empty: whoever scores decides
    how deep, and the first feedback of a proposal ends it."""
    first_generation: int = 0
    """A later stage of a longer search begins with this one, in [0, num_generations); ids and
    generations go on from those before, which ``num_proposals`` counts too."""
    round_starts: tuple[int, ...] = ()
    """Generations before which the weights that masks are scored on change, ascending: scores of
    two such rounds are never compared, and the later round ranks first."""
    params_cut: float | None = None
    """Share of the parameters to remove beside every macs_cut, in (0, 1); None: no limit."""
    latency_cut: float | None = None
    """The same of the latency that the space's table tells."""
    memory_cut: float | None = None
    """The same of the activations' peak memory in inference."""

    def __post_init__(self) -> None:
        for resource, cut in self.further_cuts.items():
            check_cut(resource, cut)
        check_macs_cuts(self.macs_cuts, may_be_zero=bool(self.further_cuts))
        if self.population_size < 2:
            raise ValueError(
                f"population_size must be at least 2, to have ranks, got {self.population_size}"
            )
        if self.num_proposals < self.population_size:
            raise ValueError(
                f"num_proposals must be at least population_size = {self.population_size}, "
                f"got {self.num_proposals}; raise it or lower population_size"
            )
        self._check_heats()
        if isinstance(self.rule, str) and self.rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {self.rule!r}")
        for name in ("lag", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.rank_by not in get_args(RankBy):
            raise ValueError(f"rank_by must be val_loss or val_accuracy, got {self.rank_by!r}")
        if self.capacity_weight < 0 or (self.capacity_weight and self.rank_by != "val_loss"):
            raise ValueError(
                "capacity_weight must be at least 0, and 0 where rank_by is not val_loss, got "
                f"{self.capacity_weight} with rank_by {self.rank_by}"
            )
        if list(self.rungs) != sorted({*self.rungs}) or min(self.rungs, default=0) < 0:
            raise ValueError(f"rungs must ascend from at least 0, got {self.rungs}")
        self._check_generations("first_generation", (self.first_generation,))
        self._check_generations("round_starts", self.round_starts)

    def _check_generations(self, name: str, values: tuple[int, ...]) -> None:
        last = self.num_generations - 1
        if list(values) != sorted({*values} & {*range(last + 1)}):
            raise ValueError(
                f"{name} must ascend within [0, {last}], the generations, got {getattr(self, name)}"
            )

    def _check_heats(self) -> None:
        """Refuse several budgets where one of them would have no ranks in some generation."""
        num_budgets = len(self.macs_cuts)
        least = 2 * num_budgets
        if num_budgets == 1:
            return
        if self.population_size < least:
            raise ValueError(
                f"population_size must be at least {least} for {num_budgets} budgets, two "
                f"proposals for each, got {self.population_size}; raise it or give fewer macs_cut"
            )
        if 0 < (left := self.num_proposals % self.population_size) < least:
            raise ValueError(
                f"the last generation must have at least {least} proposals for {num_budgets} "
                f"budgets, got {left}; make num_proposals = {self.num_proposals} a multiple of "
                f"population_size = {self.population_size}"
            )

    @property
    def macs_cuts(self) -> tuple[float, ...]:
        """``macs_cut``, one for every budget."""
        return self.macs_cut if isinstance(self.macs_cut, tuple) else (self.macs_cut,)

    @property
    def further_cuts(self) -> dict[Resource, float]:
        """What is limited besides MACs."""
        cuts: dict[Resource, float | None] = {
            "params": self.params_cut,
            "latency": self.latency_cut,
            "memory": self.memory_cut,
        }
        return {resource: cut for resource, cut in cuts.items() if cut is not None}

    @property
    def num_generations(self) -> int:
        """Generations of the whole search."""
        return -(-self.num_proposals // self.population_size)

    def progress(self, generation: int) -> float:
        """Share of the search, or of its stage, that lies behind a generation: from 0 to 1."""
        first = self.first_generation
        return (generation - first) / max(1, self.num_generations - 1 - first)

    def round_of(self, proposal_id: int) -> int:
        """In which round a proposal is scored, counted from 0."""
        return bisect_right(self.round_starts, proposal_id // self.population_size)

    def ids(self, generation: int) -> range:
        """The proposals of a generation."""
        begin = generation * self.population_size
        return range(begin, min(begin + self.population_size, self.num_proposals))

    def heats(self, generation: int) -> tuple[range, ...]:
        """The proposals of a generation for each of the budgets.

        Only those of one heat are ever ranked against each other. Their ids are consecutive, so
        that the networks of the widest budget, which take longest to score, come first.
        """
        ids, num_budgets = self.ids(generation), len(self.macs_cuts)
        bounds = [len(ids) * budget // num_budgets for budget in range(num_budgets + 1)]
        return tuple(ids[begin:end] for begin, end in pairwise(bounds))
