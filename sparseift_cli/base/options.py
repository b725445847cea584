"""An option is declared once, on the field of the dataclass it belongs to; everything that shows or reads it is made from that.

    @dataclass(frozen=True)
    class RigL:
        delta_t: Annotated[int, Option("Optimiser steps between two mask updates.", panel="Mask updates", minimum=1)] = 100
        decay: Annotated[Literal["cosine", "linear"], Option("How the drop fraction falls until `stop`.")] = "cosine"

From such a class are made: the parameters of a command and its `--help` (cli/options.py), a section of recipes and its JSON
schema (recipe/sections.py), the check of values (`check`, below) and a table for the documentation (`markdown`, below).
Imports neither typer nor pydantic nor torch: the classes that declare options must be importable by `--help`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from functools import cache
from numbers import Integral
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import UsageError, did_you_mean
from .registry import Registry


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What is said of an option beside its name, type and default, which the field itself has.

    Args:
        help: a sentence: what the option sets.
        panel: the heading under which `--help` lists it.
        flags: its spellings on the command line; `--name-with-dashes` if none are given.
        names: the values it may have, where a registry or a tuple lists them and not a `Literal`. A registry also takes
            `package.module:Name`.
        by_layer: beside a name, a mapping from globs over layer names to numbers is a value, in recipes and in Python.
        only: the members or algorithms that read it, separated by commas; others refuse it. Shown before the help.
        minimum: the smallest value; `above` a limit that is no value itself.
        maximum: the largest value; `below` a limit that is no value itself.
        pattern: regular expression that the text must match.
        reads: what reads the text, and raises UsageError where it means nothing.
        metavar: what `--help` prints for the value, in place of its choices or type.
        decimal: the field keeps the text of a number, so that 0.9 means 9/10 exactly; files write it as a number.
        shown: how the default is shown, where its value does not explain itself.
    """

    help: str = dataclasses.field(kw_only=False)
    panel: str = ""
    flags: tuple[str, ...] = ()
    names: Iterable[str] | None = None
    only: str = ""
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None
    by_layer: bool = False
    pattern: str | None = None
    reads: Callable[[str], object] | None = None
    metavar: str | None = None
    decimal: bool = False
    shown: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class DeclaredOption:
    """A field of a dataclass with its `Option`: all that is known of one option."""

    name: str
    type: Any
    """The field's type without `Annotated` and without `| None`."""
    optional: bool
    """None is a value: not given."""
    default: Any
    """`dataclasses.MISSING` where a value must be given."""
    option: Option
    notes: tuple[Any, ...] = ()
    """What else `Annotated` says of the type, for whatever makes fields of it."""

    @property
    def flags(self) -> tuple[str, ...]:
        return self.option.flags or (f"--{self.name.replace('_', '-')}",)

    @property
    def choices(self) -> tuple[str, ...]:
        """The values it may have; empty where any value of its type will do. Of a registry those that are registered now."""
        if self.option.names is not None:
            return tuple(self.option.names)
        return tuple(map(str, get_args(self.type))) if get_origin(self.type) is Literal else ()

    @property
    def takes_objects(self) -> bool:
        """Whether `package.module:Name` is a value too."""
        return isinstance(self.option.names, Registry)

    @property
    def help(self) -> str:
        """The sentence, behind the member or algorithm that it is for."""
        text = self.option.help
        return f"{self.option.only}: {text[0].lower()}{text[1:]}" if self.option.only else text

    @property
    def shown_default(self) -> str | None:
        """The default as text; None where there is none to show."""
        if self.option.shown is not None:
            return self.option.shown
        if self.default is dataclasses.MISSING or self.default in (None, ()):
            return None
        return str(self.default).lower() if isinstance(self.default, bool) else str(self.default)


def not_read(declaring: type, user: str) -> dict[str, DeclaredOption]:
    """The options that are for others than `user` (a member, a way to start); none where no option names `user`."""
    readers = {n: d.option.only.split(", ") for n, d in options_of(declaring).items() if d.option.only}
    if not any(user in named for named in readers.values()):  # one from outside: it may read any of them
        return {}
    return {name: options_of(declaring)[name] for name, named in readers.items() if user not in named}


def require_read(values: Mapping[str, Any], declaring: type, user: str, what: str) -> None:
    """Refuse an option that would be ignored: one that is for others, with another value than its default.

    Args:
        values: options by name.
        declaring: the class that declares them.
        user: who reads them, `wide`; `what` it is: `member`.

    Raises:
        UsageError: there is one.
    """
    for name, declared in not_read(declaring, user).items():
        if name in values and values[name] != declared.default:
            called, readers = name.replace("_", " "), declared.option.only
            raise UsageError(
                f"{called} {values[name]!r} is an option of {readers}; {user} does not read it",
                hint=f"leave it out, or use {what} {readers.replace(', ', ' or ')}",
            )


