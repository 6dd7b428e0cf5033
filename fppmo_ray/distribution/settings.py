"""The settings that decide a search's trajectory, together with its feedback."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from fppmo_ray.distribution.budget import check_macs_cuts
from fppmo_ray.distribution.limits import Resource, check_cut
from fppmo_ray.distribution.merit import Merit, RankBy
from fppmo_ray.distribution.rules import RULES, UpdateRule
from fppmo_ray.distribution.space import PruningSpace


def cuts_of(macs_cut: float | tuple[float, ...]) -> tuple[float, ...]:
    """Return the ``macs_cut`` of every budget: one number is one budget."""
    return macs_cut if isinstance(macs_cut, tuple) else (macs_cut,)


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """The settings that decide a search's trajectory, together with its feedback.

    Raises:
        ValueError: a setting is out of its range.
    """

    macs_cut: float | tuple[float, ...]
    """Share of the dense network's MACs to remove, in (0, 1). Several, ascending, make as many
    budgets, each of which gets an even share of every generation's proposals. Beside another cut it
    may be 0, which limits no MACs."""
    num_proposals: int
    """Proposals over the whole search, at least ``population_size``; 0: nothing is scored. Noise
    cools down over them, so a finished search cannot be extended."""
    rule: str | UpdateRule = "layer_es"
    """A name in ``RULES``, or a rule with steps of its own."""
    population_size: int = 16
    """Proposals per generation, at least 2; the last generation takes what is left."""
    lag: int = 1
    """Generations that may be sampled before the feedback of the one before is in, >= 0:
    generation g comes from the beliefs after the update of generation g - 1 - lag."""
    seed: int = 0
    """Random seed, >= 0."""
    rank_by: RankBy = "val_loss"
    """The figure that ranks proposals; on few images a loss tells more than an accuracy."""
    capacity_weight: float = 0.0
    """How much the parameters that a mask leaves count when losses are ranked, >= 0; see
    ``Merit``."""
    params_cut: float | None = None
    """Share of the parameters to remove beside every macs_cut, in (0, 1); None: no limit."""
    latency_cut: float | None = None
    """Share of the latency to remove, by the space's latency table; None: no limit."""
    memory_cut: float | None = None
    """Share of the activations' peak memory in inference to remove; None: no limit."""

    def __post_init__(self) -> None:
        for resource, cut in self.further_cuts.items():
            check_cut(resource, cut)
        check_macs_cuts(self.macs_cuts, may_be_zero=bool(self.further_cuts))
        if self.population_size < 2:
            raise ValueError(
                f"population_size must be at least 2, to have ranks, got {self.population_size}"
            )
        if self.num_proposals != 0 and self.num_proposals < self.population_size:
            raise ValueError(
                f"num_proposals must be at least population_size = {self.population_size}, "
                f"got {self.num_proposals}; raise it or lower population_size"
            )
        self._check_budgets()
        if isinstance(self.rule, str) and self.rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {self.rule!r}")
        for name in ("lag", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        # The parameters are known with the space; any number checks the other two here.
        Merit(rank_by=self.rank_by, capacity_weight=self.capacity_weight, dense_parameters=1)

    def _check_budgets(self) -> None:
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
        return cuts_of(self.macs_cut)

    @property
    def further_cuts(self) -> dict[Resource, float]:
        """Shares to remove of the resources that are limited besides MACs."""
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
        """Return the share of the search that lies behind a generation, from 0 to 1."""
        return generation / max(1, self.num_generations - 1)

    def ids(self, generation: int) -> range:
        """Return the ids of a generation's proposals."""
        begin = generation * self.population_size
        return range(begin, min(begin + self.population_size, self.num_proposals))

    def ids_by_budget(self, generation: int) -> tuple[range, ...]:
        """Return the ids of a generation's proposals for each of the budgets.

        Only proposals for one budget are ever ranked against each other. Their ids are consecutive,
        so that the networks of the widest budget, which take longest to score, come first.
        """
        ids, num_budgets = self.ids(generation), len(self.macs_cuts)
        bounds = [len(ids) * budget // num_budgets for budget in range(num_budgets + 1)]
        return tuple(ids[begin:end] for begin, end in pairwise(bounds))

    def merit(self, space: PruningSpace) -> Merit:
        """Return the order of scores on a space.

        Args:
            space: The space of the masks; it knows the sizes of tensors if losses are weighed.

        Raises:
            ValueError: losses are to be weighed by capacity and the space knows no tensor sizes.
        """
        if self.capacity_weight and not space.tensor_sizes:
            raise ValueError(
                f"capacity_weight = {self.capacity_weight} needs a space with tensor_sizes, got "
                "one without; trace makes such spaces, or take 0"
            )
        return Merit(
            rank_by=self.rank_by,
            capacity_weight=self.capacity_weight,
            dense_parameters=space.dense_parameters if space.tensor_sizes else 0,
        )
