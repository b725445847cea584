"""Help without what it does not use: rich's Markdown parser and its tracebacks are a quarter of the time of `--help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from types import ModuleType

_UNUSED = {"rich.markdown": "Markdown", "rich.traceback": "Traceback"}
"""Modules that typer's renderer imports, and the name it takes from each."""


def prepare(words: Sequence[str]) -> None:
    """Where `words`, a command line, ask for help: load typer's renderer with stand-ins for what help never calls.

    The process ends with the help, so nobody meets a stand-in; whoever imports these modules afterwards gets the real ones.
    """
    if words and not {"-h", "--help"} & set(words):
        return
    stand_ins = {name: ModuleType(name) for name in _UNUSED if name not in sys.modules}
    for name, module in stand_ins.items():
        setattr(module, _UNUSED[name], None)
    sys.modules.update(stand_ins)
    try:
        with suppress(ImportError):  # another typer: it loads what it needs itself
            import typer.rich_utils  # noqa: F401  # pyright: ignore[reportUnusedImport]
    finally:
        for name in stand_ins:
            del sys.modules[name]
