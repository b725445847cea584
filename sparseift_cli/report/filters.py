"""The small language of --filter and --fail-if: `sparsity >= 0.5 and algorithm == rigl or top1 < 76`.

    expression := term {"or" term}        `and` binds closer than `or`; nothing else does
    term       := test {"and" test}
    test       := NAME OP VALUE           OP: < <= > >= == != ~
    VALUE      := a number (0.75, 1e-3), a word, or a "quoted text"

`~` matches a text against a glob. Expressions are compared value by value: nothing in them is ever evaluated as code.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ..errors import UsageError, did_you_mean

_TOKEN = re.compile(
    r"""\s*(?:(?P<op><=|>=|==|!=|<|>|~|=)|"(?P<double>[^"]*)"|'(?P<single>[^']*)'|(?P<word>[^\s<>=!~"']+))"""
)
_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?")
_COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "~": lambda value, glob: fnmatchcase(value, glob),
}
_TEXT_ONLY, _NUMBERS_ONLY = {"~"}, {"<", "<=", ">", ">="}


@dataclass(frozen=True, slots=True)
class Condition:
    """NAME OP VALUE."""

    name: str
    op: str
    value: float | bool | str | None

    def __str__(self) -> str:
        value = f"{self.value:g}" if isinstance(self.value, float) else str(self.value)
        return f"{self.name} {self.op} {value}"

    def on(self, row: Mapping[str, Any]) -> bool | None:
        """Whether it holds for a row; None where the row has no such value. A NaN is neither less nor more than anything.

        Raises:
            UsageError: a text is compared with a number.
        """
        found = row.get(self.name)
        if found is None:
            return None if self.value is not None else self.op == "=="
        if self.value is None:
            return self.op == "!="
        wanted = self.value
        text = isinstance(found, str)
        if text and isinstance(wanted, float) and self.op not in _NUMBERS_ONLY:
            wanted = f"{wanted:g}"
        if text is not isinstance(wanted, str) or (text and self.op in _NUMBERS_ONLY):
            kind = "text" if text else "a number"
            raise UsageError(
                f"'{self}': {self.name} is {kind}, as in {found!r}",
                hint="texts can be compared by ==, != and ~ (a glob); numbers by <, <=, >, >=, == and !=",
            )
        return _COMPARE[self.op](found, wanted)


@dataclass(frozen=True, slots=True)
class Expression:
    """An `or` of `and`s of conditions."""

    text: str
    terms: Sequence[Sequence[Condition]]

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(test.name for term in self.terms for test in term))

    def on(self, row: Mapping[str, Any]) -> bool:
        """Whether it holds for a row; a condition on a missing value does not hold."""
        return any(all(bool(test.on(row)) for test in term) for term in self.terms)

    @property
    def hint(self) -> str:
        """What to try where the expression holds for no row."""
        for test in (test for term in self.terms for test in term):
            if test.op == "~" and not set(str(test.value)) & set("*?["):
                return f"~ matches a whole text: {test.name} ~ '*{test.value}*' finds it anywhere"
        return "without --filter every run is shown, with the values to filter by"

    def knows(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has every value that the expression uses."""
        return all(row.get(name) is not None for name in self.names)

    def require(self, known: Sequence[str], where: str) -> None:
        """Raise UsageError for the first name that is not in `known`."""
        for name in self.names:
            if name not in known:
                hint = did_you_mean(name, known) or f"columns: {', '.join(known)}"
                raise UsageError(f"{where} '{self.text}': there is no column {name!r}", hint=hint)


def parse(text: str, where: str = "--filter") -> Expression:
    """Read an expression.

    Raises:
        UsageError: it cannot be read; the message says where.
    """
    tokens = _tokens(text, where)
    terms: list[list[Condition]] = [[]]
    i = 0
    while True:
        name, op, value = (tokens[i + k] if i + k < len(tokens) else ("end", "") for k in range(3))
        if name[0] != "word" or op[0] != "op" or value[0] not in ("word", "text"):
            at = next((t for t, kinds in ((name, ("word",)), (op, ("op",))) if t[0] not in kinds), value)
            got = f"{at[1]!r}" if at[0] != "end" else "its end"
            raise UsageError(
                f"{where} {text!r}: cannot be read at {got}",
                hint='NAME OP VALUE, joined by and/or: "sparsity >= 0.5 and algorithm == rigl"',
            )
        terms[-1].append(_condition(name[1], op[1], value, where, text))
        i += 3
        if i == len(tokens):
            return Expression(text, terms)
        joint = tokens[i][1].lower() if tokens[i][0] == "word" else ""
        if joint not in ("and", "or"):
            raise UsageError(
                f"{where} {text!r}: there must be 'and' or 'or' in place of {tokens[i][1]!r}",
                hint="quote a value that has spaces in it",
            )
        if joint == "or":
            terms.append([])
        i += 1


def _tokens(text: str, where: str) -> list[tuple[str, str]]:
    tokens: list[tuple[str, str]] = []
    at = 0
    while text[at:].strip():
        found = _TOKEN.match(text, at)
        if found is None:
            raise UsageError(
                f"{where} {text!r}: cannot be read at {text[at:].strip()[:10]!r}",
                hint='NAME OP VALUE, joined by and/or: "top1 < 76"',
            )
        kind = found.lastgroup or ""
        tokens.append((kind if kind in ("op", "word") else "text", found[kind]))
        at = found.end()
    return tokens


def _condition(name: str, op: str, value: tuple[str, str], where: str, text: str) -> Condition:
    kind, raw = value
    op = "==" if op == "=" else op
    meant: float | bool | str | None = raw
    if kind == "word" and op not in _TEXT_ONLY:
        if _NUMBER.fullmatch(raw):
            meant = float(raw)
        else:
            meant = {"true": True, "false": False, "none": None, "null": None}.get(raw.lower(), raw)
    if op in _NUMBERS_ONLY and not isinstance(meant, float):
        raise UsageError(f"{where} {text!r}: {raw!r} is not a number", hint=f"{name} {op} 0.5")
    return Condition(name, op, meant)
