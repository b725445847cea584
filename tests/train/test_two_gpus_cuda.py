"""Two GPUs: one run over both with NCCL, and two runs that get one each. Needs two."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseift_cli.recipe.load import load
from sparseift_cli.runs.directory import RunDirectory
from sparseift_cli.train.run import run_seeds
from tests.helpers.two_processes import on_two_processes

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

Write = Callable[..., Path]
SETS = ("training.device=auto", "training.deterministic=true", "training.compile=false", "training.cuda_graph=false")


def alone(recipe: Path, root: Path) -> list[dict[str, Any]]:
    return run_seeds(load(recipe, list(SETS)), [0, 1], root, None, lambda *_: None, lambda *_: None)


def words() -> list[str]:
    return [word for one in SETS for word in ("--set", one)]


def tensors_of(summary: dict[str, Any]) -> dict[str, Tensor]:
    newest = RunDirectory.open(Path(summary["path"])).checkpoints.newest()
    assert newest is not None
    return dict(newest.tensors)


def test_one_run_over_two_gpus_computes_what_one_gpu_does(write_recipe: Write, tmp_path: Path) -> None:
    recipe = write_recipe("rigl", net="mlp", save=7)
    before = alone(recipe, tmp_path / "one")[0]
    together = on_two_processes(recipe, tmp_path / "two", *words())
    one, two = tensors_of(before), tensors_of(together)
    for name, tensor in one.items():
        if name.startswith("masks/"):
            assert torch.equal(two[name], tensor), name
        elif name.startswith("model/"):
            torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-5 * float(tensor.abs().max()))
    assert together["flops"] == before["flops"]
    session = json.loads((Path(together["path"]) / "provenance.json").read_text())["sessions"][0]
    assert (session["device"], session["processes"]) == ("cuda:0", 2)
    copy = tmp_path / "copy" / Path(together["path"]).name
    shutil.copytree(together["path"], copy)
    (copy / "summary.json").unlink()
    shutil.rmtree(copy / "checkpoints" / "step-00000012")
    resumed = tensors_of(on_two_processes(recipe, tmp_path / "two", *words(), "--resume", str(copy)))
    assert [n for n in two if not torch.equal(resumed[n], two[n])] == []


def test_runs_beside_each_other_get_a_gpu_each(write_recipe: Write, tmp_path: Path) -> None:
    recipe = write_recipe("rigl")
    in_turn = alone(recipe, tmp_path / "turn")
    command = [
        sys.executable,
        "-m",
        "sparseift_cli",
        "train",
        str(recipe),
        "--runs",
        str(tmp_path / "once"),
        *words(),
        "--seeds",
        "0..1",
        "--parallel",
        "2",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    beside = json.loads(done.stdout)["runs"]
    sessions = [json.loads((Path(r["path"]) / "provenance.json").read_text())["sessions"][0] for r in beside]
    assert {s["device"] for s in sessions} == {"cuda:0", "cuda:1"} and [s["at_once"] for s in sessions] == [1, 1]
    for one, other in zip(in_turn, beside, strict=True):
        before, after = tensors_of(one), tensors_of(other)
        assert [n for n, t in before.items() if not torch.equal(t, after[n])] == []
