"""One way out for every reading command: the same sheets as a rich table, JSON, CSV or Markdown.

stdout carries the result and nothing else.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..base.atomic import replace_file
from ..base.sheets import Sheet, csv_text, make_console, markdown_text, print_tables, stdout, tables_text
from ..errors import UsageError
from .options import Format


def render(sheets: Sequence[Sheet], payload: Mapping[str, Any], fmt: Format, output: Path | None = None) -> None:
    """Print `sheets` (or `payload` as JSON) to stdout, or write them whole to `output`.

    Raises:
        UsageError: `output` cannot be written.
    """
    if output is None and fmt is Format.table:
        print_tables(make_console(), sheets)
    else:
        write_result(as_text(sheets, payload, fmt), output)


def write_result(text: str, output: Path | None = None) -> None:
    """Write a result to stdout, or whole to `output`.

    Raises:
        UsageError: `output` cannot be written.
    """
    if output is not None:
        write_whole(output, text)
        return
    stdout().write(text)
    stdout().flush()


@contextmanager
def ignore_broken_pipe() -> Iterator[None]:
    """Where the reader of stdout goes away (`| head`), what is printed goes nowhere, and the work after it is still done."""
    try:
        yield
        stdout().flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout().fileno())


def as_text(sheets: Sequence[Sheet], payload: Mapping[str, Any], fmt: Format) -> str:
    """The result as one string in the wanted format."""
    if fmt is Format.json:
        return json.dumps(_finite(payload), indent=1, allow_nan=False) + "\n"
    if fmt is Format.csv:
        return "\n".join(csv_text(s) for s in sheets)
    if fmt is Format.md:
        return "\n".join(markdown_text(s) for s in sheets)
    return tables_text(sheets)


def _finite(value: Any) -> Any:
    """NaN and infinities as null: JSON has no word for them, and what is not Python refuses the whole document."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_whole(path: Path, content: str | bytes) -> None:
    """Write `path` in one step: a reader sees the old file or the new one, never half of it. Text becomes UTF-8.

    Raises:
        UsageError: it cannot be written.
    """
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    try:
        replace_file(path, data, durable=False)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", hint="give --output a writable file path") from None
