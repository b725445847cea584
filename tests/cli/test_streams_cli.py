"""A script's view of streams: a full disk, a closed stream, a reader that has gone, and --output that is no plain file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.helpers.report_runs import make_run

TRAIN = (
    "train",
    "quickstart/digits_mlp_wide75_rigl",
    "--set",
    "training.epochs=null",
    "--set",
    "training.steps=40",
    "--set",
    "evaluation.every=2",
    "--set",
    "checkpoint.every=40",
    "--json",
)
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.is_char_device(), reason="needs /dev/full")


def shell(script: str, *words: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`script` of bash, in which "$@" is the command."""
    command = ["bash", "-c", script, "bash", sys.executable, "-m", "sparseift_cli", *words]
    path = {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env={**os.environ, **path})


@needs_full
@pytest.mark.parametrize("words", [("flops", "resnet18"), ("flops", "resnet18", "--json"), ("--version",)])
def test_a_full_disk_under_stdout_is_no_gate(words: tuple[str, ...]) -> None:
    """Exit code 1 belongs to gates; a result that cannot be written is an error of two lines."""
    done = shell('"$@" > /dev/full', *words)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[0] == "sparseift: cannot write the result: No space left on device"
    assert len(done.stderr.splitlines()) == 2


TALKATIVE = """
print("imported")
from dataclasses import dataclass
import torch
from torch import nn
from sparseift_cli.base.metrics import Metric, percent
from sparseift_cli.data.images import ImageSet
from sparseift_cli.data.source import DataSource
from sparseift_cli.plan.distributions import Uniform
from sparseift_cli.sparsity.algorithms import RigL

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        print("built")
        self.net = nn.Sequential(nn.Flatten(), *(nn.Linear(16, 16) for _ in range(4)))
    def forward(self, x):
        print("forward")
        return self.net(x)

def net():
    return Net(), torch.zeros(1, 1, 4, 4)

def read(split):
    print("read")
    return torch.zeros(16, 1, 4, 4, dtype=torch.uint8), torch.arange(16)

def opened(root=None):
    print("opened")
    return ImageSet("dots", read, split_names=("train", "test"), shape=(1, 4, 4), classes=16, source="made up", mean=(0.5,), std=(1,))

DOTS = DataSource(name="dots", kind="image", open=opened, image=(1, 4, 4), classes=16, samples=16, splits=("train", "test"))

@dataclass(frozen=True, kw_only=True)
class Moving(RigL):
    def grow_scores(self, at):
        print("scored")
        return super().grow_scores(at)

def hits(logits, targets):
    print("measured")
    return (logits.argmax(-1) == targets).sum()

HITS = Metric("hits", "hits (%)", "points", lower_is_better=False, total=hits, value=percent)

class Even(Uniform):
    def densities(self, layers, macs):
        print("distributed")
        return super().densities(layers, macs)
"""
ITS_RECIPE = """
model: talkative:net
data: talkative:DOTS
transform: {member: wide, match: model, distribution: "talkative:Even"}
sparsity: 0.5
algorithm: {name: "talkative:Moving", delta_t: 1}
training: {steps: 3, batch_size: 8, device: cpu}
evaluation: {metrics: [loss, "talkative:HITS"]}
checkpoint: {best: loss}
"""


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        (
            ("flops", "talkative:net", "-s", "0.5", "--match", "model", "--distribution", "talkative:Even"),
            "built forward distributed",
        ),
        (("inspect", "talkative:net"), "built forward"),
        (("transform", "talkative:net", "-s", "0.5", "-o", "made"), "built forward"),
        (("train", "own.yaml"), "built forward opened read scored measured distributed"),
        (("recipe", "show", "own.yaml"), ""),
    ],
)
def test_what_other_peoples_code_prints_is_no_result(
    sparseift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], printed: str
) -> None:
    """stdout is one JSON document, whatever a model, algorithm, data set, metric or distribution prints."""
    (tmp_path / "talkative.py").write_text(TALKATIVE)
    (tmp_path / "own.yaml").write_text(ITS_RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "talkative", raising=False)
    code, out, err = sparseift(*words, "--json")
    assert code == 0, err
    json.loads(out)
    for word in ("imported", *printed.split()):
        assert f"{word}\n" in err
    code, out, _ = sparseift(*words[:1], "--help")
    assert code == 0 and "Usage" in out  # help is a result


