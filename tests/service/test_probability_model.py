from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import ray

from fppmo_ray.distribution import (
    ChannelGroup,
    Feedback,
    LayerCost,
    MaskOptimizer,
    OptimizerSettings,
    Proposal,
    PruningSpace,
    Width,
)
from fppmo_ray.service.journal.facts import pack_mask
from fppmo_ray.service.search_loop import ModelHandle, ProbabilityModel

# The workers' processes cannot import test modules.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

GROUPS, FILTERS = 3, 12
SPACE = PruningSpace(
    groups=tuple(ChannelGroup(name=f"conv{i}", num_filters=FILTERS) for i in range(GROUPS)),
    layer_costs=tuple(
        LayerCost(
            layer=f"conv{i}",
            macs_per_pair=10,
            out_width=Width(terms=((i, 1),)),
            in_width=Width(terms=((i - 1, 1),)) if i else Width(constant=3),
        )
        for i in range(GROUPS)
    ),
)
SETTINGS = OptimizerSettings(macs_cut=0.5, num_proposals=32, population_size=8)


class Deadly:
    """Takes its process down with the first call."""

    def __init__(self, *arguments: object) -> None:
        pass

    def step(self, feedback: object) -> None:
        os._exit(1)


IMPORTANCE = np.linspace(1, 2, SPACE.num_filters)


def model(settings: OptimizerSettings = SETTINGS) -> ProbabilityModel:
    return ProbabilityModel(SPACE, IMPORTANCE, settings)


def score(proposal: Proposal) -> Feedback:
    """Return a loss that is low for masks of even filters, with a little noise."""
    loss = float(proposal.keep[1::2].sum()) + 7 * proposal.proposal_id % 11 / 20
    return Feedback(proposal_id=proposal.proposal_id, val_loss=loss, val_accuracy=0.5)


def run(service: ProbabilityModel) -> list[Proposal]:
    """All proposals of a search whose feedback comes one by one, in order."""
    proposals = list(service.step([]).proposals)
    done = 0
    while done < len(proposals):
        proposals += service.step([score(proposals[done])]).proposals
        done += 1
    return proposals


def test_two_generations_are_in_flight_from_the_start() -> None:
    assert [item.generation for item in model().step([]).proposals] == [0] * 8 + [1] * 8


def test_replaying_all_feedback_at_once_proposes_the_same_masks() -> None:
    proposals = run(model())
    step = model().step([score(item) for item in reversed(proposals)])
    assert len(proposals) == SETTINGS.num_proposals
    for live, replayed in zip(proposals, step.proposals, strict=True):
        assert live.proposal_id == replayed.proposal_id
        assert np.array_equal(live.keep, replayed.keep)
    assert [update.generation for update in step.updates] == [1, 2, 3, 4]


def test_the_work_of_a_replay_grows_with_the_proposals_and_no_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = 0
    expects = MaskOptimizer.expects

    def counted(self: MaskOptimizer, proposal_id: int) -> bool:
        nonlocal looks
        looks += 1
        return expects(self, proposal_id)

    settings = replace(SETTINGS, num_proposals=64 * 8, population_size=8)
    known = [score(item) for item in run(model(settings))]
    monkeypatch.setattr(MaskOptimizer, "expects", counted)
    model(settings).step(known)
    # Once before it is told, once in tell; and once a generation for one that is not asked for yet.
    assert looks <= 2 * len(known) + 64 + 2


def masks(proposals: Iterable[Proposal]) -> list[tuple[int, str]]:
    return sorted((item.proposal_id, pack_mask(item.keep)) for item in proposals)


def test_from_any_part_of_its_feedback_a_search_is_replayed_and_goes_on_alike() -> None:
    whole = run(model())
    expected, updates = masks(whole), model().step([score(item) for item in whole]).updates
    assert [update.generation for update in updates] == [1, 2, 3, 4]
    for count in range(len(whole) + 1):
        known = [score(item) for item in whole[:count]]
        replayed = model()
        begun = replayed.step(random.Random(count).sample(known, count))
        seen, made = list(begun.proposals), [*begun.updates]
        told = {item.proposal_id for item in known}
        assert told <= {item.proposal_id for item in seen}
        while missing := [item for item in seen if item.proposal_id not in told]:
            told.add(missing[-1].proposal_id)
            step = replayed.step([score(missing[-1])])
            seen += step.proposals
            made += step.updates
        assert masks(seen) == expected
        assert made == list(updates)


def test_feedback_told_twice_changes_nothing() -> None:
    service = model()
    first = service.step([]).proposals[0]
    service.step([score(first)])
    assert service.step([score(first)]).proposals == ()


def test_feedback_for_a_proposal_never_asked_for_is_refused() -> None:
    feedback = Feedback(proposal_id=99, val_loss=1.0, val_accuracy=0.5)
    with pytest.raises(ValueError, match=r"never asked for: \[99\]"):
        model().step([feedback])


def test_updates_do_not_depend_on_which_generation_ended_first() -> None:
    in_order, out_of_order = model(), model()
    proposals = in_order.step([]).proposals
    expected = in_order.step([score(item) for item in proposals]).updates
    out_of_order.step([])
    last_of_first, *others = sorted(proposals, key=lambda item: item.proposal_id != 7)
    assert out_of_order.step([score(item) for item in others]).updates == ()
    assert out_of_order.step([score(last_of_first)]).updates == expected
    assert [update.generation for update in expected] == [1, 2]


def test_an_update_tells_the_expected_share_of_kept_filters_per_group() -> None:
    service = model()
    proposals = service.step([]).proposals
    step = service.step([score(item) for item in proposals])
    assert [len(update.keep_share) for update in step.updates] == [GROUPS, GROUPS]
    assert all(0 < share < 1 for update in step.updates for share in update.keep_share)


def test_a_model_that_is_killed_is_replayed_to_and_proposes_the_same(local_ray: None) -> None:
    undisturbed = run(model())
    handle = ModelHandle(SPACE, IMPORTANCE, SETTINGS)
    proposals = {item.proposal_id: item for item in handle.step([]).proposals}
    for done in range(SETTINGS.num_proposals):
        if done == 11:
            handle.close()  # as a killed process would, in the middle of a generation
        step = handle.step([score(proposals[done])])
        proposals |= {item.proposal_id: item for item in step.proposals}
    handle.close()
    assert sorted(proposals) == [item.proposal_id for item in undisturbed]
    for item in undisturbed:
        assert np.array_equal(proposals[item.proposal_id].keep, item.keep)


def test_a_model_that_is_killed_at_the_end_still_names_its_finalists(local_ray: None) -> None:
    service = model()
    scores = [score(item) for item in run(service)]
    handle = ModelHandle(SPACE, IMPORTANCE, SETTINGS)
    handle.step(scores)
    handle.close()
    finalists = handle.finalists()
    handle.close()
    expected = model()
    expected.step(scores)
    assert [(item.name, pack_mask(item.keep)) for item in finalists] == [
        (item.name, pack_mask(item.keep)) for item in expected.finalists()
    ]


def test_a_model_that_no_process_survives_stops_the_search_with_a_sentence(
    local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fppmo_ray.service.search_loop.ProbabilityModel", Deadly)
    handle = ModelHandle(SPACE, IMPORTANCE, SETTINGS)
    with pytest.raises(
        RuntimeError, match=r"lost 5 times in a row on the driver's node \([\d.]+\)"
    ):
        handle.step([])


def test_the_dashboard_shows_what_the_model_is() -> None:
    assert repr(model()) == "ProbabilityModel(layer_es, 4 generations)"
