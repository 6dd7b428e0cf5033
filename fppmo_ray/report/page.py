"""Self-contained HTML pages about one search, or about several."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from fppmo_ray.distribution import Proposal
from fppmo_ray.durable_files import write_whole
from fppmo_ray.report import drawings, html, result_drawings
from fppmo_ray.report.lead import against_importance, headlines
from fppmo_ray.report.result_rows import (
    ACCURACY,
    cut_table,
    moments_of,
    network_rows,
    on_test,
    size_columns,
    table_sentence,
)
from fppmo_ray.report.run import (
    RescoredFinalist,
    Run,
    costs_of,
    finalists,
    read_run,
    with_distinct_names,
)
from fppmo_ray.report.table import status_lines
from fppmo_ray.service.journal.artifacts import DENSE
from fppmo_ray.service.journal.facts import Finished
from fppmo_ray.service.journal.run_directory import begun_stages

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK = "#010203"  # replaced in the SVG text by the page's text colour
_RC: dict[Any, Any] = {
    **drawings.LITERAL,
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK
    ),
    "axes.titlesize": 11,
    "legend.framealpha": 0.0,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_MAX_PROPOSALS = 2_000  # rows of the table of proposals; a browser sorts as many at once
_MINOR = ("parameters", "seconds", "worker")

_Draw = Callable[[Any, Any], None]


def write_report(run_dir: str | Path, output: Path) -> list[Path]:
    """Write a page about a search, finished or running, and its figures beside it.

    The page begins with the result in one sentence and its figures; tables follow, and internals
    come last.

    Args:
        run_dir: The search's run directory, a folder or a URI.
        output: The page's file name, ``NAME.html``; its figures are ``NAME-*.svg``. The folder is
            created if it does not exist.

    Returns:
        The files written: the page, then its figures.

    Raises:
        ValueError: the run directory holds no journal, or the search has not begun.
    """
    run = read_run(run_dir)
    stages = [read_run(place) for place in begun_stages(run_dir)]
    figures = {name: _svg(name, draw, run) for name, draw in _drawings(run).items()}
    for number, stage in enumerate(stages, start=1):
        for name, draw in _drawings(stage).items():
            if name != "agreement":
                figures[f"stage-{number}-{name}"] = _svg(f"{number}{name}", draw, stage)
    inner = [name for name in figures if name.endswith(("probabilities", "timeline"))]
    parts = [
        *_lead(run, stages),
        html.figures({figures[name]: _caption(name, run) for name in figures if name not in inner}),
        *_networks(run),
        *_choice(run),
        *_proposals(stages or [run]),
        "<h2>Internals</h2>",
        html.pairs(status_lines(run.facts)),
        html.figures({figures[name]: _caption(name, run) for name in inner}),
        html.details("Settings", _json(run.started.identity.get("settings"))),
        html.details("Versions", _json(run.started.versions)),
    ]
    return _write(output, f"Search {run.name}", parts, figures)


def write_comparison(run_dirs: Sequence[str | Path], output: Path) -> list[Path]:
    """Write a page that compares several searches, and its figures beside it.

    Args:
        run_dirs: Two or more run directories, folders or URIs.
        output: The page's file name, as for ``write_report``.

    Returns:
        The files written: the page, then its figures.

    Raises:
        ValueError: there are fewer than two, one of them has not begun, or their tasks' measures
            differ.
    """
    if len(run_dirs) < 2:
        raise ValueError(f"a comparison takes at least two run directories, got {len(run_dirs)}")
    runs = with_distinct_names([read_run(run_dir) for run_dir in run_dirs])
    if len({run.measure for run in runs}) > 1:
        named = ", ".join(f"{run.name} by {run.measure.name}" for run in runs)
        raise ValueError(f"only searches with the same measure can be compared, got {named}")
    draws = {"generations": drawings.draw_runs, "results": result_drawings.draw_compared}
    figures = {name: _svg(name, draw, runs) for name, draw in draws.items()}
    finished = [run for run in runs if run.figures is not None]
    parts = [f"<h1>{len(runs)} searches</h1>"]
    for run in finished:
        parts += [html.paragraph(f"{run.name}: {line}") for line in headlines(run.figures or {})]
    unfinished = [run.name for run in runs if run.figures is None]
    parts += [html.paragraph(f"Not finished: {', '.join(unfinished)}")] if unfinished else []
    parts.append(html.figures(dict.fromkeys(figures.values(), "")))
    if finished:
        rows = [[run.name, *row] for run in finished for row in network_rows(run.figures or {})]
        parts += ["<h2>Networks</h2>", html.table(("run", *_result_columns(finished[0])), rows)]
    return _write(output, f"{len(runs)} searches", parts, figures)


def _drawings(run: Run) -> dict[str, _Draw]:
    """The drawings that a run has data for so far, by name."""
    found: dict[str, _Draw] = {}
    if run.figures is not None:
        found |= {"results": result_drawings.draw_results, "widths": result_drawings.draw_widths}
    is_scored = not run.history["score"].isna().all()
    if is_scored:
        found |= {"scores": drawings.draw_scores}
    if result_drawings.training_curves(run):
        found |= {"training": result_drawings.draw_training}
    if drawings.agreement_pairs(run):
        found |= {"agreement": drawings.draw_agreement}
    if is_scored:
        found |= {"probabilities": drawings.draw_probabilities, "timeline": drawings.draw_timeline}
    return found


_CAPTIONS = {
    "results": "After the same extra training. The test data decides nothing.",
    "widths": "Filters that each group of layers keeps.",
    "scores": "Every dot is a mask that was scored, without final fine-tuning.",
    "training": "The dense network is trained for as long as the smaller ones.",
    "agreement": "How far a score on search-val foretells the score on choose-val.",
    "probabilities": "Where the probability model removes filters.",
    "timeline": "Every bar is a score.",
}


def _caption(name: str, run: Run) -> str:
    """Return what a figure shows, in a sentence or two."""
    stage = re.match(r"stage-(\d+)-", name)
    behind = f"Stage {stage[1]}. " if stage else ""
    caption = f"{behind}{_CAPTIONS[name.rpartition('-')[2]]}"
    has_bars = name == "results" and run.measure == ACCURACY and "test" in run.started.images
    return f"{caption} Bars are 95 % intervals." if has_bars else caption


def _svg(name: str, draw: _Draw, drawn: Any) -> str:
    """Return a figure as an SVG element without a fixed size, in the page's text colour."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_RC | {"svg.hashsalt": name}):  # distinct ids for each figure of a page
        figure: Figure = Figure(figsize=(5.2, 3.5), layout="constrained")
        draw(figure, drawn)
        title = figure.axes[0].get_title()
        image = io.BytesIO()
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None})
    text = image.getvalue().decode()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r'\s(width|height)="[\d.]+pt"', "", text, count=2)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(title, quote=True)}"', 1)


