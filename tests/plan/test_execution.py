"""What a device executes of a plan: block kernels compute the blocks that are stored, all other layers multiply by zeros."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction

import pytest

from sparseift_cli.kernels.registry import MASKED
from sparseift_cli.models.request import Request
from sparseift_cli.models.source import load_table
from sparseift_cli.plan.audit import Audit, audit
from sparseift_cli.plan.execution import choices_on_gpu, execution, has_structure, stored_in_blocks
from sparseift_cli.plan.plan import make_plan
from sparseift_cli.plan.sheets import audit_sheets
from sparseift_cli.plan.spec import TrainingSpec, TransformSpec
from sparseift_cli.table.table import LayerTable

TRAINING = TrainingSpec(algorithm="rigl", steps=1000)


@pytest.fixture(scope="module")
def gpt() -> LayerTable:
    return load_table(Request("gpt3_small"))


def audited(table: LayerTable, pattern: str = "128x128", training: TrainingSpec = TRAINING, **options: object) -> Audit:
    spec = {"sparsity": "0.75", "match": "model", "width_multiple": 128, **options}
    return audit(make_plan(table, TransformSpec.of({**spec, "pattern": pattern}), training))


def note(result: Audit) -> str:
    return next((text for text in audit_sheets(result)[1].notes if "Executed" in text), "")


def test_blocks_execute_what_is_counted(gpt: LayerTable) -> None:
    result = audited(gpt)
    assert result.transformed is not None and result.plan is not None
    assert {(c.backend, c.block, c.reason) for c in result.choices.values()} == {("blocks", 128, "")}
    kernels, masked = result.executed(kernels=True), result.executed(kernels=False)
    assert kernels.forward_macs == result.transformed.forward_macs
    assert kernels.training_macs == result.transformed.training_macs
    rows = result.plan.layers
    assert masked.forward_macs == sum(row.full_macs for row in rows) > 2 * kernels.forward_macs
    assert "48 layers in blocks of 128. Masked-dense:" in note(result)
    name = next(row.layer.weight for row in rows if row.status == "transformed")
    assert next(iter(result.choices.values())).name == name == "transformer.h.0.attn.c_attn.weight"


def test_a_part_in_blocks_is_in_between(gpt: LayerTable) -> None:
    result = audited(gpt)
    assert result.plan is not None
    layers = [
        replace(row, pattern="unstructured") if row.layer.name.endswith("c_attn") else row for row in result.plan.layers
    ]
    choices = choices_on_gpu(layers, TRAINING)
    compact = stored_in_blocks(choices)
    assert len(choices) == 48 and len(compact) == 36
    some = execution(layers, TRAINING, compact)
    left = [row for row in layers if row.layer.name.endswith("c_attn")]
    kernels, masked = result.executed(kernels=True), result.executed(kernels=False)
    more = sum(row.full_macs - row.macs for row in left)
    assert some.forward_macs == kernels.forward_macs + more
    assert kernels.training_macs < some.training_macs < masked.training_macs


def test_dense_gradients_of_updates_are_executed(gpt: LayerTable) -> None:
    rigl, static = audited(gpt).executed(kernels=True), audited(gpt, training=TrainingSpec()).executed(kernels=True)
    assert rigl.training_macs / rigl.forward_macs > static.training_macs / static.forward_macs
    assert audited(gpt).executed(kernels=False).training_macs == 3 * audited(gpt).executed(kernels=False).forward_macs


@pytest.mark.parametrize(
    ("pattern", "options", "training", "reason"),
    [
        ("unstructured", {}, TRAINING, "unstructured masks have no kernel"),
        ("128x4", {}, TRAINING, "blocks of 128x4 are not square"),
        ("16x16", {}, TRAINING, "Triton kernels have blocks of 128, 64 or 32, not 16"),
        ("128x128", {}, TrainingSpec(algorithm="gmp"), "gmp begins denser than the planned masks"),
        ("128x128", {}, TrainingSpec(algorithm="granet"), "granet begins denser than the planned masks"),
        ("128x128", {"match": "layer"}, TrainingSpec(algorithm="dense"), "trained without masks"),
    ],
)
def test_why_masked(
    gpt: LayerTable, pattern: str, options: dict[str, object], training: TrainingSpec, reason: str
) -> None:
    result = audited(gpt, pattern, training, **options)
    assert {(c.backend, c.reason) for c in result.choices.values()} == {(MASKED, reason)}
    assert result.executed(kernels=True) == result.executed(kernels=False)
    expected = f"48 layers masked-dense: {reason}." if pattern != "unstructured" else ""
    assert note(result).endswith(expected) and bool(note(result)) == bool(expected)


def test_asked_for_and_named_backends(gpt: LayerTable) -> None:
    plan = audited(gpt, "16x16").plan
    assert plan is not None and has_structure(plan.layers)
    assert {c.reason for c in choices_on_gpu(plan.layers, TRAINING, MASKED).values()} == {
        "masked layers were asked for"
    }
    named = choices_on_gpu(plan.layers, TRAINING, "reference")
    assert {(c.backend, c.block) for c in named.values()} == {("reference", 16)}


def test_the_interpreter_of_this_process_changes_no_plan(gpt: LayerTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert {c.backend for c in audited(gpt).choices.values()} == {"blocks"}


def test_convolutions_and_layers_that_no_kernel_replaces() -> None:
    table = load_table(Request("resnet50"))
    plan = audited(table, "64x64", width_multiple=64).plan
    assert plan is not None
    choices = choices_on_gpu(plan.layers, TRAINING)
    reasons = {name: choice.reason for (name, _), choice in choices.items()}
    assert reasons["layer2.0.conv1"] == "", "a 1 x 1 convolution is a linear layer"
    assert reasons["layer2.0.conv2"] == "blocks of 64x64 are not all 9 taps of whole inputs, as 64x576 are"
    tied = [
        replace(row, layer=replace(row.layer, tied_to="x", host=host, computed=computed))
        for row, host, computed in zip(
            [row for row in plan.layers if row.status == "transformed" and row.parts[0].shape.taps == 1],
            ("Gate", None, None),
            (False, True, False),
            strict=False,
        )
    ]
    assert [c.reason for c in choices_on_gpu(tied, TRAINING).values()] == [
        "Gate reads its weight itself",
        "its weight is computed from another parameter",
        "its weight is shared with another layer",
    ]


def test_flops_says_it_in_table_json_and_csv(sparseift, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ("flops", "gpt3_small", "-s", ".75", "--width-multiple", "128", "--pattern")
    monkeypatch.setenv("COLUMNS", "220")
    data = json.loads(sparseift(*line, "128x128", "--json")[1])
    row = next(row for row in data["layers"] if row["name"].endswith("c_fc"))
    assert (row["kernel"], row["why_masked"]) == ("blocks of 128", None)
    assert next(row for row in data["layers"] if row["name"] == "lm_head")["kernel"] is None
    executed, totals = data["executed"], data["totals"]
    assert executed["kernels"]["training_flops"] == totals["transformed"]["training_flops"]
    assert executed["kernels"]["forward_ratio"] == pytest.approx(totals["ratio"]["forward"])
    assert executed["masked"]["forward_ratio"] > 2
    table, csv = sparseift(*line, "128x128")[1], sparseift(*line, "128x128", "--format", "csv")[1]
    assert "blocks of 128" in table and "Executed on a GPU with block kernels: " in table and "blocks of 128" in csv
    plain = sparseift(*line, "unstructured")[1]
    assert "Executed" not in plain and "computed" not in plain
    folded = json.loads(sparseift(*line, "128x128", "--depth", "2", "--json")[1])["layers"]
    assert {"blocks of 128"} == {row["computed"] for row in folded if row["name"].endswith(".h")}
    thin = sparseift(*line, "128x4")[1]
    assert "masked: blocks of 128x4 are not square" in thin and "Executed: " in thin


def test_sparsities_are_compared_by_it(sparseift, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "220")
    line = ("flops", "gpt3_small", "-s", ".5,.75", "--width-multiple", "128", "--pattern")
    table, data = sparseift(*line, "128x128")[1], json.loads(sparseift(*line, "128x128", "--json")[1])
    assert "executed (kernels)" in table and "executed (masked)" in table
    for row in data["rows"][1:]:
        assert row["executed_ratio"] == row["training_ratio"] < row["executed_masked_ratio"]
    assert "executed" not in sparseift(*line, "unstructured")[1]


def test_dry_run_says_it(sparseift) -> None:
    sets = [f"transform.{text}" for text in ("pattern=128x128", "width_multiple=128")]
    line = ("train", "gpt3_small/wide50_static", "--dry-run", *(word for text in sets for word in ("--set", text)))
    data = json.loads(sparseift(*line, "--json", "--tflops", "100")[1])
    assert data["executed_flops_kernels"] == data["training_flops"] < data["executed_flops"]
    assert data["seconds"] == round(data["executed_flops_kernels"] / 1e14)
    assert data["weight_bytes_kernels"] == 16 * data["nonzero_params"]
    assert data["kernels"][0] == {
        "weight": "transformer.h.0.attn.c_attn.weight",
        "kernel": "blocks",
        "block": 128,
        "why_masked": "",
    }
    table = sparseift(*line)[1]
    assert "transformer.h.*.mlp.c_fc.weight (12)" in table and "Executed on a GPU with block kernels: " in table
    for text, why in (("kernels=masked", "masked layers were asked for"), ("device=cpu", "training.device is cpu")):
        masked = json.loads(sparseift(*line, "--set", f"training.{text}", "--json")[1])
        assert {one["why_masked"] for one in masked["kernels"]} == {why}
        assert "executed_flops_kernels" not in masked and "weight_bytes_kernels" not in masked


def test_ratios_are_exact(gpt: LayerTable) -> None:
    done = audited(gpt).executed(kernels=True)
    assert done.to_json(done.forward_macs, Fraction(2 * done.training_macs))["training_ratio"] == 0.5
    assert done.forward_flops == 2 * done.forward_macs and done.training_flops == round(2 * done.training_macs)
