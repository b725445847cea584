"""Pattern auto, and widths that are multiples of blocks: the largest blocks that suit each layer, budgets kept, nothing left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparseift_cli as sparseift
from sparseift_cli.errors import UsageError
from sparseift_cli.mask.attached import masks_of, pattern_of
from sparseift_cli.mask.patterns import has_pattern
from sparseift_cli.models.source import Request, load_table
from sparseift_cli.plan import layer_patterns
from sparseift_cli.plan.audit import audit, to_json
from sparseift_cli.plan.layer_patterns import BLOCKS, LEAST, LEAST_NAMED, chosen_in_words
from sparseift_cli.plan.layer_plan import LayerPlan
from sparseift_cli.plan.members.wide import widen
from sparseift_cli.plan.plan import Plan, make_plan
from sparseift_cli.plan.sheets import layer_sheet, totals_sheet
from sparseift_cli.plan.spec import TrainingSpec, TransformSpec
from sparseift_cli.sparsity.sparsifier import Sparsifier
from sparseift_cli.table.table import LayerTable
from sparseift_cli.transforms.transformation import Options


def table(name: str) -> LayerTable:
    return load_table(Request(name))


def plan(name: str, training: TrainingSpec | None = None, **options: Any) -> Plan:
    return make_plan(table(name), TransformSpec(**options), training)


def transformed(plan: Plan) -> list[LayerPlan]:
    return [row for row in plan.layers if row.status == "transformed"]


def side_of(row: LayerPlan) -> int:
    return 0 if row.pattern == "unstructured" else int(row.pattern.partition("x")[0])


def blocks_a_row(row: LayerPlan, side: int) -> float:
    return min(p.nnz / (p.shape.outputs / side) / (side * side * p.shape.taps) for p in row.masked_parts)


CASES = [
    ("gpt3_small", {"sparsity": "0.5", "match": "model"}),
    ("gpt3_small", {"sparsity": "0.5", "match": "layer"}),
    ("gpt3_small", {"sparsity": "0.9", "match": "layer"}),
    ("gpt3_small", {"sparsity": "0.75", "match": "model", "scope": "inner"}),
    ("resnet50", {"sparsity": "0.5", "match": "model"}),
    ("resnet18", {"sparsity": "0.75", "match": "train"}),
    ("mobilenet_v2", {"sparsity": "0.75", "depthwise": "sparse"}),
    ("vit_b_16", {"sparsity": "0.75", "member": "parallel"}),
    ("vit_b_16", {"sparsity": "0.75", "member": "factorized"}),
    ("resnet18", {"sparsity": "0.75", "member": "factorized"}),
    ("resnet18", {"sparsity": "0.5", "match": "off"}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_every_layer_has_the_largest_blocks_that_suit_it(name: str, options: dict[str, Any]) -> None:
    found = plan(name, pattern="auto", **options)
    for row in transformed(found):
        side = side_of(row)
        shapes = [part.shape for part in row.masked_parts]
        if side:
            assert row.pattern == f"{side}x{side * shapes[0].taps}"
            assert all(s.outputs % side == s.inputs % side == 0 and s.groups == 1 for s in shapes)
            assert blocks_a_row(row, side) >= LEAST
        for larger in (b for b in BLOCKS if b > side):
            whole = all(s.outputs % larger == s.inputs % larger == 0 for s in shapes)
            same = len({s.taps for s in shapes}) == 1 and shapes[0].taps in (1, 9)
            if whole and same and all(s.groups == 1 for s in shapes):
                assert blocks_a_row(row, larger) < LEAST
        assert bool(row.why_pattern) == (side != BLOCKS[0])


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_budgets_hold_in_blocks_of_each_layer(name: str, options: dict[str, Any]) -> None:
    found = plan(name, pattern="auto", **options)
    for row in transformed(found):
        assert all(part.nnz % row.unit == 0 for part in row.masked_parts)
        if options.get("match", "layer") == "layer":
            unit = row.unit * row.positions
            assert 0 <= row.dense_macs - row.macs < unit * len(row.masked_parts)
    if options.get("match") == "model":
        missing = sum(row.dense_macs - row.macs for row in found.layers)
        assert 0 <= missing < max(row.unit * row.positions for row in transformed(found))


@pytest.mark.parametrize("name", ["resnet50", "gpt3_small"])
@pytest.mark.parametrize("side", [64, 128])
def test_blocks_of_a_side_that_is_named(name: str, side: int) -> None:
    """In every layer that has two a row, with all taps; the same blocks as by their own pattern where all layers have them."""
    found = plan(name, sparsity="0.5", pattern=f"blocks{side}")
    for row in transformed(found):
        shape = row.masked_parts[0].shape
        assert row.pattern in (f"{side}x{side * shape.taps}", "unstructured")
        fits = shape.outputs % side == shape.inputs % side == 0
        if row.pattern == "unstructured":
            assert not fits or blocks_a_row(row, side) < LEAST_NAMED
            assert row.why_pattern
        else:
            assert fits and blocks_a_row(row, side) >= LEAST_NAMED
    if name == "gpt3_small":
        written = plan(name, sparsity="0.5", pattern=f"{side}x{side}")
        assert [row.parts for row in found.layers] == [row.parts for row in written.layers]
    else:
        assert {f"{side}x{9 * side}", f"{side}x{side}"} <= {row.pattern for row in transformed(found)}


def test_a_layer_with_too_few_blocks_after_rounding_gets_smaller_ones() -> None:
    """At .5, c_attn has exactly four blocks of 128 a row; here a block is lost when it is rounded."""
    found = plan("gpt3_small", sparsity="0.5", pattern="auto")
    assert {row.pattern for row in transformed(found)} == {"128x128"}

    def allocate(rows: Sequence[LayerPlan]) -> tuple[list[LayerPlan], None]:
        return [row.with_nonzeros(row.nnz - row.unit) if side_of(row) == 128 else row for row in rows], None

    single = [replace(row, pattern="unstructured") for row in found.layers]
    rows, _ = layer_patterns.allocate_in_patterns(single, found.spec, found.sizes, allocate)
    chosen = {(row.pattern, row.why_pattern.partition(": ")[0]) for row in rows if row.status == "transformed"}
    assert chosen == {("64x64", "fewer than 4 blocks of 128 a row"), ("128x128", "")}
    smaller = {row.layer.name.partition(".attn.")[2] for row in rows if row.pattern == "64x64"}
    assert smaller == {"c_attn"}  # 108 blocks in 27 rows; the others have more than four a row


@pytest.mark.parametrize("scope", ["all", "inner"])
@pytest.mark.parametrize("sparsity", ["0.5", "0.75", "0.9"])
def test_a_gpt_consists_of_whole_blocks(sparsity: str, scope: str) -> None:
    match = "model" if scope == "inner" else "layer"
    found = plan("gpt3_small", sparsity=sparsity, match=match, scope=scope, pattern="128x128")
    rows = transformed(found)
    assert len(rows) == (24 if scope == "inner" else 48)
    assert all(row.room == row.weights for row in rows)
    assert found.widening is not None
    assert all(abs(w.size / w.ideal - 1) < 0.08 for w in found.widening.widened)
    assert audit(found).weights_in_no_block() is None


@pytest.mark.parametrize(
    ("options", "widths"),
    [
        ({"pattern": "unstructured"}, [91, 181, 362, 724]),
        ({"pattern": "4x4"}, [92, 180, 364, 724]),
        ({"pattern": "4x4", "width_multiple": 8}, [88, 184, 360, 728]),
        ({"pattern": "16x16"}, [96, 176, 368, 720]),
        ({"pattern": "64x64"}, [128, 192, 384, 704]),  # the nearest multiple of 64 to 90.5 is the dense width
        ({"pattern": "64x576"}, [128, 192, 384, 704]),
        ({"pattern": "auto"}, [96, 192, 384, 768]),
        ({"pattern": "1x4"}, [91, 181, 362, 724]),
        ({"pattern": "64x64", "base_width": 90}, [96, 192, 384, 704]),  # 128 is too far from a width that was asked for
        ({"pattern": "auto", "base_width": 90}, [96, 192, 384, 768]),
    ],
    ids=str,
)
def test_widths_are_multiples_of_blocks_as_far_as_they_stay_near(options: dict[str, Any], widths: list[int]) -> None:
    found = widen(table("resnet18"), TransformSpec(sparsity="0.5", **options)).widened
    assert sorted({w.size for w in found}) == widths


def test_weights_that_fill_no_block_are_said() -> None:
    found = plan("resnet18", sparsity="0.5", pattern="64x64", base_width=90)
    said = audit(found).weights_in_no_block()
    assert said is not None and said.startswith(
        "6 layers have weights that fill no whole block of 64x64 and stay zero: up to 36%"
    )
    assert any(said in note for note in totals_sheet(audit(found), "").notes)


def test_the_plan_says_which_blocks_and_why_not_larger() -> None:
    found = plan("mobilenet_v2", sparsity="0.75", depthwise="sparse", pattern="auto")
    words = chosen_in_words(found.layers)
    assert words == (
        "blocks of 64 in 6 layers, of 32 in 5, 40 unstructured (19: fewer than 4 blocks of 32 a row; 17: depthwise; "
        "4: no whole blocks of 32)"
    )
    result = audit(found)
    assert f"Pattern auto: {words}." in totals_sheet(result, "").notes
    sheet = layer_sheet(result)
    assert "pattern" in [column.key for column in sheet.columns]
    rows = {row["name"]: row for row in to_json(result)["layers"]}
    assert rows["features.18.0"]["pattern"] == "32x32"
    assert rows["features.18.0"]["why_pattern"] == "fewer than 4 blocks of 64 a row: 2.5"
    assert rows["features.0.0"]["pattern"] is rows["features.0.0"]["why_pattern"] is None
    same = layer_sheet(audit(plan("resnet18", sparsity="0.75", pattern="4x4")))
    assert "pattern" not in [column.key for column in same.columns]


# --- on modules ---


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 8, 4 and 2, so that nets are small."""
    monkeypatch.setattr(layer_patterns, "BLOCKS", (8, 4, 2))


X = torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    convolutions = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 64, 3), nn.Conv2d(64, 64, 3, groups=2), nn.Conv2d(64, 8, 1)
    return nn.Sequential(*(m for conv in convolutions for m in (conv, nn.ReLU())), nn.Flatten(), nn.Linear(32, 4))


@pytest.mark.usefixtures("small_blocks")
def test_masks_of_a_module_have_the_patterns_of_its_plan(tmp_path: Path) -> None:
    module, made = sparseift.transform(net(), X, sparsity=0.75, pattern="auto")
    patterns = {row.layer.weight: row.pattern for row in transformed(made)}
    assert patterns == {"2.weight": "4x36", "4.weight": "unstructured", "6.weight": "8x8"}
    path = sparseift.save(module, tmp_path / "out")
    for model in (module, sparseift.load(path, into=net())):
        for key, mask in masks_of(model).items():
            owner = model.get_submodule(key.removesuffix(".weight"))
            assert pattern_of(owner, "weight") == patterns[key]
            assert has_pattern(mask, patterns[key], getattr(owner, "groups", 1))
    assert sparseift.flops(str(path)).plan.to_json() == made.to_json()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("algorithm", ["rigl", "set"])
def test_mask_updates_move_the_blocks_of_each_layer(algorithm: str) -> None:
    module, made = sparseift.transform(net(), X, sparsity=0.75, pattern="auto")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    sparsifier = Sparsifier(module, made, optimizer, algorithm=algorithm, total_steps=10, delta_t=1)
    before = {key: mask.clone() for key, mask in masks_of(module).items()}
    for _ in range(3):
        optimizer.zero_grad()
        module(X).square().mean().backward()
        sparsifier.step()
        optimizer.step()
    for row in transformed(made):
        key = row.layer.weight or ""
        mask = masks_of(module)[key]
        groups = row.parts[0].shape.groups
        assert not torch.equal(mask, before[key]) and int(mask.sum()) == row.nnz
        assert has_pattern(mask, row.pattern, groups)


