"""One HTML page about a search, or about several: whole in itself, for any browser."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from fppmo_ray.durable_files import write_whole
from fppmo_ray.report import drawings
from fppmo_ray.report.cuts import cut_table, table_sentence
from fppmo_ray.report.measure import ACCURACY, on_test
from fppmo_ray.report.run import RescoredFinalist, Run, finalists, read_run, with_distinct_names
from fppmo_ray.report.style import STYLE
from fppmo_ray.report.table import size_columns, sizes, status_lines, title_of
from fppmo_ray.service.record.artifacts import DENSE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK = "#010203"  # what is drawn in it takes the page's colour of text
_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK
    ),
    "legend.framealpha": 0.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def write_report(run_dir: str | Path, output: Path) -> list[Path]:
    """Write a page about a search, finished or running, and its figures beside it.

    Args:
        run_dir: The search's folder, or its URI.
        output: The page, ``NAME.html``; its figures are ``NAME-*.svg``. Its folder is made.

    Returns:
        The page, then the figures.

    Raises:
        ValueError: the run directory holds no journal, or the search has not begun.
    """
    run = read_run(run_dir)
    figures = {name: _svg(name, draw, run) for name, draw in _drawings(run).items()}
    parts = [
        _table((), status_lines(run.facts)),
        *_result(run),
        _figures(figures.values()),
        *_choice(run),
        _details("Settings", json.dumps(run.started.identity.get("settings"), indent=1)),
        _details("Versions", json.dumps(run.started.versions, indent=1)),
    ]
    return _write(output, f"Search {run.name}", parts, figures)


def write_comparison(run_dirs: Sequence[str | Path], output: Path) -> list[Path]:
    """Write a page that sets several searches side by side.

    Args:
        run_dirs: Two or more.
        output: As for ``write_report``.

    Raises:
        ValueError: there are fewer, or one of them has not begun.
    """
    if len(run_dirs) < 2:
        raise ValueError(f"a comparison takes at least two run directories, got {len(run_dirs)}")
    runs = with_distinct_names([read_run(run_dir) for run_dir in run_dirs])
    if len({run.measure for run in runs}) > 1:
        named = ", ".join(f"{run.name} by {run.measure.name}" for run in runs)
        raise ValueError(f"only searches judged by the same can be compared, got {named}")
    draws = {"generations": drawings.draw_runs, "results": drawings.draw_results}
    figures = {name: _svg(name, draw, runs) for name, draw in draws.items()}
    finished = [run for run in runs if run.figures is not None]
    rows = [[run.name, *row] for run in finished for row in _result_rows(run)]
    columns = ("run", *_result_columns(finished[0])) if finished else ()
    unfinished = [run.name for run in runs if run.figures is None]
    note = f"<p>Not finished: {escape(', '.join(unfinished))}</p>" if unfinished else ""
    parts = [_table(columns, rows), note, _figures(figures.values())]
    return _write(output, f"{len(runs)} searches", parts, figures)


def _drawings(run: Run) -> dict[str, Callable[[Figure, Run], None]]:
    """The drawings that a run has data for so far, by name."""
    found: dict[str, Callable[[Figure, Run], None]] = {}
    if run.figures is not None:
        found |= {"results": lambda figure, run: drawings.draw_results(figure, [run])}
        found |= {"widths": drawings.draw_widths}
    if not run.history["score"].isna().all():
        found |= {"scores": drawings.draw_scores, "probabilities": drawings.draw_probabilities}
        found |= {"timeline": drawings.draw_timeline}
    if finalists(run):
        found |= {"agreement": drawings.draw_agreement}
    return found


def _svg(name: str, draw: Callable[[Figure, Any], None], drawn: Any) -> str:
    """A figure without size of its own, its text in the colour of the text around it."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_RC | {"svg.hashsalt": name}):  # ids of a page's figures must differ
        figure = Figure(figsize=(5.6, 3.6), layout="constrained")
        draw(figure, drawn)
        title = figure.axes[0].get_title()
        image = io.BytesIO()
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None})
    text = image.getvalue().decode()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r'\s(width|height)="[\d.]+pt"', "", text, count=2)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(title, quote=True)}"', 1)


def _result(run: Run) -> list[str]:
    if run.figures is None:
        return ["<p>The search has not finished.</p>"]
    chosen = escape(str(run.figures["chosen"]))
    note = (
        f"<p>Before and after equal fine-tuning (dense: of as much extra training): "
        f"{escape(on_test(run.figures))}; chosen: {chosen}.</p>"
    )
    return [
        "<h2>Result</h2>",
        _table(_result_columns(run), _result_rows(run)),
        note,
        *_cuts(run.figures),
    ]


def _cuts(figures: dict[str, Any]) -> list[str]:
    columns, rows = cut_table(figures, title_of)
    sentence = table_sentence(figures)
    note = [f"<p>{escape(sentence[0].upper() + sentence[1:])}.</p>"] if sentence else []
    return ["<h3>Cut besides MACs</h3>", _table(columns, rows), *note] if rows else []


def _result_columns(run: Run) -> list[str]:
    [dense] = run.named(DENSE)
    unit = f", {run.measure.unit}" if run.measure.unit else ""
    return ["network", f"before{unit}", f"after{unit}", *size_columns(dense)]


def _result_rows(run: Run) -> list[list[str]]:
    variants = (run.figures or {}).get("variants", [])
    return [
        [title_of(row), *(run.measure.text(row, at) for at in ("before", "after")), *sizes(row)]
        for row in variants
    ]


def _choice(run: Run) -> list[str]:
    rows = [
        [
            f"{one.name}{' (chosen)' if one.is_chosen else ''}",
            str(one.stage),
            *_scores(one),
        ]
        for one in finalists(run)
    ]
    named = [run.measure.at("on choose-val"), *(["loss"] if run.measure == ACCURACY else [])]
    columns = ("finalist", "stage", *named)
    return ["<h2>Finalists</h2>", _table(columns, rows)] if rows else []


def _scores(one: RescoredFinalist) -> list[str]:
    """Accuracy and loss; of the user's own task, the score."""
    if not one.accuracies:
        return [_spread([-loss for loss in one.losses], 4)]
    return [_spread([100 * accuracy for accuracy in one.accuracies], 2), _spread(one.losses, 4)]


def _spread(values: Sequence[float], digits: int) -> str:
    behind = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{behind}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _figures(figures: Iterable[str]) -> str:
    return f'<div class="figures">{"".join(f"<figure>{one}</figure>" for one in figures)}</div>'


def _details(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary><pre>{escape(text)}</pre></details>"


def _write(output: Path, title: str, parts: Sequence[str], figures: dict[str, str]) -> list[Path]:
    if output.suffix != ".html":
        raise ValueError(f"the page's name must end in .html, got {output}")
    output.parent.mkdir(parents=True, exist_ok=True)
    heading = escape(title)
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{heading}</title><style>{STYLE}</style></head>"
        f"<body><main><h1>{heading}</h1>{''.join(parts)}</main></body></html>\n"
    )
    write_whole(output, page.encode())
    paths = [output]
    for name, figure in figures.items():
        paths.append(output.with_name(f"{output.stem}-{name}.svg"))
        write_whole(paths[-1], figure.encode())
    return paths
