from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from example_runs import mask, proposal, rescored, score, started_with
from rich.console import Console

from fppmo_ray.distribution import Feedback
from fppmo_ray.report import print_result, print_status, write_report
from fppmo_ray.report.table import status_lines
from fppmo_ray.service.journal.facts import (
    Chosen,
    ComputeChosen,
    EpochFinished,
    Fact,
    Finished,
    ImportanceMeasured,
)
from fppmo_ray.service.journal.run_directory import open_run, skim_journal


def row(name: str, before: float, after: float, macs: int, **budget: float) -> dict[str, object]:
    return {
        "name": name,
        **budget,
        "macs": macs,
        "macs_cut": 1 - macs / 40_000_000,
        "parameters": 123_456,
        "file_bytes": 500_400,
        "activation_bytes": 65_536,
        "latency_ms": {"1": 1.5, "64": 20.25},
        "before": {"test": {"accuracy": before}, "choose_val": {"accuracy": 0.0}},
        "after": {"test": {"accuracy": after}, "choose_val": {"accuracy": 0.0}},
    }


def printed(run_dir: Path) -> str:
    console = Console(file=io.StringIO(), width=160)
    print_result(run_dir, console)
    text = console.file
    assert isinstance(text, io.StringIO)
    return text.getvalue()


def test_the_closing_table_sets_the_four_networks_side_by_side(tmp_path: Path) -> None:
    result = {
        "chosen": "mode",
        "variants": [
            row("dense", 0.8756, 0.8702, 40_000_000),
            row("importance-only", 0.4513, 0.8306, 17_000_000),
            row("fppmo", 0.7003, 0.8410, 17_200_000),
        ],
        "score_noise": {"repeats": 3, "val_accuracy": 0.0018, "val_loss": 0.0125},
        "scores": {"scored": 320, "failed": 1, "mean_seconds": 2.96},
    }
    (tmp_path / "result.json").write_text(json.dumps(result))
    lines = [" ".join(line.replace("│", " ").split()) for line in printed(tmp_path).splitlines()]
    assert "dense 87.56 40.00 0.0 % 123,456 500 65.5 1.50 20.25" in lines
    assert "dense, same extra training 87.02 40.00 0.0 % 123,456 500 65.5 1.50 20.25" in lines
    assert "importance-only 45.13 83.06 17.00 57.5 % 123,456 500 65.5 1.50 20.25" in lines
    assert "FPPMO 70.03 84.10 17.20 57.0 % 123,456 500 65.5 1.50 20.25" in lines
    assert (
        "320 scores of 2.96 s each, 1 failed; noise of a score (standard deviation, 3 seeds): "
        "accuracy 0.18 points, loss 0.0125"
    ) in lines


def test_distilled_networks_have_a_figure_between_those_before_and_after(tmp_path: Path) -> None:
    pruned = row("fppmo", 0.7, 0.86, 17_200_000)
    pruned["distilled"] = {"test": {"accuracy": 0.8425}}
    result = {
        "chosen": "allocation",
        "variants": [row("dense", 0.87, 0.88, 40_000_000), pruned],
        "score_noise": None,
        "scores": {"scored": 0, "failed": 0, "mean_seconds": None},
    }
    (tmp_path / "result.json").write_text(json.dumps(result))
    lines = [" ".join(line.replace("│", " ").split()) for line in printed(tmp_path).splitlines()]
    assert "dense 87.00 40.00 0.0 % 123,456 500 65.5 1.50 20.25" in lines
    assert "FPPMO 70.00 84.25 86.00 17.20 57.0 % 123,456 500 65.5 1.50 20.25" in lines
    assert "distilled" in printed(tmp_path)


def test_top5_accuracies_stand_behind_those_of_the_first_guess(tmp_path: Path) -> None:
    variants = [row("dense", 0.7737, 0.7702, 40_000_000), row("fppmo", 0.7, 0.76, 17_200_000)]
    for variant, top5 in zip(variants, (0.9355, 0.9301), strict=True):
        for moment in ("before", "after"):
            variant[moment]["test"]["top5_accuracy"] = top5  # type: ignore[index]
    result = {
        "chosen": "mode",
        "variants": variants,
        "score_noise": None,
        "scores": {"scored": 320, "failed": 0, "mean_seconds": 2.96},
    }
    (tmp_path / "result.json").write_text(json.dumps(result))
    shown = " ".join(printed(tmp_path).replace("│", " ").split())
    assert "accuracy on test, % (top-1 / top-5)" in shown
    assert "dense 77.37 / 93.55 40.00" in shown
    assert "FPPMO 70.00 / 93.01 76.00 / 93.01 17.20" in shown


def test_epochs_that_only_the_chosen_network_has_had_are_shown(tmp_path: Path) -> None:
    result = {
        "chosen": "mode",
        "epochs_between_stages": 10,
        "variants": [row("dense", 0.88, 0.87, 40_000_000), row("fppmo", 0.70, 0.84, 17_200_000)],
        "score_noise": None,
        "scores": {"scored": 320, "failed": 0, "mean_seconds": 2.96},
    }
    (tmp_path / "result.json").write_text(json.dumps(result))
    told = "FPPMO's network was trained for 10 epochs more than the others, between stages"
    assert told in printed(tmp_path)
    (tmp_path / "result.json").write_text(json.dumps(result | {"epochs_between_stages": 0}))
    assert "epochs more" not in printed(tmp_path)


