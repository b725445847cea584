"""The daemon by which runs share a GPU, played by a script that writes down how it was called."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sparseift_cli.train import gpu_sharing
from sparseift_cli.train.gpu_sharing import CONTROL, PIPES, shared_gpu

DAEMON = """#!/bin/sh
echo "$1 pipes=$CUDA_MPS_PIPE_DIRECTORY gpus=$CUDA_VISIBLE_DEVICES $([ -z "$1" ] && cat)" >> "$CALLS"
exit {code}
"""


class Machine:
    """Where `shared_gpu` is tried: a folder of programs, and what was said."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls, self.notes = folder, folder / "calls", list[str]()

    def has_daemon(self, code: int = 0) -> None:
        script = self.folder / CONTROL
        script.write_text(DAEMON.format(code=code))
        script.chmod(0o755)

    def called(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setenv("CALLS", str(made.calls))
    monkeypatch.delenv(PIPES, raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpu_sharing, "_USUAL", tmp_path / "none.pid")
    monkeypatch.setattr(
        gpu_sharing, "_ATTACH", "import os; assert os.path.isdir(os.environ['CUDA_MPS_PIPE_DIRECTORY'])"
    )
    return made


def test_runs_get_the_place_of_a_daemon_that_ends_with_them(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.has_daemon()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with shared_gpu(machine.notes.append) as places:
        folder = places[PIPES]
        assert Path(folder).is_dir()
        assert machine.called() == [f"-d pipes={folder} gpus= "]  # it numbers GPUs as the runs do
    assert machine.called()[1:] == [f" pipes={folder} gpus=1 quit -t 10"]
    assert not Path(folder).exists() and machine.notes == []


def test_the_daemon_ends_with_a_failure_too(machine: Machine) -> None:
    machine.has_daemon()
    with pytest.raises(ZeroDivisionError), shared_gpu(machine.notes.append):
        raise ZeroDivisionError
    assert machine.called()[-1].endswith("quit -t 10")


@pytest.mark.parametrize("fault", ["daemon", "process"])
def test_where_it_does_not_work_runs_take_turns(machine: Machine, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    machine.has_daemon(code=int(fault == "daemon"))
    if fault == "process":
        monkeypatch.setattr(gpu_sharing, "_ATTACH", "import sys; sys.exit(805 % 256)")
    with shared_gpu(machine.notes.append) as places:
        assert places == {}
    assert machine.notes == ["runs on a GPU take turns: NVIDIA's Multi-Process Service does not work here"]
    assert machine.called()[-1].endswith("quit -t 10")


@pytest.mark.parametrize("reason", ["no daemon", "the user's own", "one at the usual place", "no GPU to be seen"])
def test_nothing_is_started(machine: Machine, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    if reason != "no daemon":
        machine.has_daemon()
    if reason == "the user's own":
        monkeypatch.setenv(PIPES, "/somewhere")
    if reason == "one at the usual place":
        (machine.folder / "mps.pid").write_text(f"{os.getpid()}\n")
        monkeypatch.setattr(gpu_sharing, "_USUAL", machine.folder / "mps.pid")
    if reason == "no GPU to be seen":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with shared_gpu(machine.notes.append) as places:
        assert places == {}
    assert (machine.called(), machine.notes) == ([], [])


def test_a_daemon_that_is_gone_is_none(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.has_daemon()
    (machine.folder / "mps.pid").write_text("2147483647\n")
    monkeypatch.setattr(gpu_sharing, "_USUAL", machine.folder / "mps.pid")
    with shared_gpu(machine.notes.append) as places:
        assert places


def test_the_attaching_process_says_that_there_is_no_driver(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one, on any machine: without a driver it fails, and that is no crash of ours."""
    monkeypatch.undo()
    compile(gpu_sharing._ATTACH, "attach", "exec")
    assert isinstance(gpu_sharing._started({"PATH": str(machine.folder)}), bool)
