"""Weights of which a forward pass uses rows at different numbers of positions: a fused query, key and value in cross-attention.

Each part has the non-zeros of its own budget, before and after mask updates, and the whole keeps the dense function.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparseift_cli as sparseift
from sparseift_cli.plan.audit import audit
from sparseift_cli.plan.spec import TrainingSpec
from sparseift_cli.sparsity.sparsifier import Sparsifier
from sparseift_cli.train.flop_meter import FlopMeter
from sparseift_cli.transforms.transformation import Options, transformation_of
from tests.helpers.parts import Net

QUERIES, KEYS = 6, 10  # tokens
EXAMPLE = torch.randn(1, QUERIES + KEYS, 8, generator=torch.Generator().manual_seed(0))


def cross(n: Any, x: Tensor) -> Tensor:
    y, memory = n.stem(x[:, :QUERIES]), n.memory(x[:, QUERIES:])
    return n.out(n.attend(y, memory, memory, need_weights=False)[0])


def cross_of_three(n: Any, x: Tensor) -> Tensor:
    y, memory = n.stem(x[:, :QUERIES]), n.memory(x[:, QUERIES:])
    return n.out(n.attend(y, memory, n.values(x[:, QUERIES:]))[0])


def decoder(n: Any, x: Tensor) -> Tensor:
    return n.out(n.attend(n.stem(x[:, :QUERIES]), n.memory(x[:, QUERIES:])))


def sliced(n: Any, x: Tensor) -> Tensor:
    """Two slices of one weight, at 16 tokens and at 6; no call uses the last rows."""
    y, (weight, bias) = n.stem(x), (n.both.weight, n.both.bias)
    a = F.linear(y, weight[:16], bias[:16])
    b = F.linear(y[:, :QUERIES], weight[16:48], bias[16:48])
    return n.out(a.mean(1) + b[..., 16:].mean(1))


def attention(**options: Any) -> dict[str, nn.Module]:
    parts: dict[str, nn.Module] = {"stem": nn.Linear(8, 16), "memory": nn.Linear(8, 16), "out": nn.Linear(16, 3)}
    return parts | {"attend": nn.MultiheadAttention(16, 4, batch_first=True, **options)}


def decoder_layer(**options: Any) -> nn.Module:
    layer = nn.TransformerDecoderLayer(16, 4, 24, batch_first=True, dropout=0.0, **options)
    return nn.TransformerDecoder(layer, 1)


# the rows of the weight and the positions at which each is used, as (name, dense weights, positions)
Case = tuple[Callable[[], Net], list[tuple[str, int, int]]]
CASES: dict[str, Case] = {
    "query, and key with value": (
        lambda: Net(cross, **attention()),
        [("attend.in_proj.q", 16 * 16, QUERIES), ("attend.in_proj.kv", 32 * 16, KEYS)],
    ),
    "query, key and value": (
        lambda: Net(cross_of_three, values=nn.Linear(8, 16), **attention()),
        [(f"attend.in_proj.{part}", 16 * 16, n) for part, n in (("q", QUERIES), ("k", KEYS), ("v", KEYS))],
    ),
    "decoder layer": (
        lambda: Net(decoder, **attention() | {"attend": decoder_layer()}),
        [
            ("attend.layers.0.multihead_attn.in_proj.q", 16 * 16, QUERIES),
            ("attend.layers.0.multihead_attn.in_proj.kv", 32 * 16, KEYS),
        ],
    ),
    "decoder layer, norm first": (
        lambda: Net(decoder, **attention() | {"attend": decoder_layer(norm_first=True)}),
        [
            ("attend.layers.0.multihead_attn.in_proj.q", 16 * 16, QUERIES),
            ("attend.layers.0.multihead_attn.in_proj.kv", 32 * 16, KEYS),
        ],
    ),
    "slices with a gap": (
        lambda: Net(sliced, stem=nn.Linear(8, 16), both=nn.Linear(16, 64), out=nn.Linear(16, 3)),
        [("both.0", 16 * 16, QUERIES + KEYS), ("both.1", 32 * 16, QUERIES)],
    ),
}
every_case = pytest.mark.parametrize("case", CASES)


def dense(case: str) -> Net:
    torch.manual_seed(0)
    return CASES[case][0]().eval()


def transformed(case: str, **options: Any) -> nn.Module:
    return sparseift.transform(dense(case), EXAMPLE, sparsity=0.75, **options)[0]


@cache
def fresh(case: str) -> nn.Module:
    """The transformed module of a case, for tests that only read it."""
    return transformed(case)


def counted(module: nn.Module) -> dict[str, int]:
    """Places in the mask of every part, by the name of its row."""
    done, masks = transformation_of(module), sparseift.masks(module)
    assert done is not None
    return {m.layer: int(m.of(masks[m.key]).count_nonzero()) for m in done.surgery.masked}


@every_case
def test_each_part_costs_what_it_cost(case: str) -> None:
    """A part of n weights at p positions costs n * p MACs; it doubles on one side or both, and keeps n non-zeros."""
    module = fresh(case)
    plan = {row.layer.name: row for row in sparseift.audit(module, EXAMPLE).plan.layers}
    nnz = counted(module)
    for name, weights, positions in CASES[case][1]:
        assert (plan[name].dense_macs, plan[name].macs) == (weights * positions, weights * positions)
        assert plan[name].status == "transformed" and plan[name].weights > weights == nnz[name]
    assert not sparseift.flops(module).growing


@every_case
def test_a_folder_and_a_copy_keep_the_parts(case: str, tmp_path: Path) -> None:
    module = fresh(case)
    sparseift.save(module, tmp_path / "out")
    loaded = sparseift.load(tmp_path / "out", into=dense(case))
    assert torch.equal(loaded(EXAMPLE), module.eval()(EXAMPLE))
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    names = Sparsifier(loaded, optimizer, algorithm="static").nnz
    assert names == Sparsifier(module, torch.optim.SGD(module.parameters()), algorithm="static").nnz


@pytest.mark.filterwarnings("ignore:not exact")
@every_case
def test_the_wide_module_starts_as_the_dense_one(case: str) -> None:
    """Norm-first layers are not exact: what writes the stream is read by other operations too."""
    module = transformed(case, options=Options(start="preserve", preserve_slack=0.0))
    done = transformation_of(module)
    assert done is not None and done.deviation is not None
    exact = not any(note.startswith("not exact") for note in done.notes)
    assert done.deviation < (1e-5 if exact else 0.1)
    assert {m.layer: m.nnz for m in done.surgery.masked} == counted(module)


@pytest.mark.parametrize(
    ("case", "algorithm"),
    [("query, and key with value", name) for name in ("static", "set", "rigl", "snfs", "gmp", "granet")]
    + [("slices with a gap", name) for name in ("rigl", "granet")],
)
def test_mask_updates_keep_the_cost_of_every_step(case: str, algorithm: str) -> None:
    """The sum over the steps that were made is what the plan says of the run, and the parts end with the planned counts."""
    steps = 12
    module = transformed(case)
    done = transformation_of(module.train())
    assert done is not None
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    own = {} if algorithm == "static" else {"delta_t": 3}
    sparsifier = Sparsifier(module, optimizer, algorithm=algorithm, total_steps=steps, **own)
    meter = FlopMeter(done.plan.layers, done.surgery.masked, 1, recompute=False)
    for _ in range(steps):
        module(EXAMPLE).square().mean().backward()
        sparsifier.step()
        meter.add(sparsifier.last)
        optimizer.step()
        optimizer.zero_grad()
    assert counted(module) == {m.layer: m.nnz for m in done.surgery.masked}
    sparseift.audit(module.eval(), EXAMPLE)
    run = audit(done.plan, TrainingSpec(algorithm=algorithm, steps=steps, **own))
    assert run.transformed is not None and meter.macs == steps * run.transformed.training_macs


@pytest.mark.parametrize("member", ["parallel", "factorized", "doped"])
def test_members_that_replace_layers_leave_parts_by_name(member: str) -> None:
    plan = sparseift.flops(
        dense("decoder layer"), EXAMPLE, sparsity=0.75, member=member, projections="transformed"
    ).plan
    assert plan is not None
    reasons = {row.layer.name: row.reason for row in plan.layers if ".in_proj." in row.layer.name}
    assert set(reasons.values()) == {"its weight is used by MultiheadAttention: only Sparse Wide can transform it"}


@pytest.mark.parametrize("start", [8, 0], ids=["overlapping rows", "columns"])
def test_parts_that_are_no_separate_rows_are_left_by_name(start: int) -> None:
    """Rows in two parts, or columns, have weights that differ in cost within a part."""

    def run(n: Any, x: Tensor) -> Tensor:
        y, weight = n.stem(x), n.both.weight
        if start:
            return n.out(n.own(y + F.linear(y, weight[:16]) + F.linear(y, weight[start : start + 16])))
        return n.out(n.own(y + F.linear(y[..., :8], weight[:16, :8])))

    model = Net(run, stem=nn.Linear(8, 16), both=nn.Linear(16, 24), own=nn.Linear(16, 16), out=nn.Linear(16, 3))
    plan = sparseift.flops(model, EXAMPLE, sparsity=0.75).plan
    assert plan is not None
    reasons = {row.reason for row in plan.layers if row.layer.name.startswith("both")}
    assert reasons == {"its calls use parts of the weight that are no separate rows, so its non-zeros differ in cost"}
