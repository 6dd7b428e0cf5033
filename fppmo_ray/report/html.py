"""Building blocks of the HTML pages: style, tables, figures, and the document around them."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Literal

from fppmo_ray.report.result_rows import plain

# Light or dark as the reader prefers. On a phone there is one column of figures, and each row of a
# table becomes a card, so that nothing has to be scrolled sideways.
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1f23; --faint: #5d6670; --paper: #fff;
  --line: #d5d9de; --soft: #f5f7f9; --mark: #1f6fd0 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --faint: #9aa4ae; --paper: #14171a; --line: #353c43; --soft: #1c2125;
    --mark: #6aa9ff }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
main { max-width: 76rem; margin: 0 auto; padding: 2rem clamp(1rem, 3vw, 2rem) 4rem }
.kicker, .note, figcaption, .about { color: var(--faint) }
.kicker { margin: 0; font-size: 0.9rem; letter-spacing: 0.02em }
h1 { font-size: clamp(1.25rem, 2.4vw, 1.7rem); line-height: 1.35; margin: 0.4rem 0 0.8rem;
  font-weight: 600; max-width: 60rem; text-wrap: pretty }
.headlines { margin: 0.4rem 0 0.8rem; padding: 0; list-style: none; max-width: 60rem;
  font-size: 1.1rem; font-weight: 600 }
.headlines li { margin: 0.6rem 0 }
h2 { font-size: 1.15rem; margin: 2.5rem 0 0.75rem }
h3 { font-size: 1rem; margin: 1.5rem 0 0.5rem }
p { margin: 0.4rem 0; max-width: 60rem }
.note { font-size: 0.9rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 0.35rem 0 0.35rem 1.5rem; border-bottom: 1px solid var(--line);
  text-align: right; vertical-align: baseline }
th { font-weight: 600; font-size: 0.9rem; vertical-align: bottom; overflow-wrap: normal }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
.pairs td:last-child { text-align: left }
.chosen td { font-weight: 600 }
.cards td:not(:first-child) { white-space: nowrap }
.texts td, .texts th { text-align: left }
.cards.texts td { white-space: normal }
.cards.texts td:nth-child(-n + 2) { white-space: nowrap }
.figures { display: grid; gap: 1.25rem; margin: 1.5rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 28rem), 1fr)) }
figure { margin: 0; padding: 0.75rem; background: var(--soft); border-radius: 8px }
figure svg { display: block; width: 100%; height: auto; font-family: inherit }
figcaption { font-size: 0.85rem; line-height: 1.4; margin: 0.5rem 0.25rem 0 }
summary { cursor: pointer; margin-top: 1rem }
pre { white-space: pre-wrap; background: var(--soft); padding: 0.75rem; border-radius: 8px;
  font-size: 0.85rem }
.scroll { max-height: 30rem; overflow-y: auto; overflow-x: hidden; border: 1px solid var(--line);
  border-radius: 8px }
.sortable { width: 100%; font-size: 0.9rem }
.sortable th, .sortable td { padding: 0.2rem 0.75rem; text-align: right }
.sortable thead th { position: sticky; top: 0; background: var(--soft) }
.sortable button { all: unset; cursor: pointer; font-weight: 600 }
.sortable button:focus-visible { outline: 2px solid var(--mark) }
.sortable th[aria-sort=ascending] button::after { content: " \\2191" }
.sortable th[aria-sort=descending] button::after { content: " \\2193" }
@media (max-width: 44rem) {
  .cards thead { display: none }
  .cards, .cards tbody, .cards tr, .cards td { display: block; width: 100% }
  .cards tr { padding: 0.6rem 0; border-bottom: 1px solid var(--line) }
  .cards td { display: flex; justify-content: space-between; gap: 1rem; border: 0;
    padding: 0.1rem 0; text-align: right; white-space: normal }
  .cards td:not(:first-child) { white-space: normal }
  .cards td::before { content: attr(data-label); color: var(--faint); text-align: left;
    flex: none; max-width: 12rem }
  .cards td:first-child { font-weight: 600 }
  .cards td:first-child::before, .cards td:empty { display: none }
  .pairs td:first-child { min-width: 7rem; vertical-align: top }
  .pairs td:last-child { padding-left: 0.75rem }
  .sortable { font-size: 0.8rem }
  .sortable th, .sortable td { padding: 0.2rem 0.3rem }
  .sortable .minor { display: none }
}
"""

