"""The facts of a journal of format 3: what each line holds, and that it comes back."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any, get_args

import numpy as np
import pytest

from fppmo_ray.distribution import Feedback, Merit, Proposal
from fppmo_ray.service.journal.fact_lines import fact_from_json
from fppmo_ray.service.journal.facts import (
    AllocationChosen,
    Chosen,
    ClockRead,
    ComputeChosen,
    DenseScored,
    EpochFinished,
    Fact,
    Finished,
    ImportanceMeasured,
    LatencyMeasured,
    Rescored,
    Started,
    Updated,
    WeightsFrozen,
    latest_feedback,
    pack_mask,
    unpack_mask,
)
from fppmo_ray.service.journal.journal import from_lines, to_lines

KEEP = np.array([True, False, True, True, False, False, False, False, False, True])
STARTED = Started(
    search_id="run-1",
    identity={
        "settings": {"scoring": {"rank_by": "val_loss", "capacity_weight": 0.5}},
        "data": "1f",
    },
    versions={"torch": "2.8"},
    groups=["conv1", "conv2"],
    num_filters=10,
    dense_macs=1000,
    dense_parameters=90,
)
EVERY: list[Fact] = [
    STARTED,
    ComputeChosen(compute={"dtype": "float32"}, trials=[{"seconds": 0.5}], why="measured"),
    LatencyMeasured(
        artifact="latency.json",
        sha256="ab",
        batch=4,
        dense_ms=1.5,
        median_error=0.02,
        device="cpu",
    ),
    EpochFinished(
        task="dense", epoch=0, train_loss=0.1 + 0.2, seconds=2.0, artifact="d.pt", sha256="cd"
    ),
    EpochFinished(
        task="dense", epoch=0, train_loss=None, seconds=2.0, artifact="d.pt", sha256="cd"
    ),
    WeightsFrozen(sha256="ef"),
    DenseScored(
        accuracy=0.875,
        half_interval=0.01,
        num_images=3000,
        num_classes=10,
        chance=0.1,
        is_chance=False,
        reordered_accuracy=0.875,
    ),
    ImportanceMeasured(criterion="fpgm", artifact="importance.npy", sha256="01"),
    Proposal(proposal_id=0, generation=0, keep=KEEP, macs=400),
    Proposal(
        proposal_id=17,
        generation=2,
        keep=~KEEP,
        macs=600,
        parameters=50,
        score_seed=(3, 2),
        macs_cut=0.4,
    ),
    Feedback(proposal_id=0, error="RuntimeError('ü')", worker="0@h:1", at=1e9 + 0.25),
    Feedback(
        proposal_id=17,
        val_loss=1 / 3,
        val_accuracy=2 / 3,
        steps=50,
        seconds=0.7,
        worker="1@h:2",
        at=1e9 + 0.5,
    ),
    Feedback(proposal_id=17, val_loss=-32.5),
    AllocationChosen(budget=0, gamma=0.3, costs=[2.5, 2.25, 3.0]),
    Updated(generation=1, keep_share=[0.25, 1 / 3]),
    Rescored(
        finalist="mode",
        keep=KEEP,
        split="choose_val",
        repeat=1,
        val_loss=0.5,
        val_accuracy=0.75,
        seconds=1.0,
    ),
    Rescored(
        finalist="sample 3",
        keep=KEEP,
        split="search_val",
        repeat=0,
        val_loss=-30.0,
        val_accuracy=None,
        seconds=1.0,
    ),
    Chosen(finalist="mode", keep=KEEP),
    Chosen(finalist="sample 3", keep=~KEEP, macs_cut=0.4),
    Finished(artifacts={"result.json": "23", "network.pt": "45"}),
    ClockRead(keep=KEEP, milliseconds=1.25),
]


def assert_equal(fact: Fact, expected: Fact) -> None:
    """Compare all fields; facts with masks have no equality of their own."""
    assert type(fact) is type(expected)
    for field in fields(expected):
        found, wanted = getattr(fact, field.name), getattr(expected, field.name)
        if isinstance(wanted, np.ndarray):
            assert found.dtype == bool
            assert found.tolist() == wanted.tolist()
        else:
            assert found == wanted
            assert type(found) is type(wanted)


def test_every_kind_of_fact_comes_back_from_its_line() -> None:
    assert {type(fact) for fact in EVERY} == set(get_args(Fact))
    back = from_lines(to_lines(EVERY), "here")
    assert len(back) == len(EVERY)
    for fact, expected in zip(back, EVERY, strict=True):
        assert_equal(fact, expected)


def test_a_line_is_the_record_itself_and_leaves_out_what_is_none() -> None:
    lines = [json.loads(line) for line in to_lines(EVERY).splitlines()]
    assert len({line.pop("sum") for line in lines}) == len(lines)  # equal facts too
    assert lines[0]["format"] == 3
    assert lines[9] == {
        "fact": "Proposal",
        "proposal_id": 17,
        "generation": 2,
        "keep": "T4A=",  # 0100 1111, 10
        "macs": 600,
        "parameters": 50,
        "score_seed": [3, 2],
        "macs_cut": 0.4,
    }
    assert lines[12] == {
        "fact": "Feedback",
        "proposal_id": 17,
        "val_loss": -32.5,
        "steps": 0,
        "worker": "",
    }


def test_masks_are_packed_with_the_first_filter_in_the_highest_bit() -> None:
    assert pack_mask(KEEP) == "sEA="  # 1011 0000, 01
    assert unpack_mask("sEA=", 10).tolist() == KEEP.tolist()


@pytest.mark.parametrize("num_filters", [8, 17])
def test_a_mask_of_another_network_is_refused(num_filters: int) -> None:
    expected = rf"expected a mask of {num_filters} filters in \d bytes, got 2 bytes"
    with pytest.raises(ValueError, match=expected):
        unpack_mask("sEA=", num_filters)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"fact": "Asked", "id": 1}, "expected a fact of Started, .*, got 'Asked'"),
        ({"proposal_id": 1}, "expected a fact of .*, got None"),
        ({"fact": "WeightsFrozen"}, "the entries of fact WeightsFrozen do not fit"),
        ({"fact": "WeightsFrozen", "sha256": "", "round": 1}, "do not fit: .*round"),
        ({"fact": "Feedback", "proposal_id": 1}, "val_loss of proposal 1 must be finite"),
    ],
)
def test_lines_of_no_fact_are_refused(data: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        fact_from_json(data, 10)


def test_of_two_scores_of_a_proposal_the_later_one_counts() -> None:
    first, second = Feedback(proposal_id=1, error="timeout"), Feedback(proposal_id=1, val_loss=0.5)
    other = Feedback(proposal_id=2, val_loss=0.25)
    assert latest_feedback([STARTED, first, other, second]) == {1: second, 2: other}


def test_the_first_line_tells_the_order_of_the_scores() -> None:
    started = from_lines(to_lines([STARTED]), "here")[0]
    assert isinstance(started, Started)
    assert started.merit == Merit(rank_by="val_loss", capacity_weight=0.5, dense_parameters=90)


def test_a_setting_that_the_first_line_does_not_tell_is_named() -> None:
    assert STARTED.setting("scoring.capacity_weight", float) == 0.5
    for identity in ({}, {"settings": []}, {"settings": {"scoring": "all"}}):
        with pytest.raises(ValueError, match=r"setting scoring\.rank_by, got None; was it written"):
            _ = replace(STARTED, identity=identity).merit
    with pytest.raises(ValueError, match=r"setting scoring\.rank_by, got 'val_loss'; was"):
        STARTED.setting("scoring.rank_by", float)
