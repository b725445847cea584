"""`data.validation` of image sets: a part of the training images, drawn once, and the test split left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseift_cli.data import open_data
from sparseift_cli.data.images import ImageSet, hold_out
from sparseift_cli.errors import UsageError
from sparseift_cli.recipe.load import load, run_steps
from sparseift_cli.runs.metrics import read_metrics
from sparseift_cli.train.prepare import prepare
from sparseift_cli.train.processes import Processes
from sparseift_cli.train.run import run_seeds

RECIPE = """
model: digits_mlp
data: {{name: digits, validation: 0.2}}
training: {{{training}, device: cpu}}
evaluation: {{metrics: [top1], test: true}}
"""


@pytest.fixture
def digits() -> ImageSet:
    made = open_data("digits")
    assert isinstance(made, ImageSet)
    return made


def sorted_rows(*parts: tuple[torch.Tensor, torch.Tensor]) -> list[tuple[int, ...]]:
    return sorted(
        (int(y), *x.flatten().tolist()) for images, labels in parts for x, y in zip(images, labels, strict=True)
    )


def test_the_two_parts_are_the_training_images(digits: ImageSet) -> None:
    split = hold_out(digits, 300)
    assert split.split_names == ("train", "valid", "test")
    assert split.held_out == "valid"
    assert split.splits == {"train": 1142, "valid": 300, "test": 355}
    assert sorted_rows(split.images("train"), split.images("valid")) == sorted_rows(digits.images("train"))
    assert torch.equal(split.images("test")[0], digits.images("test")[0])
    assert split.sha256 != digits.sha256
    again = hold_out(digits, 300)
    assert torch.equal(again.images("valid")[0], split.images("valid")[0])
    shares = split.images("valid")[1].bincount(minlength=10) / digits.images("train")[1].bincount(minlength=10)
    assert shares.min() > 0.1 and shares.max() < 0.35  # no class is left out: it is a draw, not an end of the file


@pytest.mark.parametrize("count", [0, 1442])
def test_what_cannot_be_held_out(digits: ImageSet, count: int) -> None:
    with pytest.raises(UsageError, match=f"{count} of 1442 training images of digits cannot be held out"):
        hold_out(digits, count)
    with pytest.raises(UsageError, match="has a validation split of its own"):
        hold_out(hold_out(digits, 10), 10)


def test_a_recipe_watches_it_and_tests_once(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(training="epochs: 2, batch_size: 100"))
    recipe = load(path)
    assert run_steps(recipe.spec) == 22  # 1,442 - 288 images are 11 batches
    run = prepare(recipe, 0, Processes(torch.device("cpu")))
    assert (run.steps, run.held_out.split, run.test and run.test.split) == (22, "valid", "test")
    (summary,) = run_seeds(recipe, [0], tmp_path / "runs", None, lambda *_: None, lambda *_: None)
    *_, last = read_metrics(Path(summary["path"]) / "metrics.jsonl")
    assert last["top1"] * 2.88 == pytest.approx(round(last["top1"] * 2.88))  # of 288 images
    assert last["test_top1"] * 3.55 == pytest.approx(round(last["test_top1"] * 3.55))


def test_the_command_shows_it_and_a_report_judges_by_it(sparseift: Any, tmp_path: Path) -> None:
    """Runs with and without the measurement are one group: it changes no result."""
    path, runs = tmp_path / "recipe.yaml", str(tmp_path / "runs")
    path.write_text(RECIPE.format(training="epochs: 1, batch_size: 100"))
    code, out, err = sparseift("train", str(path), "--seeds", "0..1", "--runs", runs)
    assert code == 0 and "test top1" in out and "test_top1: " in out and " test_top1 " in err
    code, out, _ = sparseift("train", str(path), "--seeds", "2", "--runs", runs, "--set", "evaluation.test=false")
    assert code == 0 and "test" not in out.replace(str(tmp_path), "")
    code, out, _ = sparseift("report", runs, "--json")
    (group,) = json.loads(out)["groups"]
    assert (group["metric"], group["n"]) == ("top1", 3)
    code, out, _ = sparseift("report", runs, "--metric", "test_top1", "--json")
    (group,) = json.loads(out)["groups"]
    assert (group["metric"], group["n"], group["mean"]) == ("test_top1", 2, group["test_top1"])
    code, _, err = sparseift("report", runs, "--metric", "test_tpo1")
    assert code == 2 and "did you mean 'test_top1'?" in err