# Sorts a table by the column whose button is pressed: numbers by value, empty cells last.
_SCRIPT = """
for (const table of document.querySelectorAll('table.sortable')) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector('button').addEventListener('click', () => {
    const order = head.ariaSort === 'ascending' ? -1 : 1;
    heads.forEach(other => { other.ariaSort = null; });
    head.ariaSort = order === 1 ? 'ascending' : 'descending';
    const key = row => row.cells[column].textContent;
    body.append(...[...body.rows].sort((one, two) => {
      const [a, b] = [key(one), key(two)];
      if (a === '' || b === '') return (a === '') - (b === '');
      const difference = Number(a.replaceAll(',', '')) - Number(b.replaceAll(',', ''));
      return order * (Number.isNaN(difference) ? a.localeCompare(b) : difference);
    }));
  }));
}
"""


def text(value: object) -> str:
    """Return a value as text of the page."""
    return escape(plain(str(value)))


def paragraph(sentence: str, kind: str = "") -> str:
    """Return a paragraph.

    Args:
        sentence: Its plain text.
        kind: Its class in the style; empty for none.
    """
    return f'<p class="{kind}">{text(sentence)}</p>' if kind else f"<p>{text(sentence)}</p>"


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    marked: Iterable[int] = (),
    kind: Literal["", "texts"] = "",
) -> str:
    """Return a table whose rows become cards on a phone.

    Args:
        columns: Names of the columns.
        rows: A text for every column.
        marked: Numbers of the rows that are printed bold.
        kind: ``texts`` where the cells are no numbers, which are aligned on the right.
    """
    bold = {*marked}
    body = "".join(
        _row(
            (
                f'<td data-label="{text(column)}">{text(cell)}</td>'
                for column, cell in zip(columns, row, strict=True)
            ),
            "chosen" if number in bold else "",
        )
        for number, row in enumerate(rows)
    )
    head = "".join(f"<th>{text(column)}</th>" for column in columns)
    return (
        f'<table class="{f"cards {kind}".strip()}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )


def pairs(rows: Iterable[tuple[str, str]]) -> str:
    """Return a table of names and values.

    Args:
        rows: Names and values.
    """
    body = "".join(_row(f"<td>{text(cell)}</td>" for cell in row) for row in rows)
    return f'<table class="pairs"><tbody>{body}</tbody></table>'


def sortable(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, minor: Iterable[str] = ()
) -> str:
    """Return a table that readers can sort by each of its columns.

    Args:
        columns: Names of the columns.
        rows: A text for every column.
        minor: Columns that a phone has no room for.
    """
    kinds = [' class="minor"' if column in {*minor} else "" for column in columns]
    head = "".join(
        f'<th{kind}><button type="button">{text(column)}</button></th>'
        for kind, column in zip(kinds, columns, strict=True)
    )
    body = "".join(
        _row(f"<td{kind}>{text(cell)}</td>" for kind, cell in zip(kinds, row, strict=True))
        for row in rows
    )
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _row(cells: Iterable[str], kind: str = "") -> str:
    return f"<tr{f' class={kind}' if kind else ''}>{''.join(cells)}</tr>"


def figures(drawn: Mapping[str, str]) -> str:
    """Return figures side by side, each with its caption.

    Args:
        drawn: Captions by the figures' SVG elements.
    """
    shown = "".join(
        f"<figure>{svg}{f'<figcaption>{text(caption)}</figcaption>' if caption else ''}</figure>"
        for svg, caption in drawn.items()
    )
    return f'<div class="figures">{shown}</div>' if shown else ""


def details(title: str, content: str) -> str:
    """Return a part of the page that is closed at first.

    Args:
        title: Its title.
        content: Its HTML.
    """
    return f"<details><summary>{text(title)}</summary>{content}</details>"


def preformatted(content: str) -> str:
    """Return text with its line ends."""
    return f"<pre>{escape(content)}</pre>"


def document(title: str, parts: Iterable[str]) -> str:
    """Return a whole page, which loads nothing and runs no script but its own.

    Args:
        title: The title in the browser's tab.
        parts: The HTML of the page's content.
    """
    content = "".join(parts)
    script, allowed = "", "'none'"
    if 'class="sortable"' in content:
        digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
        script, allowed = f"<script>{_SCRIPT}</script>", f"'sha256-{digest}'"
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {allowed}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{_STYLE}</style></head>"
        f"<body><main>{content}</main>{script}</body></html>\n"
    )
