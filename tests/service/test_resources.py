from __future__ import annotations

import math
from typing import Any

import pytest

from fppmo_ray import Resources
from fppmo_ray.service.pool.cluster import Demand
from fppmo_ray.service.worker_protocol import Worker

H100 = Resources(
    gpus=0.5,
    cpus=4,
    accelerator_type="H100",
    memory_gib=16,
    custom_resources={"nvme": 0.25},
    labels={"market-type": "!spot"},
)


def test_a_worker_asks_ray_for_all_that_it_needs_and_for_nothing_else() -> None:
    assert H100.demand.options() == {
        "num_cpus": 4,
        "num_gpus": 0.5,
        "memory": 16 * 1024**3,
        "resources": {"nvme": 0.25},
        "accelerator_type": "H100",
        "label_selector": {"market-type": "!spot"},
    }
    assert Resources().demand.options() == {"num_cpus": 1, "num_gpus": 0.0}


def test_processes_that_train_together_need_the_same_with_a_whole_gpu() -> None:
    assert H100.replica_demand.bundle() == {
        **{"CPU": 4, "GPU": 1.0, "memory": 16 * 1024**3, "nvme": 0.25},
    }
    assert H100.replica_demand.accelerator_type == "H100"
    assert Resources().replica_demand.bundle() == {"CPU": 1}


@pytest.mark.parametrize(
    ("node", "count"),
    [
        ({}, 2),
        ({"memory": 15 * 1024**3}, 0),
        ({"nvme": 0.3}, 1),
        ({"accelerator_type:H100": 0.0, "accelerator_type:A100": 1.0}, 2),
    ],
)
def test_a_node_has_room_for_workers_by_all_resources(node: dict[str, float], count: float) -> None:
    whole = {"CPU": 64.0, "GPU": 1.0, "memory": 256 * 1024**3, "nvme": 1.0}
    assert H100.demand.count_on({**whole, "accelerator_type:H100": 1.0, **node}) == count


def test_a_node_with_other_gpus_has_no_room() -> None:
    other = {"CPU": 64.0, "GPU": 8.0, "accelerator_type:A100": 1.0}
    assert Demand(cpus=1, gpus=1, accelerator_type="H100").count_on(other) == 0
    assert Demand(cpus=1, gpus=1).count_on(other) == 8
    assert Demand().count_on(other) == math.inf


def test_messages_name_all_that_a_worker_asks_for() -> None:
    assert str(H100.demand) == (
        "4 CPUs and 0.5 GPUs, of type H100, 16 GiB of memory, 0.25 nvme, "
        "a node with market-type=!spot"
    )


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"accelerator_type": "H100"}, "accelerator_type H100 needs workers with GPUs, got 0"),
        ({"memory_gib": -1.0}, "memory_gib must be >= 0, got -1.0"),
        ({"custom_resources": {"nvme": 0.0}}, "custom_resources nvme must be > 0, got 0.0"),
    ],
)
def test_resources_that_make_no_sense_are_refused(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Resources(**wrong)


def test_time_limits_of_a_placement_hold_for_every_call_of_a_worker() -> None:
    calls = {name for name in vars(Worker) if not name.startswith("_")}
    limits = Resources(score_timeout=5.0, call_timeout=70.0).time_limits()
    scores = {"try_compute", "score", "rescore"}
    assert {name for name in calls if limits.limit(name) == 5.0} == scores
    assert {name for name in calls if limits.limit(name) == 70.0} == calls - scores
    only_scores = Resources(score_timeout=5.0).time_limits()
    assert (only_scores.limit("score"), only_scores.limit("evaluate")) == (5.0, 86_400.0)
    only_others = Resources(call_timeout=70.0).time_limits()
    assert (only_others.limit("score"), only_others.limit("evaluate")) == (86_400.0, 70.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"workers": 0},
        {"gpus": -1.0},
        {"gpus": 1.5},
        {"gpus": 2.0},
        {"cpus": 0},
        {"score_timeout": 0.0},
        {"call_timeout": 0.0},
    ],
)
def test_resources_out_of_range_are_refused_with_a_sentence(wrong: dict[str, float]) -> None:
    [name] = wrong
    with pytest.raises(ValueError, match=rf"{name} must be (>|in \[0, 1\])"):
        Resources(**wrong)  # type: ignore[arg-type]
