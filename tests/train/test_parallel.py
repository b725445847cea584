"""Several runs at once: the bits of runs in turn, signals passed on, one that fails, one whose parent is gone."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparseift_cli.errors import ArtifactError
from sparseift_cli.recipe.load import load
from sparseift_cli.recipe.write import resolved_yaml
from sparseift_cli.runs.directory import RunDirectory, seed_of
from sparseift_cli.train import parallel
from sparseift_cli.train import run as train_run
from sparseift_cli.train.prepare import with_seed
from sparseift_cli.train.run import run_jobs, run_seeds

Write = Callable[..., Path]
Command = Callable[..., tuple[int, str, str]]
ONE_THREAD = "training.threads=1"


def quiet(*_: Any, **__: Any) -> None:
    """Take a report and print nothing."""


def train_words(recipe: Path, root: Path, *words: str) -> list[str]:
    return ["train", str(recipe), "--runs", str(root), *words]


def command(recipe: Path, root: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "sparseift_cli", *train_words(recipe, root, *words)]


@contextmanager
def started(words: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        with process:
            yield process
    finally:
        process.kill()


def runs_of(root: Path) -> dict[str | None, RunDirectory]:
    return {seed_of(run.recipe): run for folder in root.iterdir() for run in RunDirectory.all(root, folder.name)}


def session_of(result: Any) -> Any:
    """The first session of the provenance of a run, given its summary."""
    return json.loads((Path(result["path"]) / "provenance.json").read_text())["sessions"][0]


def wait_for_lines(process: subprocess.Popen[str], *wanted: str) -> None:
    """Read stderr until each of `wanted` was in a line of it."""
    missing = set(wanted)
    assert process.stderr is not None
    while missing:
        line = process.stderr.readline()
        assert line, f"ended without {missing}"
        missing -= {w for w in missing if w in line}


def test_runs_at_once_have_the_bits_of_runs_in_turn(
    sparseift: Command, write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    recipe = write_recipe("rigl", steps=8)
    in_turn = run_seeds(load(recipe, [ONE_THREAD]), [1, 0], tmp_path / "turn", None, quiet, quiet)
    words = train_words(recipe, tmp_path / "once", "--set", ONE_THREAD, "--seeds", "1,0", "--parallel", "2", "--json")
    code, out, err = sparseift(*words)
    assert code == 0, err
    shown = json.loads(out)
    assert shown["schema"] == "sparseift.train/1"
    at_once = shown["runs"]
    assert [r["seed"] for r in at_once] == [1, 0]
    for one, other in zip(in_turn, at_once, strict=True):
        newest = [RunDirectory.open(Path(r["path"])).checkpoints.newest() for r in (one, other)]
        assert newest[0].tensors.keys() == newest[1].tensors.keys()
        assert [n for n, t in newest[0].tensors.items() if not torch.equal(t, newest[1].tensors[n])] == []
        assert [session_of(r)["at_once"] for r in (one, other)] == [1, 2]
        assert one["metrics"]["loss"] == other["metrics"]["loss"] and one["flops"] == other["flops"]
    assert {w for r in at_once for w in session_of(r)["command"] if "--slot" in w} == {"--slot=0", "--slot=1"}
    assert "\x1b" not in err and "\r" not in err and "@sparseift" not in err
    assert "\nseed 1: step 8/8  train_loss" in err and "\nseed 0: step 8/8  train_loss" in err


def test_sigterm_saves_every_run_and_begins_no_other(write_recipe: Write, tmp_path: Path) -> None:
    recipe = write_recipe("static", steps=100_000)
    with started(command(recipe, tmp_path / "runs", "--seeds", "0..2", "--parallel", "2")) as process:
        wait_for_lines(process, "seed 0: step 5/", "seed 1: step 5/")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (143, "")
    assert "3 of 3 runs stopped" in err and "seed 2: not begun" in err and "--resume latest" in err
    assert "Traceback" not in err
    runs = runs_of(tmp_path / "runs")
    assert set(runs) == {"0", "1"}
    for seed, run in runs.items():
        newest = run.checkpoints.newest()
        assert newest is not None and newest.step >= 5
        assert f"seed {seed}: stopped after step {newest.step} of 100000" in err


def test_a_failing_run_leaves_the_others_to_finish(sparseift: Command, write_recipe: Write, tmp_path: Path) -> None:
    recipe = write_recipe("static", steps=6)
    loaded = load(recipe)
    held = RunDirectory.create(tmp_path / "runs", loaded.name, resolved_yaml(with_seed(loaded, 0).spec))
    words = ("--seeds", "0..1", "--parallel", "2", "--resume", "latest", "-f", "json")
    with held.lock():
        code, out, err = sparseift(*train_words(recipe, tmp_path / "runs", *words))
    assert code == 4
    assert [r["seed"] for r in json.loads(out)["runs"]] == [1]
    assert "seed 0: failed, exit code 4\n" in err
    assert f"sparseift: 1 of 2 runs failed\n  seed 0: {held.path} is in use by process {os.getpid()}" in err
    assert "hint: wait for it" in err


def test_runs_whose_parent_was_killed_save_and_stop(write_recipe: Write, tmp_path: Path) -> None:
    recipe = write_recipe("static", steps=100_000)
    with started(command(recipe, tmp_path / "runs", "--seeds", "0..1", "--parallel", "2")) as process:
        wait_for_lines(process, "seed 0: step 5/", "seed 1: step 5/")
        process.kill()
    runs = runs_of(tmp_path / "runs")
    assert set(runs) == {"0", "1"}
    for run in runs.values():
        until = time.monotonic() + 30
        while run.checkpoints.newest() is None:
            assert time.monotonic() < until, "no checkpoint was written"
            time.sleep(0.05)
        while True:
            try:
                with run.lock():
                    break
            except ArtifactError:
                assert time.monotonic() < until, "the child goes on"
                time.sleep(0.05)


def test_several_recipes_train_in_turn_each_with_its_own_threads(write_recipe: Write, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    jobs = [(load(write_recipe("static", steps=5), ["training.threads=3"]), 0), (load(write_recipe("set", steps=5)), 1)]
    results = run_jobs(jobs, tmp_path / "runs", None, quiet, quiet)
    assert [(r["recipe"], r["seed"]) for r in results] == [("static_sgd", 0), ("set_sgd", 1)]
    sessions = [session_of(r) for r in results]
    assert [s["threads"] for s in sessions] == [3, before]
    assert torch.get_num_threads() == before


def test_a_changed_recipe_is_held_against_the_run_of_its_own_seed(write_recipe: Write, tmp_path: Path) -> None:
    recipe = write_recipe("static", steps=5)
    first, _ = run_seeds(load(recipe), [0, 1], tmp_path, None, quiet, quiet)
    changed = load(recipe, ["optimizer.lr=0.01"])
    with pytest.raises(ArtifactError, match="begun with another recipe") as error:
        run_seeds(changed, [0], tmp_path, "latest", quiet, quiet)
    assert error.value.message.startswith(first["path"])  # seed 1's is newer
    assert "+  lr: 0.01" in error.value.message and "seed:" not in error.value.message
    (begun,) = run_seeds(changed, [2], tmp_path, "latest", quiet, quiet)
    assert begun["seed"] == 2
    assert run_seeds(load(recipe), [0], tmp_path, "latest", quiet, quiet) == [first]


def test_a_run_that_cannot_be_started_frees_its_slot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slots: list[int] = []

    def start(crew: Any, child: parallel.Child, slot: int, result: Any) -> Any:
        slots.append(slot)
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(parallel._Children, "_start", start)
    children = [parallel.Child(Path("x.yaml"), [], seed, f"seed {seed}") for seed in range(5)]
    with pytest.raises(BlockingIOError, match="no more processes"):
        parallel.run_parallel(children, 2, tmp_path, None, SimpleNamespace(note=quiet, end=quiet))
    assert len(slots) == 5 and set(slots) <= {0, 1}


def test_what_a_child_says_last_does_not_hide_why_it_failed() -> None:
    notes: list[str] = []
    watch: Any = SimpleNamespace(note=lambda text, run: notes.append(text))
    crew, child = parallel._Children([], 1, 1, watch), parallel.Child(Path("x.yaml"), [], 0, "seed 0")
    error = f'{parallel.MARK}{{"kind": "error", "message": "x is in use", "hint": "wait"}}'
    for lines, message in (
        (["Traceback", "ValueError: 3"], "ValueError: 3"),
        ([error, "a warning at exit"], "x is in use"),
        ([], "ended with exit code 4"),
    ):
        outcome = parallel._Outcome(0)
        crew._listen(child, io.StringIO("".join(f"{line}\n" for line in lines)), outcome)
        crew._close(outcome, 4, "")
        assert (outcome.message, outcome.code) == (message, 4)
    assert notes == ["Traceback", "ValueError: 3", "a warning at exit"]


def test_a_child_that_crashes_when_all_is_done_has_finished(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a GPU a library's own clean-up can crash at the very end: what is written is written."""
    notes: list[str] = []
    watch: Any = SimpleNamespace(note=lambda text, run: notes.append(text), end=lambda run: None)
    crew, child = parallel._Children([], 1, 1, watch), parallel.Child(tmp_path / "x.yaml", [], 0, "seed 0")
    crash = "import os, signal, sys; sys.stdout.flush(); os.kill(os.getpid(), signal.SIGSEGV)"
    for printed, summary, said in (
        ('{"runs": [{"seed": 0}]}', {"seed": 0}, "ended by SIGSEGV after the run was complete"),
        ("", None, "failed, exit code 139"),
    ):

        def begin(*_: Any, words: str = printed) -> subprocess.Popen[str]:
            script = f"print({words!r}); {crash}"
            return subprocess.Popen(
                [sys.executable, "-c", script], stdout=_[-1], stderr=subprocess.PIPE, text=True, cwd=tmp_path
            )

        monkeypatch.setattr(crew, "_start", begin)
        outcome = crew.run(child)
        assert (outcome.summary, outcome.code, outcome.message) == (summary, 139, "ended by SIGSEGV")
        assert notes.pop() == said


