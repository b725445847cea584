"""What users see when something is wrong: what, where, what to do. Imports nothing of ours.

Exit codes (one home for them): 0 fine, 1 a gate or a check failed, 2 usage, recipe or input, 3 a training run diverged,
4 a run directory or checkpoint, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class SparseiftError(Exception):
    """A problem the user can act on. `message` says what and where; `hint` says what to do about it."""

    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if hint:  # a traceback shows notes; the command line prints message and hint itself
            self.add_note(f"hint: {hint}")


class UsageError(SparseiftError):
    """A wrong argument, recipe, model name or input file (exit 2)."""


class CheckFailed(SparseiftError):
    """A gate or check that the user asked for failed (exit 1)."""

    exit_code = 1


class CheckpointError(SparseiftError):
    """A file given as input that cannot be read as a checkpoint (exit 2, as any wrong input)."""


class ArtifactError(SparseiftError):
    """A directory of ours that cannot be read or written (exit 4)."""

    exit_code = 4


class DivergedError(SparseiftError):
    """A training run whose loss or gradients are no numbers any more (exit 3)."""

    exit_code = 3


class InterruptedRun(SparseiftError):
    """A training run that a signal stopped, after it was saved (exit 128 + the signal). A command line puts its own as hint."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message, hint="continue with --resume latest")
        self.exit_code = 128 + signal


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """`did you mean 'resnet18'?` for the closest of `known`, or None when nothing is close."""
    close = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else None


def one_of(what: str, value: str, known: Sequence[str]) -> None:
    """Raise UsageError unless `value` is one of `known`."""
    if value not in known:
        raise UsageError(f"unknown {what} {value!r}", hint=did_you_mean(value, known) or f"known: {', '.join(known)}")
