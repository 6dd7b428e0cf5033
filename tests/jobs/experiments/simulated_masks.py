"""Masks of a simulated network, and journals of searches that found them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from agreement.masks import (
    Mask,
    different_masks,
    near_masks,
)

from fppmo_ray.distribution import (
    BoolArray,
    Budget,
    Feedback,
    Proposal,
)
from fppmo_ray.service.journal.facts import Chosen, Fact, Rescored, Started, pack_mask
from fppmo_ray.service.journal.journal import to_lines
from fppmo_ray.testing.simulated_search import SIMULATED_SPACE

CUT = 0.57


BUDGET = Budget.from_cut(SIMULATED_SPACE, CUT)


def importances() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    names = ("l1", "fpgm", "bn_scale")
    return {name: rng.uniform(0.5, 1.5, SIMULATED_SPACE.num_filters) for name in names}


def found_masks(seed: int) -> list[Mask]:
    rng = np.random.default_rng(seed)
    return [
        Mask(f"{i} of search {seed}", BUDGET.fill(rng.random(SIMULATED_SPACE.num_filters)), True)
        for i in range(5)
    ]


def all_masks(num_masks: int, seed: int) -> list[Mask]:
    different = different_masks(BUDGET, importances(), num_masks // 2, seed)
    searches = [found_masks(1), found_masks(2)]
    return different + near_masks(BUDGET, searches, num_masks // 2, seed, taken=different)


def packed(masks: list[Mask]) -> list[str]:
    return [pack_mask(mask.keep) for mask in masks]


def write_search(run_dir: Path, facts: list[Fact], space: str, cut: float) -> Path:
    started = Started(
        search_id="s",
        identity={"space": space, "settings": {"macs_cut": cut}},
        versions={},
        groups=[],
        num_filters=next(fact.keep.size for fact in facts if isinstance(fact, Proposal | Chosen)),
        dense_macs=1,
    )
    run_dir.mkdir(parents=True)
    (run_dir / "journal.jsonl").write_bytes(to_lines([started, *facts]))
    return run_dir


def facts_of(masks: list[BoolArray], losses: list[float]) -> list[Fact]:
    """A search in which the first mask became the mode and the others were samples."""
    mode, *samples = masks
    facts: list[Fact] = []
    for number, (keep, loss) in enumerate(zip(samples, losses, strict=True)):
        facts.append(Proposal(proposal_id=number, generation=0, keep=keep, macs=1))
        facts.append(Feedback(proposal_id=number, val_loss=loss, val_accuracy=0.5))
    for finalist, keep in (("sample 0", samples[0]), ("mode", mode)):
        facts.append(
            Rescored(
                finalist=finalist,
                keep=keep,
                split="choose_val",
                repeat=0,
                val_loss=1,
                val_accuracy=0.5,
                seconds=1,
            )
        )
    return [*facts, Chosen(finalist="mode", keep=mode)]
