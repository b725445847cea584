"""Distributions by name, by layer and from outside: what they give each layer, and that the budget is met or refused."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparseift_cli as sparseift
from sparseift_cli.errors import CheckFailed, UsageError
from sparseift_cli.plan.audit import Audit
from sparseift_cli.plan.distributions import DISTRIBUTIONS, PerLayer
from sparseift_cli.plan.spec import TrainingSpec, TransformSpec
from tests.helpers.outside_distribution import Front

NAMED = "tests.helpers.outside_distribution:Front"
X = torch.zeros(2, 3, 8, 8)


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Names that a test registers are its own; `package.module:Name` is looked for in the working folder."""
    monkeypatch.chdir(root)
    monkeypatch.setattr(DISTRIBUTIONS, "_entries", dict(DISTRIBUTIONS._entries))


def net() -> nn.Sequential:
    """Convolutions 0, 2, 4, 6 (8, 16, 16 and 24 channels), and the output layer 10."""
    widths = [8, 16, 16, 24]
    convolutions = [nn.Conv2d(a, b, 3, padding=1) for a, b in zip([3, *widths], widths, strict=False)]
    body = [layer for conv in convolutions for layer in (conv, nn.ReLU())]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5))


def counted(**options: Any) -> Audit:
    return sparseift.flops(net(), X, **{"sparsity": 0.75, "match": "model", **options})


def densities(result: Audit) -> dict[str, Fraction]:
    assert result.plan is not None
    return {row.layer.name: row.density for row in result.plan.layers if row.status == "transformed"}


# --- by layer ---


@pytest.mark.parametrize("match", ["model", "train"])
@pytest.mark.parametrize("member", ["wide", "parallel", "factorized"])
def test_given_layers_keep_their_sparsity_and_the_others_meet_the_budget(member: str, match: str) -> None:
    training = TrainingSpec(algorithm="rigl")
    result = counted(member=member, match=match, distribution={"[2]": 0.9, "4": "0.6"}, training=training)
    found = densities(result)
    rows = {row.layer.name: row for row in result.plan.layers}
    assert rows["2"].nnz == rows["2"].weights // 10 and rows["4"].nnz == rows["4"].weights * 4 // 10
    ratio = result.forward_ratio if match == "model" else result.training_ratio
    assert ratio is not None and Fraction(999, 1000) < ratio <= 1
    assert found["6"] != densities(counted(member=member, match=match, training=training))["6"]


