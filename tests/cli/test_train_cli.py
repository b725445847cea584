"""`sparseift train` as a user types it: progress on a terminal and off it, dry runs, several recipes, mistakes."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from sparseift_cli.cli import progress as progress_module
from sparseift_cli.cli.progress import Bars, Lines, fold, progress
from sparseift_cli.mask.attached import masks_of
from sparseift_cli.recipe.load import find, load
from sparseift_cli.train.prepare import prepare
from sparseift_cli.train.processes import Processes

MLP = "quickstart/digits_mlp_wide75_rigl"
SHORT = ("--set", "training.epochs=null", "--set", "training.steps=6", "--set", "evaluation.every=3")
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")
ROW = {
    "step": 5,
    "seconds": 1.0,
    "train_loss": 0.25,
    "loss": 0.5,
    "top1": 90.0,
    "flops": 10**9,
    "density": 0.25,
    "itop_rate": 0.5,
}


def on_a_terminal(columns: int, words: list[str], cwd: Path, **environment: str) -> tuple[str, str]:
    """stdout through a pipe, and all that a terminal of so many columns is sent on stderr."""
    import fcntl
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    plain = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR", "WORLD_SIZE")}
    env = {**plain, "TERM": "xterm", "PYTHONUTF8": "1", **environment}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=theirs, env=env, cwd=cwd, text=True)
    os.close(theirs)
    shown = b""
    try:
        while got := os.read(ours, 65536):
            shown += got
    except OSError:  # Linux says so when the other side is closed
        pass
    os.close(ours)
    with process:
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, shown
    return out, shown.decode()


def test_a_terminal_shows_a_bar_and_a_pipe_gets_the_result(root: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "sparseift_cli", "train", MLP, *SHORT, "--runs", str(tmp_path), "--json"]
    out, shown = on_a_terminal(40, words, root, NO_COLOR="1")
    assert [r["steps"] for r in json.loads(out)["runs"]] == [6]
    assert "seed 0 " in shown and "0/6" in shown and "\x1b[?25l" in shown and shown.count("\x1b[?25h") >= 1
    assert re.search(r"\x1b\[(?!0m)[0-9;]*m", shown) is None  # NO_COLOR
    lines = [line for part in shown.split("\n") for line in CONTROL.split(part)]
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 40
    assert "step 6/6" in shown


def test_off_a_terminal_lines_are_plain(sparseift, tmp_path: Path) -> None:
    code, out, err = sparseift("train", MLP, "quickstart/digits_mlp_dense", *SHORT, "--runs", str(tmp_path))
    assert code == 0
    assert "\x1b" not in err + out and "\r" not in err + out
    first, *_ = err.splitlines()
    assert first.startswith(str(tmp_path)) and first.endswith("(seed 0, 6 steps, cpu): from the start")
    assert err.count("\n  step 6/6  train_loss ") == 2
    assert out.count(": 6 steps\n") == 2  # a table a recipe
    code, out, _ = sparseift(
        "train",
        MLP,
        "quickstart/digits_mlp_dense",
        *SHORT,
        "--runs",
        str(tmp_path),
        "--resume",
        "latest",
        "--parallel",
        "1",
        "--json",
    )
    shown = json.loads(out)
    assert code == 0 and shown["schema"] == "sparseift.train/1"
    assert [r["recipe"] for r in shown["runs"]] == ["quickstart_digits_mlp_wide75_rigl", "quickstart_digits_mlp_dense"]


def drawn(bars: Bars, width: int) -> list[str]:
    """The lines of the bars as a terminal of this width shows them."""
    stream = io.StringIO()
    Console(file=stream, width=width, height=25, color_system=None).print(bars._progress.get_renderable())
    return [line.rstrip() for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize("width", [16, 24, 40, 60, 100, 300])
def test_bars_fit_any_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    bars = Bars(Console(file=stream, force_terminal=True, width=width, color_system=None), several=True)
    for label, steps in (("seed 0", 78_000), ("resnet18_cifar100_wide75_rigl seed 11", 1_000_000)):
        bars.note("begins", steps, 0, label)
    for now[0], step in ((5.0, 6_000), (10.0, 12_345)):
        bars.tick(step, "seed 0")
        first, second = drawn(bars, width)
    assert max(len(first), len(second)) <= width
    if width >= 24:
        assert "12,345/78,000" in first
    if width >= 40:
        assert "0:52 left" in first and "1,000,000" in second
    if width >= 60:
        assert "━" in first
    if width >= 80:
        assert "1.27e+03/s" in first
    bars.row({**ROW, "step": 20}, "resnet18_cifar100_wide75_rigl seed 11")
    assert width < 40 or "20/1,000,000" in drawn(bars, width)[1]
    bars.end("seed 0")
    assert len(drawn(bars, width)) == 1
    said = stream.getvalue()
    assert width < 60 or all(len(line) < width for line in said.splitlines())
    assert "density 0.2500, ever active 0.5000" in said  # a field is never divided


def test_a_resumed_bar_counts_only_steps_since(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    bars = Bars(Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None))
    bars.note("begins", 1000, 900, "seed 0")
    (line,) = drawn(bars, 100)
    assert "900/1,000" in line and "/s" not in line
    for now[0], step in ((5.0, 910), (10.0, 920)):
        bars.tick(step)
        (line,) = drawn(bars, 100)
    assert "920/1,000" in line and "2/s" in line and "0:40 left" in line


def test_lines_of_several_runs_have_labels(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines(several=True)
    lines.note("runs/x: from the start", 10, 0, "seed 3")
    lines.tick(3, "seed 3")
    lines.row(ROW, "seed 3")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "seed 3: runs/x: from the start",
        "seed 3: step 5/10  train_loss 0.25  loss 0.5  top1 90  density 0.2500, ever active 0.5000  1e+09 FLOPs  0:01 left",
    ]


def test_progress_is_lines_unless_one_process_has_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    assert type(progress()) is Lines
    monkeypatch.setattr("sys.stderr", Terminal())
    assert type(progress()) is Bars
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert type(progress()) is Lines
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("TERM", "dumb")
    assert type(progress()) is Lines


def test_fold_keeps_words_whole() -> None:
    assert fold(["  step 1/2", "loss 0.5", "a b, c d"], "  ", 18) == ["  step 1/2", "    loss 0.5", "    a b, c d"]
    assert fold(["a" * 30, "b"], " ", 10) == ["a" * 30, "    b"]


def test_dry_run_counts_masks_and_what_is_executed(sparseift) -> None:
    found = find(MLP)
    assert found is not None
    masked = sum(m.numel() for m in masks_of(prepare(load(found), 0, Processes(torch.device("cpu"))).model).values())
    plan = json.loads(sparseift("train", MLP, "--dry-run", "--json")[1])
    assert plan["schema"] == "sparseift.dry-run/1" and plan["recipe"] == "quickstart_digits_mlp_wide75_rigl"
    assert plan["mask_bytes"] == 6 * masked
    assert plan["steps"] == 660 and "seconds" not in plan
    assert plan["executed_flops"] > plan["training_flops"]
    timed = json.loads(sparseift("train", MLP, "--dry-run", "--json", "--tflops", "0.0001")[1])
    assert timed["seconds"] == round(plan["executed_flops"] / 1e8)
    dense = json.loads(sparseift("train", "quickstart/digits_mlp_dense", "--dry-run", "--json", "--tflops", "1e-4")[1])
    assert "mask_bytes" not in dense and "executed_flops" not in dense
    assert dense["seconds"] == round(dense["training_flops"] / 1e8)
    both = json.loads(sparseift("train", MLP, "quickstart/digits_mlp_dense", "--dry-run", "--json")[1])
    assert [p["recipe"] for p in both["recipes"]] == [
        "quickstart_digits_mlp_wide75_rigl",
        "quickstart_digits_mlp_dense",
    ]
    assert "Each of 3 runs" in sparseift("train", MLP, "--dry-run", "--seeds", "0..2")[1]


def test_masks_that_never_move_are_said(sparseift, tmp_path: Path) -> None:
    """22 steps, updates until step ceil(.75 * 22) = 17, the first after 17."""
    short = ("train", MLP, "--set", "training.epochs=1", "--set")
    message = "rigl moves no mask in this run: the first update would be that of step 17, and updates end before step 17 of 22"
    assert message in sparseift(*short, "algorithm.delta_t=17", "--dry-run")[1]
    assert "moves no mask" not in sparseift(*short, "algorithm.delta_t=16", "--dry-run")[1]
    code, _, err = sparseift(*short, "algorithm.delta_t=17", "--runs", str(tmp_path))
    assert code == 0 and err.count(message) == 1


def test_sizes_of_official_sets_give_steps_without_the_data(sparseift) -> None:
    assert json.loads(sparseift("train", "resnet18_cifar100/wide75_rigl", "--dry-run", "--json")[1])["steps"] == 78_000
    _, out, _ = sparseift(
        "train", "resnet18_cifar100/wide75_rigl", "--set", "data=image-folder", "--dry-run", "--tflops", "9"
    )
    assert "not known beforehand" in out and "seconds" not in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((MLP, "--parallel", "0"), "--parallel 0 runs nothing"),
        ((MLP, "--seeds", "0,0"), "names a seed twice"),
        ((MLP, "--seeds", "0..1", "--resume", "runs/x/y"), "--resume RUN continues one run"),
        (
            (MLP, "quickstart/digits_mlp_dense", "--parallel", "2", "--resume", "runs/x/y"),
            "--resume RUN continues one run",
        ),
        ((MLP, f"{MLP}.yaml"), "are both called quickstart_digits_mlp_wide75_rigl"),
        ((MLP, "quickstart/digits_mpl"), "is no recipe"),
        ((MLP, "--tflops", "100"), "add --dry-run"),
        ((MLP, "--dry-run", "--tflops", "0"), "--tflops 0 is no speed"),
        ((MLP, "--dry-run", "--tflops", "nan"), "--tflops nan is no speed"),
    ],
)
def test_a_users_mistake_is_one_clear_line(sparseift, words: tuple[str, ...], said: str) -> None:
    code, out, err = sparseift("train", *words)
    assert (code, out) == (2, "")
    assert err.startswith("sparseift: ") and said in err and len(err.splitlines()) <= 2


def test_torchrun_and_parallel_do_not_go_together(sparseift, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = sparseift("train", MLP, "--seeds", "0..1", "--parallel", "2")
    assert code == 2 and "--parallel and torchrun do not go together" in err


@pytest.mark.parametrize(
    "words", [("train", MLP), ("recipe", "ls"), ("recipe", "show", MLP), ("inspect", "resnet18"), ("report", "figure4")]
)
def test_only_gates_write_github_annotations(sparseift, words: tuple[str, ...]) -> None:
    code, out, err = sparseift(*words, "--format", "github")
    assert code == 2 and not out
    assert "has no gates to annotate" in err and "--format table, json, csv or md" in err
