"""Tables for the terminal: the result of a finished search, the state of a running search."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from fppmo_ray.distribution.limits import Resource
from fppmo_ray.report.result_rows import (
    cut_table,
    measure_of,
    on_test,
    size_columns,
    sizes,
    table_sentence,
    title_of,
)
from fppmo_ray.service.record.artifacts import read_figures
from fppmo_ray.service.record.facts import (
    Asked,
    Chosen,
    ComputeChosen,
    EpochFinished,
    Fact,
    Failed,
    Finished,
    LatencyMeasured,
    Rescored,
    Scored,
    Started,
    ends_of_scores,
)
from fppmo_ray.service.record.run_directory import read_journal
from fppmo_ray.service.record.storage import location_of


def print_result(run_dir: str | Path, console: Console) -> None:
    """Print a finished search's networks side by side, and the cost and noise of its scores.

    Args:
        run_dir: The search's run directory, a folder or a URI.
        console: The console to print to.

    Raises:
        ValueError: the search has not finished.
    """
    figures = read_figures(run_dir)
    name = location_of(run_dir).rpartition("/")[2]
    dense, *others = figures["variants"]
    measure = measure_of(figures)
    table = Table(title=f"{name}: {on_test(figures)}; chosen: {figures['chosen']}")
    for column in ("network", "before fine-tuning", "after", *size_columns(dense)):
        table.add_column(column, justify="left" if column == "network" else "right")
    table.add_row("dense", measure.text(dense, "before"), "", *sizes(dense))
    table.add_row("dense, same extra training", "", measure.text(dense, "after"), *sizes(dense))
    for row in others:
        title = title_of(row)
        table.add_row(title, *(measure.text(row, at) for at in ("before", "after")), *sizes(row))
    console.print(table)
    _print_cuts(figures, console)
    if epochs := figures.get("epochs_between_stages", 0):
        console.print(
            f"FPPMO's network was trained for {epochs} epochs more than the others, between stages"
        )
    console.print(_cost_line(figures))


def _print_cuts(figures: dict[str, Any], console: Console) -> None:
    columns, rows = cut_table(figures)
    if not rows:
        return
    table = Table(title="cut besides MACs")
    for column in columns:
        table.add_column(column, justify="left" if column == "network" else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if sentence := table_sentence(figures):
        console.print(sentence)


def _cost_line(figures: dict[str, Any]) -> str:
    """Return a sentence about the number, duration and noise of the scores."""
    scores, noise = figures["scores"], figures["score_noise"]
    line = (
        f"{scores['scored']} scores of {scores['mean_seconds']:.2f} s each, "
        f"{scores['failed']} failed"
    )
    if noise is None:
        return line
    line += f"; noise of a score (standard deviation, {noise['repeats']} seeds): "
    if "val_accuracy" not in noise:
        return f"{line}{noise['val_loss']:.4g}"
    return f"{line}accuracy {100 * noise['val_accuracy']:.2f} points, loss {noise['val_loss']:.4f}"


def print_status(run_dir: str | Path, console: Console) -> None:
    """Print how far a search has come, read from its journal.

    Args:
        run_dir: The search's run directory, a folder or a URI.
        console: The console to print to.

    Raises:
        ValueError: the run directory holds no journal.
    """
    facts = read_journal(run_dir)
    table = Table(title=location_of(run_dir), show_header=False)
    table.add_column()
    table.add_column()
    for name, value in status_lines(facts):
        table.add_row(name, value)
    console.print(table)


def status_lines(facts: list[Fact]) -> list[tuple[str, str]]:
    """Return the state of a search as pairs of a name and a value.

    Args:
        facts: All facts of the search's journal, in order.
    """
    started = next((fact for fact in facts if isinstance(fact, Started)), None)
    if started is None:
        return [("state", "not started")]
    settings = started.identity["settings"]
    ends = ends_of_scores(facts).values()
    scored = [fact for fact in ends if isinstance(fact, Scored)]
    failed = {fact.id for fact in ends if isinstance(fact, Failed)}
    num_scored = len({fact.id for fact in scored} - failed)
    lines = [
        ("search", started.search_id),
        ("state", _state(facts, _num_stages(settings))),
        ("MACs cut", f"{_listed(settings['macs_cut'])} of {started.dense_macs:,}"),
        *_further_cuts(settings),
        ("proposals", f"{num_scored} scored, {len(failed)} failed of {settings['proposals']}"),
        ("asked", str(_count(facts, Asked))),
    ]
    lines += [("compute", fact.why) for fact in facts if isinstance(fact, ComputeChosen)]
    lines += [("latency", str(fact)) for fact in facts if isinstance(fact, LatencyMeasured)]
    by_rung = Counter(fact.rung for fact in scored)
    if len(by_rung) > 1:
        counts = ", ".join(f"{by_rung[rung]} of {rung} steps" for rung in sorted(by_rung))
        lines.append(("scores", counts))
    lines += _best_scores(facts, scored)
    epochs = [fact for fact in facts if isinstance(fact, EpochFinished)]
    last = {fact.task: fact for fact in epochs}
    lines += [(task, f"epoch {fact.epoch} done{_loss(fact)}") for task, fact in last.items()]
    return lines


def _loss(fact: EpochFinished) -> str:
    return "" if fact.train_loss is None else f", loss {fact.train_loss:.4f}"


def _further_cuts(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the cuts of other resources than MACs in the settings."""
    names = {f"{resource}_cut": f"{resource} cut" for resource in get_args(Resource)}
    given = {name: settings.get(name) for name in names}
    return [(names[name], str(cut)) for name, cut in given.items() if cut is not None]


