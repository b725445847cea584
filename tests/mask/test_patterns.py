"""Mask patterns as objects: how they are written, and one from outside that is counted, drawn, checked and trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparseift_cli as sparseift
from sparseift_cli.errors import CheckFailed, UsageError
from sparseift_cli.mask.layout import Layout
from sparseift_cli.mask.mask import make_mask
from sparseift_cli.mask.patterns import PATTERNS, UNSTRUCTURED, Block, NofM, has_pattern, parse_pattern, room
from sparseift_cli.plan.spec import TransformSpec
from sparseift_cli.sparsity.sparsifier import Sparsifier
from sparseift_cli.table.shape import Shape
from tests.helpers.outside_pattern import EvenColumns

MODULE = "tests.helpers.outside_pattern"
OUTSIDE = ["even", f"{MODULE}:EvenColumns", f"{MODULE}:EvenPairs"]
X = torch.zeros(2, 3, 8, 8)


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """`even` is registered; `package.module:Name` is looked for in the working folder."""
    monkeypatch.chdir(root)
    monkeypatch.setattr(PATTERNS, "_entries", dict(PATTERNS._entries))
    PATTERNS.register("even", EvenColumns())


def net() -> nn.Sequential:
    """Convolutions 0 and 2, a grouped one 4, a linear layer 8, and the output layer 10."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 24),
        nn.ReLU(),
        nn.Linear(24, 10),
    )


def example() -> tuple[nn.Module, torch.Tensor]:
    """`net` and one image, for recipes."""
    return net(), torch.zeros(1, 3, 8, 8)


# --- how they are written ---


def test_written_forms() -> None:
    assert parse_pattern("unstructured") is UNSTRUCTURED
    assert (parse_pattern("4x8"), parse_pattern("2:4")) == (Block(4, 8), NofM(2, 4))
    assert [p.name for p in map(parse_pattern, ("4x8", "2:4", "unstructured"))] == ["4x8", "2:4", "unstructured"]
    assert isinstance(parse_pattern("even"), EvenColumns) and isinstance(parse_pattern(OUTSIDE[1]), EvenColumns)


@pytest.mark.parametrize("text", ["5:4", "0:4", "0x4", "4x", "blocks", "n_of_m", "evn", "", "4:2:1", "2:four"])
def test_what_is_no_pattern(text: str) -> None:
    with pytest.raises(UsageError, match="unknown pattern") as refusal:
        parse_pattern(text)
    assert refusal.value.hint is not None and "N:M (2:4)" in refusal.value.hint and "even" in refusal.value.hint


def test_objects_that_are_no_pattern() -> None:
    with pytest.raises(UsageError, match="pathlib:Path is not a mask pattern: it is no MaskPattern"):
        parse_pattern("pathlib:Path")
    with pytest.raises(UsageError, match="cannot import"):
        TransformSpec(pattern="nowhere.at_all:It")


