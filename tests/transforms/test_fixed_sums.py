"""Concatenations whose total width is fixed: Sparse Wide keeps their parts, widens the rest, and uses the whole budget."""

from __future__ import annotations

from collections.abc import Callable
from math import floor, sqrt

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparseift_cli as sparseift
from tests.helpers.preserve_models import EXACT, trained, widened


class Net(nn.Module):
    """Named parts and a forward given as a function of them."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.register_buffer("mix_in", torch.linspace(1, 2, 256).view(16, 16))
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def cat(n: Net, x: Tensor) -> Tensor:
    """Two branches of what the stem makes, side by side."""
    h = F.relu(n.stem(x))
    return torch.cat([n.a(h), n.b(h)], 1)


def added_to_the_input() -> Net:
    return Net(
        lambda n, x: n.out(F.relu(n.mid(F.relu(cat(n, x) + x)))),
        stem=nn.Linear(8, 16),
        a=nn.Linear(16, 4),
        b=nn.Linear(16, 4),
        mid=nn.Linear(8, 16),
        out=nn.Linear(16, 3),
    )


def projected_by_a_buffer() -> Net:
    return Net(
        lambda n, x: n.out(F.relu(cat(n, x) @ n.mix_in)),
        stem=nn.Linear(8, 16),
        a=nn.Linear(16, 6),
        b=nn.Linear(16, 10),
        out=nn.Linear(16, 3),
    )


def into_fixed_groups() -> Net:
    """A depthwise convolution with two filters a channel: its number of groups is its number of input channels."""
    return Net(
        lambda n, x: n.out(n.mix(F.relu(n.taps(F.relu(cat(n, x))))).mean((2, 3))),
        stem=nn.Conv2d(3, 16, 3),
        a=nn.Conv2d(16, 6, 1),
        b=nn.Conv2d(16, 2, 1),
        taps=nn.Conv2d(8, 16, 3, groups=8),
        mix=nn.Conv2d(16, 16, 1),
        out=nn.Linear(16, 3),
    )


FIXED = {added_to_the_input: (2, 8), projected_by_a_buffer: (2, 8), into_fixed_groups: (2, 3, 8, 8)}


@pytest.mark.parametrize("make", FIXED)
@pytest.mark.parametrize("sparsity", ["0.5", "0.75", "0.9"])
def test_the_parts_of_a_fixed_concatenation_keep_their_widths(make: Callable[[], nn.Module], sparsity: str) -> None:
    model, x = make(), torch.randn(FIXED[make])
    new, plan = sparseift.transform(model, x, sparsity=sparsity)
    sizes = {name: p.shape for name, p in new.named_parameters()}
    for name, p in model.named_parameters():
        assert all(n >= m for n, m in zip(sizes[name], p.shape, strict=True)), name
    wide = floor(16 / sqrt(1 - float(sparsity)) + 0.5)
    for branch in ("a", "b"):
        assert sizes[f"{branch}.weight"][:2] == (model.get_parameter(f"{branch}.weight").shape[0], wide)
    rows = [row for row in plan.layers if row.status == "transformed"]
    assert {"a", "b"} <= {row.layer.name for row in rows}
    for row in rows:  # never more than one non-zero below the budget
        assert row.dense_macs - row.positions < row.macs <= row.dense_macs
    sparseift.audit(new, x)  # raises where the module is not what was planned
    assert new(x).shape == model(x).shape


def test_a_part_that_keeps_its_width_has_a_reason() -> None:
    """Of the second of two such sums in a row, whose branches read the fixed width of the first."""

    def forward(n: Net, x: Tensor) -> Tensor:
        y = F.relu(torch.cat([n.a(x), n.b(x)], 1) + x)
        y = F.relu(torch.cat([n.c(y), n.d(y)], 1) + x)
        return n.out(F.relu(n.mid(F.relu(n.up(y)))))

    parts = {name: nn.Linear(8, 4) for name in "abcd"}
    model = Net(forward, **parts, up=nn.Linear(8, 16), mid=nn.Linear(16, 16), out=nn.Linear(16, 3))
    _, plan = sparseift.transform(model, torch.randn(2, 8), sparsity="0.75")
    assert plan.widening is not None
    reasons = {plan.table.widths[i].name: reason for i, reason in plan.widening.solution.reasons.items()}
    rows = {row.layer.name: row for row in plan.layers}
    assert rows["c"].status == rows["d"].status == "untouched"
    assert rows["c"].reason == "its width c.weight[0] is kept: part of a sum of fixed size"
    assert reasons["c.weight[0]"] == reasons["d.weight[0]"] == "part of a sum of fixed size"


def test_a_concatenation_added_to_a_layer_still_grows() -> None:
    model = Net(
        lambda n, x: n.out(F.relu(cat(n, x) + n.side(x))),
        stem=nn.Linear(8, 16),
        a=nn.Linear(16, 6),
        b=nn.Linear(16, 10),
        side=nn.Linear(8, 16),
        out=nn.Linear(16, 3),
    )
    new, _ = sparseift.transform(model, torch.randn(2, 8), sparsity="0.75")
    assert [len(new.get_parameter(f"{name}.bias")) for name in ("stem", "a", "b", "side")] == [32, 12, 20, 32]


def test_a_model_match_allocates_what_a_fixed_sum_leaves() -> None:
    model, x = added_to_the_input(), torch.randn(2, 8)
    for sparsity in ("0.3", "0.5"):
        new, plan = sparseift.transform(model, x, sparsity=sparsity, match="model")
        spare = sum(row.dense_macs - row.macs for row in plan.layers)
        assert 0 <= spare < min(row.positions for row in plan.layers if row.status == "transformed")
        ratio = sparseift.audit(new, x).forward_ratio
        assert ratio is not None and 0.999 < ratio <= 1


def test_a_fixed_concatenation_starts_as_the_dense_network() -> None:
    torch.manual_seed(0)
    for make, shape in FIXED.items():
        x = torch.randn(shape)
        case = widened(trained(make(), x), x, sparsity="0.6")
        assert case.deviation(x) <= EXACT and not any("not exact" in note for note in case.preserved.notes)


def rotated_head(n: Net, x: Tensor) -> Tensor:
    """Part of a vector of 16 is turned, as by a rotary embedding of fewer dims than a head has; the rest passes."""
    h = n.stem(x).view(-1, 16)
    part = n.part(x)
    size = part.shape[1]
    turned = h[:, :size] * part
    return n.out(n.mid(torch.cat([turned, h[:, size:]], 1)).relu())


def split_head(n: Net, x: Tensor) -> Tensor:
    """The same with the sizes of a split, one of them a difference."""
    h, part = n.stem(x).view(-1, 16), n.part(x)
    passed, turned = h.split([h.shape[1] - part.shape[1], part.shape[1]], 1)
    return n.out(n.mid(torch.cat([passed, turned * part], 1)).relu())


@pytest.mark.parametrize("forward", [rotated_head, split_head])
@pytest.mark.parametrize("sparsity", ["0.5", "0.96"])
def test_a_part_of_a_fixed_width_does_not_outgrow_it(forward: Callable[..., Tensor], sparsity: str) -> None:
    """16 is a number of the code: 5 times the part of 6 is more, and so is any more of it, since the rest cannot shrink."""
    parts = {"stem": nn.Linear(8, 16), "part": nn.Linear(8, 6), "mid": nn.Linear(16, 32), "out": nn.Linear(32, 3)}
    net = Net(forward, **parts)
    new, _ = sparseift.transform(net, torch.randn(4, 8), sparsity=sparsity)
    assert (new.part.weight.shape, new.stem.weight.shape) == ((6, 8), (16, 8))
    assert new.mid.weight.shape == (round(32 * (1 - float(sparsity)) ** -0.5), 16)
    assert new(torch.randn(4, 8)).shape == (4, 3)
