"""Sheets: rows of raw values under columns, as a rich table, CSV, Markdown or HTML.

A `Sheet` holds raw values; a `Column` knows how a person reads them. On a terminal too narrow for every column the least
important ones are left out and named, so no number is ever cut; through a pipe nothing is left out.
"""

from __future__ import annotations

import csv
import html
import io
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .registry import import_object

PIPE_WIDTH = 10_000  # rich would cut tables at 80 columns where there is no terminal
_HEIGHT = 25  # lines: nothing that is printed here depends on it
_EASY = 24  # characters of a column that wraps, as it reads well


@dataclass(frozen=True, slots=True)
class Column:
    """One column: `key` into each row, how to show a value, and how soon it gives way on a narrow terminal."""

    key: str
    header: str
    show: Callable[[Any], str] = str
    right: bool = False
    priority: int = 0  # the highest goes first
    style: Callable[[Any], str] | None = None
    wraps: int = 0
    """How narrow it may get where a terminal has no room: words go on below. 0: a cell is one line."""


@dataclass(slots=True)
class Sheet:
    """Rows of raw values under columns, with a title above and notes below."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    notes: Sequence[str] = field(default_factory=list)

    def cells(self) -> list[list[str]]:
        """Every cell as a person reads it; None is an empty cell."""
        return [
            ["" if (v := row.get(c.key)) is None else one_line(c.show(v)) for c in self.columns] for row in self.rows
        ]


def one_line(text: str) -> str:
    """A text without control characters: a folder's name could break a table, or recolour the terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda c: f"\\x{ord(c[0]):02x}", text)


def integer(value: int) -> str:
    """1814073344 -> '1,814,073,344'."""
    return f"{value:,}"


def ratio(value: float) -> str:
    """A ratio to five decimals, as the reference points are given."""
    return f"{value:.5f}"


def measured(value: float) -> str:
    """A metric to four decimals; from a million on, where only the size says something, as 3.0888e+27."""
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4e}"


def digits_that_differ(value: Fraction | float, limit: float, digits: int = 6) -> str:
    """A number next to a limit, in as many decimals as show on which side it is; only 1 itself is shown as 1.

    >>> digits_that_differ(1.00000004, 1.0)
    '1.00000004'
    """
    exact, bound = Fraction(value), Fraction(limit) if math.isfinite(limit) else None
    for decimals in range(digits, 17):
        shown = Fraction(text := f"{float(value):.{decimals}f}")
        differs = bound is None or abs(shown - exact) * 4 < abs(exact - bound)
        if differs and (shown == 1) is (exact == 1):
            return text
    return str(float(value))


_stdout: TextIO | None = None


def stdout() -> TextIO:
    """The stream of results. `sys.stdout` is another one while a command runs: see `results_alone_on_stdout`."""
    return _stdout or sys.stdout


@contextmanager
def results_alone_on_stdout() -> Iterator[None]:
    """While a command runs, what a user's model, algorithm or data set prints goes to stderr."""
    global _stdout
    before, _stdout = _stdout, stdout()
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout, _stdout = _stdout, before


def make_console(stream: Any = None) -> Console:
    """The only place that makes a Console: a terminal's own width, or no limit through a pipe. Honours NO_COLOR, COLUMNS."""
    stream = stream or stdout()
    if not stream.isatty():
        return _console(stream, PIPE_WIDTH)
    dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    return _console(stream, shutil.get_terminal_size().columns if dumb else None)  # None: follows the terminal