@cache
def options_of(declaring: type) -> Mapping[str, DeclaredOption]:
    """The options that a dataclass declares, by name, in the order of its fields. A field without `Option` is none.

    >>> @dataclasses.dataclass
    ... class Pruning:
    ...     steps: Annotated[int, Option("Steps between two updates.", minimum=1)] = 100
    >>> options_of(Pruning)["steps"].flags
    ('--steps',)
    """
    hints = get_type_hints(declaring, include_extras=True)
    found: dict[str, DeclaredOption] = {}
    for field in dataclasses.fields(declaring):
        hint = hints[field.name]
        if get_origin(hint) is not Annotated:
            continue
        bare, *notes = get_args(hint)
        option = next((note for note in notes if isinstance(note, Option)), None)
        if option is None:
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        others = tuple(note for note in notes if note is not option)
        found[field.name] = DeclaredOption(field.name, *_without_none(bare), default, option, others)
    return found


def _without_none(hint: Any) -> tuple[Any, bool]:
    """`int | None` -> (int, True)."""
    if get_origin(hint) in (Union, UnionType) and NoneType in get_args(hint):
        kept = [part for part in get_args(hint) if part is not NoneType]
        return (kept[0] if len(kept) == 1 else hint), True
    return hint, False


def check(values: object) -> None:
    """Check the options of a dataclass instance against their declarations; for its `__post_init__`.

    Raises:
        UsageError: a value that is not among the choices, or outside its bounds.
    """
    for declared in options_of(type(values)).values():
        value = getattr(values, declared.name)
        if value is not None or not declared.optional:
            check_value(declared, value)


def check_value(declared: DeclaredOption, value: Any) -> None:
    """Check one value of an option.

    Raises:
        UsageError: it is not among the choices, or outside the bounds.
    """
    option, called = declared.option, declared.name.replace("_", " ")
    if option.by_layer and not isinstance(value, str):
        return  # the class that declares it checks the mapping
    if declared.choices and not (declared.takes_objects and ":" in str(value)):
        names = option.names
        if value not in (names if isinstance(names, Registry) else declared.choices):
            known = f"known: {', '.join(declared.choices)}"
            raise UsageError(f"unknown {called} {value!r}", hint=did_you_mean(str(value), declared.choices) or known)
    if option.reads is not None:
        option.reads(value)
    if declared.type in (int, float) or option.decimal:
        problem = _outside(declared, value)
        if problem:
            raise UsageError(f"{called} {value!r} {problem}")


def _outside(declared: DeclaredOption, value: Any) -> str | None:
    """What is wrong with a number, or None: `is not a number`, `must be below 1`."""
    option, whole = declared.option, declared.type is int
    if isinstance(value, bool) or (whole and not isinstance(value, Integral)):
        return "is not a whole number" if whole else "is not a number"
    try:
        number = Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        return "is not a number"
    if option.minimum is not None and number < Fraction(str(option.minimum)):
        return f"must be at least {option.minimum:g}"
    if option.above is not None and number <= Fraction(str(option.above)):
        return f"must be above {option.above:g}"
    if option.maximum is not None and number > Fraction(str(option.maximum)):
        return f"must be at most {option.maximum:g}"
    if option.below is not None and number >= Fraction(str(option.below)):
        return f"must be below {option.below:g}"
    return None


def markdown(declaring: type) -> str:
    """The options of a class as a Markdown table: name, values, default, meaning."""
    lines = ["| option | values | default | meaning |", "|---|---|---|---|"]
    for declared in options_of(declaring).values():
        cells = (f"`{declared.name}`", values_text(declared), declared.shown_default or "", declared.help)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def values_text(declared: DeclaredOption) -> str:
    """What an option may be, in a few words: `wide, parallel` or `number, at least 0, below 1`."""
    if declared.choices:
        others = ("package.module:Name",) if declared.takes_objects else ()
        mapping = ("or {layer glob: number}",) if declared.option.by_layer else ()
        return ", ".join((*declared.choices, *others, *mapping))
    kind = "number" if declared.option.decimal else _KINDS.get(declared.type, "text")
    if get_origin(declared.type) is tuple:
        kind = "list"
    option = declared.option
    bounds = [
        f"{word} {limit:g}"
        for word, limit in (
            ("at least", option.minimum),
            ("above", option.above),
            ("at most", option.maximum),
            ("below", option.below),
        )
        if limit is not None
    ]
    return ", ".join([kind, *bounds])


_KINDS = {int: "whole number", float: "number", bool: "true or false", str: "text"}
