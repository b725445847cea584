"""Elements of HTML as plain strings. Text is escaped unless an element made it, so a name from a recipe stays a name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})


class Safe(str):
    """Markup that is already whole. Only this module and the inlined pictures make it."""

    __slots__ = ()


Child = str | Safe | None
Column = str  # "", number or words: the class of its cells


def element(name: str, /, *children: Child, **attributes: str | int | bool | None) -> Safe:
    """`<name attributes>children</name>`; an attribute's `_` is `-`, one at its end goes; None and False leave it out.

    >>> element("p", "1 < 2", class_="note")
    '<p class="note">1 &lt; 2</p>'
    """
    given = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items())
    written = [
        f" {k}" if v is True else f' {k}="{escape(str(v))}"' for k, v in given if v is not None and v is not False
    ]
    opening = f"<{name}{''.join(written)}>"
    return Safe(opening if name in VOID else f"{opening}{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Safe:
    """Children one after another, escaped where they are text."""
    return Safe("".join(c if isinstance(c, Safe) else escape(c, quote=False) for c in children if c is not None))


def table(caption: str, columns: Sequence[tuple[str, Column]], rows: Iterable[Sequence[Child]]) -> Safe:
    """A table that can be scrolled sideways with the keyboard. Each row's first cell names it.

    `columns` are (header, what is in it): a number stands right, words may break over lines, anything else may not.
    """
    head = element("tr", *(element("th", name, scope="col", class_=kind or None) for name, kind in columns))
    body = [element("tr", *map(_cell, range(len(columns)), row, (kind for _, kind in columns))) for row in rows]
    told = element("caption", element("span", caption))
    inner = element("table", told, element("thead", head), element("tbody", *body))
    return element("div", inner, class_="scroll", role="region", aria_label=caption, tabindex=0)


def breakable(text: Child) -> Child:
    """A name that may go over lines after its `_`, `/` and `.`; markup as it is."""
    if text is None or isinstance(text, Safe):
        return text
    return Safe("<wbr>".join(map(escape, re.split(r"(?<=[_/])(?=\w)|(?<=\.)(?=[a-z])", text))))


def plain(*names: str) -> list[tuple[str, Column]]:
    """Columns of names and the like."""
    return [(name, "") for name in names]


def numbers(*names: str) -> list[tuple[str, Column]]:
    """Columns of numbers."""
    return [(name, "number") for name in names]


def words(*names: str) -> list[tuple[str, Column]]:
    """Columns of sentences."""
    return [(name, "words") for name in names]


def listing(items: Iterable[Child]) -> Safe:
    """A bulleted list."""
    return element("ul", *(element("li", item) for item in items))


def folded(summary: str, *children: Child) -> Safe:
    """Shown on demand."""
    return element("details", element("summary", summary), *children)


def _cell(at: int, cell: Child, kind: Column) -> Safe:
    return element("th", breakable(cell), scope="row") if at == 0 else element("td", cell, class_=kind or None)