def _listed(macs_cut: float | list[float]) -> str:
    return ", ".join(map(str, macs_cut)) if isinstance(macs_cut, list) else str(macs_cut)


def _best_scores(facts: list[Fact], scored: list[Scored]) -> list[tuple[str, str]]:
    """Return a line for every budget, because scores of different budgets do not compare."""
    cuts = {fact.id: fact.macs_cut for fact in facts if isinstance(fact, Asked)}
    by_cut: dict[float | None, list[Scored]] = {}
    for fact in scored:
        by_cut.setdefault(cuts.get(fact.id), []).append(fact)
    lines = []
    for macs_cut in sorted(by_cut, key=lambda cut: cut or 0.0):
        best = max(by_cut[macs_cut], key=lambda fact: (fact.round, fact.rung, fact.score))
        name = "best on search-val" + ("" if macs_cut is None else f", budget {macs_cut}")
        lines.append((name, f"{best.score:.4f} (proposal {best.id})"))
    return lines


def _num_stages(settings: dict[str, Any]) -> int:
    """Return how many searches follow each other, 1 without stages."""
    stages = settings.get("stages", ())
    earlier = {*stages} if isinstance(stages, list | tuple) else {stages}
    return len(earlier - {settings["macs_cut"]}) + 1 if earlier else 1


def _state(facts: list[Fact], num_stages: int) -> str:
    """Return the step that the search has reached."""
    if _count(facts, Finished):
        return "finished"
    chosen = [place for place, fact in enumerate(facts) if isinstance(fact, Chosen)]
    stage = len({fact.stage for fact in facts if isinstance(fact, Chosen)})
    if stage == num_stages:
        return "final fine-tuning"
    of_stage = facts[chosen[-1] + 1 :] if chosen else facts
    in_stage = f", stage {stage + 1} of {num_stages}" if num_stages > 1 else ""
    if _count(of_stage, Rescored):
        return f"choosing among the finalists{in_stage}"
    if _count(of_stage, Asked):
        return f"searching{in_stage}"
    return f"fine-tuning between stages{in_stage}" if chosen else "preparing"


def _count(facts: list[Fact], kind: type[Fact]) -> int:
    return sum(isinstance(fact, kind) for fact in facts)