def test_recipes_after_another_begin_with_a_clean_compiler(
    write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile gives up on a function after eight versions of it; seeds of a recipe share one."""
    reset: list[int] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: reset.append(1))
    sets = ["training.compile=auto"]
    one, other = load(write_recipe("static", steps=5), sets), load(write_recipe("set", steps=5), sets)
    run_jobs([(one, 0), (one, 1), (other, 0)], tmp_path / "runs", None, quiet, quiet)
    assert reset == [1]


def test_a_deterministic_run_lets_cudnn_search_for_nothing(
    write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def looks(*_: Any, **__: Any) -> dict[str, Any]:
        seen.append(torch.backends.cudnn.benchmark)
        return {}

    monkeypatch.setattr(train_run, "train", looks)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)  # as the caller may have set it
    for deterministic in ("true", "false"):
        recipe = load(write_recipe("static", steps=5), [f"training.deterministic={deterministic}"])
        run_jobs([(recipe, 0)], tmp_path / deterministic, None, quiet, quiet)
    assert seen == [False, True]
    assert torch.backends.cudnn.benchmark


def test_what_a_run_sets_for_the_process_is_undone(
    write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def like_a_graphed_step(*_: Any, **__: Any) -> dict[str, Any]:
        torch.backends.cudnn.benchmark = True
        return {}

    monkeypatch.setattr(train_run, "train", like_a_graphed_step)
    run_jobs([(load(write_recipe("static", steps=5)), 0)], tmp_path / "runs", None, quiet, quiet)
    assert not torch.backends.cudnn.benchmark


def test_ticks_of_the_loop_reach_the_caller(
    write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = train_run.train

    def ticking(*of: Any, tick: Callable[[int], None] | None = None) -> dict[str, Any]:
        assert tick is not None
        tick(1)
        return loop(*of)

    monkeypatch.setattr(train_run, "train", ticking)
    notes: list[int] = []
    run_jobs([(load(write_recipe("static", steps=5)), 0)], tmp_path / "runs", None, quiet, quiet, tick=notes.append)
    assert notes == [1]