@needs_full
def test_an_error_keeps_its_exit_code_where_stderr_is_full() -> None:
    assert shell('"$@" 2> /dev/full', "flops", "resnet18", "-s", "0.9", "--max-flops-ratio", "1").returncode == 1


def test_closed_streams() -> None:
    assert shell('"$@" >&-', "flops", "resnet18", "--json").returncode == 0
    done = shell('"$@" 2>&-', "flops", "resnet81")
    assert done.returncode == 2 and not done.stdout  # what stderr cannot take is no result


@pytest.mark.parametrize("sparsity", ["0.9", "0.5,0.9"])
def test_a_gate_sets_the_exit_code_where_the_reader_has_gone(sparsity: str) -> None:
    words = ("flops", "resnet18", "-s", sparsity, "--max-flops-ratio", "1.0")
    done = shell('"$@" | head -c 0; exit ${PIPESTATUS[0]}', *words)
    assert done.returncode == 1 and "above 1.0" in done.stderr


def test_a_comparison_bit_for_bit_sets_the_exit_code_where_the_reader_has_gone(tmp_path: Path) -> None:
    a, b = make_run(tmp_path), make_run(tmp_path, seed=1, values=(50.0, 71.0))
    done = shell('"$@" | head -c 0; exit ${PIPESTATUS[0]}', "report", "diff", str(a), str(b), "--exact")
    assert done.returncode == 1 and "not equal bit for bit" in done.stderr


def test_output_into_a_pipe_leaves_it_there(sparseift, tmp_path: Path) -> None:
    """A device or a pipe is written to. Renamed over, /dev/null would be gone for the whole machine."""
    pipe, read = tmp_path / "pipe", list[str]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    assert sparseift("flops", "resnet18", "--json", "-o", str(pipe)) == (0, "", "")
    assert pipe.is_fifo()
    reader.join(10)
    assert json.loads(read[0])["model"] == "resnet18"


def test_output_through_a_link_leaves_it_there(sparseift, tmp_path: Path) -> None:
    link, target = tmp_path / "latest.json", tmp_path / "audit.json"
    link.symlink_to(target.name)
    for _ in range(2):  # a link to nothing yet, and to a file
        assert sparseift("flops", "resnet18", "--json", "-o", str(link)) == (0, "", "")
        assert link.is_symlink() and json.loads(target.read_text())["model"] == "resnet18"
    assert sorted(tmp_path.iterdir()) == [target, link]


@needs_full
def test_a_full_disk_under_the_log_loses_no_run(tmp_path: Path) -> None:
    done = shell('"$@" 2> /dev/full', *TRAIN, "--runs", str(tmp_path))
    assert done.returncode == 0 and [r["steps"] for r in json.loads(done.stdout)["runs"]] == [40]


def test_a_run_whose_log_has_no_reader_is_saved(tmp_path: Path) -> None:
    """`train 2>&1 | head -1`: it was a traceback into nowhere, exit code 1, and what came after the last save was lost."""
    done = shell('"$@" 2>&1 > /dev/null | head -n 1; exit ${PIPESTATUS[0]}', *TRAIN, "--runs", str(tmp_path))
    assert done.returncode == 143, done.stdout
    (run,) = tmp_path.glob("*/*/")
    assert list(run.glob("checkpoints/step-*"))


def test_a_crash_in_native_code_says_where(tmp_path: Path) -> None:
    script = "import ctypes; from sparseift_cli.cli import app; app.app = lambda: ctypes.string_at(0); app.main()"
    done = shell(f'exec "$1" -c "{script}"', folder=tmp_path)
    assert done.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in done.stderr
    assert 'app.py", line' in done.stderr
