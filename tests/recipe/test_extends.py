"""`extends:` in a recipe: whose values win, where errors point, what cannot be extended, and copies that need no other file."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparseift_cli.errors import UsageError
from sparseift_cli.recipe.catalog import copy, shipped
from sparseift_cli.recipe.load import Recipe, load
from sparseift_cli.recipe.write import resolved_yaml

BASE = """\
model: resnet18_cifar
data: cifar100
optimizer: {name: sgd, lr: 0.1, momentum: 0.8, nesterov: true}
schedule: {name: multistep, milestones: [60, 120, 160], gamma: 0.2}
training: {epochs: 200, batch_size: 64}
"""


def made(folder: Path, text: str, *options: str, base: str = BASE) -> Recipe:
    (folder / "base.yaml").write_text(base)
    (folder / "mine.yaml").write_text(text)
    return load(folder / "mine.yaml", options)


def test_values_of_the_recipe_win_key_by_key(tmp_path: Path) -> None:
    recipe = made(tmp_path, "extends: base\noptimizer: {lr: 0.5}\nschedule: {milestones: [10]}\nsparsity: 0.75\n")
    assert recipe.spec.optimizer.lr == 0.5
    assert recipe.spec.optimizer.momentum == 0.8
    assert recipe.spec.schedule.milestones == (10.0,) and recipe.spec.schedule.gamma == 0.2
    assert recipe.spec.training.batch_size == 64
    assert recipe.transform["sparsity"] == "0.75" and recipe.transform["member"] in ("wide", "sparse_wide")


def test_origins_name_the_file_that_has_the_value(tmp_path: Path) -> None:
    origins = made(tmp_path, "extends: base\noptimizer: {lr: 0.5}\n", "training.epochs=3").origins
    assert origins["optimizer.lr"] == "mine.yaml:2"
    assert origins["optimizer.momentum"] == "base.yaml:3"
    assert origins["training.epochs"] == "--set training.epochs=3"


def test_a_name_keeps_only_the_options_that_it_has(tmp_path: Path) -> None:
    spec = made(tmp_path, "extends: base\noptimizer: adamw\nschedule: cosine\n").spec
    assert spec.optimizer.name == "adamw" and spec.optimizer.lr == 0.1
    assert spec.schedule.name == "cosine"
    spec = made(tmp_path, "extends: base\ntraining: {steps: 100}\n").spec
    assert (spec.training.steps, spec.training.epochs, spec.training.batch_size) == (100, None, 64)


def test_null_removes_a_section(tmp_path: Path) -> None:
    base = BASE + "transform: wide\nsparsity: 0.9\nalgorithm: rigl\n"
    assert made(tmp_path, "extends: base\n", base=base).transform["sparsity"] == "0.9"
    assert made(tmp_path, "extends: base\nsparsity: 0.5\n", base=base).transform["sparsity"] == "0.5"
    assert not made(tmp_path, "extends: base\ntransform: null\nalgorithm: dense\n", base=base).transform


def test_a_chain_of_recipes_and_a_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "middle.yaml").write_text("extends: resnet18_cifar100/wide75_rigl\ntraining: {epochs: 7}\n")
    recipe = made(tmp_path, "extends: middle.yaml\nsparsity: 0.5\n")
    assert recipe.spec.training.epochs == 7 and recipe.spec.model.name == "resnet18_cifar"
    assert recipe.transform["sparsity"] == "0.5" and recipe.transform["width_multiple"] == 8
    assert recipe.origins["model.name"].startswith("dense.yaml:")


@pytest.mark.parametrize(
    ("text", "base", "message"),
    [
        ("extends: base\n", BASE.replace("lr: 0.1", "lr: fast"), "base.yaml:3:28: optimizer.lr"),
        ("extends: base\n", BASE.replace("momentum", "momentom"), "base.yaml:3:33: unknown key 'momentom'"),
        ("extends: base\noptimizer: {lr: -1}\n", BASE, "mine.yaml:2:17: optimizer.lr: must be above 0"),
        ("sparsity: 0.5\nextends: nothing\n", BASE, "mine.yaml:2:1: extends: there is no recipe 'nothing'"),
        ("extends: bases\n", BASE, "did you mean 'base'?"),
        ("extends: [base]\n", BASE, "mine.yaml:1:1: extends: expected the name of one recipe, not ['base']"),
        ("extends: base\n", "- a list\n", "base.yaml:1:1: a recipe is a mapping"),
        ("extends: base\n", "extends: mine\n", "base.yaml:1:1: extends: a recipe cannot extend itself"),
        ("extends: mine\n", BASE, "mine.yaml:1:1: extends: a recipe cannot extend itself"),
    ],
)
def test_problems_point_at_the_file_and_line(tmp_path: Path, text: str, base: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        made(tmp_path, text, base=base)
    assert message in caught.value.message


def test_problems_of_both_files_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        made(tmp_path, "extends: base\ncheckpoint: {keep: 0}\n", base=BASE.replace("epochs: 200", "epochs: 0"))
    own, base = caught.value.message.splitlines()[1:]
    assert "mine.yaml:2:20: checkpoint.keep" in own and "base.yaml:5:20: training.epochs" in base


def test_a_copy_needs_no_other_file(tmp_path: Path) -> None:
    for entry in shipped():
        target = copy(entry.name, tmp_path / f"{entry.path.parent.name}_{entry.path.name}")
        assert "extends:" not in target.read_text("utf-8")
        copied, original = load(target), load(entry.path)
        assert resolved_yaml(copied.spec) == resolved_yaml(original.spec)
        assert (copied.transform, copied.training) == (original.transform, original.training)
        assert target.read_text("utf-8").count("# ") >= 2  # what it is stays in it
