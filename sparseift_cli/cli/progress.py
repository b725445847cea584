"""The progress of runs on stderr: bars that stay at the bottom of a terminal, plain lines anywhere else.

The training loop only stores a number a step; a thread draws the bars a few times a second from these numbers.
"""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..base.metrics import metric_names

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

SHOWN = ("train_loss", *metric_names())
REFRESH = 2  # times a second
WINDOW = 60  # the rate is that of so many drawings, half a minute
BAR = 30  # its longest
SHORTEST = 8  # a shorter bar says nothing: then there is none


class Lines:
    """One line for what begins and for every line of metrics; with `several` at once, each line begins with its run's label."""

    def __init__(self, several: bool = False) -> None:
        self._several = several
        self._steps: dict[str, int] = {}
        self._run = ""  # the one that began last
        self._lock = threading.Lock()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        """Lines are complete as they are."""

    def note(self, text: str, steps: int = 0, begins: int = 0, run: str = "") -> None:
        """Something to say; with `steps`, a run that begins at step `begins`."""
        if steps:
            self._steps[run] = steps
            self._run = run
        self._say([*self._label(run), *text.split(" ")], " ")

    def row(self, row: Mapping[str, Any], run: str = "") -> None:
        """A line of metrics."""
        run = run or self._run
        label = self._label(run)
        fields = row_fields(row, self._steps.get(run, 0))
        self._say([" ".join([*label, fields[0]]) if label else f"  {fields[0]}", *fields[1:]], "  ")

    def tick(self, step: int, run: str = "") -> None:
        """A step is made: nothing that a log should hold."""

    def end(self, run: str) -> None:
        """A run is over."""

    def _label(self, run: str) -> list[str]:
        return [f"{run}:"] if self._several and run else []

    def _say(self, words: Sequence[str], between: str) -> None:
        line = between.join(words)
        with self._lock:
            try:
                print(line, file=sys.stderr, flush=True)
            except BrokenPipeError:  # the reader of the log has gone: save and stop, as a run of --parallel does
                sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
                os.kill(os.getpid(), signal.SIGTERM)
            except OSError:
                pass  # a full disk under the log loses lines of it, not the run


class Bars(Lines):
    """The same lines, folded to the terminal, above one bar for each run that is on its way."""

    def __init__(self, console: Console, several: bool = False) -> None:
        from rich.live import Live

        super().__init__(several)
        self._console = console
        self._runs: dict[str, _Bar] = {}
        self._live = Live(
            console=console,
            refresh_per_second=REFRESH,
            transient=True,
            redirect_stdout=False,
            get_renderable=self._draw,
        )

    def __enter__(self) -> Bars:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._runs.clear()
        self._live.stop()

    def note(self, text: str, steps: int = 0, begins: int = 0, run: str = "") -> None:
        super().note(text, steps, begins, run)
        if steps:
            if not self._several:
                self._runs.clear()
            self._runs[run] = _Bar(run, steps, begins)
            self._live.refresh()

    def row(self, row: Mapping[str, Any], run: str = "") -> None:
        super().row(row, run)
        bar = self._runs.get(run or self._run)
        if bar is not None:
            bar.measured(row["step"])

    def tick(self, step: int, run: str = "") -> None:
        bar = self._runs.get(run or self._run)
        if bar is not None:
            bar.step, bar.ticks = step, True

    def end(self, run: str) -> None:
        self._runs.pop(run, None)

    def _say(self, words: Sequence[str], between: str) -> None:
        from rich.text import Text

        lines = fold(words, between, self._console.width - 1)
        self._console.print(Text("\n".join(lines)), soft_wrap=True)  # a path that is too long is left to the terminal

    def _draw(self) -> Text:
        from rich.text import Text

        drawn = [bar.draw(self._console, time.monotonic()) for bar in list(self._runs.values())]
        return Text("\n").join(drawn)


class _Bar:
    """Where one run is, how fast, and how long it still takes."""

    def __init__(self, label: str, steps: int, begins: int) -> None:
        self.step, self.ticks = begins, False
        self._label, self._steps = label, steps
        self._seen: deque[tuple[float, int]] = deque([(time.monotonic(), begins)], WINDOW)

    def measured(self, step: int) -> None:
        """A line of metrics says where it is."""
        self.step = step
        self._see(time.monotonic())

    def draw(self, console: Console, now: float) -> Text:
        """One line that fits the terminal: the label gives way last, the bar first."""
        from rich.text import Text

        if self.ticks:
            self._see(now)
        (first, low), (last, high) = self._seen[0], self._seen[-1]
        rate = (high - low) / (last - first) if high > low and last > first else 0.0
        step = self.step if self.ticks else min(self._steps, high + int(rate * (now - last)))
        counts = f"{step:,}/{self._steps:,}"
        shown = [counts, f"{rate:.3g}/s", f"{clock((self._steps - step) / rate)} left"] if rate else [counts]
        limit = console.width - 1
        if len(shown) > 1 and len("  ".join([self._label, *shown])) > limit:
            shown = [counts, shown[2]]
        room = limit - len("  ".join([self._label, *shown])) - 2
        line = Text(self._label, no_wrap=True)
        if room >= SHORTEST:
            length = min(BAR, room)
            done = length * step // self._steps
            glyph = "-" if console.options.ascii_only else "━"
            line.append("  ").append(glyph * done, "bar.complete")
            line.append((" " if console.no_color else glyph) * (length - done), "bar.back")
        elif room < -2:
            line.truncate(max(0, limit - len("  ".join(["", *shown]))), overflow="ellipsis")
        line.append("".join(f"  {t}" for t in shown))
        line.truncate(limit)
        return line

    def _see(self, now: float) -> None:
        if self.step > self._seen[-1][1]:
            self._seen.append((now, self.step))


def progress(several: bool = False) -> Lines:
    """Bars where stderr is a terminal of one process that can move its cursor, lines elsewhere."""
    shared = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if shared or not sys.stderr.isatty() or os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
        return Lines(several)
    from ..base.sheets import make_console

    console = make_console(sys.stderr)
    return Bars(console, several) if console.is_terminal else Lines(several)


def row_fields(row: Mapping[str, Any], steps: int) -> list[str]:
    """A line of metrics in pieces, with the time that is left."""
    step = row["step"]
    left = row["seconds"] / step * (steps - step) if step else 0.0
    masks = [f"density {row['density']:.4f}, ever active {row['itop_rate']:.4f}"] if "itop_rate" in row else []
    return [
        f"step {step:,}/{steps:,}",
        *(f"{k} {row[k]:.4g}" for k in SHOWN if k in row),
        *masks,
        f"{row['flops']:.4g} FLOPs",
        f"{clock(left)} left",
    ]


def fold(words: Sequence[str], between: str, width: int) -> list[str]:
    """Lines of whole words, no longer than `width` where a word allows it; all but the first are indented."""
    tied = between.join(word.replace(" ", "\0") for word in words)  # what belongs together stays together
    lines = textwrap.wrap(tied, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return [line.replace("\0", " ") for line in lines]


def clock(seconds: float) -> str:
    """3723.4 -> '1:02:03'."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


class Spinner:
    """One line on a terminal's stderr that names what is being done; nothing elsewhere.

    For work of seconds whose length is not known. Close it before anything else is printed.
    """

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