@pytest.mark.parametrize("pattern", ["unstructured", "4x8", "3x2", "2:4", "1:3", *OUTSIDE])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_plan_and_the_masks_count_the_same(pattern: str, groups: int) -> None:
    shape = Shape(inputs=10, outputs=12, taps=9, groups=groups)
    assert parse_pattern(pattern).room(shape) == room((12, 10 // groups, 3, 3), pattern, groups=groups)


# --- one from outside ---


@pytest.mark.parametrize("pattern", OUTSIDE)
@pytest.mark.parametrize("shape", [(6, 12), (8, 3, 3, 3)])
def test_it_is_drawn_at_random_and_by_score(pattern: str, shape: tuple[int, ...]) -> None:
    n, kind = 24, parse_pattern(pattern)
    layout = Layout(shape)
    scores = torch.rand(shape)
    for given in (None, scores):
        mask = make_mask(shape, n, generator=torch.Generator(), pattern=pattern, scores=given)
        assert int(mask.sum()) == n and has_pattern(mask, pattern)
        assert not mask.flatten(1)[:, 1::2].any() and mask.flatten(1).any(1).all()
    best = make_mask(shape, n, generator=torch.Generator(), pattern=pattern, scores=scores, connect=False)
    cells = kind.to_cells(layout, scores.flatten(1))
    chosen = kind.to_cells(layout, best.flatten(1).float()) > 0
    assert cells[chosen].min() > cells[~chosen].max()
    assert not has_pattern(torch.ones(shape, dtype=torch.bool), pattern)
    with pytest.raises(UsageError, match="has room for"):
        make_mask(shape, 2 * scores.numel(), generator=torch.Generator(), pattern=pattern)


@pytest.mark.parametrize("pattern", OUTSIDE)
@pytest.mark.parametrize("member", ["wide", "parallel", "factorized", "doped"])
def test_every_member_takes_it_and_is_measured_as_planned(pattern: str, member: str, tmp_path: Path) -> None:
    model, plan = sparseift.transform(net(), X, member=member, sparsity=0.75, match="model", pattern=pattern)
    masks = sparseift.masks(model)
    planned = sum(p.nnz for row in plan.layers for p in row.parts if row.status == "transformed" and not p.dense)
    assert sum(int(mask.sum()) for mask in masks.values()) == planned
    assert not any(mask.flatten(1)[:, 1::2].any() for mask in masks.values())
    ratio = sparseift.audit(model, X).forward_ratio  # raises where the masks are not those of the plan
    assert ratio is not None and 0.99 < ratio <= 1
    sparseift.save(model, tmp_path / "out")
    assert sparseift.load(tmp_path / "out", into=net()) is not None
    next(iter(masks.values())).fill_(True)
    with pytest.raises(CheckFailed, match=f"masks are no longer {pattern}"):
        sparseift.audit(model, X)


@pytest.mark.parametrize("algorithm", ["set", "rigl", "gmp", "granet"])
@pytest.mark.parametrize("pattern", OUTSIDE)
def test_masks_move_within_it(pattern: str, algorithm: str) -> None:
    torch.manual_seed(0)
    model, plan = sparseift.transform(net(), X, sparsity=0.75, pattern=pattern)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = Sparsifier(model, plan, optimizer, algorithm=algorithm, total_steps=12, delta_t=2)
    first = {name: mask.clone() for name, mask in sparsifier.masks().items()}
    for _ in range(12):
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()
        assert all(has_pattern(mask, pattern) for mask in sparsifier.masks().values())
    planned = {f"{row.layer.name}.weight": row.nnz for row in plan.layers if row.status == "transformed"}
    assert dict(sparsifier.nnz) == planned
    assert any(not torch.equal(first[name], mask) for name, mask in sparsifier.masks().items())


def test_one_that_is_for_static_masks_is_not_moved() -> None:
    model, plan = sparseift.transform(net(), X, sparsity=0.75, pattern=f"{MODULE}:StillColumns")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match="is StillColumns, which only static sparsity keeps"):
        Sparsifier(model, plan, optimizer, algorithm="rigl", total_steps=10)
    Sparsifier(model, plan, optimizer, algorithm="static")


RECIPE = """
model: {{name: "tests.mask.test_patterns:example", input: 3x8x8}}
data: synthetic-images
transform: {{match: model, pattern: "{pattern}"}}
sparsity: 0.75
algorithm: {algorithm}
training: {{steps: 6, batch_size: 8, device: cpu}}
evaluation: {{every: 6, limit: 16}}
"""


@pytest.mark.parametrize("algorithm", ["static", "{name: rigl, delta_t: 2}", "{name: gmp, delta_t: 2}", "dense"])
@pytest.mark.parametrize("pattern", ["even", OUTSIDE[2]])
def test_a_recipe_trains_it_at_the_planned_flops(pattern: str, algorithm: str, sparseift: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text(RECIPE.format(pattern=pattern, algorithm=algorithm))
    code, _, err = sparseift("recipe", "validate", str(recipe), "--plan")
    assert code == 0, err
    code, _, err = sparseift("train", str(recipe), "--runs", str(tmp_path / "runs"))
    assert code == 0, err
    (path,) = (tmp_path / "runs").rglob("summary.json")
    flops = json.loads(path.read_text("utf-8"))["flops"]
    assert flops["spent"] == flops["audited"]
    assert json.loads((path.parent / "audit.json").read_text("utf-8"))["transform"]["pattern"] == pattern


def test_what_is_wrong_in_a_recipe_is_said_with_its_place(sparseift: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "own.yaml"
    for pattern, message in (
        ("5:4", "own.yaml:4:36: transform.pattern: unknown pattern '5:4'"),
        ("evn", "unknown pattern 'evn'"),
        ("two four", "is not of the form it should have"),
        (f"{MODULE}:Nothing", f"module {MODULE} has no 'Nothing'"),
    ):
        recipe.write_text(RECIPE.format(pattern=pattern, algorithm="static"))
        code, _, err = sparseift("recipe", "validate", str(recipe))
        assert code == 2 and message in " ".join(err.split()), err


def test_the_command_line_takes_it(sparseift: Any) -> None:
    code, out, err = sparseift("flops", "resnet18_cifar", "-s", "0.75", "--pattern", OUTSIDE[2], "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["transform"]["pattern"] == OUTSIDE[2]
    assert all(row["nnz"] % 2 == 0 for row in found["layers"] if row["status"] == "transformed")
