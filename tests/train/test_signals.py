"""Signals at odd moments: twice, between two runs, amid an evaluation, and to the workers that decode images."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sparseift_cli.data import Batches, image_files, open_data
from sparseift_cli.data.image_files import leave_signals
from sparseift_cli.errors import InterruptedRun
from sparseift_cli.recipe.load import load
from sparseift_cli.runs.directory import RunDirectory
from sparseift_cli.runs.metrics import read_metrics
from sparseift_cli.train import loop
from sparseift_cli.train.evaluate import evaluate
from sparseift_cli.train.processes import catching_signals
from sparseift_cli.train.run import run_jobs

Write = Callable[..., Path]
CNN = "digits_cnn"


def quiet(*_: Any) -> None:
    """Take a report and print nothing."""


def signal_myself(number: int) -> None:
    os.kill(os.getpid(), number)


def asked_twice(first: int) -> None:
    with catching_signals():
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
    """It comes after the last evaluation of the first run, which is done all the same."""
    recipe = load(write_recipe("static", steps=5))

    def report(row: Mapping[str, Any]) -> None:
        if row["step"] == 5:
            signal_myself(signal.SIGTERM)

    with pytest.raises(InterruptedRun, match="stopped before static_sgd seed 1 was begun") as stopped:
        run_jobs([(recipe, 0), (recipe, 1)], tmp_path / "runs", None, report, quiet)
    assert stopped.value.exit_code == 143
    (only,) = (tmp_path / "runs" / "static_sgd").iterdir()
    assert (only / "summary.json").exists()


def signal_at(monkeypatch: pytest.MonkeyPatch, batch: int) -> list[int]:
    """SIGTERM before this batch of all that evaluations look at; as many entries as batches were looked at."""
    seen: list[int] = []

    def watched(*args: Any) -> Any:
        *rest, asked = args

        def ask() -> int:
            seen.append(len(seen))
            if len(seen) == batch:
                signal_myself(signal.SIGTERM)
            return asked()

        return evaluate(*rest, ask)

    monkeypatch.setattr(loop, "evaluate", watched)
    return seen


def rows_of(path: str | Path) -> list[dict[str, Any]]:
    rows = read_metrics(Path(path) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in ("seconds", "peak_bytes")} for row in rows]


@pytest.mark.parametrize("save", [1, 100])
def test_an_evaluation_that_a_signal_ended_is_made_when_the_run_goes_on(
    write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: int
) -> None:
    """Whatever it was in the midst of: the first batch, the last, the last evaluation, the test split."""
    sets = ["evaluation.every=4", "evaluation.batch_size=8", "evaluation.limit=24", "evaluation.test=true"]
    recipe = load(
        write_recipe("rigl", steps=10, save=save),
        [*sets, "data.name=digits", "data.validation=0.1", "model.input=1x8x8", f"model.name={CNN}"],
    )
    seen = signal_at(monkeypatch, 0)
    (whole,) = run_jobs([(recipe, 0)], tmp_path / "whole", None, quiet, quiet)
    want = RunDirectory.open(Path(whole["path"])).checkpoints.newest()
    assert want is not None
    for batch in (1, 3, 5, len(seen) - 3, len(seen)):
        root = tmp_path / str(batch)
        signal_at(monkeypatch, batch)
        with pytest.raises(InterruptedRun, match="before its evaluation; the checkpoint is in") as stopped:
            run_jobs([(recipe, 0)], root, None, quiet, quiet)
        assert stopped.value.exit_code == 143
        signal_at(monkeypatch, 0)
        (again,) = run_jobs([(recipe, 0)], root, "latest", quiet, quiet)
        have = RunDirectory.open(Path(again["path"])).checkpoints.newest()
        assert have is not None
        assert [n for n, t in want.tensors.items() if not torch.equal(have.tensors[n], t)] == []
        assert rows_of(again["path"]) == rows_of(whole["path"])
        assert (again["best"], again["flops"]) == (whole["best"], whole["flops"])


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="this system does not say who sent a signal")
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
    for _ in range(
        100
    ):  # by its parent, as Python does at its exit; one that still waits for the first SIGTERM gets no second
        worker.terminate()
        worker.join(0.3)
        if not worker.is_alive():
            break
    assert worker.exitcode == 0
    batches.close()
    assert torch.equal(batches.at(0)[0], first[0])
    batches.close()


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="this system does not say who sent a signal")
def test_a_signal_while_a_worker_starts_ends_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its fork and the moment when it leaves signals alone."""
    (tmp_path / "train" / "a").mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (9, 9), (i, 0, 0)).save(tmp_path / "train" / "a" / f"{i}.png")

    def signalled_early(worker: int) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal_myself(number)
        leave_signals(worker)

    monkeypatch.setattr(image_files, "leave_signals", signalled_early)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    batches = Batches(open_data("image-folder", tmp_path, size=8), "train", 2, workers=1)
    assert [tuple(batches.at(step)[0].shape) for step in range(6)] == [(2, 3, 8, 8)] * 6
    batches.close()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_workers_end_with_the_run(write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    monkeypatch.setattr(Batches, "close", lambda batches: closed.append(batches.split))
    run_jobs([(load(write_recipe("static", steps=5)), 0)], tmp_path / "runs", None, quiet, quiet)
    assert closed == ["train", "test"]
