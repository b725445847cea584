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