@pytest.mark.usefixtures("small_blocks")
def test_weights_without_a_matrix_stay_unstructured() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.out, self.head = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 3)
            self.table = nn.Parameter(torch.randn(32, 4, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.out(torch.einsum("btd,dnh->btnh", self.stem(x), self.table).flatten(2)))

    module, made = sparseift.transform(Heads(), torch.randn(2, 5, 8), sparsity=0.75, pattern="auto")
    found = {row.layer.name: (row.pattern, row.why_pattern) for row in transformed(made)}
    assert found["table"] == ("unstructured", "stacked matrices")
    assert found["out"][0] == "4x4"
    assert module(torch.randn(2, 5, 8)).shape == (2, 5, 3)


@pytest.mark.usefixtures("small_blocks")
def test_parts_of_a_weight_have_one_pattern() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.memory, self.out = nn.Linear(8, 32), nn.Linear(8, 32), nn.Linear(32, 3)
            self.attend = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y, memory = self.stem(x[:, :6]), self.memory(x[:, 6:])
            return self.out(self.attend(y, memory, memory, need_weights=False)[0])

    x = torch.randn(1, 16, 8)
    module, made = sparseift.transform(Cross(), x, sparsity=0.75, pattern="auto")
    parts = [row for row in transformed(made) if row.layer.weight == "attend.in_proj_weight"]
    assert len(parts) == 2 and {row.pattern for row in parts} == {"4x4"}
    mask = masks_of(module)["attend.in_proj_weight"]
    assert has_pattern(mask, "4x4") and pattern_of(module.attend, "in_proj_weight") == "4x4"
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    Sparsifier(module, made, optimizer, algorithm="set", total_steps=10, delta_t=1)


@pytest.mark.usefixtures("small_blocks")
def test_dense_weights_are_in_no_blocks() -> None:
    with pytest.raises(UsageError, match="the positions of the dense weights do not form a 4x36 pattern"):
        sparseift.transform(net(), X, sparsity=0.75, pattern="auto", options=Options(start="preserve"))
