"""What the scoring benchmark compares is the same work; how long it takes is nobody's claim."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec

import pandas as pd
import pytest
import torch
from speed import layouts, scoring
from speed.decoding import decoders_table, decoding_table
from speed.passes import Convolutions, bare_passes
from speed.rivals import Task, Turn, naively_pruned, rival, task_of
from speed.subject import MACS_CUT, Plan, Subject, make_subject
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from fppmo_ray.training import ComputeConfig
from fppmo_ray.training.networks import CifarResNet

SMALL = Plan(steps=(0, 2), repeats=1, recalibrate_images=20, score_images=30, batch_size=8)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return make_subject("resnet20", SMALL)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def calls(kind: type[nn.Module], run: Callable[[], object]) -> list[tuple[int, ...]]:
    """Shapes of the inputs of all modules of a kind, in the order of their calls."""
    shapes: list[tuple[int, ...]] = []

    def note(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, kind):
            shapes.append(tuple(inputs[0].shape))

    hook = register_module_forward_pre_hook(note)
    run()
    hook.remove()
    return shapes


def test_the_bare_passes_are_those_of_a_score() -> None:
    plan = replace(SMALL, recalibrate_images=255, compute=ComputeConfig(scoring_batch=20))
    trained = make_subject("resnet20", plan).at(2)
    shapes = calls(CifarResNet, bare_passes(trained))
    rows = [8, 8, 250, 5, 20, 10]  # two steps, recalibration, scoring
    assert shapes == [(count, 3, 32, 32) for count in rows]
    assert shapes == calls(CifarResNet, trained.score)


def test_the_convolutions_alone_are_those_of_a_score(subject: Subject) -> None:
    trained = subject.at(2)
    alone = Convolutions(trained)
    shapes = calls(nn.Conv2d, alone.train) + calls(nn.Conv2d, alone.look)
    assert len(shapes) == 4 * 19
    assert shapes == calls(nn.Conv2d, trained.score)


def test_the_naive_way_scores_the_same_network(subject: Subject) -> None:
    naive = naively_pruned(subject.dense, task_of(subject)).double().eval()
    extracted = subject.extracted().double().eval()
    widths = [
        [layer.out_channels for layer in network.modules() if isinstance(layer, nn.Conv2d)]
        for network in (naive, extracted)
    ]
    assert widths[0] == widths[1]
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(naive(images), extracted(images))


def test_the_mask_cuts_what_the_table_says(subject: Subject) -> None:
    space = subject.tracing.space
    assert space.macs(subject.keep) / space.dense_macs == pytest.approx(1 - MACS_CUT, abs=0.005)


@pytest.mark.parametrize("fold_batchnorm", [False, True])
def test_every_part_of_a_score_is_measured(fold_batchnorm: bool) -> None:
    plan = replace(SMALL, compute=ComputeConfig(dtype="bfloat16", fold_batchnorm=fold_batchnorm))
    cost = scoring.measure(make_subject("resnet20", plan).at(2), repeats=1)
    assert set(cost.around) == {"extract", "copy", "BN", "metrics", "optimizer"}
    assert all(seconds > 0 for seconds in cost.around.values())
    assert cost.score == pytest.approx(cost.bare + sum(cost.around.values()) + cost.rest)
    assert cost.launch == 0  # on a CPU
    assert cost.training is not None
    assert cost.training.images == 16
    assert 0 < cost.training.convolutions < cost.convolutions


def test_there_is_a_row_for_every_network_and_number_of_steps() -> None:
    plan = replace(SMALL, steps=(1, 2))
    speed, parts = scoring.scoring_tables(["resnet20", "resnet32"], plan)
    for table in (speed, parts):
        names, steps = (list(table.columns[i].cells) for i in (0, 1))
        assert names == ["resnet20", "resnet20", "resnet32", "resnet32"]
        assert steps == ["1", "2", "1", "2"]


def test_scores_without_steps_are_compared_with_others(subject: Subject) -> None:
    cost = scoring.measure(subject, repeats=1)
    assert cost.training is None
    assert cost.rivals["naive"] > 0
    assert ("fastnas" in cost.rivals) == (find_spec("modelopt") is not None)


def fail(task: Task, turn: Turn) -> None:
    raise ValueError("expected of this test")


def test_a_rival_that_fails_is_named(subject: Subject) -> None:
    with rival(fail, task_of(subject)) as take_turn, pytest.raises(RuntimeError, match="fail end"):
        take_turn()


def test_the_first_of_the_repeats_does_not_count() -> None:
    seconds = iter([9.0, 1.0, 3.0, 2.0])
    assert scoring._in_turns({"way": lambda: next(seconds)}, repeats=3) == {"way": 2.0}


def test_scores_count_from_when_all_workers_are_up() -> None:
    history = pd.DataFrame(
        {
            "worker": ["a", "a", "a", "b", "a", "b"],
            "at": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
            "seconds": [1.0, 1.0, 1.0, 2.0, 2.0, 1.0],
        }
    )
    assert layouts.scores_per_second(history) == 2 / (6.0 - 4.0)
    # a scored all the time, b for one second of the two between its scores
    assert layouts.share_outside_scores(history) == (0.0 + 0.5) / 2


@pytest.mark.gpu
def test_launching_is_told_apart_on_a_gpu() -> None:
    plan = replace(SMALL, device="cuda", compute=ComputeConfig(dtype="bfloat16"))
    for steps in plan.steps:
        cost = scoring.measure(make_subject("resnet20", plan).at(steps), repeats=1)
        assert 0 < cost.launch < cost.bare


def test_decoding_is_told_for_evaluation_and_for_training() -> None:
    table = decoding_table(repeats=1)
    assert table.row_count == 3
    assert str(table.title).startswith("JPEG files of 500 x 375 pixels")


def test_decoders_are_told_beside_pixels_that_are_decoded_once() -> None:
    names, rates = (list(column.cells) for column in decoders_table(repeats=1).columns[:3:2])
    assert (names[0], names[-1]) == ("Pillow", "pixels of 341 x 256, mapped")
    assert all(float(str(rate)) > 0 for rate in rates)
