"""Gradual pruning in stages: whole searches one after the other, wherever they are cut."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from simulated_run import Killed, all_of, go_on, killed_after, problem_of, told
from simulated_training import TinyCNN
from stage_masks import composed, folders
from torch import nn

from fppmo_ray import (
    Recipe,
    Sampler,
    Scoring,
    SearchSettings,
)
from fppmo_ray.distribution import Feedback, Proposal
from fppmo_ray.pruning import extract, trace
from fppmo_ray.report import draw_figures
from fppmo_ray.service import mask_search
from fppmo_ray.service.journal.fact_lines import fact_to_json
from fppmo_ray.service.journal.facts import (
    Chosen,
    EpochFinished,
    Fact,
    ImportanceMeasured,
    Rescored,
    Started,
    WeightsFrozen,
)
from fppmo_ray.service.journal.run_directory import (
    JOURNAL,
    begun_stages,
)
from fppmo_ray.service.journal.storage import stage_run_dir
from fppmo_ray.service.settings import in_stages

SETTINGS = SearchSettings(
    macs_cut=0.6,
    proposals=24,
    fine_tune=Recipe(epochs=3),
    sampler=Sampler(population=4),
    scoring=Scoring(rescore_seeds=2),
)


STAGED = SETTINGS.changed(stages=(0.3, 0.6), stage_epochs=2)


SPACE = problem_of(STAGED).space


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a search in two stages that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    go_on(run_dir, STAGED)
    return run_dir


def test_every_stage_is_a_search_of_its_own_on_what_the_one_before_left(undisturbed: Path) -> None:
    first, _ = composed(undisturbed)
    for number, num_filters, least, most in ((1, 28, 0.6, 0.7), (2, first.sum(), 0.3, 0.4)):
        run_dir = undisturbed / f"stage-{number}"
        [started] = all_of(run_dir, Started)
        assert started.search_id == f"simulated-stage-{number}"
        assert started.num_filters == num_filters
        proposals = all_of(run_dir, Proposal)
        assert [(item.proposal_id, item.generation) for item in proposals] == [
            (i, i // 4) for i in range(12)
        ]
        assert all(least < item.macs / SPACE.dense_macs <= most for item in proposals)
        assert sorted(item.proposal_id for item in all_of(run_dir, Feedback)) == [*range(12)]
        assert all_of(run_dir, Rescored)
        assert all_of(run_dir, EpochFinished) == []
    assert [fact.search_id for fact in all_of(undisturbed, Started)] == ["simulated"]


def test_the_first_stage_is_the_search_for_its_cut(undisturbed: Path, tmp_path: Path) -> None:
    go_on(tmp_path, SETTINGS.changed(macs_cut=0.3, proposals=12, start="uniform"))
    for kind in (Proposal, Feedback, Rescored, Chosen):
        expected, found = all_of(tmp_path, kind), all_of(undisturbed / "stage-1", kind)
        assert sorted(map(without_time, found)) == sorted(map(without_time, expected))


def without_time(fact: Fact) -> str:
    return repr({k: v for k, v in fact_to_json(fact).items() if k != "at"})


def test_the_journal_of_the_whole_search_holds_what_lies_between_the_stages(
    undisturbed: Path,
) -> None:
    epochs = [(fact.task, fact.epoch) for fact in all_of(undisturbed, EpochFinished)]
    assert epochs == [("stage-1", 0), ("stage-1", 1)]
    assert len(all_of(undisturbed, WeightsFrozen)) == 1
    assert len(all_of(undisturbed, ImportanceMeasured)) == 1
    assert len(all_of(undisturbed, Chosen)) == 1
    for kind in (Proposal, Feedback, Rescored):
        assert all_of(undisturbed, kind) == []


def test_the_chosen_mask_is_composed_of_those_of_the_stages(undisturbed: Path) -> None:
    found, _ = go_on(undisturbed, STAGED)
    first, whole = composed(undisturbed)
    [choice], [fact] = found.choices, all_of(undisturbed, Chosen)
    assert choice.chosen.keep.tolist() == fact.keep.tolist() == whole.tolist()
    assert not (whole & ~first).any()
    assert 0.3 < SPACE.macs(whole) / SPACE.dense_macs <= 0.4
    assert (
        fact.finalist == choice.chosen.name == all_of(undisturbed / "stage-2", Chosen)[0].finalist
    )
    assert found.stages == 2
    assert [sum(isinstance(f, Feedback) for f in facts) for facts in found.searches] == [12, 12]


def test_parameters_of_the_finalist_are_those_of_the_whole_pruned_network(
    undisturbed: Path,
) -> None:
    found, _ = go_on(undisturbed, STAGED)
    problem, chosen = problem_of(STAGED), found.choices[0].chosen
    network: nn.Module = extract(problem.network, problem.tracing, chosen.keep)
    counted = sum(parameter.numel() for parameter in network.parameters())
    assert chosen.parameters == counted == SPACE.parameters(chosen.keep)
    only = found.choices[0].importance_only
    assert only.parameters == SPACE.parameters(only.keep)
    by_id = {item.proposal_id: item for item in all_of(undisturbed / "stage-2", Proposal)}
    first, _ = composed(undisturbed)
    for item in by_id.values():
        whole = first.copy()
        whole[np.flatnonzero(first)] = item.keep
        assert item.parameters == SPACE.parameters(whole)
        assert item.macs == SPACE.macs(whole)


def test_the_final_network_is_cut_from_the_original_with_the_trained_weights(
    undisturbed: Path,
) -> None:
    """The same as cutting the fine-tuned network of the first stage by the second's mask."""
    found, _ = go_on(undisturbed, STAGED)
    problem = problem_of(STAGED)
    first, whole = composed(undisturbed)
    dense = TinyCNN()
    dense.load_state_dict({k: torch.tensor(v) for k, v in found.weights.snapshot.arrays.items()})
    final = extract(dense, problem.tracing, whole)

    [*_, last] = all_of(undisturbed, EpochFinished)
    smaller: nn.Module = extract(problem.network, problem.tracing, first)
    state = torch.load(undisturbed / last.artifact, weights_only=True)["network"]
    smaller.load_state_dict(state)
    tracing = trace(smaller, torch.zeros(1, 1, 8, 8))
    expected = extract(smaller, tracing, all_of(undisturbed / "stage-2", Chosen)[0].keep)

    assert final.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(final.state_dict()[name], tensor)
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(final.eval()(images), expected.eval()(images))
    for name, tensor in extract(dense, problem.tracing, first).state_dict().items():
        assert torch.equal(state[name], tensor)
    gone = ~first[:12]
    assert gone.any()
    assert not dense.conv1.weight[gone].any()


