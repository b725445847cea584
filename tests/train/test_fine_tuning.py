"""A recipe that starts at a checkpoint: `model: CHECKPOINT` with `init: preserve`, dense or transformed; `transform RUN`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import sparseift_cli
from sparseift_cli.errors import UsageError
from sparseift_cli.models.request import Request
from sparseift_cli.models.source import build
from sparseift_cli.recipe.load import load
from sparseift_cli.train.prepare import prepare
from sparseift_cli.train.processes import Processes
from sparseift_cli.train.run import run_jobs

FINE_TUNED = """
model: {{name: {model}}}
data: {{name: digits}}
{more}
optimizer: {{name: sgd, lr: 1.0e-9}}
training: {{steps: 1, batch_size: 8, device: cpu}}
evaluation: {{limit: 8}}
"""
WIDE = "transform: wide\nsparsity: 0.75\ninit: {start: preserve, slack: 0}"
X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def quiet(*_: Any, **__: Any) -> None:
    """Take a report or note and print nothing."""


def prepared(folder: Path, model: str, more: str) -> Any:
    """The run of a recipe before its first step."""
    path = folder / "fine.yaml"
    path.write_text(FINE_TUNED.format(model=model, more=more))
    return prepare(load(path), 0, Processes(torch.device("cpu")))


@pytest.fixture
def dense(tmp_path: Path) -> torch.nn.Module:
    """A dense model whose weights are in `weights.pt`, under names that the zoo recognises."""
    torch.manual_seed(7)
    model = build(Request("digits_cnn"), device="cpu").model
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    return model


def test_a_recipe_starts_at_the_function_of_a_checkpoint(dense: torch.nn.Module, tmp_path: Path) -> None:
    """A dense recipe ignored its `init`: it drew new weights and said nothing."""
    file = str(tmp_path / "weights.pt")
    run = prepared(tmp_path, file, "init: preserve")
    assert torch.equal(run.model.eval()(X), dense(X)) and run.spec.model.name == "digits_cnn"
    wide = prepared(tmp_path, file, WIDE)
    torch.testing.assert_close(wide.model.eval()(X), dense(X), rtol=1e-4, atol=1e-5)
    named = prepared(tmp_path, "digits_cnn", f"init: {{start: preserve, checkpoint: {file}}}")
    assert torch.equal(named.model.eval()(X), dense(X))
    fresh = prepared(tmp_path, file, "init: fresh")
    assert fresh.spec.init.checkpoint is None and not torch.equal(fresh.model.eval()(X), dense(X))


def test_a_recipe_starts_at_a_run_and_a_run_is_transformed(tmp_path: Path, sparseift: Any) -> None:
    first = tmp_path / "first.yaml"
    first.write_text(FINE_TUNED.format(model="digits_cnn", more=""))
    (summary,) = run_jobs([(load(first), 0)], tmp_path / "runs", None, quiet, quiet)
    run, trained = summary["path"], sparseift_cli.load(summary["path"])
    assert torch.equal(prepared(tmp_path, run, "init: preserve").model.eval()(X), trained(X))
    wide = tmp_path / "wide.yaml"
    wide.write_text(FINE_TUNED.format(model=run, more=WIDE))
    (summary,) = run_jobs([(load(wide), 0)], tmp_path / "runs", None, quiet, quiet)
    torch.testing.assert_close(prepared(tmp_path, run, WIDE).model.eval()(X), trained(X), rtol=1e-4, atol=1e-5)
    before = sparseift_cli.load(summary["path"])(X)
    shutil.move(run, run + ".moved")
    assert torch.equal(sparseift_cli.load(summary["path"])(X), before)  # its start is not needed any more
    shutil.move(run + ".moved", run)
    hints = json.loads(sparseift("inspect", run, "--json")[1])["next"]
    assert any(hint.startswith("sparseift export") for hint in hints)
    words = ("-s", "0.75", "--summary", "-o", str(tmp_path / "out"))
    code, _, err = sparseift("transform", run, *words)
    assert code == 2 and "--init preserve" in err
    code, out, err = sparseift("transform", run, *words, "--init", "preserve", "--preserve-slack", "0", "--json")
    assert code == 0 and json.loads(out)["deviation"] < 1e-6, err
    torch.testing.assert_close(sparseift_cli.load(tmp_path / "out")(X), trained(X), rtol=1e-4, atol=1e-5)
    code, _, err = sparseift("transform", summary["path"], *words, "--init", "preserve")
    assert code == 2 and "transformed model already" in err
    code, _, err = sparseift("transform", "resnet20", *words, "--checkpoint", "last")
    assert code == 2 and "are for runs" in err
    with pytest.raises(UsageError, match="transformed model already"):
        prepared(tmp_path, summary["path"], WIDE)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("", "add `init: preserve`, or `init: fresh`"),
        ("init: {start: preserve, checkpoint: other.pt}", "is one already"),
    ],
)
def test_what_becomes_of_trained_weights_is_said(
    dense: torch.nn.Module, tmp_path: Path, more: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        prepared(tmp_path, str(tmp_path / "weights.pt"), more)


def test_a_checkpoint_of_a_model_of_ones_own_says_how_it_is_named(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.zeros(3, 3)}, tmp_path / "own.pt")
    with pytest.raises(UsageError, match="fits no model of the zoo") as raised:
        prepared(tmp_path, str(tmp_path / "own.pt"), "init: preserve")
    assert "checkpoint:" in raised.value.message