class _Console(Console):
    """One that leaves a reader who has gone (`| head`) to `main`: rich itself would exit 1, which is a gate's word."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def _console(stream: Any, width: int | None) -> Console:
    """rich believes a width only beside a height: without one a dumb terminal (TERM=dumb) has 80 columns, come what may."""
    if width is None:
        return _Console(file=stream, highlight=False, soft_wrap=False)
    return _Console(file=stream, width=width, height=_HEIGHT, highlight=False, soft_wrap=not stream.isatty())


def tables_text(sheets: Sequence[Sheet], *, like: Any = None) -> str:
    """The tables as one text without colour, as wide as the terminal `like`; without a limit where it is none."""
    buffer = io.StringIO()
    width = shutil.get_terminal_size().columns if like is not None and like.isatty() else PIPE_WIDTH
    print_tables(_console(buffer, width), sheets)
    return buffer.getvalue()


class ShownAsSheets:
    """Base of results that `print` and a notebook show as tables, and that have a line as their repr."""

    sheets_by: ClassVar[str]
    """`package.module:function` that makes the tables of an object: a module above the class, imported when they are shown."""

    def sheets(self) -> list[Sheet]:
        """The tables, as the command prints them."""
        make: Any = import_object(self.sheets_by, "function that makes tables")
        return make(self)

    def __str__(self) -> str:
        return tables_text(self.sheets(), like=sys.stdout)

    def _repr_html_(self) -> str:
        return html_text(self.sheets())

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.sheets()[0].title}; print() shows its tables>"


def html_text(sheets: Sequence[Sheet]) -> str:
    """The tables as HTML, for a notebook; every text is escaped."""
    parts = []
    for sheet in sheets:
        cells = "".join(_html_row("th", sheet.columns, [c.header for c in sheet.columns]))
        rows = "".join(_html_row("td", sheet.columns, shown) for shown in sheet.cells())
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in sheet.notes)
        parts.append(f"<table><caption>{html.escape(sheet.title)}</caption>{cells}{rows}</table>{notes}")
    return "\n".join(parts)


def _html_row(tag: str, columns: Sequence[Column], cells: Sequence[str]) -> str:
    sides = ("right" if column.right else "left" for column in columns)
    inside = (
        f'<{tag} style="text-align:{side}">{html.escape(c)}</{tag}>' for side, c in zip(sides, cells, strict=True)
    )
    return f"<tr>{''.join(inside)}</tr>"


def print_tables(console: Console, sheets: Sequence[Sheet]) -> None:
    """Print sheets one below the other, an empty line between: a table ends in one, text below a table does not."""
    text_before = False
    for sheet in sheets:
        if text_before:
            console.print()
        text_before = _print_table(console, sheet)


def _print_table(console: Console, sheet: Sheet) -> bool:
    """Title, rows, notes, and what was left out. Returns whether there is text below the rows."""
    cells = sheet.cells()
    widths = [max([len(c.header), *(len(row[i]) for row in cells)]) for i, c in enumerate(sheet.columns)]
    columns = list(range(len(widths)))
    if _width(widths, columns) > console.width:  # an optional column without a word says nothing here
        columns = [i for i in columns if not sheet.columns[i].priority or any(row[i] for row in cells)]
    widths, kept, left_out = _fit(sheet.columns, columns, widths, console.width)
    console.print(Text(sheet.title, style="bold"))  # rich would wrap a table's own title to the table
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i in kept:
        column = sheet.columns[i]
        table.add_column(
            column.header,
            justify="right" if column.right else "left",
            no_wrap=column.wraps == 0,
            overflow="fold",
            width=widths[i],
        )
    for row, shown in zip(sheet.rows, cells, strict=True):
        table.add_row(*(_styled(sheet.columns[i], row, shown[i]) for i in kept))
    # where even the columns that must stay do not fit, the terminal wraps the line: a number is never cut
    needed = _width(widths, kept)
    (console if needed <= console.width else _console(console.file, needed)).print(table)
    for note in sheet.notes:
        console.print(Text(note))
    if left_out:
        names = ", ".join(sheet.columns[i].header for i in left_out)
        console.print(
            Text(f"left out on this narrow terminal: {names} (widen it, or --format csv|json|md)", style="dim")
        )
    return bool(sheet.notes or left_out)


def _styled(column: Column, row: Mapping[str, Any], shown: str) -> Text:
    return Text(shown, style=column.style(row.get(column.key)) if column.style and shown else "")


def _fit(
    columns: Sequence[Column], kept: Sequence[int], widths: Sequence[int], limit: int
) -> tuple[list[int], list[int], list[int]]:
    """Widths, the columns that fit into `limit` characters, and those left out.

    What wraps gets narrower first, down to `_EASY`; then columns give way; if that is not enough, it gets narrower still.
    """
    if _width(widths, kept) <= limit:
        return list(widths), list(kept), []
    shown, stay, left_out = list(widths), list(kept), list[int]()
    for easy in (_EASY, 0):
        shown = [
            min(w, max(easy, c.wraps, len(c.header))) if c.wraps else w for c, w in zip(columns, widths, strict=True)
        ]
        stay, left_out = _kept(columns, kept, shown, limit)
        if _width(shown, stay) <= limit:
            break
    while _width(shown, stay) < limit:  # what is left goes to the narrowest of those that wrap
        wanting = [i for i in stay if shown[i] < widths[i]]
        if not wanting:
            break
        narrowest = min(wanting, key=lambda i: (shown[i], i))
        shown[narrowest] += 1
    return shown, stay, left_out


def _kept(
    columns: Sequence[Column], some: Sequence[int], widths: Sequence[int], limit: int
) -> tuple[list[int], list[int]]:
    """Those of `some` that fit, and those left out: highest priority number first, then rightmost."""
    kept = list(some)
    left_out: list[int] = []
    while _width(widths, kept) > limit:
        candidates = [i for i in kept if columns[i].priority > 0]
        if not candidates:
            break
        worst = max(candidates, key=lambda i: (columns[i].priority, i))
        kept.remove(worst)
        left_out.append(worst)
    for i in sorted(
        left_out, key=lambda i: (columns[i].priority, i)
    ):  # a long one gave way last: room for shorter ones
        if _width(widths, [*kept, i]) <= limit:
            kept.append(i)
            left_out.remove(i)
    return sorted(kept), sorted(left_out)


def _width(widths: Sequence[int], kept: Sequence[int]) -> int:
    """Characters of a printed line: the cells, a space at both ends, three between two columns."""
    return sum(widths[i] for i in kept) + 3 * (len(kept) - 1) + 2


def csv_text(sheet: Sheet) -> str:
    """The raw values of the sheet as CSV, under the keys of its columns."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(c.key for c in sheet.columns)
    for row in sheet.rows:
        writer.writerow("" if (v := row.get(c.key)) is None else v for c in sheet.columns)
    return buffer.getvalue()


def markdown_text(sheet: Sheet) -> str:
    """The sheet as a Markdown table with its title and notes."""
    lines = [f"**{sheet.title}**", ""]
    lines.append("| " + " | ".join(c.header for c in sheet.columns) + " |")
    lines.append("|" + "|".join(" ---: " if c.right else " --- " for c in sheet.columns) + "|")
    for shown in sheet.cells():
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in shown) + " |")
    lines += ["", *(f"{note}  " for note in sheet.notes), ""] if sheet.notes else [""]
    return "\n".join(lines)
