"""`evaluation.test`: a split that was not looked at in training is measured once, at the end of the run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from sparseift_cli.errors import UsageError
from sparseift_cli.recipe.load import load
from sparseift_cli.report.collect import collect
from sparseift_cli.report.frame import groups_frame, records, runs_frame
from sparseift_cli.runs.directory import RunDirectory
from sparseift_cli.runs.metrics import read_metrics
from sparseift_cli.train.run import run_seeds
from tests.helpers.nets import letters

HERE = Path(__file__).resolve().parents[2]
SPLITS = {
    "train": "to be or not to be, that is the question\n" * 8,
    "valid": "or not\n" * 5,
    "test": "the quest is to be\n",
}
RECIPE = """
model: "tests.helpers.nets:letters"
data: {{name: {data}}}
optimizer: {{name: sgd, lr: 0.5}}
training: {{steps: 6, batch_size: 8, device: cpu}}
evaluation: {{every: 3, metrics: [loss, perplexity_per_word], test: true}}
"""


def trained(tmp_path: Path, recipe: str) -> Path:
    (tmp_path / "recipe.yaml").write_text(recipe)
    (summary,) = run_seeds(
        load(tmp_path / "recipe.yaml"), [0], tmp_path / "runs", None, lambda *_: None, lambda *_: None
    )
    return Path(summary["path"])


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(HERE)  # `tests.helpers.nets` is found from here
    (tmp_path / "texts").mkdir()
    for name, text in SPLITS.items():
        (tmp_path / "texts" / f"{name}.txt").write_text(text)
    return f"text, root: {tmp_path / 'texts'}"


def test_the_last_line_has_the_test_split(tmp_path: Path, texts: str) -> None:
    path = trained(tmp_path, RECIPE.format(data=texts))
    first, last = read_metrics(path / "metrics.jsonl")
    assert not [name for name in first if name.startswith("test_")]
    newest = RunDirectory.open(path).checkpoints.newest()
    assert newest is not None
    model, _ = letters()
    model.load_state_dict({k.removeprefix("model/"): v for k, v in newest.tensors.items() if k.startswith("model/")})
    for prefix, split in (("", "valid"), ("test_", "test")):
        text = torch.tensor(list(SPLITS[split].encode()))
        loss = float(nn.functional.cross_entropy(model(text[:-1]), text[1:]).detach())
        assert last[f"{prefix}loss"] == pytest.approx(loss, rel=1e-5)
    assert last["test_perplexity_per_word"] == pytest.approx(
        math.exp(last["test_loss"] * 18 / 6)
    )  # bytes after the first; words, line
    (row,) = records(groups_frame(runs_frame(collect([path]).runs)))
    assert (row["mean"], row["test_loss"]) == (last["loss"], last["test_loss"])


def test_a_test_split_that_is_watched_is_none(tmp_path: Path) -> None:
    recipe = RECIPE.format(data="digits").replace("tests.helpers.nets:letters", "digits_mlp")
    with pytest.raises(
        UsageError, match=r"recipe.yaml:6:\d+: evaluation.test: digits has no test split beside the one"
    ):
        trained(tmp_path, recipe.replace("perplexity_per_word", "top1"))


def test_text_without_a_test_split_has_none(tmp_path: Path, texts: str) -> None:
    (tmp_path / "texts" / "test.txt").unlink()
    with pytest.raises(UsageError, match="the test split of text does not exist"):
        trained(tmp_path, RECIPE.format(data=texts))
