"""Which generations of a search belong to which stage, and where in it the weights change."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from fppmo_ray.distribution import OptimizerSettings

_MIN_GENERATIONS = 2  # of a stage: with one alone, nothing is learned from


def in_stages(
    search: OptimizerSettings, cuts: tuple[float, ...], adaptations: int
) -> tuple[OptimizerSettings, ...]:
    """The settings of every stage; one stage without cuts.

    Args:
        search: As if all was one stage; its ``macs_cut`` is the last stage's.
        cuts: Of the stages before the last, ascending, or all of them.
        adaptations: How often the weights are adapted in each stage, at even distances, the first
            time before its first generation; 0: never.

    Raises:
        ValueError: the cuts do not lead up to the search's, or the generations are too few.
    """
    earlier = _earlier_cuts(search, cuts)
    num_stages, num_generations = len(earlier) + 1, search.num_generations
    if earlier and num_generations < _MIN_GENERATIONS * num_stages:
        needed = _MIN_GENERATIONS * num_stages * search.population_size
        raise ValueError(
            f"{num_stages} stages need at least {_MIN_GENERATIONS} generations each, got "
            f"{num_generations} in all; give --proposals {needed} or more, or fewer stages"
        )
    stages = []
    bounds = [num_generations * stage // num_stages for stage in range(num_stages + 1)]
    for macs_cut, (first, end) in zip((*earlier, search.macs_cut), pairwise(bounds), strict=True):
        if adaptations > end - first:
            raise ValueError(
                f"adapt_rounds must be at most {end - first}, the generations of a stage, got "
                f"{adaptations}; lower it, or raise proposals"
            )
        stages.append(
            replace(
                search,
                macs_cut=macs_cut,
                num_proposals=search.ids(end - 1).stop,
                first_generation=first,
                round_starts=tuple(
                    first + (end - first) * i // adaptations for i in range(adaptations)
                ),
            )
        )
    return tuple(stages)


def as_one(stages: tuple[OptimizerSettings, ...]) -> OptimizerSettings:
    """All stages for whoever counts and ranks all scores: each begins a round."""
    starts = {stage.first_generation for stage in stages[1:]}
    starts.update(*(stage.round_starts for stage in stages))
    return replace(stages[-1], first_generation=0, round_starts=tuple(sorted(starts)))


def _earlier_cuts(search: OptimizerSettings, cuts: tuple[float, ...]) -> tuple[float, ...]:
    if not cuts:
        return ()
    [*_, last] = search.macs_cuts
    if len(search.macs_cuts) > 1:
        raise ValueError(
            f"stages lead up to one macs_cut, got {len(search.macs_cuts)}; give one of them, or "
            "no stages"
        )
    if search.further_cuts:
        listed = ", ".join(f"{name}_cut" for name in search.further_cuts)
        raise ValueError(
            f"stages lead up to a macs_cut alone, got {listed} beside it; leave stages out, or "
            "the other cuts"
        )
    earlier = cuts[:-1] if cuts[-1] == last else cuts
    if list(earlier) != sorted({*earlier}) or not all(0 < cut < last for cut in earlier):
        raise ValueError(
            f"stages must ascend within (0, {last}], up to macs_cut, got {','.join(map(str, cuts))}"
        )
    return earlier
