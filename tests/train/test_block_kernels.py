"""Recipes with training.kernels: the same run with blocks alone and with zeros, on either side of a checkpoint."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseift_cli.errors import InterruptedRun
from sparseift_cli.kernels.storage import to_dense_state
from sparseift_cli.recipe.load import load
from sparseift_cli.runs.directory import RunDirectory
from sparseift_cli.train.run import run_jobs
from tests.helpers.two_processes import on_two_processes

RECIPE = """
model: {{name: bytes_gpt, seq: 16}}
data: {{name: stdlib, limit: 64}}
transform: {{member: wide, match: model, pattern: 32x32}}
sparsity: 0.75
algorithm: {algorithm}
optimizer: {{name: adamw, lr: 1.0e-3, weight_decay: 0.1}}
training: {{steps: 8, batch_size: 4, accumulate: 2, clip: 1.0, device: cpu, kernels: {kernels}}}
evaluation: {{every: 4, limit: 4}}
checkpoint: {{every: 100}}
"""
ALGORITHMS = {
    "static": "static",
    "set": "{name: set, delta_t: 2}",
    "rigl": "{name: rigl, delta_t: 2}",
    "snfs": "{name: snfs, delta_t: 2}",
    "gmp": "gmp",
}


def write(folder: Path, algorithm: str, kernels: str) -> Path:
    path = folder / f"{algorithm}_{kernels}.yaml"
    path.write_text(RECIPE.format(algorithm=ALGORITHMS[algorithm], kernels=kernels))
    return path


def quiet(*_: Any, **__: Any) -> None:
    """Take a report or note and print nothing."""


def train(recipe: Path, root: Path, resume: str | None = None, **how: Any) -> dict[str, Any]:
    (summary,) = run_jobs([(load(recipe, how.pop("sets", [])), 0)], root, resume, quiet, how.pop("note", quiet), **how)
    return summary


def tensors_of(path: str) -> dict[str, Tensor]:
    newest = RunDirectory.open(Path(path)).checkpoints.newest()
    assert newest is not None
    return dict(newest.tensors)


def weights_of(path: str) -> dict[str, Tensor]:
    """The weights of the last checkpoint of a run, with their zeros."""
    saved = {n.removeprefix("model/"): t for n, t in tensors_of(path).items() if n.startswith("model/")}
    return to_dense_state(saved)


def stop_after(step: int) -> Callable[[int], None]:
    return lambda made: os.kill(os.getpid(), signal.SIGTERM) if made == step else None


def require_close(one: dict[str, Any], other: dict[str, Any]) -> None:
    """The same run but for rounding: every weight, and every number of the summary."""
    for (name, a), b in zip(weights_of(one["path"]).items(), weights_of(other["path"]).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)
    assert one["flops"] == other["flops"] or one["flops"]["spent"] == other["flops"]["spent"]
    for key in ("density", "itop_rate", "churn", "masks"):
        assert one["metrics"][key] == other["metrics"][key], key
    assert one["metrics"]["loss"] == pytest.approx(other["metrics"]["loss"], rel=1e-4)


@pytest.mark.parametrize("algorithm", ["static", "set", "rigl", "snfs"])
def test_a_run_on_blocks_is_the_run_with_zeros(algorithm: str, tmp_path: Path) -> None:
    blocks, zeros = (
        train(write(tmp_path, algorithm, kernels), tmp_path / kernels) for kernels in ("reference", "masked")
    )
    require_close(blocks, zeros)
    assert blocks["flops"]["executed"] == blocks["flops"]["spent"] < zeros["flops"]["executed"]
    stored, dense = tensors_of(blocks["path"]), tensors_of(zeros["path"])
    values = [n for n in stored if n.endswith(".values")]
    assert len(values) == 4 * 4
    assert not [n for n in stored if n.startswith("masks/") and stored[n].numel() == dense[n].numel()]
    sparse = sum(int(m.sum()) for n, m in dense.items() if n.startswith("masks/"))
    assert sum(stored[n].numel() for n in values) == sparse
    moments = [t.numel() for n, t in stored.items() if n.endswith("exp_avg") and t.dim() == 3]
    assert sum(moments) == sparse


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize(
    ("before", "after"), [("reference", "reference"), ("reference", "masked"), ("masked", "reference")]
)
def test_resuming_with_any_kernels(before: str, after: str, step: int, tmp_path: Path) -> None:
    whole = train(write(tmp_path, "rigl", before), tmp_path / "whole")
    recipe = write(tmp_path, "rigl", before)
    with pytest.raises(InterruptedRun):
        train(recipe, tmp_path / "runs", tick=stop_after(step))
    again = train(recipe, tmp_path / "runs", "latest", sets=[f"training.kernels={after}"])
    if before == after:
        want = tensors_of(whole["path"])
        assert all(torch.equal(t, want[n]) for n, t in tensors_of(again["path"]).items())
    require_close(again, whole)
    if before != after:  # a part of the steps multiplied by zeros
        most = whole["flops"]["executed"] if before == "masked" else float("inf")
        assert again["flops"]["spent"] < again["flops"]["executed"] < most


def test_what_begins_denser_trains_masked_and_says_so(tmp_path: Path) -> None:
    notes: list[str] = []
    done = train(write(tmp_path, "gmp", "reference"), tmp_path, note=lambda text, *_: notes.append(text))
    assert not [n for n in tensors_of(done["path"]) if n.endswith(".values")]
    facts = json.loads((Path(done["path"]) / "provenance.json").read_text())
    assert "gmp begins denser than the planned masks" in json.dumps(facts["sessions"][0]["kernels"])
    assert any("gmp begins denser than the planned masks" in text for text in notes)


def test_two_processes_move_the_same_blocks(tmp_path: Path) -> None:
    """The dense gradients by which RigL grows are averaged too: the run is that of one process."""
    alone = train(write(tmp_path, "rigl", "reference"), tmp_path / "one")
    together = on_two_processes(write(tmp_path, "rigl", "reference"), tmp_path / "two", forked=True)
    assert together["metrics"]["masks"] == alone["metrics"]["masks"]
    for (name, a), b in zip(weights_of(alone["path"]).items(), weights_of(together["path"]).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)
