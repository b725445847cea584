"""Every model of the zoo becomes what was planned: transformed on meta, traced again, equal to the MAC."""

from __future__ import annotations

from typing import Any

import pytest

from sparseift_cli.models.request import Request
from sparseift_cli.models.source import build
from sparseift_cli.plan.members import MEMBERS
from sparseift_cli.plan.plan import make_plan
from sparseift_cli.plan.spec import TransformSpec
from sparseift_cli.trace.build import trace
from sparseift_cli.transforms.check import measure, require_as_planned
from sparseift_cli.transforms.surgery import apply_surgery, surgery_for

SMALLER = [
    "resnet18",
    "resnet50",
    "resnet20",
    "wrn22_2",
    "mobilenet_v2",
    "vit_s_16",
    "botnet50",
    "mobilevit_s",
    "bert_base",
    "gpt2",
    "llama_tiny",
]
BUDGETS: list[dict[str, Any]] = [{"sparsity": "0.75"}, {"sparsity": "0.3", "match": "model"}]


@pytest.mark.parametrize("name", SMALLER)
def test_measured_is_planned(name: str) -> None:
    """One of each family, every member under one of two budgets, which take turns; `tests.tools.survey zoo` does all."""
    built = build(Request(name))
    before = trace(built.model, built.args, built.kwargs, name=name, input_shape=built.input_shape)
    for turn, member in enumerate(MEMBERS, SMALLER.index(name)):
        plan = make_plan(before.table, TransformSpec(member=member, **BUDGETS[turn % 2]))
        surgery = surgery_for(plan, before.structure, built.model)
        new = apply_surgery(built.model, surgery)
        measured, after = measure(new, built.args, built.kwargs, plan, surgery, None)
        require_as_planned(measured, plan, before, after)
        assert measured.forward_macs == sum(row.macs for row in plan.layers)
        assert sum(row.activations for row in plan.layers) == sum(
            row.activations.evaluate(()) for row in after.table.layers
        )


@pytest.mark.parametrize("sparsity", ["0.5", "0.75", "0.9"])
def test_doped_uses_its_whole_budget(sparsity: str) -> None:
    """The authors' code masks U and V too: 0.746, 0.439 and 0.194 of the budget."""
    built = build(Request("resnet18"))
    before = trace(built.model, built.args, name="resnet18", input_shape=built.input_shape)
    plan = make_plan(before.table, TransformSpec(member="sparse_doped", sparsity=sparsity))
    surgery = surgery_for(plan, before.structure, built.model)
    new = apply_surgery(built.model, surgery)
    for row in plan.layers:
        if row.status == "transformed":
            member = new.get_submodule(row.layer.name)
            dense = member.get_parameter("u.weight").numel() + member.get_parameter("v.weight").numel()
            copies = [m.nnz for m in surgery.masked if m.layer == row.layer.name]
            assert len(copies) == 1  # U and V are never masked
            assert dense + copies[0] == built.model.get_submodule(row.layer.name).get_parameter("weight").numel()