def _lead(run: Run, stages: Sequence[Run]) -> list[str]:
    """Return what readers look for first: the result, and when and on what it was found."""
    parts = [html.paragraph(f"Search {run.name}", "kicker")]
    if run.figures is None:
        state = dict(status_lines((stages or [run])[-1].facts))
        parts.append(
            f"<h1>The search has not finished. State: {html.text(state['state'])}, "
            f"{html.text(state['proposals'])} proposals.</h1>"
        )
    else:
        parts += _headlines(run)
        parts += [html.paragraph(sentence) for sentence in against_importance(run.figures)]
    return [*parts, *(html.paragraph(line, "about") for line in _about(run))]


def _headlines(run: Run) -> list[str]:
    """Return the result as the page's heading: a sentence, or a list of one for every budget."""
    sentences = [html.text(sentence) for sentence in headlines(run.figures or {})]
    if len(sentences) == 1:
        return [f"<h1>{sentences[0]}</h1>"]
    items = "".join(f"<li>{sentence}</li>" for sentence in sentences)
    heading = f"<h1>{len(sentences)} networks, one for each budget</h1>"
    return [heading, f'<ul class="headlines">{items}</ul>']


def _about(run: Run) -> list[str]:
    """Return lines about time, work and data of a search."""
    started, lines = run.started, list[str]()
    finished = [fact for fact in run.facts if isinstance(fact, Finished)]
    if started.at is not None:
        times = f"Begun {_date(started.at)}"
        if finished and finished[-1].at is not None:
            seconds = finished[-1].at - started.at
            later = (
                f"{_duration(seconds)} later" if seconds >= 0 else "by a clock that was set back"
            )
            times += f", finished {_date(finished[-1].at)}, {later}"
        lines.append(f"{times}.")
    if images := started.images:
        uses = "train", "score", "choose", "test"
        counts = [f"{images[use]:,} to {use} on" for use in uses if use in images]
        lines.append(f"Images: {', '.join(counts)}.")
    if run.figures is not None and any("against" in row for row in run.figures["variants"]):
        lines.append("± is the 95 % interval of a difference between two networks on these images.")
    return lines


def _date(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M} UTC"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _networks(run: Run) -> list[str]:
    if run.figures is None:
        return []
    rows = network_rows(run.figures)
    ours = [number for number, row in enumerate(rows) if row[0].startswith("FPPMO")]
    note = f"{on_test(run.figures)}; chosen: {run.figures['chosen']}."
    return [
        "<h2>Networks</h2>",
        html.table(_result_columns(run), rows, marked=ours),
        html.paragraph(note[0].upper() + note[1:], "note"),
        *_cuts(run.figures),
    ]