def test_a_stage_begins_with_the_trained_network_and_the_beliefs_of_the_one_before(
    tmp_path: Path,
) -> None:
    found, pools = go_on(tmp_path, STAGED)
    first, _ = composed(tmp_path)
    whole, one, two = pools.problems
    assert torch.equal(one.network.conv1.weight, whole.network.conv1.weight)
    [*_, last] = all_of(tmp_path, EpochFinished)
    state = torch.load(tmp_path / last.artifact, weights_only=True)["network"]
    for name, tensor in two.network.state_dict().items():
        assert torch.equal(state[name], tensor)
    assert not torch.equal(two.network.conv1.weight, whole.network.conv1.weight[first[:12]])
    fresh, warm = pools.warm_starts
    assert fresh is None
    assert warm.shape == (first.sum(),)
    assert len(np.unique(warm)) > 2
    assert found.keep_logits is None


def test_widths_of_all_stages_are_limited_like_those_of_the_dense_network(tmp_path: Path) -> None:
    settings = STAGED.changed(min_keep=0.3, layer_limits={"conv1": (0.5, 0.9)})
    _, pools = go_on(tmp_path, settings)
    whole, one, two = (problem.space for problem in pools.problems)
    assert whole.min_widths.tolist() == [6, 5]
    assert whole.max_widths.tolist() == [10, 16]
    assert one.min_widths.tolist() == two.min_widths.tolist() == [6, 5]
    assert (two.max_widths <= [10, 16]).all()
    _, keep = composed(tmp_path)
    assert 6 <= keep[:12].sum() <= 10
    assert 5 <= keep[12:].sum() <= 16


