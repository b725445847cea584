"""Signals at odd moments: twice, between two runs, and to the workers that decode images."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sparseift_cli.data import Batches, open_data
from sparseift_cli.errors import InterruptedRun
from sparseift_cli.recipe.load import load
from sparseift_cli.train.run import run_jobs
from sparseift_cli.train.signals import listening

Write = Callable[..., Path]


def quiet(*_: Any) -> None:
    """A report to nobody."""


def signal_myself(number: int) -> None:
    os.kill(os.getpid(), number)


def asked_twice(first: int) -> None:
    with listening():
        signal_myself(first)
        signal_myself(signal.SIGTERM)
        time.sleep(5)


@pytest.mark.parametrize(("first", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_at_once_with_the_code_of_the_first(first: int, code: int) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(InterruptedRun, match="at once by a second signal") as stopped:
        asked_twice(first)
    assert stopped.value.exit_code == code
    assert signal.getsignal(signal.SIGTERM) == before


def test_no_run_is_begun_after_a_signal(write_recipe: Write, tmp_path: Path) -> None:
    """It comes in the last step of the first run, which is done all the same."""
    recipe = load(write_recipe("static", steps=5))

    def tick(step: int) -> None:
        if step == 5:
            signal_myself(signal.SIGTERM)

    with pytest.raises(InterruptedRun, match="stopped before static_sgd seed 1 was begun") as stopped:
        run_jobs([(recipe, 0), (recipe, 1)], tmp_path / "runs", None, quiet, quiet, tick=tick)
    assert stopped.value.exit_code == 143
    (only,) = (tmp_path / "runs" / "static_sgd").iterdir()
    assert (only / "summary.json").exists()


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="nobody says who sent a signal here")
def test_workers_leave_signals_to_the_process_that_trains(tmp_path: Path) -> None:
    """A cluster sends SIGTERM to every process of a job; the run has to save, and needs no dead worker's error for that."""
    for place in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / place).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (9, 9), (i, 0, 0)).save(tmp_path / place / f"{i}.png")
    batches = Batches(open_data("image-folder", tmp_path, size=8), "train", 2, workers=1)
    first = batches.at(0)
    (worker,) = multiprocessing.active_children()
    for name in ("TERM", "INT"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)  # not sent by its parent
    assert [tuple(batches.at(step)[0].shape) for step in range(1, 20)] == [(2, 3, 8, 8)] * 19
    assert worker.is_alive()
    worker.terminate()  # by its parent, as Python does at its exit
    worker.join(10)
    assert not worker.is_alive()
    batches.close()
    assert torch.equal(batches.at(0)[0], first[0])
    batches.close()


def test_workers_end_with_the_run(write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    monkeypatch.setattr(Batches, "close", lambda batches: closed.append(batches.split))
    run_jobs([(load(write_recipe("static", steps=5)), 0)], tmp_path / "runs", None, quiet, quiet)
    assert closed == ["train", "test"]