def test_without_a_match_they_are_taken_as_they_are() -> None:
    found = densities(counted(match="off", distribution={"2": 0.5, "*": 0.875}))
    widened = counted(match="off").plan.layers[1]
    assert found["2"] == Fraction(widened.weights // 2, widened.weights)
    assert found["4"] == found["6"] == Fraction(1, 8)  # the first glob that matches decides


def test_the_others_have_the_sparsity_of_the_transform() -> None:
    result = densities(counted(match="off", distribution={"2": 0}))
    assert result == {"2": 1, "4": Fraction(1, 4), "6": Fraction(1, 4)}


def test_a_control_takes_them_too() -> None:
    result = densities(counted(match="off", scope="none", distribution={"4": 0.5}))
    assert result == {"2": Fraction(1, 4), "4": Fraction(1, 2), "6": Fraction(1, 4)}


def test_what_was_planned_is_measured_and_read_back(tmp_path: Path) -> None:
    model, plan = sparseift.transform(net(), X, sparsity=0.75, match="model", distribution={"2": 0.5, "6": 0.95})
    masks = sparseift.masks(model)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {
        f"{row.layer.name}.weight": row.nnz for row in plan.layers if row.status == "transformed"
    }
    assert sparseift.audit(model, X).forward_ratio == counted(distribution={"2": 0.5, "6": 0.95}).forward_ratio
    sparseift.save(model, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "plan.json").read_text("utf-8"))
    assert written["spec"]["distribution"] == {"2": 0.5, "6": 0.95}
    assert TransformSpec.from_json(written["spec"]) == plan.spec and hash(plan.spec)
    assert sparseift.load(tmp_path / "out", into=net()) is not None
    assert json.loads((tmp_path / "out" / "audit.json").read_text("utf-8"))["transform"]["distribution"] == {
        "2": 0.5,
        "6": 0.95,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distribution": {"2": 0, "4": 0, "6": 0}, "match": "model"}, r"fixes every transformed layer, .* 3\.\d+x"),
        ({"distribution": {"2": 0.9, "4": 0.9, "6": 0.9}, "match": "train"}, r"training FLOPs: .* 0\.\d+x"),
        ({"distribution": {"6": 0.99, "4": 0.99}, "match": "model"}, r"other transformed layer dense .* 0\.\d+x"),
        ({"distribution": {"6": 0, "4": 0}, "match": "model"}, r"by layer \(6 0, 4 0\) already cost .* 3\.\d+x"),
        ({"distribution": {"6": 0, "4": 0}, "match": "train"}, r"in the other transformed layers a step already costs"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused_with_numbers(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckFailed, match=message):
        counted(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distribution": {"2": 0.5}, "match": "layer"}, "cannot match each layer"),
        ({"distribution": {"layer9": 0.5}}, "'layer9' matches no transformed layer"),
        ({"distribution": {"0": 0.5}}, "'0' matches no transformed layer"),
        ({"distribution": {"2": 1}}, "gives '2' the sparsity 1, which is not a number in"),
        ({"distribution": {"2": "half"}}, "not a number in"),
        ({"distribution": {"2": True}}, "not a number in"),
        ({"distribution": {}}, "names no layer"),
        ({"distribution": 0.5}, "neither a name nor a mapping"),
        ({"distribution": "erdos"}, "unknown distribution 'erdos'"),
        ({"distribution": "pathlib:Path"}, "is not a distribution: it is no Distribution"),
        ({"distribution": {"2": 0.5}, "match": "off", "sparsity": 0.5, "pattern": "2:4"}, "fixes every density"),
        ({"distribution": NAMED.replace("Front", "Broken")}, "needs one density for each layer"),
    ],
)
def test_what_is_wrong_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        counted(**options)


# --- Erdos-Renyi over layers of several parts ---


@pytest.mark.parametrize("distribution", ["er", "erk"])
@pytest.mark.parametrize("model", ["resnet18", "mobilenet_v2", "gpt3_small"])
def test_large_layers_whose_dense_factors_cost_more_than_is_theirs(model: str, distribution: str) -> None:
    """Sparse Doped keeps U and V dense; where a layer's part of the budget is less, the other layers get less."""
    ratio = sparseift.flops(
        model, sparsity=0.75, member="doped", match="model", distribution=distribution
    ).forward_ratio
    assert ratio is not None and Fraction(999, 1000) < ratio <= 1


@pytest.mark.parametrize("distribution", ["er", "erk"])
def test_layers_of_two_unlike_factors_meet_the_budget(distribution: str) -> None:
    """U and V are of other sizes: rounding a layer's cost to a multiple of V's made the model exceed its budget."""
    ratio = counted(member="factorized", distribution=distribution).forward_ratio
    assert ratio is not None and Fraction(999, 1000) < ratio <= 1


# --- from outside ---


@pytest.mark.parametrize("name", ["front", NAMED])
def test_one_from_outside_is_planned_drawn_and_trained(name: str, sparseift: Any, tmp_path: Path) -> None:
    DISTRIBUTIONS.register("front", Front())
    code, out, err = sparseift(
        "flops", "resnet18_cifar", "-s", "0.75", "--match", "model", "--distribution", name, "--json"
    )
    assert code == 0, err
    document = json.loads(out)
    assert document["transform"]["distribution"] == name
    assert 0.9999 < document["totals"]["ratio"]["forward"] <= 1
    found = [row["density"] for row in document["layers"] if row["status"] == "transformed"]
    assert found[1] > found[8] > found[-1]
    recipe = tmp_path / "own.yaml"
    recipe.write_text(RECIPE.format(distribution=f'"{name}"'))
    _, audit = trained(recipe, sparseift, tmp_path)
    assert audit["transform"]["distribution"] == name


RECIPE = """
model: {{name: "tests.plan.test_distributions:small", input: 3x8x8}}
data: synthetic-images
transform: {{match: model, distribution: {distribution}}}
sparsity: 0.75
algorithm: {{name: rigl, delta_t: 1}}
training: {{steps: 4, batch_size: 8, device: cpu}}
evaluation: {{every: 4, limit: 16}}
"""


def small() -> tuple[nn.Module, torch.Tensor]:
    """`net` for the ten classes of the synthetic images."""
    return nn.Sequential(*list(net())[:-1], nn.Linear(24, 10)), torch.zeros(1, 3, 8, 8)


def trained(recipe: Path, sparseift: Any, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Validate and train a recipe; its run directory, and its audit, whose FLOPs are those that the run measured."""
    assert sparseift("recipe", "validate", str(recipe), "--plan")[0] == 0
    code, _, err = sparseift("train", str(recipe), "--runs", str(folder / "runs"))
    assert code == 0, err
    (path,) = (folder / "runs").rglob("audit.json")
    audit = json.loads(path.read_text("utf-8"))
    flops = json.loads((path.parent / "metrics.jsonl").read_text("utf-8").splitlines()[-1])["flops"]
    # 4 steps of 8 images; rigl's dense gradients at updates are in it
    assert flops == pytest.approx(4 * 8 * audit["totals"]["transformed"]["training_flops"], rel=1e-9)
    return path.parent, audit


def test_a_recipe_gives_layers_their_sparsity(sparseift: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text(RECIPE.format(distribution='{"[2]": 0.9, "4": 0.5}'))
    run, audit = trained(recipe, sparseift, tmp_path)
    assert audit["transform"]["distribution"] == {"[2]": 0.9, "4": 0.5}
    assert [round(row["density"], 2) for row in audit["layers"] if row["status"] == "transformed"][:2] == [0.1, 0.5]
    assert sparseift("recipe", "validate", str(run / "recipe.yaml"))[0] == 0
    code, out, err = sparseift("recipe", "show", str(recipe), "--set", "transform.distribution={'4': 0.25}")
    assert code == 0 and 'distribution: {"4": 0.25}' in out, err
    code, out, err = sparseift("report", str(tmp_path / "runs"))
    assert code == 0, err


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ('{"4": 1.5}', "own.yaml:4:41: transform.distribution: the distribution gives '4' the sparsity 1.5"),
        ("erdos", "unknown distribution 'erdos'"),
        ("[er]", "expected a name or a mapping"),
        ("{}", "names no layer"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_said_with_its_place(
    written: str, message: str, sparseift: Any, tmp_path: Path
) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text(RECIPE.format(distribution=written))
    code, _, err = sparseift("recipe", "validate", str(recipe))
    assert code == 2 and message in " ".join(err.split())


def test_every_distribution_says_what_it_is() -> None:
    assert list(DISTRIBUTIONS) == ["uniform", "er", "erk"]
    assert all(DISTRIBUTIONS.get(name).summary() for name in DISTRIBUTIONS)
    assert str(PerLayer.of({"2": 0.5, "fc*": "0.9"})) == "by layer (2 0.5, fc* 0.9)"
