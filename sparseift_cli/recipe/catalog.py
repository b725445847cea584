"""The recipes that come with the package."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..base.locations import recipes_dir
from ..errors import UsageError
from .load import find
from .parse import extends, written_sections
from .write import EDITOR, short_yaml


@dataclass(frozen=True, slots=True)
class Shipped:
    """One shipped recipe: its name, as `resnet18/wide90_rigl`, and the first sentence of what it says about itself."""

    name: str
    path: Path
    headline: str


def shipped() -> Iterator[Shipped]:
    """Every shipped recipe, quickstarts first, then by name. Deeper folders hold kept results."""
    top = recipes_dir()
    paths = sorted(top.glob("*/*.yaml"), key=lambda p: (p.parent.name != "quickstart", p.as_posix()))
    for path in paths:
        yield Shipped(
            path.relative_to(top).with_suffix("").as_posix(), path, headline(path.read_text(encoding="utf-8"))
        )


def headline(text: str) -> str:
    """The first sentence of the comment at the head of a recipe, without the line for editors."""
    return re.split(r"(?<=[^.\d])[.:](?:\s|$)", about(text), maxsplit=1)[0]


def about(text: str) -> str:
    """The comment at the head of a recipe, on one line, without the line for editors."""
    head = re.match(r"(#.*\n)*", text)
    lines = (head[0] if head else "").splitlines()
    return " ".join(line[1:].strip() for line in lines if not line.startswith(EDITOR)).strip()


def schema_file() -> Path:
    """The generated JSON schema beside the shipped recipes."""
    return recipes_dir() / "schema.json"


def copy(source: str, destination: Path, *, force: bool = False) -> Path:
    """Copy a recipe to a file or into a folder, its line for editors pointing at the installed schema.

    The copy is complete: of a recipe that extends another one, the values of both are written out.

    Raises:
        UsageError: no such recipe, or something is there already.
    """
    path = find(source)
    if path is None:
        raise UsageError(f"{source} is no recipe", hint="see: sparseift recipe ls")
    target = destination / path.name if destination.is_dir() else destination
    if target.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{target} does not end in .yaml", hint="give a file name, or a folder that exists")
    text = path.read_text(encoding="utf-8")
    if extends(path):
        text = short_yaml(written_sections(path), about(text), str(schema_file()))
    else:
        text = re.sub(rf"^{re.escape(EDITOR)}.*$", f"{EDITOR}{schema_file()}", text, flags=re.M)
    write_new(target, text, force=force)
    return target


def write_new(path: Path, text: str, *, force: bool = False) -> None:
    """Write a file that is not there yet.

    Raises:
        UsageError: it is there, or it cannot be written.
    """
    flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if force else os.O_EXCL)
    try:
        with os.fdopen(os.open(path, flags, 0o666), "w", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise UsageError(f"{path} is there already", hint="--force replaces it") from None
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None
