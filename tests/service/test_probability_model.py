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
    OptimizerSettings,
    Proposal,
    PruningSpace,
    Width,
    pack_mask,
)
from fppmo_ray.service.model_handle import ModelHandle
from fppmo_ray.service.probability_model import ProbabilityModel

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
IN_RUNGS = replace(SETTINGS, rungs=(5, 20))


class Deadly:
    """Takes its process down with the first call."""

    def __init__(self, *arguments: object) -> None:
        pass

    def advance(self, feedback: object) -> None:
        os._exit(1)


def model(settings: OptimizerSettings = SETTINGS) -> ProbabilityModel:
    importance = np.linspace(1, 2, SPACE.num_filters)
    return ProbabilityModel(SPACE, importance, settings)


def score(proposal: Proposal) -> Feedback:
    """A loss that likes the filters with even numbers, and a little noise at its rung."""
    rung = proposal.rung or 0
    loss = float(proposal.keep[1::2].sum()) + (7 * proposal.proposal_id + rung) % 11 / 20
    return Feedback(proposal_id=proposal.proposal_id, val_loss=loss, val_accuracy=0.5, rung=rung)


def run(service: ProbabilityModel) -> list[Proposal]:
    """All proposals of a search whose feedback comes one by one, in order."""
    proposals = list(service.advance([]).proposals)
    done = 0
    while done < len(proposals):
        proposals += service.advance([score(proposals[done])]).proposals
        done += 1
    return proposals


def test_two_generations_are_in_flight_from_the_start() -> None:
    assert [item.generation for item in model().advance([]).proposals] == [0] * 8 + [1] * 8


def test_replaying_all_feedback_at_once_proposes_the_same_masks() -> None:
    proposals = run(model())
    advance = model().advance([score(item) for item in reversed(proposals)])
    assert len(proposals) == SETTINGS.num_proposals
    for live, replayed in zip(proposals, advance.proposals, strict=True):
        assert live.proposal_id == replayed.proposal_id
        assert np.array_equal(live.keep, replayed.keep)
    assert [update.generation for update in advance.updates] == [1, 2, 3, 4]


def wanted(proposals: Iterable[Proposal]) -> list[tuple[int, int, str]]:
    return sorted((item.proposal_id, item.rung or 0, pack_mask(item.keep)) for item in proposals)


def test_from_any_part_of_its_feedback_a_search_in_rungs_is_replayed_and_goes_on_alike() -> None:
    whole = run(model(IN_RUNGS))
    expected, updates = wanted(whole), model(IN_RUNGS).advance([score(i) for i in whole]).updates
    assert len(whole) == 32 + 4 * 3
    assert [update.generation for update in updates] == [1, 2, 3, 4]
    for count in range(len(whole) + 1):
        known = [score(item) for item in whole[:count]]
        replayed = model(IN_RUNGS)
        begun = replayed.advance(random.Random(count).sample(known, count))
        seen = list(begun.proposals)
        told = {(item.proposal_id, item.rung) for item in known}
        assert told <= {(i, rung) for i, rung, _ in wanted(seen)}
        made = [*begun.updates]
        while missing := [i for i in seen if (i.proposal_id, i.rung) not in told]:
            told.add((missing[-1].proposal_id, missing[-1].rung))
            advance = replayed.advance([score(missing[-1])])
            seen += advance.proposals
            made += advance.updates
        assert wanted(seen) == expected
        assert made == list(updates)


def test_feedback_at_a_rung_never_asked_for_is_refused() -> None:
    service = model(IN_RUNGS)
    proposals = service.advance([]).proposals
    feedback = [score(item) for item in proposals if item.generation == 0]
    promoted = service.advance(feedback).proposals
    [other, *_] = {item.proposal_id for item in proposals} - {i.proposal_id for i in promoted}
    with pytest.raises(ValueError, match=rf"never asked for: \[{other}\]"):
        service.advance([Feedback(proposal_id=other, error="NaN", rung=20)])


def test_feedback_told_twice_changes_nothing() -> None:
    service = model()
    first = service.advance([]).proposals[0]
    service.advance([score(first)])
    assert service.advance([score(first)]).proposals == ()


def test_feedback_for_a_proposal_never_asked_for_is_refused() -> None:
    feedback = Feedback(proposal_id=99, val_loss=1.0, val_accuracy=0.5)
    with pytest.raises(ValueError, match=r"never asked for: \[99\]"):
        model().advance([feedback])


def test_updates_do_not_depend_on_which_generation_ended_first() -> None:
    in_order, out_of_order = model(), model()
    proposals = in_order.advance([]).proposals
    expected = in_order.advance([score(item) for item in proposals]).updates
    out_of_order.advance([])
    last_of_first, *others = sorted(proposals, key=lambda item: item.proposal_id != 7)
    assert out_of_order.advance([score(item) for item in others]).updates == ()
    assert out_of_order.advance([score(last_of_first)]).updates == expected
    assert [update.generation for update in expected] == [1, 2]


def test_an_update_tells_the_expected_share_of_kept_filters_per_group() -> None:
    service = model()
    proposals = service.advance([]).proposals
    advance = service.advance([score(item) for item in proposals])
    assert [len(update.keep_share) for update in advance.updates] == [GROUPS, GROUPS]
    assert all(0 < share < 1 for update in advance.updates for share in update.keep_share)


def test_a_model_that_is_killed_is_replayed_to_and_proposes_the_same(local_ray: None) -> None:
    undisturbed = run(model())
    handle = ModelHandle(SPACE, np.linspace(1, 2, SPACE.num_filters), SETTINGS)
    proposals = {item.proposal_id: item for item in handle.advance([]).proposals}
    for done in range(SETTINGS.num_proposals):
        if done == 11:
            handle.close()  # as a killed process would, in the middle of a generation
        advance = handle.advance([score(proposals[done])])
        proposals |= {item.proposal_id: item for item in advance.proposals}
    handle.close()
    assert sorted(proposals) == [item.proposal_id for item in undisturbed]
    for item in undisturbed:
        assert np.array_equal(proposals[item.proposal_id].keep, item.keep)


def test_a_model_that_is_killed_at_the_end_still_names_its_finalists(local_ray: None) -> None:
    service = model()
    scores = [score(item) for item in run(service)]
    handle = ModelHandle(SPACE, np.linspace(1, 2, SPACE.num_filters), SETTINGS)
    handle.advance(scores)
    handle.close()
    finalists = handle.finalists()
    handle.close()
    expected = model()
    expected.advance(scores)
    assert [(item.name, pack_mask(item.keep)) for item in finalists] == [
        (item.name, pack_mask(item.keep)) for item in expected.finalists()
    ]


def test_a_model_that_no_process_survives_stops_the_search_with_a_sentence(
    local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fppmo_ray.service.model_handle.ProbabilityModel", Deadly)
    handle = ModelHandle(SPACE, np.linspace(1, 2, SPACE.num_filters), SETTINGS)
    with pytest.raises(
        RuntimeError, match=r"lost 5 times in a row on the driver's node \([\d.]+\)"
    ):
        handle.advance([])


def test_the_dashboard_shows_what_the_model_is() -> None:
    assert repr(model()) == "ProbabilityModel(layer_es, 4 generations)"