def test_the_table_of_several_budgets_shows_their_front(tmp_path: Path) -> None:
    result = {
        "chosen": "mode, sample 3",
        "variants": [
            row("dense", 0.8756, 0.8702, 40_000_000),
            row("importance-only", 0.6513, 0.8506, 24_000_000, budget=0.4),
            row("fppmo", 0.7603, 0.8610, 23_900_000, budget=0.4),
            row("importance-only", 0.4513, 0.8306, 17_000_000, budget=0.57),
            row("fppmo", 0.7003, 0.8410, 17_200_000, budget=0.57),
        ],
        "score_noise": None,
        "scores": {"scored": 320, "failed": 1, "mean_seconds": 2.96},
    }
    (tmp_path / "result.json").write_text(json.dumps(result))
    lines = [" ".join(line.replace("│", " ").split()) for line in printed(tmp_path).splitlines()]
    same = " 123,456 500 65.5 1.50 20.25"
    rows = [line.removesuffix(same) for line in lines if line.endswith(same)]
    assert rows == [
        "dense 87.56 40.00 0.0 %",
        "dense, same extra training 87.02 40.00 0.0 %",
        "importance-only, budget 0.4 65.13 85.06 24.00 40.0 %",
        "FPPMO, budget 0.4 76.03 86.10 23.90 40.2 %",
        "importance-only, budget 0.57 45.13 83.06 17.00 57.5 %",
        "FPPMO, budget 0.57 70.03 84.10 17.20 57.0 %",
    ]


def status_of(run_dir: Path) -> str:
    """Return the words of the status, with single spaces."""
    text = io.StringIO()
    print_status(run_dir, Console(file=text, width=200))
    return " ".join(text.getvalue().replace("│", " ").split())


def test_the_state_of_a_search_with_several_budgets_shows_the_best_of_each(tmp_path: Path) -> None:
    cuts = (0.4, 0.4, 0.57, 0.57)
    proposals = [proposal(i, macs_cut=cuts[i]) for i in range(4)]
    scores = [score(i, 0.9 - 0.1 * i) for i in range(4)]
    started = started_with(macs_cut=(0.4, 0.57), population=4)
    with open_run(tmp_path, resume=False, started=started) as run:
        run.record([*proposals, *scores])
    shown = status_of(tmp_path)
    assert "MACs cut 0.4, 0.57 of 9" in shown
    assert "best on search-val, budget 0.4 0.9000 (proposal 0)" in shown
    assert "best on search-val, budget 0.57 0.7000 (proposal 2)" in shown


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_the_status_of_a_skimmed_journal_is_that_of_the_whole_one(
    tmp_path: Path, weight: float
) -> None:
    started = started_with(capacity_weight=weight)
    proposals = [proposal(i, parameters=900 - 300 * i) for i in range(3)]
    facts: list[Fact] = [started, *proposals, *(score(i, 0.5 + 0.1 * i) for i in range(2))]
    with open_run(tmp_path, resume=False, started=started) as run:
        run.record(facts[1:])
    skimmed = skim_journal(tmp_path)
    assert (len(skimmed.facts), len(skimmed.asked), len(skimmed.told)) == (1, 3, 2)
    lines = status_lines(facts)
    assert dict(lines)["asked"] == "3"
    assert status_lines(skimmed.facts, skimmed.asked, skimmed.told) == lines
    shown = status_of(tmp_path)
    assert all(f"{name} {value}" in shown for name, value in lines)


def test_a_first_line_without_settings_is_answered_by_a_sentence(tmp_path: Path) -> None:
    started = replace(started_with(), identity={"settings": {"macs_cut": 0.5}})
    with open_run(tmp_path, resume=False, started=started) as run:
        run.record([proposal(0), score(0, 0.5)])
    with pytest.raises(ValueError, match="first line should tell the search's setting proposals"):
        print_status(tmp_path, Console(file=io.StringIO()))
    with pytest.raises(ValueError, match="first line should tell the search's setting"):
        write_report(tmp_path, tmp_path / "report.html")


@pytest.mark.parametrize("width", [80, 120, 140])
def test_the_closing_table_fits_terminals_without_a_cut_word(tmp_path: Path, width: int) -> None:
    result = {
        "chosen": "mode",
        "variants": [
            row("dense", 0.8756, 0.8702, 40_000_000),
            row("importance-only", 0.4513, 0.8306, 17_000_000, budget=0.57),
            row("fppmo", 0.7003, 0.8410, 17_200_000, budget=0.57),
        ],
        "score_noise": None,
        "scores": {"scored": 320, "failed": 1, "mean_seconds": 2.96},
    }
    (tmp_path / "result.json").write_text(json.dumps(result))
    console = Console(file=io.StringIO(), width=width)
    print_result(tmp_path, console)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    sizes = "57.0 % 123,456" if width == 80 else "17.20 57.0 % 123,456 500 65.5"
    shown = [" ".join(line.replace("│", "").split()) for line in lines]
    if width == 140:
        assert "importance-only, 45.13 83.06" in " ".join(shown)
        shown = [line.replace("FPPMO, budget", "FPPMO, budget 0.57") for line in shown]
    assert f"FPPMO, budget 0.57 70.03 84.10 {sizes} 1.50 20.25" in shown


