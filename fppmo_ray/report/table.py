"""Tables for the terminal: the result of a finished search, the state of a running search."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fppmo_ray.distribution import Feedback, Proposal
from fppmo_ray.distribution.limits import Resource
from fppmo_ray.report.result_rows import (
    cut_table,
    moments_of,
    network_rows,
    on_test,
    plain,
    size_columns,
    table_sentence,
)
from fppmo_ray.service.journal.artifacts import IMPORTANCE_ONLY, read_figures
from fppmo_ray.service.journal.fact_lines import Asked, Told
from fppmo_ray.service.journal.facts import (
    Chosen,
    ComputeChosen,
    EpochFinished,
    Fact,
    Finished,
    ImportanceMeasured,
    LatencyMeasured,
    Rescored,
    Started,
    latest_feedback,
)
from fppmo_ray.service.journal.run_directory import begun_stages, skim_journal
from fppmo_ray.service.journal.storage import location_of

_MANY = Feedback, Proposal  # kinds of which a journal holds as many facts as there are masks
_WIDE, _NARROW = 140, 110  # columns of a terminal that fit all of the table, and without lines
_LEFT_OUT = ("MACs, M", "file, kB", "activations, kB")  # of a narrow table; the page has them


def print_result(run_dir: str | Path, console: Console) -> None:
    """Print a finished search's networks side by side, and the cost and noise of its scores.

    Args:
        run_dir: The search's run directory, a folder or a URI.
        console: The console to print to.

    Raises:
        ValueError: the search has not finished.
    """
    _print_figures(run_dir, read_figures(run_dir), console)


def _print_figures(run_dir: str | Path, figures: dict[str, Any], console: Console) -> None:
    name = location_of(run_dir).rpartition("/")[2]
    dense = figures["variants"][0]
    is_narrow = console.width < _WIDE
    table = Table(
        title=_literal(f"{name}: {on_test(figures)}; chosen: {figures['chosen']}"),
        box=box.SIMPLE_HEAD if is_narrow else box.HEAVY_HEAD,
        padding=(0, 0) if is_narrow else (0, 1),
    )
    columns = ["network", *moments_of(figures).values(), *size_columns(dense)]
    left_out = _LEFT_OUT if console.width < _NARROW else ()
    shown = [at for at, column in enumerate(columns) if column not in left_out]
    for at in shown:
        title = plain(columns[at])
        table.add_column(
            Text(_in_two_lines(title) if is_narrow else title),
            justify="right" if at else "left",
            no_wrap=is_narrow and at > 0,
            min_width=None if is_narrow or at else len(f"{IMPORTANCE_ONLY},"),
        )
    for row in network_rows(figures):
        table.add_row(*(_literal(row[at]) for at in shown))
    console.print(table)
    _print_cuts(figures, console)
    if epochs := figures.get("epochs_between_stages", 0):
        console.print(
            f"FPPMO's network was trained for {epochs} epochs more than the others, between stages"
        )
    console.print(_cost_line(figures))


def _in_two_lines(column: str) -> str:
    """Return a column's name for a narrow table."""
    if column == "before fine-tuning":
        return "before"
    return re.sub(r"^(ms at|MACs) (?=\w)", r"\1\n", column)


def _literal(text: str) -> Text:
    """Return text for a table, whose brackets are no markup."""
    return Text(plain(text))


def _print_cuts(figures: dict[str, Any], console: Console) -> None:
    columns, rows = cut_table(figures)
    if not rows:
        return
    table = Table(title="cut besides MACs")
    for column in columns:
        table.add_column(column, justify="left" if column == "network" else "right")
    for row in rows:
        table.add_row(*map(_literal, row))
    console.print(table)
    if sentence := table_sentence(figures):
        console.print(plain(sentence), markup=False)


