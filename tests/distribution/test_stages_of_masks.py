"""A search in stages and rounds: within the mask before, from the logits before, never pooled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from fppmo_ray.distribution import (
    BoolArray,
    ChannelGroup,
    Feedback,
    Inheritance,
    LayerCost,
    MaskOptimizer,
    OptimizerSettings,
    PruningSpace,
    Standings,
    Width,
)

SIZES = 16, 24, 16


def make_space(multiple: int = 1) -> PruningSpace:
    """A chain of three layers."""
    groups = tuple(ChannelGroup(name=f"conv{i}", num_filters=size) for i, size in enumerate(SIZES))
    costs = tuple(
        LayerCost(
            layer=f"conv{i}",
            macs_per_pair=9,
            out_width=Width(terms=((i, 1),)),
            in_width=Width(terms=((i - 1, 1),)) if i else Width(constant=3),
        )
        for i in range(len(SIZES))
    )
    return PruningSpace(groups, costs).with_limits(min_keep=0.1, multiple=multiple)


SPACE = make_space()
IMPORTANCE = np.linspace(1.0, 2.0, SPACE.num_filters)
FIRST = OptimizerSettings(macs_cut=0.3, num_proposals=24, population_size=8, seed=4)
SECOND = replace(FIRST, macs_cut=0.6, num_proposals=44, first_generation=3)


def run(optimizer: MaskOptimizer, loss: Callable[[BoolArray], float]) -> list:
    """All proposals, each scored at once."""
    proposals = []
    while not optimizer.finished:
        for item in optimizer.ask():
            proposals.append(item)
            optimizer.tell(
                Feedback(proposal_id=item.proposal_id, val_loss=loss(item.keep), val_accuracy=0.5)
            )
    return proposals


def odd_kept(keep: BoolArray) -> float:
    return float(keep[1::2].mean())


@pytest.fixture
def stages() -> tuple[MaskOptimizer, Inheritance, MaskOptimizer, list]:
    """Both stages, and the second one's proposals."""
    first = MaskOptimizer(SPACE, IMPORTANCE, FIRST)
    run(first, odd_kept)
    mode = next(item.keep for item in first.finalists() if item.name == "mode")
    inherited = Inheritance(keep=mode, keep_logits=first.keep_logits())
    second = MaskOptimizer(SPACE, IMPORTANCE, SECOND, inherited)
    return first, inherited, second, run(second, odd_kept)


def test_all_masks_of_a_stage_lie_within_the_one_before_and_meet_the_tighter_budget(stages) -> None:
    _, inherited, second, proposals = stages
    masks = [item.keep for item in [*proposals, *second.finalists()]]
    assert all(mask.shape == (SPACE.num_filters,) for mask in masks)
    assert not any((mask & ~inherited.keep).any() for mask in masks)
    assert all(0.35 < SPACE.macs(mask) / SPACE.dense_macs <= 0.4 for mask in masks)
    assert [item.macs for item in proposals] == [SPACE.macs(item.keep) for item in proposals]
    assert (second.prune_prob()[~inherited.keep] == 1).all()
    assert (second.prune_prob()[inherited.keep] <= 0.98).all()


def test_ids_and_generations_go_on_from_the_stage_before(stages) -> None:
    _, _, second, proposals = stages
    assert [item.proposal_id for item in proposals] == list(range(24, 44))
    assert [item.generation for item in proposals] == [3] * 8 + [4] * 8 + [5] * 4
    assert {item.score_seed for item in proposals} == {(4, 3), (4, 4), (4, 5)}
    samples = [item.name for item in second.finalists() if item.name.startswith("sample")]
    assert all(24 <= int(name.split()[1]) < 44 for name in samples)


def test_survivors_keep_their_logits_but_for_the_shift_to_the_budget(stages) -> None:
    first, inherited, *_ = stages
    begun = MaskOptimizer(SPACE, IMPORTANCE, SECOND, inherited).keep_logits()
    assert (begun[~inherited.keep] == -np.inf).all()
    shift = (begun - first.keep_logits())[inherited.keep]
    assert shift.max() < 0
    assert shift.max() == pytest.approx(shift.min(), abs=1e-12)


def test_a_space_within_a_mask_costs_the_same_and_has_legal_widths() -> None:
    space = make_space(multiple=4)
    keep = np.arange(space.num_filters) < 16 + 12 + 8
    keep[44:] = True  # widths 16, 16 and 12
    inside = space.within(keep)
    half = np.arange(inside.num_filters) % 2 == 0
    whole = np.zeros(space.num_filters, dtype=bool)
    whole[np.flatnonzero(keep)[half]] = True
    assert inside.macs(half) == space.macs(whole)
    assert inside.min_widths.tolist() == space.min_widths.tolist() == [4, 4, 4]


def test_a_rehearsal_is_drawn_from_where_the_latest_generation_was_and_changes_nothing() -> None:
    rehearsing, plain = (MaskOptimizer(SPACE, IMPORTANCE, FIRST) for _ in range(2))
    seen, expected, rehearsals = [], [], []
    while not plain.finished:
        asked = rehearsing.ask()
        rehearsals.append([*map(np.packbits, rehearsing.rehearsal(200))])
        for item, other in zip(asked, plain.ask(), strict=True):
            seen.append(item.keep.tobytes())
            expected.append(other.keep.tobytes())
            loss = odd_kept(item.keep)
            for optimizer in (rehearsing, plain):
                optimizer.tell(
                    Feedback(proposal_id=item.proposal_id, val_loss=loss, val_accuracy=0.5)
                )
    assert seen == expected
    first, last = (np.unpackbits(np.array(masks), axis=1) for masks in rehearsals[::2])
    assert odd_kept(last.mean(axis=0)) < odd_kept(first.mean(axis=0))


def test_a_rehearsal_is_dealt_over_the_budgets() -> None:
    optimizer = MaskOptimizer(SPACE, IMPORTANCE, replace(FIRST, macs_cut=(0.3, 0.6)))
    optimizer.ask()
    shares = [SPACE.macs(keep) / SPACE.dense_macs for keep in optimizer.rehearsal(10)]
    assert [share > 0.5 for share in shares] == [True] * 5 + [False] * 5


def test_scores_of_different_rounds_are_never_pooled_the_later_round_ranks_first() -> None:
    standings = Standings(replace(FIRST, round_starts=(1, 2)))
    losses = {0: 0.1, 8: 0.3, 9: 0.2, 16: 0.9}
    for proposal_id, loss in losses.items():
        standings.add(Feedback(proposal_id=proposal_id, val_loss=loss, val_accuracy=0.5))
    assert standings.ranked(range(24)) == [16, 9, 8, 0]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"first_generation": 3}, r"first_generation must ascend within \[0, 2\].*got 3"),
        ({"round_starts": (1, 1)}, r"round_starts must ascend within \[0, 2\].*got \(1, 1\)"),
        ({"round_starts": (-1,)}, "round_starts must ascend"),
    ],
)
def test_generations_that_there_are_not_are_refused(wrong, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(FIRST, **wrong)