def test_the_status_of_a_finished_search_shows_its_result(tmp_path: Path) -> None:
    result = {
        "chosen": "mode",
        "variants": [row("dense", 0.8756, 0.8702, 40_000_000), row("fppmo", 0.7, 0.8410, 17)],
        "score_noise": None,
        "scores": {"scored": 320, "failed": 0, "mean_seconds": 2.96},
    }
    with open_run(tmp_path, resume=False, started=started_with()) as run:
        digest = run.write_artifact("result.json", json.dumps(result).encode())
        run.record([Finished(artifacts={"result.json": digest})])
    shown = status_of(tmp_path)
    assert "FPPMO 70.00 84.10" in shown
    (tmp_path / "result.json").write_text("{}")
    damaged = status_of(tmp_path)
    assert "is not the file that the journal names" in damaged
    assert "state finished" in damaged


def test_the_state_names_each_phase_of_a_search(tmp_path: Path) -> None:
    steps: list[tuple[Fact, str]] = [
        (ImportanceMeasured(criterion="l1", artifact="a", sha256="0"), "preparing"),
        (proposal(0), "searching"),
        (score(0, 0.9), "searching"),
        (rescored("mode", mask(0)), "choosing among the finalists"),
        (Chosen(finalist="mode", keep=mask(0)), "final fine-tuning"),
        (epoch("fppmo"), "final fine-tuning"),
        (Finished(artifacts={"result.json": "0"}), "finished"),
    ]
    with open_run(tmp_path, resume=False, started=started_with()) as run:
        assert "state preparing" in status_of(tmp_path)
        for fact, state in steps:
            run.record([fact])
            assert f"state {state} MACs" in status_of(tmp_path)


def epoch(task: str) -> EpochFinished:
    return EpochFinished(task=task, epoch=4, train_loss=0.25, seconds=1, artifact="a", sha256="b")


def test_the_state_of_a_search_in_stages_says_where_its_stages_are(tmp_path: Path) -> None:
    started = started_with(macs_cut=0.6, stages=(0.3,), proposals=8)
    steps: list[tuple[Fact, str]] = [
        (epoch("baseline"), "preparing"),
        (
            ImportanceMeasured(criterion="l1", artifact="a", sha256="0"),
            "searching in stages: each has a run directory below, stage-1, stage-2 ...",
        ),
        (
            epoch("stage-1"),
            "searching in stages: each has a run directory below, stage-1, stage-2 ...",
        ),
        (Chosen(finalist="mode", keep=mask(0)), "final fine-tuning"),
    ]
    with open_run(tmp_path, resume=False, started=started) as run:
        for fact, state in steps:
            run.record([fact])
            assert f"state {state} MACs" in status_of(tmp_path)
    assert "stage-1 epoch 4 done, loss 0.2500" in status_of(tmp_path)


def test_an_unfinished_search_has_no_table(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no result\.json: the search there has not"):
        print_result(tmp_path, Console(file=io.StringIO()))


def test_a_proposal_with_a_score_after_its_failure_has_not_failed(tmp_path: Path) -> None:
    failures = [Feedback(proposal_id=number, error="no space") for number in (0, 1, 1)]
    compute = ComputeChosen(compute={}, trials=[], why="slow, as asked for")
    with open_run(tmp_path, resume=False, started=started_with()) as run:
        run.record([compute, proposal(0), proposal(1), *failures, score(0, 0.5)])
    shown = status_of(tmp_path)
    assert "1 scored, 1 failed of 4" in shown
    assert "slow, as asked for" in shown


def test_of_weighed_losses_the_state_shows_the_one_that_the_search_ranks_first(
    tmp_path: Path,
) -> None:
    # Of 1000 parameters: 0.4 * 4 against 0.5 * 1.
    proposals = [proposal(0, parameters=250), proposal(1, parameters=1000)]
    scores = [score(0, 0.9, loss=0.4), score(1, 0.6, loss=0.5)]
    started = started_with(capacity_weight=1.0)
    with open_run(tmp_path, resume=False, started=started) as run:
        run.record([*proposals, *scores])
    assert "best on search-val 0.6000 (proposal 1)" in status_of(tmp_path)


def test_the_status_of_a_search_in_stages_shows_every_stage(tmp_path: Path) -> None:
    whole = tmp_path / "run"
    for folder in (whole, whole / "stage-1", whole / "stage-2"):
        started = replace(started_with(proposals=8, stages=(0.3,)), search_id=folder.name)
        with open_run(folder, resume=False, started=started):
            pass
    console = Console(width=100, file=io.StringIO())
    print_status(whole, console)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert [name for name in ("run", "stage-1", "stage-2") if f"│ {name} " in shown] == [
        "run",
        "stage-1",
        "stage-2",
    ]
