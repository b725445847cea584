"""Wall time as evidence: what a run's seconds depend on, and whether it was alone on its device while they were counted.

`seconds` in a line of metrics is the time since the first step, over all sessions of a run that was resumed: steps,
compilation, evaluations before that line, checkpoints. Steps that were lost with a process and repeated count once. Whether a
run was alone is known from its provenance (`at_once`) and from the other runs of the report: two sessions on one device whose
times overlap. What else the machine did is not recorded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from .read import Run, number

_RESOLUTION = 1.0  # seconds: `started` has whole ones, so one run behind the other may seem to overlap by so much
_DEVICE = "device"
_ON_EVERY_DEVICE = {
    "processes": "processes",
    "versions.torch": "torch",
    "versions.triton": "triton",
    "versions.sparseift": "sparseift",
}
_ON_A_CPU = {"threads": "threads", "cpu_capability": "CPU capability", "platform": "platform"}
"""What the seconds of a step depend on beside the device, by the dotted key of a session, and what people call it."""


@dataclass(frozen=True, slots=True)
class Alone:
    """Whether a run had its device for itself; None where that is not known. `why` is for people, empty where it was alone."""

    known: bool | None
    why: str = ""


@dataclass(frozen=True, slots=True)
class _Span:
    """A session of run number `run`, from `start` to `end` in seconds since 1970: at least that long."""

    run: int
    start: float
    end: float


def alone(runs: Sequence[Run]) -> list[Alone]:
    """Of every run whether it was alone on its device, as far as its provenance and the others of `runs` show."""
    beside: dict[int, dict[int, float]] = {}
    for place in _by_place(runs).values():
        for a, b, seconds in _overlaps(place):
            if a != b and runs[a].stamp != runs[b].stamp:  # a run and what is kept of it are one
                for one, other in ((a, b), (b, a)):
                    found = beside.setdefault(one, {})
                    found[other] = found.get(other, 0.0) + seconds
    return [_judged(run, runs, beside.get(i, {})) for i, run in enumerate(runs)]


def _judged(run: Run, runs: Sequence[Run], beside: Mapping[int, float]) -> Alone:
    sessions = _sessions(run)
    most = max((s["at_once"] for s in sessions if s.get("at_once")), default=0)
    if most > 1:
        return Alone(False, f"{most} runs at once (--parallel)")
    if beside:
        longest = max(beside, key=lambda i: beside[i])
        more = f" and {len(beside) - 1} more" if len(beside) > 1 else ""
        name = f"{runs[longest].name} seed {runs[longest].seed}"
        return Alone(False, f"beside {name}{more} for {beside[longest]:,.0f} s, by when they started")
    if not sessions or any(s.get("at_once") is None or _started(s) is None for s in sessions):
        return Alone(None, "provenance does not say how many runs shared the device")
    return Alone(True)


def same_conditions(before: Sequence[Run], after: Sequence[Run]) -> list[str]:
    """What the wall times of two groups' runs depend on and which is not the same, in words; empty where times compare.

    Every session counts: the seconds of a run that went on elsewhere are of two devices.

    >>> same_conditions([], [])
    ['device: unknown against unknown']
    """
    sides = [[session for run in runs for session in _sessions(run)] for runs in (after, before)]
    found = [(_DEVICE, *({_device(s) for s in side} or {"unknown"} for side in sides))]
    on_cpu = any("cpu" in devices for devices in (found[0][1], found[0][2])) or any(
        s.get("device") == "cpu" for side in sides for s in side
    )
    for key, name in (_ON_EVERY_DEVICE | (_ON_A_CPU if on_cpu else {})).items():
        found.append((name, *({_text(_at(s, key)) for s in side} for side in sides)))
    return [
        f"{name}: {' and '.join(sorted(here))} against {' and '.join(sorted(there))}"
        for name, here, there in found
        if here != there or len(here) > 1 or (name == _DEVICE and "unknown" in here)
    ]


def resumed(runs: Sequence[Run]) -> int:
    """How many of the runs have more than one session."""
    return sum(len(_sessions(run)) > 1 for run in runs)


def _sessions(run: Run) -> Sequence[Mapping[str, Any]]:
    return (run.provenance or {}).get("sessions") or []


def _device(session: Mapping[str, Any]) -> str:
    return str(session.get("device_name") or session.get("device") or "unknown")


def _by_place(runs: Sequence[Run]) -> dict[tuple[str, ...], list[_Span]]:
    """The sessions on each device. Two devices of one name and number in two machines differ by `device_id` alone."""
    found: dict[tuple[str, ...], list[_Span]] = {}
    for i, run in enumerate(runs):
        for session, span in _spans(i, run):
            if session.get("device_id"):
                key = (str(session["device_id"]),)
            else:
                visible = (session.get("environment") or {}).get("CUDA_VISIBLE_DEVICES")
                key = (str(session.get("device")), _device(session), str(visible))
            found.setdefault(key, []).append(span)
    return found


def _spans(index: int, run: Run) -> Iterator[tuple[Mapping[str, Any], _Span]]:
    """When each session of a run was busy, from when it started and the seconds of its evaluations."""
    sessions = _sessions(run)
    for i, session in enumerate(sessions):
        start = _started(session)
        if start is None:
            continue
        following = sessions[i + 1] if i + 1 < len(sessions) else None
        begins, ends = _step(session), None if following is None else _step(following)
        end = start + max(0.0, _seconds_by(run, ends) - _seconds_by(run, begins))
        after = None if following is None else _started(following)
        yield session, _Span(index, start, end if after is None else min(end, max(after, start)))


def _seconds_by(run: Run, step: int | None) -> float:
    """The run's clock at its last evaluation up to `step` (None: at its last one); 0 where there is none."""
    found = 0.0
    for line in run.metrics:
        if step is None or line["step"] <= step:
            found = number(line.get("seconds")) or found
    return found


def _overlaps(spans: Sequence[_Span]) -> Iterator[tuple[int, int, float]]:
    """Every two sessions that went on at the same time, and for how many seconds."""
    going: list[_Span] = []
    for span in sorted(spans, key=lambda s: s.start):
        going = [other for other in going if other.end > span.start]
        for other in going:
            seconds = min(span.end, other.end) - span.start
            if other.end - span.start > _RESOLUTION and seconds > 0:
                yield other.run, span.run, seconds
        going.append(span)


def _started(session: Mapping[str, Any]) -> float | None:
    try:
        moment = datetime.fromisoformat(str(session.get("started")))
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def _step(session: Mapping[str, Any]) -> int:
    step = session.get("from_step")
    return step if isinstance(step, int) else 0


def _at(session: Mapping[str, Any], key: str) -> Any:
    value: Any = session
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _text(value: Any) -> str:
    return "unknown" if value is None else str(value)
