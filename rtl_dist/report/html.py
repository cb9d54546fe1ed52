"""One self-contained HTML page: pictures inside, all text escaped, nothing fetched from anywhere.

The page's own policy forbids scripts and requests, so that a class name or a config value cannot
do more than be read.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #5a6270; --line: #d9dde3;
  --paper: #ffffff; --card: #f5f7f9; --accent: #0072b2; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #a3abb8; --line: #3a404a; --paper: #16181d;
    --card: #20242b; --accent: #56b4e9; }
  img.plot { filter: invert(.91) hue-rotate(180deg); } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 68rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; padding-bottom: .25rem;
  border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.4rem 0 .4rem; }
p { margin: .4rem 0; max-width: 48rem; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.cards { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .6rem .9rem; min-width: 8.5rem; }
.card b { display: block; font-size: 1.45rem; line-height: 1.3; color: var(--accent);
  font-variant-numeric: tabular-nums; }
.card span { display: block; color: var(--soft); font-size: .85rem; }
.wide { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .8rem .25rem .4rem; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: break-word; max-width: 28rem; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; white-space: nowrap; }
figure { margin: 1rem 0; }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: .4rem;
  border: 1px solid var(--line); }
figcaption { margin-top: .3rem; }
details { margin: .8rem 0; }
summary { cursor: pointer; color: var(--accent); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .4rem;
  padding: .8rem; overflow-x: auto; font: .85rem/1.45 ui-monospace, Menlo, Consolas, monospace; }
@media screen and (max-width: 40rem) {
  img.plot { max-width: none; width: 44rem; }
  img.photo { max-width: none; }
  thead { display: none; }
  table, tbody, tr, td { display: block; max-width: none; }
  tr { padding: .4rem 0; border-bottom: 1px solid var(--line); }
  td, td.number { border: 0; padding: .05rem 0; text-align: left; white-space: normal; }
  td::before { content: attr(data-name) ": "; color: var(--soft); } }
@media print {
  body { max-width: none; padding: 0; font-size: 12px; }
  .wide { overflow: visible; }
  table { font-size: 10px; width: 100%; }
  th { white-space: normal; vertical-align: bottom; }
  th, td { padding: .15rem .3rem; }
  figure, .card, tr { break-inside: avoid; }
  h1, h2, h3 { break-after: avoid; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; } }
"""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

# A number, a share or a duration.
_FIGURE = r"[+-]?[\d.,]+( %| s| min \d\d s| h \d\d min)?"

# A table's cell: text as it is, numbers to the right, None as a dash.
Cell = str | int | float | None


class Page:
    """Collects blocks in order; ``render`` gives the page."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self._title = title
        self._blocks = [f"<h1>{escape(title)}</h1>"]
        if subtitle:
            self.paragraph(subtitle, soft=True)

    def heading(self, text: str, level: int = 2) -> None:
        self._blocks.append(f"<h{level}>{escape(text)}</h{level}>")

    def paragraph(self, text: str, *, soft: bool = False) -> None:
        self._blocks.append(f"<p{' class=soft' if soft else ''}>{escape(text)}</p>")

    def cards(self, items: Iterable[tuple[str, str, str]]) -> None:
        """Headline figures, each (value, name, remark)."""
        cards = (
            f"<div class=card><b>{escape(value)}</b>{escape(name)}"
            f"<span>{escape(remark)}</span></div>"
            for value, name, remark in items
        )
        self._blocks.append(f"<div class=cards>{''.join(cards)}</div>")

    def table(
        self, header: Sequence[str], rows: Sequence[Sequence[Cell]], *, folded: str = ""
    ) -> None:
        """A table; with ``folded`` it is closed at first, under that line."""
        numeric = [all(_is_figure(row[i]) for row in rows) for i in range(len(header))]
        head = "".join(_cell("th", name, n) for name, n in zip(header, numeric, strict=True))
        columns = [_column([row[i] for row in rows]) for i in range(len(header))]
        body = "".join(
            "<tr>"
            + "".join(
                _cell("td", column[place], n, name)
                for column, n, name in zip(columns, numeric, header, strict=True)
            )
            + "</tr>"
            for place in range(len(rows))
        )
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        self._blocks.append(_fold(f"<div class=wide>{table}</div>", folded))

    def picture(self, png: bytes | None, caption: str, *, is_photo: bool = False) -> None:
        """A PNG, embedded; the caption is its text alternative too. None: it could not be drawn.

        Args:
            is_photo: it keeps its colours on a dark page, and its size on a small one.
        """
        if png is None:
            self.paragraph(f"{caption} (This picture could not be drawn.)", soft=True)
            return
        data = base64.b64encode(png).decode("ascii")
        self._blocks.append(
            f"<figure><div class=wide><img class={'photo' if is_photo else 'plot'}"
            f' alt="{escape(caption)}" src="data:image/png;base64,{data}"></div>'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )

    def preformatted(self, text: str, *, folded: str = "") -> None:
        self._blocks.append(_fold(f"<pre>{escape(text)}</pre>", folded))

    def render(self) -> str:
        """The whole page as text."""
        blocks = "\n".join(self._blocks)
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<link rel="icon" href="data:,">\n'
            f"<title>{escape(self._title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
            f"<body>\n{blocks}\n</body>\n</html>\n"
        )


def number(value: float) -> str:
    """A figure for reading: four significant digits, no needless zeros."""
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.1f}"


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _is_figure(value: Cell) -> bool:
    return not isinstance(value, str) or re.fullmatch(_FIGURE, value) is not None


def _column(values: Sequence[Cell]) -> list[str]:
    """A column's cells as text, its fractions with equally many decimals."""
    figures = [value for value in values if isinstance(value, int | float)]
    largest = max((abs(value) for value in figures), default=0.0)
    whole = all(float(value).is_integer() for value in figures)
    aligned = 1e-3 <= largest < 1000 and not whole
    decimals = 4 if largest < 10 else 2

    def text(value: Cell) -> str:
        if value is None or isinstance(value, str):
            return "–" if value is None else value
        return f"{value:.{decimals}f}" if aligned else number(value)

    return [text(value) for value in values]


def _cell(tag: str, text: str, numeric: bool, name: str = "") -> str:
    """name: of its column, which is shown where there is no room for a header."""
    named = f' data-name="{escape(name)}"' if name else ""
    return f"<{tag}{' class=number' if numeric else ''}{named}>{escape(text)}</{tag}>"


def _fold(block: str, summary: str) -> str:
    if not summary:
        return block
    return f"<details><summary>{escape(summary)}</summary>{block}</details>"
