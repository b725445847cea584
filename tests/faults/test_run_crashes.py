"""A run is stopped between any two system calls, its files are cut, changed and removed: nothing whole is ever lost."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from sparseift_cli.errors import ArtifactError
from sparseift_cli.runs.checkpoint import Checkpoints
from sparseift_cli.runs.directory import RunDirectory
from sparseift_cli.runs.metrics import Metrics, read_metrics

CALLS = (
    "open",
    "fsync",
    "rename",
    "replace",
    "mkdir",
    "unlink",
    "rmdir",
    "write",
    "chmod",
    "ftruncate",
    "close",
    "stat",
    "scandir",
    "listdir",
    "fdopen",
)


class Killed(BaseException):
    """The process is gone: no handler of an error may do anything any more."""


class Machine:
    """Counts system calls, and stops at the nth one: before it, or after it; every later call fails too, as a dead
    process makes none.
    """

    def __init__(self, stop_at: int | None, *, after: bool = False, error: OSError | None = None) -> None:
        self.calls, self.stop_at, self.after, self.error, self.dead = 0, stop_at, after, error, False

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self.dead:
                raise Killed
            self.calls += 1
            if self.calls != self.stop_at:
                return call(*args, **kwargs)
            if self.error is not None:
                raise self.error
            if self.after:
                with suppress(OSError):
                    getattr(call(*args, **kwargs), "close", int)()  # a process that dies closes its files
            self.dead = True
            raise Killed

        return wrapped


@contextmanager
def running_on(machine: Machine) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, machine.wrap(getattr(os, name)))
        patch.setattr(io, "open", machine.wrap(io.open))
        patch.setattr(safetensors.torch, "save_file", machine.wrap(safetensors.torch.save_file))
        yield


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((8,), float(step))}


def calls_of(action: Callable[[], Any]) -> int:
    machine = Machine(None)
    with running_on(machine):
        action()
    return machine.calls


def require_whole(store: Checkpoints, least: int) -> int:
    """The newest checkpoint verifies without skipping, is what was saved as it, and is no older than `least`."""
    found = store.newest()
    assert found is not None
    assert found.skipped == ()
    assert found.step >= least
    assert torch.equal(found.tensors["w"], tensors(found.step)["w"])
    assert found.state == {"step": found.step}
    return found.step


@pytest.mark.parametrize("after", [False, True], ids=["before the call", "after the call"])
def test_stopped_between_any_two_calls_of_a_save(tmp_path: Path, after: bool) -> None:
    """Three checkpoints are there; the writer dies somewhere in the fourth. Then the run goes on."""

    def save(folder: Path, step: int) -> None:
        Checkpoints(folder).save(step, tensors(step), {"step": step}, score=float(step == 1))

    def prepared(folder: Path) -> None:
        for step in (1, 2, 3):
            save(folder, step)

    prepared(tmp_path / "count")
    total = calls_of(lambda: save(tmp_path / "count", 4))
    assert total > 25
    seen: set[int] = set()
    for n in range(1, total + 1):
        folder = tmp_path / f"{n}"
        prepared(folder)
        with running_on(Machine(n, after=after)), pytest.raises(Killed):
            save(folder, 4)
        store = Checkpoints(folder)
        seen.add(require_whole(store, 3))
        best = store.best()
        assert best is not None
        assert best.step == 1
        save(folder, 5)  # the next start sweeps up and goes on
        assert require_whole(store, 5) == 5
        assert not [p for p in folder.iterdir() if p.name.startswith(".")]
        assert set(store.steps()) <= {1, 3, 4, 5}
        assert {1, 5} <= set(store.steps())
    assert seen == {3, 4}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_what_the_disk_refuses_is_told_and_nothing_is_lost(tmp_path: Path, number: int) -> None:
    def save(folder: Path, step: int) -> None:
        Checkpoints(folder).save(step, tensors(step), {"step": step})

    save(tmp_path / "count", 1)
    total = calls_of(lambda: save(tmp_path / "count", 2))
    reported = 0
    for n in range(1, total + 1):
        folder = tmp_path / str(n)
        save(folder, 1)
        with running_on(Machine(n, error=OSError(number, os.strerror(number)))):
            error: ArtifactError | None = None
            try:
                save(folder, 2)
            except ArtifactError as caught:
                error = caught
        if error is not None:
            reported += 1
            assert (error.exit_code, os.strerror(number) in error.message) == (4, True)
        require_whole(Checkpoints(folder), 1)
        save(folder, 3)
        require_whole(Checkpoints(folder), 3)
    assert reported > 15


def test_stopped_anywhere_in_a_run_no_line_that_a_checkpoint_followed_is_lost(tmp_path: Path) -> None:
    def work(run: RunDirectory) -> None:
        """Steps 1 to 4, or what is left of them; a line a step, a checkpoint every second step."""
        found, metrics = run.resume()
        with metrics:
            for step in range((found.step if found else 0) + 1, 5):
                metrics.append({"step": step, "value": step * 0.1})
                if step % 2 == 0:
                    run.save(step, tensors(step), {"step": step}, metrics, score=-step)

    whole = RunDirectory.create(tmp_path, "whole", "model: x\n")
    total = calls_of(lambda: work(whole))
    want = (whole.path / "metrics.jsonl").read_bytes()
    assert total > 60
    for n in range(1, total + 1):
        run = RunDirectory.create(tmp_path, f"run{n}", "model: x\n")
        with running_on(Machine(n)), pytest.raises(Killed):
            work(run)
        found = run.checkpoints.newest()
        rows = list(read_metrics(run.path / "metrics.jsonl"))
        assert [row["step"] for row in rows][: found.step if found else 0] == list(
            range(1, (found.step if found else 0) + 1)
        )
        work(run)
        assert (run.path / "metrics.jsonl").read_bytes() == want
        assert run.checkpoints.steps() == [2, 4]


def test_a_run_directory_is_there_with_its_recipe_or_not_at_all(tmp_path: Path) -> None:
    def create(name: str) -> RunDirectory:
        return RunDirectory.create(tmp_path, name, "model: x\n", plan={"p": 1}, audit={"a": 2})

    total = calls_of(lambda: create("count"))
    for n in range(1, total + 1):
        with running_on(Machine(n)), pytest.raises(Killed):
            create(f"run{n}")
        found = RunDirectory.latest(tmp_path, f"run{n}")
        if found is not None:
            assert found.recipe == "model: x\n"
            assert {"plan.json", "audit.json"} <= {p.name for p in found.path.iterdir()}


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["remove", "cut", "empty", "longer", "flip first", "flip middle", "flip last"])
def test_damage_is_found_and_the_one_before_is_loaded(tmp_path: Path, name: str, damage: str) -> None:
    store = Checkpoints(tmp_path)
    for step in (1, 2):
        store.save(step, tensors(step), {"step": step})
    file = tmp_path / "step-00000002" / name
    content = bytearray(file.read_bytes())
    at = {"flip first": 0, "flip middle": len(content) // 2, "flip last": len(content) - 2}.get(damage)
    if damage == "remove":
        file.unlink()
    elif at is not None:
        content[at] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes({"cut": content[:-7], "empty": b"", "longer": content + b"\0"}[damage])
    found = store.newest()
    assert found is not None
    assert found.step == 1
    (skipped,) = found.skipped
    assert skipped.path.name == "step-00000002"
    assert str(skipped).startswith(f"step-00000002: {name} ")


@pytest.mark.parametrize("bit", range(8))
def test_any_flipped_bit_of_a_checkpoint_is_noticed(tmp_path: Path, bit: int) -> None:
    store = Checkpoints(tmp_path)
    path = store.save(1, tensors(1), {"step": 1})
    for file in path.iterdir():
        content = file.read_bytes()
        for at in range(bit, len(content), 8):
            changed = bytearray(content)
            changed[at] ^= 1 << bit
            file.write_bytes(changed)
            try:
                found = store.newest()
            except ArtifactError:
                continue
            assert file.name == "manifest.json"  # the line breaks between its values say nothing
            assert found is not None
            assert torch.equal(found.tensors["w"], tensors(1)["w"])
            assert (found.step, found.state, found.score, found.metrics_bytes) == (1, {"step": 1}, None, None)
        file.write_bytes(content)


def test_none_left_says_what_is_wrong_with_each(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    for step in (1, 2):
        path = store.save(step, tensors(step), {"step": step}, score=1.0)
        (path / "state.json").unlink()
    for load in (store.newest, store.best):
        with pytest.raises(ArtifactError) as caught:
            load()
        assert "step-00000001: state.json cannot be read: No such file or directory" in caught.value.message
        assert "step-00000002: state.json cannot be read" in caught.value.message


def test_the_best_that_is_damaged_gives_way_to_the_next(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    for step, score in ((1, 0.9), (2, 0.1), (3, 0.5)):
        store.save(step, tensors(step), {"step": step}, score=score)
    (tmp_path / "step-00000001" / "tensors.safetensors").write_bytes(b"")
    best = store.best()
    assert best is not None
    assert (best.step, [s.path.name for s in best.skipped]) == (3, ["step-00000001"])


def test_metrics_that_are_shorter_than_their_checkpoint_are_refused(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "x", "model: x\n")
    _, metrics = run.resume()
    with metrics:
        metrics.append({"step": 1})
        run.save(1, tensors(1), {"step": 1}, metrics)
    (run.path / "metrics.jsonl").write_text("")
    with pytest.raises(ArtifactError, match="does not match the checkpoint"):
        run.resume()


def test_a_write_that_takes_only_part_of_a_line_goes_on(tmp_path: Path) -> None:
    write = os.write
    with Metrics(tmp_path / "metrics.jsonl") as metrics, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", lambda handle, data: write(handle, data[:3]))
        metrics.append({"step": 1, "loss": 0.5})
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == [{"step": 1, "loss": 0.5}]
