"""Self-contained HTML pages about one search, or about several."""

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
from fppmo_ray.report.result_rows import (
    ACCURACY,
    cut_table,
    moments_of,
    on_test,
    plain,
    size_columns,
    sizes,
    table_sentence,
    title_of,
)
from fppmo_ray.report.run import RescoredFinalist, Run, finalists, read_run, with_distinct_names
from fppmo_ray.report.table import status_lines
from fppmo_ray.service.journal.artifacts import DENSE

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
    "legend.framealpha": 0.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
# One column on a phone, two columns of figures on a screen, light or dark as the reader prefers.
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1f23; --paper: #fff; --line: #d5d9de; --soft: #f4f6f8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --paper: #14171a; --line: #3a4148; --soft: #1d2226 }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif }
main { max-width: 78rem; margin: 0 auto; padding: 1.5rem clamp(0.75rem, 3vw, 2rem) 3rem }
h1 { font-size: 1.5rem; margin: 0 0 1rem; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin: 2rem 0 0.5rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 0.3rem 0.75rem; border-bottom: 1px solid var(--line); text-align: right }
th { font-weight: 600; vertical-align: bottom }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
td:nth-child(2):last-child { text-align: left }
td:not(:first-child):not(:last-child), td:nth-child(3) ~ td { white-space: nowrap }
.figures { display: grid; gap: 1.5rem; margin: 1.5rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)) }
figure { margin: 0; padding: 0.5rem; background: var(--soft); border-radius: 6px }
figure svg { display: block; width: 100%; height: auto; font-family: inherit }
summary { cursor: pointer; margin-top: 1rem }
pre { overflow-x: auto; background: var(--soft); padding: 0.75rem; border-radius: 6px }
"""

_UNFINISHED: dict[str, Any] = {"variants": []}


def write_report(run_dir: str | Path, output: Path) -> list[Path]:
    """Write a page about a search, finished or running, and its figures beside it.

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
    draws = {"generations": drawings.draw_runs, "results": drawings.draw_results}
    figures = {name: _svg(name, draw, runs) for name, draw in draws.items()}
    finished = [run for run in runs if run.figures is not None]
    rows = [[run.name, *row] for run in finished for row in _result_rows(run)]
    columns = ("run", *_result_columns(finished[0])) if finished else ()
    unfinished = [run.name for run in runs if run.figures is None]
    note = f"<p>Not finished: {_text(', '.join(unfinished))}</p>" if unfinished else ""
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
    """Return a figure as an SVG element without a fixed size, in the page's text colour."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_RC | {"svg.hashsalt": name}):  # distinct ids for each figure of a page
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
    chosen = _text(run.figures["chosen"])
    note = (
        "<p>Before and after equal fine-tuning (dense: after as much extra training): "
        f"{_text(on_test(run.figures))}; chosen: {chosen}.</p>"
    )
    return [
        "<h2>Result</h2>",
        _table(_result_columns(run), _result_rows(run)),
        note,
        *_cuts(run.figures),
    ]


def _cuts(figures: dict[str, Any]) -> list[str]:
    columns, rows = cut_table(figures)
    sentence = table_sentence(figures)
    note = [f"<p>{_text(sentence[0].upper() + sentence[1:])}.</p>"] if sentence else []
    return ["<h3>Cut besides MACs</h3>", _table(columns, rows), *note] if rows else []


def _result_columns(run: Run) -> list[str]:
    [dense] = run.named(DENSE)
    unit = f", {run.measure.unit}" if run.measure.unit else ""
    moments = [f"{moment}{unit}" for moment in moments_of(run.figures or _UNFINISHED)]
    return ["network", *moments, *size_columns(dense)]


def _result_rows(run: Run) -> list[list[str]]:
    figures = run.figures or _UNFINISHED
    moments = moments_of(figures)
    return [
        [title_of(row), *(run.measure.text(row, at) for at in moments), *sizes(row)]
        for row in figures["variants"]
    ]


def _choice(run: Run) -> list[str]:
    rows = [
        [
            f"{one.name}{' (chosen)' if one.is_chosen else ''}",
            *_scores(one),
        ]
        for one in finalists(run)
    ]
    named = [run.measure.at("on choose-val"), *(["loss"] if run.measure == ACCURACY else [])]
    columns = ("finalist", *named)
    return ["<h2>Finalists</h2>", _table(columns, rows)] if rows else []


def _scores(one: RescoredFinalist) -> list[str]:
    """Return a finalist's accuracy and loss, or the score of the user's own task."""
    if not one.accuracies:
        return [_spread([-loss for loss in one.losses], 4)]
    return [_spread([100 * accuracy for accuracy in one.accuracies], 2), _spread(one.losses, 4)]


def _spread(values: Sequence[float], digits: int) -> str:
    behind = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{behind}"


def _text(value: object) -> str:
    """Return a value as text of the page."""
    return escape(plain(str(value)))


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
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
    heading = _text(title)
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{heading}</title><style>{_STYLE}</style></head>"
        f"<body><main><h1>{heading}</h1>{''.join(parts)}</main></body></html>\n"
    )
    write_whole(output, page.encode())
    paths = [output]
    for name, figure in figures.items():
        paths.append(output.with_name(f"{output.stem}-{name}.svg"))
        write_whole(paths[-1], figure.encode())
    return paths
