"""The masks that scores are judged on: half very different ones, half near a search's optimum.

All meet the same budget. Any useful score finds the good masks among the very different ones; the
masks near an optimum are the choice that a search has in its last generations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from fppmo_ray.distribution import (
    BoolArray,
    Budget,
    FloatArray,
    Merit,
    Proposal,
    PruningSpace,
)
from fppmo_ray.distribution.logits import uniform_priority
from fppmo_ray.pruning import Criterion
from fppmo_ray.service.journal.facts import (
    Chosen,
    Fact,
    Rescored,
    Started,
    latest_feedback,
    pack_mask,
    unpack_mask,
)
from fppmo_ray.service.journal.run_directory import read_journal

CRITERIA: tuple[Criterion, ...] = ("l1", "fpgm", "bn_scale")
"""Of the global rankings; the first also orders the filters within layers."""

_MODES: tuple[str, ...] = ("mode", "averaged mode")  # names of finalists
_SPREADS = 0.5  # each mask of random widths spreads its layers' logits this much more
_FOUND_PER_SAMPLE = 2  # masks that searches found, for each sample around their modes
_KEEP_LOGIT = 2.0  # around a mode: its filters are kept at this logit, the others at its negative,
_TEMPERATURE = 0.7  # under logistic noise of this scale, which turns about 5 % of them over,
_LAYER_SPREAD = 0.3  # and layers move by Gaussian noise, as in a search's late generations
_MAX_DRAWS = 1000
_DIFFERENT, _AROUND = 0, 1  # streams of random numbers


@dataclass(frozen=True, eq=False)
class Mask:
    """A mask with the name of where it comes from."""

    name: str
    keep: BoolArray
    """``(num_filters,)``, True = kept."""
    is_near: bool
    """Whether it is near the optimum of a search."""


def different_masks(
    budget: Budget, importances: Mapping[Criterion, FloatArray], num_masks: int, seed: int
) -> list[Mask]:
    """Return uniform L1, a global ranking by each criterion, then random widths and random filters.

    Args:
        budget: The budget that all masks meet.
        importances: Importance of each filter by criterion, with ``CRITERIA[0]`` among them.
        num_masks: Number of masks; a larger number begins with the same masks.
        seed: Seed of the random masks.

    Raises:
        ValueError: the space has fewer different masks.
    """
    space, quantiles = budget.space, uniform_priority(budget.space, importances[CRITERIA[0]])
    priorities = chain(
        [(f"uniform {CRITERIA[0]}", quantiles)],
        ((f"global {criterion}", values) for criterion, values in importances.items()),
        islice(_at_random(space, quantiles, seed), _MAX_DRAWS),
    )
    candidates = (Mask(name, budget.fill(wish), is_near=False) for name, wish in priorities)
    return _distinct(candidates, num_masks, taken=())


def _at_random(
    space: PruningSpace, quantiles: FloatArray, seed: int
) -> Iterator[tuple[str, FloatArray]]:
    """Yield named priorities without end: layers that spread ever more, and random filters."""
    rng = np.random.default_rng([seed, _DIFFERENT])
    logits = np.log(quantiles / (1 - quantiles))
    for number in count(1):
        spread = _SPREADS * number
        moves = spread * rng.standard_normal(len(space.groups))
        yield f"random widths, spread {spread:g}", logits + moves[space.group_of]
        yield f"random filters {number}", uniform_priority(space, rng.random(len(quantiles)))


def near_masks(
    budget: Budget,
    searches: Sequence[Sequence[Mask]],
    num_masks: int,
    seed: int,
    taken: Iterable[Mask] = (),
) -> list[Mask]:
    """Return masks that searches ended with, in turn, and after every two a sample around a mode.

    Args:
        budget: The budget that all masks meet.
        searches: The masks of each search, the best first; at least one mask in all.
        num_masks: Number of masks; a larger number begins with the same masks.
        seed: Seed of the samples.
        taken: Masks that must not come again.

    Raises:
        ValueError: there are fewer different masks.
    """
    rng = np.random.default_rng([seed, _AROUND])

    def around() -> Iterator[Mask]:
        for number in range(_MAX_DRAWS):
            centre = searches[number % len(searches)][0]
            keep = budget.fill(_priority_around(budget.space, centre.keep, rng))
            yield Mask(f"around the {centre.name}, {number}", keep, is_near=True)

    found = _new_ones(mask for turn in zip_longest(*searches) for mask in turn if mask is not None)
    candidates = (
        mask for sample in around() for mask in (*islice(found, _FOUND_PER_SAMPLE), sample)
    )
    return _distinct(candidates, num_masks, taken=taken)


def masks_of_search(
    run_dir: str | Path, number: int, space: PruningSpace, macs_cut: float
) -> list[Mask]:
    """Return the mode, the averaged mode and all samples of a finished search, the best first.

    Samples are ordered by their losses as they are, however the search weighed them.

    Args:
        run_dir: Run directory of the search.
        number: Number of the search, for the masks' names.
        space: The space that the search must have had.
        macs_cut: The budget that the search must have had.

    Raises:
        ValueError: there is no finished search, it is of another network, space or budget, or its
            masks are in the journals of its stages.
    """
    facts = read_journal(run_dir)
    _require_fit(run_dir, facts, space, macs_cut)
    rescored = {fact.finalist: fact.keep for fact in facts if isinstance(fact, Rescored)}
    proposed = {fact.proposal_id: fact.keep for fact in facts if isinstance(fact, Proposal)}
    if not proposed:
        raise ValueError(
            f"the search in {run_dir} pruned in stages, which have masks of their own; give "
            "searches without --stages"
        )
    ranked = Merit().ranked(latest_feedback(facts).values(), lambda _: 0)
    masks = {name: rescored[name] for name in _MODES if name in rescored}
    masks |= {f"sample {item.proposal_id}": proposed[item.proposal_id] for item in ranked}
    return [Mask(f"{name} of search {number}", keep, is_near=True) for name, keep in masks.items()]


def chosen_mask(run_dir: str | Path, number: int, space: PruningSpace, macs_cut: float) -> Mask:
    """Return the mask that a finished search chose; the arguments are as for ``masks_of_search``.

    Raises:
        ValueError: there is no finished search, or it has another network, space or budget.
    """
    facts = read_journal(run_dir)
    _require_fit(run_dir, facts, space, macs_cut)
    [keep] = (fact.keep for fact in facts if isinstance(fact, Chosen))
    return Mask(f"chosen by search {number}", keep, is_near=True)


def masks_to_json(masks: Iterable[Mask]) -> list[dict[str, Any]]:
    """Return masks as values that JSON holds."""
    return [
        {"name": mask.name, "keep": pack_mask(mask.keep), "is_near": mask.is_near} for mask in masks
    ]


def masks_from_json(
    entries: Iterable[Mapping[str, Any]], num_masks: int, num_filters: int
) -> list[Mask]:
    """Return the first of the masks that ``masks_to_json`` described, half of them near an optimum.

    Args:
        entries: What ``masks_to_json`` returned.
        num_masks: Number of masks.
        num_filters: Number of filters of a mask.

    Raises:
        ValueError: there are fewer masks.
    """
    masks = [Mask(**{**item, "keep": unpack_mask(item["keep"], num_filters)}) for item in entries]
    near = [mask for mask in masks if mask.is_near][: num_masks // 2]
    different = [mask for mask in masks if not mask.is_near][: num_masks - num_masks // 2]
    if len(near) + len(different) < num_masks:
        raise ValueError(
            f"expected {num_masks} masks, the results were begun with {len(masks)}; give the "
            "--searches that those near the optimum came from, or ask for fewer --masks"
        )
    return different + near


def _require_fit(
    run_dir: str | Path, facts: Sequence[Fact], space: PruningSpace, macs_cut: float
) -> None:
    started = next((fact for fact in facts if isinstance(fact, Started)), None)
    if started is None or not any(isinstance(fact, Chosen) for fact in facts):
        raise ValueError(f"the search in {run_dir} has not finished; go on with it by --resume")
    identity: Mapping[str, Any] = started.identity
    if identity["space"] != space.fingerprint():
        raise ValueError(
            f"the search in {run_dir} was for another network or other limits of its widths; "
            "give searches of this --network, --min-keep and --width-multiple"
        )
    cut = identity["settings"]["macs_cut"]
    if cut != macs_cut:
        cuts = ", ".join(f"{one:.0%}" for one in (cut if isinstance(cut, list) else [cut]))
        raise ValueError(
            f"the search in {run_dir} cut {cuts} of the MACs, expected {macs_cut:.0%}; "
            "give searches of this --macs-cut"
        )


def _priority_around(space: PruningSpace, keep: BoolArray, rng: np.random.Generator) -> FloatArray:
    """Priorities whose mask is close to a given one."""
    logits = np.where(keep, _KEEP_LOGIT, -_KEEP_LOGIT)
    layers = _LAYER_SPREAD * rng.standard_normal(len(space.groups))
    noise = rng.logistic(scale=_TEMPERATURE, size=space.num_filters)
    priority: FloatArray = logits + layers[space.group_of] + noise
    return priority


def _distinct(masks: Iterable[Mask], num_masks: int, *, taken: Iterable[Mask]) -> list[Mask]:
    """The first ``num_masks`` masks that differ from each other and from those taken."""
    found = list(islice(_new_ones(masks, taken), num_masks))
    if len(found) < num_masks:
        raise ValueError(
            f"expected {num_masks} different masks, found {len(found)} that meet the budget; ask "
            "for fewer --masks"
        )
    return found


def _new_ones(masks: Iterable[Mask], taken: Iterable[Mask] = ()) -> Iterator[Mask]:
    seen = {pack_mask(mask.keep) for mask in taken}
    for mask in masks:
        if (bits := pack_mask(mask.keep)) not in seen:
            seen.add(bits)
            yield mask