def test_workers_of_the_search_make_room_for_those_of_a_stage_which_stop_with_it(
    tmp_path: Path,
) -> None:
    _, pools = go_on(tmp_path, STAGED)  # whose pools refuse to be two at once
    assert pools.stops[1:] == ["the stop of the search"] * 2
    assert not pools.all[0].is_away
    whole, *of_stages = pools.names
    assert whole == ["importance obs", "epoch 0 of stage-1", "epoch 1 of stage-1"]
    for names in of_stages:
        assert sorted(name for name in names if name.startswith("proposal")) == sorted(
            f"proposal {i}" for i in range(12)
        )
        assert not any("epoch" in name for name in names)


def test_gradual_pruning_is_compared_with_the_importance_alone_on_the_given_weights(
    tmp_path: Path,
) -> None:
    staged, _ = go_on(tmp_path / "staged", STAGED)
    plain, _ = go_on(tmp_path / "plain", SETTINGS)
    [choice], [other] = staged.choices, plain.choices
    assert np.array_equal(choice.importance_only.keep, other.importance_only.keep)
    assert choice.importance_only.parameters == other.importance_only.parameters
    assert staged.given.snapshot.sha256 == plain.given.snapshot.sha256
    assert staged.weights.snapshot.sha256 != staged.given.snapshot.sha256


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_search_killed_anywhere_within_and_between_stages_ends_like_an_undisturbed_one(
    undisturbed: Path, tmp_path: Path, every: int
) -> None:
    where = set()
    for number in range(1, 1000, every):
        run_dir = tmp_path / str(number)
        try:
            with killed_after(number):
                go_on(run_dir, STAGED, seed=number, num_workers=1 + number % 3)
        except Killed:
            pass
        else:
            break
        where.add(tuple(len(told(d)) for d in folders(run_dir) if (d / JOURNAL).is_file()))
        go_on(run_dir, STAGED, seed=number + 1, num_workers=3 - number % 3)
        for folder, expected in zip(folders(run_dir), folders(undisturbed), strict=True):
            assert told(folder) == told(expected), (number, folder.name)
    assert {len(lengths) for lengths in where} == {1, 2, 3}  # in the whole search's, the stages'


@pytest.mark.parametrize("folder", [".", "stage-1", "stage-2"])
def test_a_journal_that_was_cut_back_leads_to_the_same_end(tmp_path: Path, folder: str) -> None:
    go_on(tmp_path, STAGED, num_workers=1)
    whole = [told(place) for place in folders(tmp_path)]
    journal = tmp_path / folder / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    for seed, length in enumerate(range(0, len(lines), 8)):
        journal.write_bytes(b"".join(lines[:length]))
        go_on(tmp_path, STAGED, seed=seed, num_workers=1 + seed % 3)
        assert [told(place) for place in folders(tmp_path)] == whole, length


def test_finished_stages_are_neither_scored_nor_trained_again(tmp_path: Path) -> None:
    go_on(tmp_path, STAGED)
    _, pools = go_on(tmp_path, STAGED)
    assert pools.names == [[], [], []]


def test_figures_of_a_search_in_stages_lie_beside_the_journals_of_the_stages(
    tmp_path: Path,
) -> None:
    with killed_after(9), pytest.raises(Killed):
        go_on(tmp_path, STAGED)
    assert begun_stages(tmp_path) == [tmp_path / "stage-1"]
    go_on(tmp_path, STAGED)
    assert begun_stages(tmp_path) == [tmp_path / "stage-1", tmp_path / "stage-2"]
    assert begun_stages(tmp_path / "stage-1") == []
    draw_figures(tmp_path)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")} == {
        f"stage-{n}/{name}.png" for n in (1, 2) for name in ("scores", "probabilities")
    }


