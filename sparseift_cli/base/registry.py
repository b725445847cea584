"""Registries: the doors through which users add a member, an algorithm, a data set, a model, a metric, without a fork.

A registry maps names to objects of one kind. An object comes in by three ways: `register` in Python, an entry point of an
installed package (`[project.entry-points."sparseift.algorithms"]`), or `package.module:Name` written where a name is asked for.
Imports errors only, so that a recipe can be checked and help printed without torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..errors import UsageError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Objects of one kind by name.

    >>> colours = Registry[str]("colour", "colours", {"red": "#f00"})
    >>> colours.register("green", "#0f0")
    '#0f0'
    >>> colours.get("green"), list(colours)
    ('#0f0', ['red', 'green'])

    Args:
        kind: what one entry is called in messages, in the singular: "mask algorithm".
        group: the entry points `sparseift.<group>` of installed packages are entries too.
        entries: what ships with the package, in the order in which it is listed.
        aliases: other spellings that are read, and the name that each means.
        check: raises UsageError or returns a reason (str) where an object from outside is not of this kind.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        entries: Mapping[str, T] | None = None,
        *,
        aliases: Mapping[str, str] | None = None,
        check: Callable[[object], str | None] | None = None,
    ) -> None:
        self.kind = kind
        self.group = f"sparseift.{group}"
        self.aliases = dict(aliases or {})
        self._entries: dict[str, T] = dict(entries or {})
        self._check = check

    def register(self, name: str, entry: T) -> T:
        """Add an entry under a new name, and return it.

        Raises:
            UsageError: the name is taken by another object, or the object is not of this kind.
        """
        if self._entries.get(name, entry) is not entry:
            raise UsageError(f"there is already a {self.kind} {name!r}", hint="register it under another name")
        self._require_kind(name, entry)
        self._entries[name] = entry
        return entry

    def canonical(self, name: str) -> str:
        """The name that `name` is listed under: case, dashes, dots and underscores never matter, aliases are resolved.

        What is not listed, and `package.module:Name`, comes back as it is.
        """
        if ":" in name:
            return name
        word = _squeezed(name)
        spellings = {_squeezed(alias): known for alias, known in self.aliases.items()}
        spellings |= {_squeezed(known): known for known in self._entries}
        if word in spellings:  # before entry points are looked for, which takes some milliseconds
            return spellings[word]
        return next((known for known in self._installed if _squeezed(known) == word), name)

    def get(self, name: str) -> T:
        """The entry called `name`, one of an installed package, or the object that `package.module:Name` imports.

        Raises:
            UsageError: there is no such entry; the message names what there is.
        """
        if ":" in name:
            return self._import(name)
        known = self.canonical(name)
        if known in self._entries:
            return self._entries[known]
        if known in self._installed:
            self._entries[known] = self._import(self._installed[known])
            return self._entries[known]
        raise UsageError(
            f"unknown {self.kind} {name!r}",
            hint=did_you_mean(name, self.names) or f"known: {', '.join(self.names)}; or package.module:Name",
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Every name, those of this package first."""
        return tuple(dict.fromkeys((*self._entries, *self._installed)))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        known = self.canonical(name)
        return known in self._entries or known in self._installed

    @cached_property
    def _installed(self) -> dict[str, str]:
        """Entry points of installed packages: name -> package.module:Name. Read once a process, when first needed."""
        return {point.name: point.value for point in _entry_points().select(group=self.group)}

    def _import(self, target: str) -> T:
        entry = import_object(target, self.kind)
        self._require_kind(target, entry)
        return entry  # pyright: ignore[reportReturnType]  # whatever `check` let through

    def _require_kind(self, name: str, entry: object) -> None:
        reason = self._check(entry) if self._check else None
        if reason:
            raise UsageError(f"{name} is not {'an' if self.kind[0] in 'aeio' else 'a'} {self.kind}: {reason}")


@cache
def _entry_points() -> Any:
    """All entry points of all installed packages: one search for every registry."""
    from importlib.metadata import entry_points

    return entry_points()


def _squeezed(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


_naming: ContextVar[str | None] = ContextVar("naming", default=None)


@contextmanager
def imports_nothing_for(data: str | None) -> Iterator[None]:
    """Inside, `package.module:Name` is read from `data`, which must not import anything new. None: it may."""
    token = _naming.set(data)
    try:
        yield
    finally:
        _naming.reset(token)


def _require_imported(target: str, module: str) -> None:
    """Raise UsageError where data names what the user did not import: its code would run. Python's own modules never count."""
    data, top = _naming.get(), module.partition(".")[0]
    known = module in sys.modules and top not in sys.stdlib_module_names
    if data is not None and not known and top != __name__.partition(".")[0]:
        raise UsageError(
            f"{data} names {target}, whose code would run",
            hint=f"where you trust the folder: --trust, in Python load(..., trust=True), or import {module} first",
        )


def import_object(target: str, kind: str) -> object:
    """What `package.module:Name` names; modules beside the working directory are found too, as `python -m` finds them.

    Raises:
        UsageError: the module cannot be imported, or has no such name.
    """
    module_name, _, attribute = target.partition(":")
    _require_imported(target, module_name)
    if module_name.partition(".")[0] not in sys.modules and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: object = import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"cannot import {error.name!r} for the {kind} {target}",
            hint="package.module:Name is looked for in this folder and among installed packages",
        ) from None
    except Exception as error:
        raise UsageError(f"importing {module_name} failed: {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UsageError(f"module {module_name} has no {attribute!r}")
        found = getattr(found, part)
    return found
