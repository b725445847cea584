"""One line on a terminal's stderr that says what is being done; nothing elsewhere."""

from __future__ import annotations

import sys
from typing import Any


class Ticker:
    """For work of seconds whose length is not known. Close it before anything else is printed."""

    def __init__(self) -> None:
        self._status: Any = None
        if sys.stderr.isatty():
            from rich.console import Console

            self._status = Console(stderr=True).status("")
            self._status.start()

    def show(self, what: str) -> None:
        if self._status:
            from rich.markup import escape

            self._status.update(escape(what))

    def close(self) -> None:
        if self._status:
            self._status.stop()