def _cost_line(figures: dict[str, Any]) -> str:
    """Return a sentence about the number, duration and noise of the scores."""
    scores, noise = figures["scores"], figures["score_noise"]
    if scores["mean_seconds"] is None:
        return f"no scores, {scores['failed']} failed"
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
    """Print how far a search has come, and its result if it has finished; then each stage.

    Args:
        run_dir: The search's run directory, a folder or a URI.
        console: The console to print to.

    Raises:
        ValueError: the run directory holds no journal.
    """
    skimmed = skim_journal(run_dir)
    facts = skimmed.facts
    if any(isinstance(fact, Finished) for fact in facts):
        try:
            _print_figures(run_dir, read_figures(run_dir, facts), console)
        except ValueError as error:  # the result is gone or damaged, and the journal is not
            console.print(plain(str(error)), markup=False)
    table = Table(title=_literal(location_of(run_dir)), show_header=False)
    table.add_column()
    table.add_column()
    for name, value in status_lines(facts, skimmed.asked, skimmed.told):
        table.add_row(_literal(name), _literal(value))
    console.print(table)
    for place in begun_stages(run_dir):
        print_status(place, console)


def status_lines(
    facts: list[Fact], asked: Iterable[Asked] = (), told: Iterable[Told] = ()
) -> list[tuple[str, str]]:
    """Return the state of a search as pairs of a name and a value.

    Args:
        facts: The facts of the search's journal, in order.
        asked: The proposals, where ``facts`` are without them.
        told: Their feedback, where ``facts`` are without it.

    Raises:
        ValueError: the first of them does not tell the search's settings.
    """
    started = next((fact for fact in facts if isinstance(fact, Started)), None)
    if started is None:
        return [("state", "not started")]
    macs_cut = started.setting("macs_cut", float | int | list | tuple)
    num_wanted = started.setting("proposals", int)
    proposals: dict[int, Asked | Proposal] = {item.proposal_id: item for item in asked}
    proposals |= {item.proposal_id: item for item in facts if isinstance(item, Proposal)}
    latest: dict[int, Told | Feedback] = {item.proposal_id: item for item in told}
    feedback = (latest | latest_feedback(facts)).values()
    facts = [fact for fact in facts if not isinstance(fact, _MANY)]
    num_failed = sum(item.failed for item in feedback)
    num_scored = len(feedback) - num_failed
    lines = [
        ("search", started.search_id),
        ("state", _state(started, facts, len(proposals))),
        ("MACs cut", f"{_listed(macs_cut)} of {started.dense_macs:,}"),
        *_further_cuts(started.identity["settings"]),
        ("proposals", f"{num_scored} scored, {num_failed} failed of {num_wanted}"),
        ("asked", str(len(proposals))),
    ]
    lines += [("compute", fact.why) for fact in facts if isinstance(fact, ComputeChosen)]
    lines += [("latency", str(fact)) for fact in facts if isinstance(fact, LatencyMeasured)]
    lines += _best_scores(started, proposals, feedback)
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


def _best_scores(
    started: Started,
    proposals: Mapping[int, Asked | Proposal],
    feedback: Iterable[Told | Feedback],
) -> list[tuple[str, str]]:
    """Return a line for every budget, because scores of different budgets do not compare."""
    by_cut: dict[float | None, list[Told | Feedback]] = {}
    for item in feedback:
        if not item.failed:
            by_cut.setdefault(proposals[item.proposal_id].macs_cut, []).append(item)
    if not by_cut:
        return []
    merit = started.merit
    lines = []
    for macs_cut in sorted(by_cut, key=lambda cut: cut or 0.0):
        best = merit.best(by_cut[macs_cut], lambda i: proposals[i].parameters)
        assert best is not None
        name = "best on search-val" + ("" if macs_cut is None else f", budget {macs_cut}")
        lines.append((name, f"{best.score:.4f} (proposal {best.proposal_id})"))
    return lines


def _state(started: Started, facts: list[Fact], num_asked: int) -> str:
    """Return the step that the search has reached."""
    if _count(facts, Finished):
        return "finished"
    if _count(facts, Chosen):
        return "final fine-tuning"
    if _count(facts, Rescored):
        return "choosing among the finalists"
    if num_asked:
        return "searching"
    if started.setting("gradual.stages", list | tuple) and _count(facts, ImportanceMeasured):
        return "searching in stages: each has a run directory below, stage-1, stage-2 ..."
    return "preparing"


def _count(facts: list[Fact], kind: type[Fact]) -> int:
    return sum(isinstance(fact, kind) for fact in facts)