def _cuts(figures: dict[str, Any]) -> list[str]:
    columns, rows = cut_table(figures)
    sentence = table_sentence(figures)
    note = [html.paragraph(f"{sentence[0].upper()}{sentence[1:]}.", "note")] if sentence else []
    return ["<h3>Cut besides MACs</h3>", html.table(columns, rows), *note] if rows else []


def _result_columns(run: Run) -> list[str]:
    [dense] = run.named(DENSE)
    unit = f", {run.measure.unit}" if run.measure.unit else ""
    moments = [f"{moment}{unit}" for moment in moments_of(run.figures or {}).values()]
    return ["network", *moments, *size_columns(dense)]


def _choice(run: Run) -> list[str]:
    found = finalists(run)
    rows = [[f"{one.name}{' (chosen)' if one.is_chosen else ''}", *_scores(one)] for one in found]
    named = [run.measure.at("on choose-val"), *(["loss"] if run.measure == ACCURACY else [])]
    marked = [number for number, one in enumerate(found) if one.is_chosen]
    table = html.table(("finalist", *named), rows, marked=marked)
    return ["<h2>Finalists</h2>", table] if rows else []


def _scores(one: RescoredFinalist) -> list[str]:
    """Return a finalist's accuracy and loss, or the score of the user's own task."""
    if not one.accuracies:
        return [_spread([-loss for loss in one.losses], 4)]
    return [_spread([100 * accuracy for accuracy in one.accuracies], 2), _spread(one.losses, 4)]


def _spread(values: Sequence[float], digits: int) -> str:
    behind = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{behind}"


def _proposals(runs: Sequence[Run]) -> list[str]:
    """Return tables of the proposals that were scored, the best first, and of those that failed.

    Args:
        runs: The search, or its stages.
    """
    scored, failed = list[dict[str, str]](), list[list[str]]()
    for number, run in enumerate(runs, start=1):
        stage = {"stage": str(number)} if len(runs) > 1 else {}
        scored += [stage | row for row in _scored_rows(run)]
        errors = run.history.dropna(subset=["error"])
        failed += [
            [f"proposal {one.id}", str(one.worker), str(one.error)] for one in errors.itertuples()
        ]
    parts = []
    if scored:
        shown = scored[:_MAX_PROPOSALS]
        count = f"{len(scored):,}" if len(shown) == len(scored) else f"best {len(shown):,}"
        columns = list(shown[0])
        rows = [list(row.values()) for row in shown]
        parts = ["<h2>Proposals</h2>", html.sortable(columns, rows, minor=_MINOR)]
        parts.append(html.paragraph(f"{count} proposals. Press a column's name to sort.", "note"))
    if failed:
        columns = ["failed", "worker", "error"]
        parts += [f"<h3>Failed proposals: {len(failed):,}</h3>"]
        parts.append(html.table(columns, failed[:_MAX_PROPOSALS], kind="texts"))
    return parts


def _scored_rows(run: Run) -> list[dict[str, str]]:
    """Return every score of a run as texts by the column's name, the best first."""
    costs, measure = costs_of(run), run.measure
    budgets = {f.proposal_id: f.macs_cut for f in run.facts if isinstance(f, Proposal)}
    several = any(budget is not None for budget in budgets.values())
    dense = run.started.dense_macs
    rows = run.history.dropna(subset=["score"]).to_dict("records")
    rows.sort(key=lambda row: (budgets[row["id"]] or 0.0, costs[row["id"]], row["id"]))
    return [
        {
            "id": str(row["id"]),
            "gen.": str(row["generation"]),
            **({"budget": str(budgets[row["id"]])} if several else {}),
            **({"loss": f"{row['val_loss']:.4f}"} if measure == ACCURACY else {}),
            measure.label: measure.written(measure.scale * row["score"]),
            "MACs cut, %": f"{100 * (1 - row['macs'] / dense):.1f}",
            "parameters": f"{row['parameters']:,}",
            "seconds": f"{row['seconds']:.2f}",
            "worker": str(row["worker"]).partition("@")[0],
        }
        for row in rows
    ]


def _json(value: object) -> str:
    return html.preformatted(json.dumps(value, indent=1))


def _write(output: Path, title: str, parts: Sequence[str], figures: dict[str, str]) -> list[Path]:
    if output.suffix != ".html":
        raise ValueError(f"the page's name must end in .html, got {output}")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, html.document(title, parts).encode())
    paths = [output]
    for name, figure in figures.items():
        paths.append(output.with_name(f"{output.stem}-{name}.svg"))
        write_whole(paths[-1], figure.encode())
    return paths
