"""Help without what it does not use: a sixth of the time of `--help` is rich's Markdown parser, and our help is no Markdown."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from types import ModuleType

_PARSER = "rich.markdown"


def prepare(words: Sequence[str]) -> None:
    """Where `words`, a command line, ask for help: load typer's renderer with a stand-in for the parser it imports.

    The process ends with the help, so nobody meets the stand-in; whoever imports the parser afterwards gets the real one.
    """
    if (words and not {"-h", "--help"} & set(words)) or _PARSER in sys.modules:
        return
    stand_in = ModuleType(_PARSER)
    stand_in.Markdown = None  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules[_PARSER] = stand_in
    try:
        with suppress(ImportError):  # another typer: it loads what it needs itself
            import typer.rich_utils  # noqa: F401  # pyright: ignore[reportUnusedImport]
    finally:
        del sys.modules[_PARSER]
