"""What a search's masks may cost, before and after latencies are measured."""

from __future__ import annotations

from fppmo_ray.distribution import Budget, PruningSpace
from fppmo_ray.service.settings import SearchSettings


def budgets_of(space: PruningSpace, settings: SearchSettings) -> list[Budget]:
    """The budget of every macs_cut; as long as the space tells no latency, without its limit.

    Raises:
        ValueError: a cut cannot be reached under the space's limits.
    """
    cuts = settings.further_cuts
    if space.latency is None:
        cuts.pop("latency", None)
    return [
        Budget.from_cut(space, macs_cut, cuts)
        if macs_cut or cuts
        else Budget(space, space.dense_macs)
        for macs_cut in settings.macs_cuts
    ]
