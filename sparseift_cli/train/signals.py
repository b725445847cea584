"""SIGTERM and SIGINT ask a run to stop after the step it is in; a second one means now."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ..errors import InterruptedRun
from .processes import Processes

_asked: list[int] = []


@contextmanager
def listening() -> Iterator[None]:
    """Note signals instead of dying of them, while inside.

    Raises:
        InterruptedRun: a second signal, which ends at once whatever is being done.
    """
    _asked.clear()

    def note(number: int, frame: FrameType | None) -> None:
        if _asked:
            raise KeyboardInterrupt
        _asked.append(number)

    before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except KeyboardInterrupt:
        if not _asked:
            raise
        raise InterruptedRun("stopped at once by a second signal; what was saved before is there", _asked[0]) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_requested(processes: Processes) -> int:
    """The signal that came, 0 without one; all processes stop together when one of them was asked."""
    mine = _asked[0] if _asked else 0
    if processes.world == 1:
        return mine
    return (mine or signal.SIGTERM) if processes.agree(bool(mine)) else 0
