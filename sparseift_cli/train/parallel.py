"""Several runs at once, each in a child process: start them, pass signals on, show progress, collect summaries. No torch.

    sparseift train RECIPE --seeds K --events --at-once=N --slot=I --json     is a child; its stderr has progress

There are N slots, one for each run at a time. A child takes GPU number I modulo the number of GPUs: the parent need not ask
CUDA how many there are, which would hold memory on one of them.

A child has a process group of its own, so Ctrl-C reaches it once, through the parent. When the parent dies, a child notices
at its next line of progress, saves and stops.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any, Protocol

from ..base.machine import cores
from ..errors import InterruptedRun, SparseiftError, UsageError

MARK = "@sparseift "
"""How a line of progress begins; every other line on a child's stderr is shown as it is."""
TICK_INTERVAL = 0.5  # seconds between two lines about the step


@dataclass(frozen=True, slots=True)
class Child:
    """One run: its recipe file, `--set` options and seed, and what it is called on the screen."""

    recipe: Path
    sets: Sequence[str]
    seed: int
    label: str
    threads: int | None = None
    """training.threads, where the recipe has it."""
    name: str = ""
    """The name of its recipe."""
    words: Sequence[str] = ()
    """More of its command line: the sweep, and which point of it this is."""


class ProgressListener(Protocol):
    """Shows the progress of runs, which their labels name. Called from several threads."""

    def note(self, text: str, steps: int = 0, begins: int = 0, run: str = "") -> None: ...
    def row(self, row: Mapping[str, Any], run: str = "") -> None: ...
    def tick(self, step: int, run: str = "") -> None: ...
    def end(self, run: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Failure:
    """A run that failed: what it is called on the screen, and why."""

    label: str
    recipe: str
    seed: int | None
    message: str
    hint: str | None
    exit_code: int

    @staticmethod
    def of(error: SparseiftError, label: str, recipe: str, seed: int | None) -> Failure:
        return Failure(label, recipe, seed, error.message, error.hint, error.exit_code)


class FailedRuns(SparseiftError):
    """Some of several runs failed; the others were finished first. The exit code is that of the first in their order."""

    def __init__(self, failures: Sequence[Failure], finished: Sequence[Mapping[str, Any]], of: int) -> None:
        reasons = [f"  {f.label}: {f.message}".replace("\n", "\n  ") for f in failures]
        super().__init__("\n".join([f"{len(failures)} of {of} runs failed", *reasons]), hint=failures[0].hint)
        self.exit_code = failures[0].exit_code
        self.failures = failures
        self.finished = finished
        self.of = of


@dataclass(slots=True)
class _Outcome:
    """How a child ended."""

    code: int
    summary: dict[str, Any] | None = None
    message: str = ""
    hint: str | None = None
    last: str = ""
    """The last line that was no progress: that of a traceback says what it was."""


def require_one_run(resume: str | None, runs: int) -> None:
    """Refuse to continue with one run directory for several runs.

    Raises:
        UsageError: `resume` names a directory.
    """
    if resume not in (None, "latest") and runs > 1:
        raise UsageError("--resume RUN continues one run", hint="--resume latest finds the run of every seed")


def require_parallel(at_once: int) -> None:
    """Several runs at once are started from one process.

    Raises:
        UsageError: fewer than one, or torchrun started this process.
    """
    if at_once < 1:
        raise UsageError(f"--parallel {at_once} runs nothing", hint="--parallel 2 runs two at a time")
    if at_once > 1 and ("TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        raise UsageError(
            "--parallel and torchrun do not go together: torchrun spreads one run over several processes",
            hint="leave one of them out",
        )


def run_parallel(
    children: Sequence[Child],
    at_once: int,
    root: Path,
    resume: str | None,
    listener: ProgressListener,
    *,
    tensorboard: bool = False,
) -> list[dict[str, Any]]:
    """Train `at_once` of them at a time, in their order; their summaries in the same order.

    Raises:
        InterruptedRun: SIGTERM or SIGINT, which every child was sent. Those that ran are saved.
        FailedRuns: a child failed; all others were finished.
    """
    at_once = min(at_once, len(children))
    threads = max(1, cores() // at_once)
    divided = "OMP_NUM_THREADS" not in os.environ and any(c.threads is None for c in children)
    each = f", {threads} CPU thread{'s'[: threads > 1]} each (on a CPU, bits depend on their number)" if divided else ""
    listener.note(f"{len(children)} runs, {at_once} at a time{each}")
    more = ["--runs", str(root), *(["--resume", resume] if resume else []), *(["--tensorboard"] if tensorboard else [])]
    running = _Children(more, at_once, threads, listener)
    with running.forwarding(), ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(running.run, child) for child in children]
        wait(futures)  # signals are handled in between
    return _collected(children, [f.result() for f in futures], running.stopped)


def _collected(children: Sequence[Child], outcomes: Sequence[_Outcome], stopped: int) -> list[dict[str, Any]]:
    finished = [o.summary for o in outcomes if o.summary is not None]
    bad = [(child, o) for child, o in zip(children, outcomes, strict=True) if o.summary is None]
    if not bad:
        return finished
    failures = [Failure(c.label, c.name, c.seed, o.message, o.hint, o.code) for c, o in bad]
    failed = FailedRuns(failures, finished, len(outcomes))
    if stopped:
        raise InterruptedRun(failed.message.replace("failed", "stopped", 1), stopped)
    raise failed


class _Children:
    """The child processes that run now, and the free slots."""

    def __init__(self, more: Sequence[str], at_once: int, threads: int, listener: ProgressListener) -> None:
        self.stopped = 0
        """The first signal that came."""
        self._more, self._threads, self._progress = [*more, f"--at-once={at_once}"], threads, listener
        self._free_slots = list(range(at_once))
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.RLock()  # a second signal may come while the first is handled

    @contextmanager
    def forwarding(self) -> Iterator[None]:
        """Send every SIGTERM and SIGINT on to the children, while inside."""

        def forward(number: int, frame: FrameType | None) -> None:
            with self._lock:
                self.stopped = self.stopped or number
                for process in self._running:
                    process.send_signal(number)

        before = {s: signal.signal(s, forward) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def run(self, child: Child) -> _Outcome:
        """Start a child and wait for its end; nothing is started after a signal."""
        outcome = _Outcome(0)
        with tempfile.TemporaryFile("w+", encoding="utf-8") as result:
            with self._lock:
                if self.stopped:
                    return _Outcome(128 + self.stopped, message="not begun")
                slot = min(self._free_slots)  # as many as threads of the pool: one is free
                self._free_slots.remove(slot)
                try:
                    process = self._start(child, slot, result)
                except BaseException:
                    self._free_slots.append(slot)
                    raise
                self._running.add(process)
            assert process.stderr is not None
            reader = threading.Thread(target=self._listen, args=(child, process.stderr, outcome), daemon=True)
            reader.start()
            code = process.wait()
            with self._lock:
                self._running.discard(process)
                self._free_slots.append(slot)
            reader.join(5)  # a process that the child started may keep its stderr open
            result.seek(0)
            self._close(outcome, code, result.read())
        self._progress.end(child.label)
        if outcome.summary is None and not self.stopped:
            self._progress.note(f"failed, exit code {outcome.code}", run=child.label)
        elif (
            outcome.summary is not None and code < 0
        ):  # a library crashed at the end of the process: the run is complete
            self._progress.note(f"{outcome.message} after the run was complete", run=child.label)
        return outcome

    def _start(self, child: Child, slot: int, result: IO[str]) -> subprocess.Popen[str]:
        sets = [word for pair in child.sets for word in ("--set", pair)]
        command = [
            sys.executable,
            "-m",
            "sparseift_cli",
            "train",
            *sets,
            *child.words,
            "--seeds",
            str(child.seed),
            *self._more,
            f"--slot={slot}",
            "--json",
            "--events",
            "--",
            str(child.recipe),
        ]
        environment = {"OMP_NUM_THREADS": str(self._threads), **os.environ} if child.threads is None else None
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=result,
            stderr=subprocess.PIPE,
            env=environment,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )

    def _listen(self, child: Child, stream: IO[str], outcome: _Outcome) -> None:
        """Pass the lines of a child on, until it closes its stderr."""
        with stream:
            for line in stream:
                event = _event(line)
                kind = event.pop("kind", None)
                if kind == "error":
                    outcome.message, outcome.hint = event["message"], event["hint"]
                elif kind in ("note", "row", "tick"):
                    getattr(self._progress, kind)(**event, run=child.label)
                elif line.strip():
                    outcome.last = line.strip()
                    self._progress.note(line.rstrip(), run=child.label)

    def _close(self, outcome: _Outcome, code: int, printed: str) -> None:
        """The exit code as a shell gives it, and what the child printed."""
        outcome.code = code if code >= 0 else 128 - code
        if code < 0:
            outcome.message = f"ended by {signal.Signals(-code).name}"
        if code <= 0:
            with suppress(ValueError, KeyError, TypeError):
                (outcome.summary,) = json.loads(printed)["runs"]
        if outcome.summary is None and code == 0:
            outcome.code, outcome.message = 1, "ended without a result"
        outcome.message = outcome.message or outcome.last or f"ended with exit code {code}"


class Events:
    """The child's side: writes the progress of its one run to stderr, where the parent reads it."""

    def __init__(self) -> None:
        self._next = 0.0

    def note(self, text: str, steps: int = 0, begins: int = 0, run: str = "") -> None:
        self._send("note", text=text, steps=steps, begins=begins)

    def row(self, row: Mapping[str, Any], run: str = "") -> None:
        self._send("row", row={k: v for k, v in row.items() if k != "masks"})

    def tick(self, step: int, run: str = "") -> None:
        now = time.perf_counter()
        if now >= self._next:
            self._next = now + TICK_INTERVAL
            self._send("tick", step=step)

    def end(self, run: str) -> None:
        """Nothing to send: the process ends."""

    def error(self, error: SparseiftError) -> None:
        """Why the run ended."""
        self._send("error", message=error.message, hint=error.hint)

    def _send(self, kind: str, **content: Any) -> None:
        try:
            sys.stderr.write(f"{MARK}{json.dumps({'kind': kind, **content})}\n")
            sys.stderr.flush()
        except BrokenPipeError:  # the parent has died: save and stop
            sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
            os.kill(os.getpid(), signal.SIGTERM)


def _event(line: str) -> dict[str, Any]:
    if not line.startswith(MARK):
        return {}
    try:
        return json.loads(line.removeprefix(MARK))
    except ValueError:
        return {}
