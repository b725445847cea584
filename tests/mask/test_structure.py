"""Patterns that ask for structure: blocks after a random order of the channels, constant fan-in, constant fan-in and fan-out."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparseift_cli as sparseift
from sparseift_cli.errors import UsageError
from sparseift_cli.kernels.convert import use_kernels
from sparseift_cli.kernels.registry import square_block
from sparseift_cli.mask.attached import pattern_of
from sparseift_cli.mask.layout import Layout
from sparseift_cli.mask.mask import disjoint_masks, make_mask
from sparseift_cli.mask.patterns import Block, Even, Shuffled, has_pattern, parse_pattern
from sparseift_cli.plan.spec import TransformSpec
from sparseift_cli.sparsity.sparsifier import Sparsifier
from tests.mask.test_patterns import RECIPE, X, net

EVEN = ("fan_in", "fan_in_out")
FORMS = [((24, 16), 1, False), ((24, 16), 1, True), ((12, 8, 3, 3), 1, False), ((12, 4, 3, 3), 2, False)]


def counts(mask: Tensor, groups: int = 1, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """Non-zeros of each row, and of each column of each group [groups, C]."""
    matrix = Layout(tuple(mask.shape), groups, transposed).to_matrix(mask)
    return matrix.sum(1), matrix.unflatten(0, (groups, -1)).sum(1)


def spread(numbers: Tensor) -> int:
    return int((numbers.amax(-1) - numbers.amin(-1)).max())


def test_how_they_are_written() -> None:
    assert parse_pattern("shuffled:64x128") == Shuffled(Block(64, 128))
    assert parse_pattern("shuffled:64x128:7") == Shuffled(Block(64, 128), 7)
    assert (parse_pattern("fan_in"), parse_pattern("fan_in_out")) == (Even(), Even(columns=True))
    for text in ("shuffled:64x128:7", "shuffled:4x4", "fan_in", "fan_in_out"):
        assert parse_pattern(text).name == text == TransformSpec(pattern=text).pattern
    assert parse_pattern("shuffled:4x4").width_multiple == 4
    for text in ("shuffled", "shuffled:4", "fan_out"):
        with pytest.raises(UsageError):
            parse_pattern(text)


# --- shuffled blocks ---


@pytest.mark.parametrize(("shape", "groups", "transposed"), FORMS)
def test_shuffled_blocks_are_blocks_once_the_channels_are_back_in_order(
    shape: tuple[int, ...], groups: int, transposed: bool
) -> None:
    layout, side = Layout(shape, groups, transposed), 2
    pattern = f"shuffled:{side}x{side * layout.taps}:3"
    n = 7 * side * side * layout.taps
    mask = make_mask(shape, n, generator=torch.Generator(), pattern=pattern, groups=groups, transposed=transposed)
    assert int(mask.sum()) == n
    assert has_pattern(mask, pattern, groups, transposed)
    assert not has_pattern(mask, pattern[:-1] + "4", groups, transposed)
    assert not has_pattern(mask, pattern.split(":")[1], groups, transposed)
    kind, matrix = parse_pattern(pattern), layout.to_matrix(mask)
    cells = kind.to_cells(layout, matrix.float())
    assert torch.equal(kind.from_cells(layout, cells == side * side * layout.taps), matrix)
    # the obvious reference: outputs whose rows are equal come in groups of `side`, in each group of the layer
    size = layout.rows // groups
    for g in range(groups):
        rows = [tuple(row) for row in matrix[g * size : (g + 1) * size].int().tolist()]
        assert all(rows.count(row) % side == 0 for row in rows)
    by_channel = matrix.view(layout.rows, -1, layout.taps)
    assert torch.equal(by_channel.any(2), by_channel.all(2))


def test_every_layer_has_an_order_of_its_own_that_its_name_decides() -> None:
    model, plan = sparseift.transform(net(), X, sparsity=0.75, match="model", pattern="shuffled:2x2")
    rows = {row.layer.name: row.pattern for row in plan.layers if row.status == "transformed"}
    assert len(set(rows.values())) == len(rows) > 1
    assert all(name.startswith("shuffled:2x2:") for name in rows.values())
    assert rows == {n: parse_pattern("shuffled:2x2").for_layer(f"{n}.weight").name for n in rows}
    for name, pattern in rows.items():
        module = model.get_submodule(name)
        assert pattern_of(module, "weight") == pattern
        assert has_pattern(sparseift.masks(model)[f"{name}.weight"], pattern, getattr(module, "groups", 1))
    other = sparseift.transform(net(), X, sparsity=0.75, match="model", pattern="shuffled:2x2:1")[1]
    assert not {row.pattern for row in other.layers} & set(rows.values())
    assert parse_pattern("shuffled:2x2").for_layer("qkv", whole=False) == Block(2, 2)


def test_no_kernel_computes_shuffled_blocks() -> None:
    assert square_block("shuffled:32x32", 64, 64) == (None, "shuffled:32x32 masks have no kernel")
    layer = nn.Sequential(nn.Linear(64, 64))
    mask = make_mask((64, 64), 2048, generator=torch.Generator(), pattern="shuffled:32x32")
    sparseift.mask.attached.attach(layer, {"0.weight": mask}, {"0.weight": "shuffled:32x32"})
    (choice,) = use_kernels(layer, "reference")
    assert choice.reason == "shuffled:32x32 masks have no kernel" and type(layer[0]) is nn.Linear


# --- constant fan-in and fan-out ---


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("pattern", EVEN)
@pytest.mark.parametrize("n", [0, 24, 77, 144, 383])
@pytest.mark.parametrize(("shape", "groups", "transposed"), FORMS)
def test_rows_and_columns_differ_by_at_most_one(
    shape: tuple[int, ...], groups: int, transposed: bool, n: int, pattern: str, scored: bool
) -> None:
    scores = torch.rand(shape, generator=torch.manual_seed(1)) if scored else None
    mask = make_mask(
        shape, n, generator=torch.Generator(), pattern=pattern, scores=scores, groups=groups, transposed=transposed
    )
    rows, columns = counts(mask, groups, transposed)
    assert int(mask.sum()) == n and spread(rows) <= 1
    assert pattern == "fan_in" or spread(columns) <= 1
    assert has_pattern(mask, pattern, groups, transposed)


@pytest.mark.parametrize("pattern", EVEN)
def test_masks_that_are_not_even_do_not_have_the_pattern(pattern: str) -> None:
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:, 0] = True  # constant fan-in, and all of it from one input
    assert has_pattern(mask, pattern) is (pattern == "fan_in")
    assert not has_pattern(mask.t(), pattern)


@pytest.mark.parametrize("pattern", EVEN)
def test_by_score_rows_have_their_best(pattern: str) -> None:
    scores = torch.rand(8, 10, generator=torch.manual_seed(0))
    mask = make_mask((8, 10), 24, generator=torch.Generator(), pattern=pattern, scores=scores)
    best = torch.zeros_like(mask).scatter_(1, scores.topk(3).indices, True)
    assert torch.equal(mask, best) is (pattern == "fan_in")
    random = make_mask((8, 10), 24, generator=torch.Generator(), pattern=pattern)
    assert scores[random].sum() < scores[mask].sum() <= scores[best].sum()


@pytest.mark.parametrize("heads", [{"row_balance": 4}, {"column_balance": 4}])
@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("pattern", EVEN)
def test_heads_have_equal_shares(pattern: str, scored: bool, heads: dict[str, int]) -> None:
    scores = torch.rand(16, 16, generator=torch.manual_seed(0)) if scored else None
    mask = make_mask((16, 16), 90, generator=torch.Generator(), pattern=pattern, scores=scores, **heads)
    parts = mask.split(4, 0 if "row_balance" in heads else 1)
    assert sorted(int(part.sum()) for part in parts) == [22, 22, 23, 23]
    assert has_pattern(mask, "fan_in")


@pytest.mark.parametrize("pattern", [*EVEN, "shuffled:2x2"])
def test_disjoint_masks(pattern: str) -> None:
    masks = disjoint_masks((12, 10), [40, 40, 32], generator=torch.Generator(), pattern=pattern)
    assert [int(mask.sum()) for mask in masks] == [40, 40, 32]
    assert all(has_pattern(mask, pattern) for mask in masks) and int(sum(m.int() for m in masks).max()) == 1


def test_every_place_is_as_likely() -> None:
    for pattern in EVEN:
        total = sum(
            make_mask((5, 6), 10, generator=torch.manual_seed(seed), pattern=pattern).int() for seed in range(200)
        )
        assert isinstance(total, Tensor) and int(total.min()) > 40 and int(total.max()) < 98  # 67 in the mean


# --- plans, training ---


@pytest.mark.parametrize("pattern", [*EVEN, "shuffled:2x2"])
@pytest.mark.parametrize("member", ["wide", "parallel", "factorized", "doped"])
def test_every_member_takes_them_and_is_measured_as_planned(pattern: str, member: str, tmp_path: Path) -> None:
    model, plan = sparseift.transform(net(), X, member=member, sparsity=0.75, match="model", pattern=pattern)
    planned = sum(p.nnz for row in plan.layers for p in row.parts if row.status == "transformed" and not p.dense)
    assert sum(int(mask.sum()) for mask in sparseift.masks(model).values()) == planned
    ratio = sparseift.audit(model, X).forward_ratio
    assert ratio is not None and 0.99 < ratio <= 1
    sparseift.save(model, tmp_path / "out")
    again = sparseift.load(tmp_path / "out", into=net())
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("pattern", "algorithm", "options"),
    [
        ("shuffled:2x2", "rigl", {}),
        ("shuffled:2x2", "set", {}),
        ("shuffled:2x2", "gmp", {}),
        ("shuffled:2x2", "rigl", {"growth": "balanced"}),
        ("fan_in", "rigl", {"growth": "balanced"}),
        ("fan_in", "rigl", {"growth": "balanced", "regrow": "forbid"}),
        ("fan_in_out", "rigl", {"growth": "balanced"}),
        ("fan_in_out", "set", {"growth": "balanced"}),
        ("fan_in_out", "snfs", {"growth": "balanced"}),
    ],
)
def test_masks_move_and_keep_the_pattern(pattern: str, algorithm: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, plan = sparseift.transform(net(), X, sparsity=0.75, pattern=pattern)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = Sparsifier(model, plan, optimizer, algorithm=algorithm, total_steps=12, delta_t=2, **options)
    first = {name: mask.clone() for name, mask in sparsifier.masks().items()}
    for _ in range(12):
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()
    assert any(not torch.equal(first[name], mask) for name, mask in sparsifier.masks().items())
    assert sparseift.audit(model, X).forward_ratio is not None  # counts and patterns are those of the plan


@pytest.mark.parametrize(
    ("pattern", "options", "hint"),
    [
        ("fan_in", {}, "growth balanced"),
        ("fan_in_out", {"growth": "normalised"}, "growth balanced"),
        ("fan_in_out", {"growth": "balanced", "regrow": "forbid"}, "with regrow allow"),
        ("fan_in", {"algorithm": "granet", "growth": "balanced"}, "static"),
    ],
)
def test_what_would_lose_the_pattern_is_refused(pattern: str, options: dict[str, Any], hint: str) -> None:
    model, plan = sparseift.transform(net(), X, sparsity=0.75, pattern=pattern)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = {"algorithm": "rigl"} | options
    with pytest.raises(UsageError, match=f"is {pattern}, which only static sparsity and balanced growth keep") as error:
        Sparsifier(model, plan, optimizer, total_steps=12, delta_t=2, **given)
    assert hint in str(error.value.hint)
    Sparsifier(model, plan, optimizer, algorithm="static")


@pytest.mark.parametrize(
    ("pattern", "algorithm"),
    [
        ("shuffled:2x18", "{name: rigl, delta_t: 2, growth: normalised, grown_state: mean}"),
        ("fan_in_out", "{name: rigl, delta_t: 2, growth: balanced}"),
        ("fan_in", "static"),
    ],
)
def test_a_recipe_trains_them_at_the_planned_flops(
    pattern: str, algorithm: str, sparseift: Any, tmp_path: Path
) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text(RECIPE.format(pattern=pattern, algorithm=algorithm))
    code, _, err = sparseift("train", str(recipe), "--runs", str(tmp_path / "runs"))
    assert code == 0, err
    (path,) = (tmp_path / "runs").rglob("summary.json")
    flops = json.loads(path.read_text("utf-8"))["flops"]
    assert flops["spent"] == flops["audited"]


def test_the_command_line_shows_them(sparseift: Any) -> None:
    found = []
    for pattern in ("unstructured", *EVEN):
        code, out, err = sparseift("flops", "resnet18_cifar", "-s", "0.75", "--pattern", pattern, "--json")
        assert code == 0, err
        found.append([row["nnz"] for row in json.loads(out)["layers"] if row["status"] == "transformed"])
    assert all(a == b for a, b in pairwise(found))  # they cost no rounding
