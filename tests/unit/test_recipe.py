"""Recipes: every problem with its place, all at once; a recipe and the same options say the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparseift_cli.errors import UsageError
from sparseift_cli.locations import recipes_dir
from sparseift_cli.recipe.load import load


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_all_problems_at_once_with_their_places(tmp_path: Path) -> None:
    path = write(
        tmp_path, "model: resnet18\ntransfrom: wide\nsparsity: 0.5\nsparsity: 0.9\nalgorithm: {name: rigl, delta: 3}\n"
    )
    with pytest.raises(UsageError) as caught:
        load(path)
    message = caught.value.message
    assert f"{path}:2:1: unknown key 'transfrom', did you mean 'transform'?" in message
    assert f"{path}:4:1: key 'sparsity' appears twice, first on line 3" in message
    assert f"{path}:5:25: unknown key 'delta', did you mean 'delta_t'?" in message


@pytest.mark.parametrize(("text", "said"), [
    ("", "is empty"),
    ("- a\n- b\n", "a recipe is a mapping"),
    ("sparsity: 0.5\n", "names no model"),
    ("model: resnet18\nsparsity: 1.5\n", ":2:11: sparsity '1.5' is not a number"),
    ("model: resnet18\ntransform: wider\nsparsity: 0.5\n", "unknown transform 'wider'"),
    ("model: &a resnet18\ntransform: {member: wide}\nsparsity: *a\n", "sparsity 'resnet18'"),
    ("model: &a {name: resnet18}\nalgorithm: *a\n", "aliases are not allowed"),
    ("model: [\n", "not YAML"),
    ("model: " + "[" * 5000, "nested too deeply"),
    ("model: {name: {name: {name: 1}}}\nsparsity: [1]\n", "not a number"),
    ("model: resnet18\nalgorithm: {name: rigl, delta_t: 0}\n", "must be positive"),
    ("model: 7\n", "expected a name or a mapping"),
])  # fmt: skip
def test_what_is_wrong_is_said(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(write(tmp_path, text))
    assert said in caught.value.message


def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path) -> None:
    assert load(write(tmp_path, "model: resnet18\nsparsity: 7.5e-1\n")).transform["sparsity"] == "0.75"


@pytest.mark.parametrize("path", sorted(recipes_dir().rglob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_audit(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sparseift_cli.cli.app import app

    app(["flops", str(path), "--json"], standalone_mode=False)
    data = json.loads(capsys.readouterr().out)
    recipe = load(path)
    assert data["transform"]["sparsity"] == float(recipe.transform["sparsity"])
    assert data["training"]["algorithm"] == recipe.training["algorithm"]