def test_three_stages_end_within_each_other(tmp_path: Path) -> None:
    settings = STAGED.changed(stages=(0.2, 0.4), stage_epochs=1)
    found, _ = go_on(tmp_path, settings)
    epochs = [(fact.task, fact.epoch) for fact in all_of(tmp_path, EpochFinished)]
    assert epochs == [("stage-1", 0), ("stage-2", 0)]
    assert found.stages == 3
    left = np.arange(SPACE.num_filters)
    for number, cut in ((1, 0.2), (2, 0.4), (3, 0.6)):
        [fact] = all_of(tmp_path / f"stage-{number}", Chosen)
        left = left[fact.keep]
        keep = np.isin(np.arange(SPACE.num_filters), left)
        assert cut <= 1 - SPACE.macs(keep) / SPACE.dense_macs < cut + 0.1
    assert np.flatnonzero(found.choices[0].chosen.keep).tolist() == left.tolist()
    assert found.choices[0].chosen.parameters == SPACE.parameters(keep)


def test_a_pruned_network_of_other_groups_ends_the_search_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = trace(nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 2, 3)), torch.zeros(1, 1, 8, 8))
    monkeypatch.setattr(mask_search, "trace", lambda *_, **__: other)
    sentence = (
        r"other channel groups .*: 0 \(3\) instead of conv1 \(12\), conv2 \(16\); search with"
    )
    with pytest.raises(RuntimeError, match=sentence):
        go_on(tmp_path, STAGED)


@pytest.mark.parametrize(
    ("run_dir", "expected"),
    [
        (Path("runs/mine"), Path("runs/mine/stage-2")),
        ("runs/mine", Path("runs/mine/stage-2")),
        ("s3://bucket/run", "s3://bucket/run/stage-2"),
        ("s3://bucket/run/?region=x", "s3://bucket/run/stage-2?region=x"),
    ],
)
def test_run_directories_of_stages_lie_below_the_whole_search_s(
    run_dir: Path | str, expected: Path | str
) -> None:
    assert stage_run_dir(run_dir, 2) == expected


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"stages": (0.1, 0.2, 0.3)}, "4 stages need at least 2 generations.* --proposals 32"),
        ({"stages": (0.3, 0.2)}, r"stages must ascend within \(0, 0.6\].* got 0.3,0.2"),
        ({"stages": 0.7}, r"stages must ascend within \(0, 0.6\].* got 0.7"),
        ({"stages": 0.3, "macs_cut": (0.4, 0.6)}, "stages lead up to one macs_cut, got 2"),
        ({"stages": 0.3, "params_cut": 0.5}, "stages lead up to a macs_cut alone, got params_cut"),
    ],
)
def test_stages_that_make_no_search_are_refused(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SETTINGS.changed(**wrong)


def test_stages_are_even_shares_of_the_generations() -> None:
    settings = replace(STAGED, proposals=27)
    first, second = in_stages(settings)
    assert first == settings.changed(macs_cut=0.3, proposals=12, stages=())
    assert second == settings.changed(macs_cut=0.6, proposals=15, stages=())
    assert in_stages(STAGED.changed(stages=0.3)) == in_stages(STAGED)
    assert in_stages(SETTINGS) == [SETTINGS]


def test_a_later_stage_is_no_resumption(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        go_on(tmp_path, STAGED)
        generations = [line for line in caplog.messages if line.startswith("generation")]
        assert sorted(line.split()[1] for line in generations) == ["0", "0", "1", "1", "2", "2"]
        assert not any("resumed" in line for line in caplog.messages)
        go_on(tmp_path, STAGED)
    assert caplog.messages.count("resumed with 12 of 12 scores") == 2
