"""The output formats, apart from what prints them: `--help` must not wait for rich."""

from __future__ import annotations

from enum import StrEnum


class Format(StrEnum):
    """How a reading command prints its result."""

    table = "table"
    json = "json"
    csv = "csv"
    md = "md"
    github = "github"


def without_github(fmt: Format, json: bool, command: str) -> Format:
    """The format that was asked for, `--json` being short for one, by a command that has no gates.

    Raises:
        UsageError: GitHub annotations, which gates alone can write.
    """
    from ..errors import UsageError

    if json:
        return Format.json
    if fmt is Format.github:
        raise UsageError(f"{command} has no gates to annotate", hint="--format table, json, csv or md")
    return fmt
