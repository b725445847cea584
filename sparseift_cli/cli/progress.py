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
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..base.metrics import metrics_in

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress, TaskID

REFRESH = 2  # times a second
WINDOW = 30.0  # seconds over which the rate is the mean
WITH_TIME, WITH_BAR, WITH_RATE = 40, 60, 80  # characters of a terminal that has room for these


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
    """The same lines, folded to the terminal, above one bar for each run in progress."""

    def __init__(self, console: Console, several: bool = False) -> None:
        super().__init__(several)
        self._console = console
        self._tasks: dict[str, TaskID] = {}
        self._latest: dict[str, int] = {}
        """The step of each run, as its loop stored it; the drawing thread reads it."""
        self._progress = _progress(console, self._advance)

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        for run in list(self._tasks):
            self.end(run)
        self._progress.stop()

    def note(self, text: str, steps: int = 0, begins: int = 0, run: str = "") -> None:
        super().note(text, steps, begins, run)
        if steps:
            for other in list(self._tasks) if not self._several else [run]:
                self.end(other)
            self._latest[run] = begins
            self._tasks[run] = self._progress.add_task(run, total=steps, completed=begins)

    def row(self, row: Mapping[str, Any], run: str = "") -> None:
        super().row(row, run)
        self.tick(row["step"], run)

    def tick(self, step: int, run: str = "") -> None:
        self._latest[run or self._run] = step

    def end(self, run: str) -> None:
        task = self._tasks.pop(run, None)
        if task is not None:
            self._progress.remove_task(task)

    def _advance(self) -> None:
        for run, task in list(self._tasks.items()):
            self._progress.update(task, completed=self._latest[run])

    def _say(self, words: Sequence[str], between: str) -> None:
        from rich.text import Text

        lines = fold(words, between, self._console.width - 1)
        self._console.print(Text("\n".join(lines)), soft_wrap=True)  # a path that is too long is left to the terminal


def _progress(console: Console, before_drawing: Callable[[], None]) -> Progress:
    """rich's bars with the columns that this terminal has room for: run, bar, steps, steps a second, time left."""
    from rich.progress import BarColumn, Progress, ProgressColumn, Task
    from rich.table import Column
    from rich.text import Text

    class Words(ProgressColumn):
        """A column of text about a task."""

        def __init__(self, words: Callable[[Task], str], **layout: Any) -> None:
            super().__init__(Column(no_wrap=True, overflow="ellipsis", **layout))
            self._words = words

        def render(self, task: Task) -> Text:
            return Text(self._words(task))

    class Drawn(Progress):
        def get_renderables(self) -> Iterable[RenderableType]:
            before_drawing()
            yield from super().get_renderables()

    def rate(task: Task) -> str:
        return f"{task.speed:.3g}/s" if task.speed else ""

    def left(task: Task) -> str:
        return f"{clock((task.total or 0) / task.speed - task.completed / task.speed)} left" if task.speed else ""

    columns: list[ProgressColumn] = [Words(lambda task: task.description, max_width=max(6, console.width // 3))]
    columns += [BarColumn(bar_width=None)] if console.width >= WITH_BAR else []
    columns.append(Words(lambda task: f"{int(task.completed):,}/{int(task.total or 0):,}"))
    columns += [Words(rate)] if console.width >= WITH_RATE else []
    columns += [Words(left)] if console.width >= WITH_TIME else []
    return Drawn(
        *columns,
        console=console,
        refresh_per_second=REFRESH,
        speed_estimate_period=WINDOW,
        transient=True,
        redirect_stdout=False,
        get_time=lambda: time.monotonic(),
    )


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
        *(f"{k} {row[k]:.4g}" for k in ("train_loss", *metrics_in(row)) if k in row),
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
