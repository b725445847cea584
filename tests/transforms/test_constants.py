"""Buffers and plain tensors that a width is tied to: position tables, rotary angles, kernels, vectors of constants."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparseift_cli as sparseift
from sparseift_cli.plan.audit import to_json
from sparseift_cli.plan.sheets import totals_sheet
from sparseift_cli.trace.sinusoids import find_sinusoids
from sparseift_cli.transforms.transformation import transformation_of

# At 75 % sparsity every width is doubled.
ROWS, WIDTH, SPARSITY = 16, 32, 0.75


def angles(rows: int, pairs: int, *, base: float = 10000.0, closed: bool = False, start: int = 0) -> Tensor:
    return (torch.arange(rows) + start).double()[:, None] * base ** (-torch.arange(pairs) / (pairs - closed))


def halves(width: int, **form: Any) -> Tensor:
    a = angles(ROWS, width // 2, **form)
    return torch.cat((a.sin(), a.cos()), 1).float()


def in_turn(width: int) -> Tensor:
    a = angles(ROWS, width // 2)
    return torch.stack((a.sin(), a.cos()), 2).flatten(1).float()


def padded(width: int) -> Tensor:
    """As fairseq's: the last frequency is 1 / base, positions start at 2, and the row of the padding is zero."""
    table = halves(width, closed=True, start=2)
    table[1] = 0
    return table


def grid(width: int) -> Tensor:
    """Rows and columns of a picture of 4 x 4 patches, a quarter apart."""
    y, x = (g.flatten().double()[:, None] / 4 for g in torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"))
    w = 10000.0 ** (-torch.arange(width // 4) / (width // 4))
    return torch.cat(((y * w).sin(), (y * w).cos(), (x * w).sin(), (x * w).cos()), 1).float()


def scaled(width: int) -> Tensor:
    return 0.02 * halves(width)


def other_base(width: int) -> Tensor:
    return halves(width, base=500000.0)


FORMULAS: list[Callable[[int], Tensor]] = [halves, in_turn, padded, grid, scaled, other_base]


class Positions(nn.Module):
    """A residual network with a norm, to whose stream a table [rows, width] is added; `kind` says how it is stored."""

    def __init__(self, table: Tensor, kind: str = "buffer") -> None:
        super().__init__()
        self.kind = kind
        self.i, self.o = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 3)
        self.norm, self.a, self.b = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        if kind == "plain":
            self.pe = table
        elif kind == "parameter":
            self.pe = nn.Parameter(table, requires_grad=False)
        else:
            self.register_buffer("pe", table, persistent=kind == "buffer")

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        x = self.i(x) + (self.pe.index_select(0, places) if self.kind == "unsaved" else self.pe[: x.shape[1]])
        return self.o(x + self.b(self.a(self.norm(x)).relu()))


def wide(model: nn.Module, x: Tensor, **options: Any) -> tuple[Any, Any]:
    """The transformed model; every layer has grown on all sides but the input's and the output's, and it runs."""
    new, plan = sparseift.transform(model, x, sparsity=SPARSITY, **options)
    for row in plan.layers:
        if row.layer.weighted and row.layer.role == "body":
            assert (row.status, row.macs) == ("transformed", row.dense_macs)
            assert row.parts[0].shape.weights == 4 * row.layer.shape(plan.table.sizes).weights
    y = new(x)
    assert y.shape == model(x).shape
    y.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in new.parameters())
    return new, plan


X = torch.randn(2, 6, 8)


@pytest.mark.parametrize("kind", ["buffer", "unsaved", "plain"])
@pytest.mark.parametrize("formula", FORMULAS)
def test_a_table_of_sines_is_computed_at_the_new_width(formula: Callable[[int], Tensor], kind: str) -> None:
    new, _ = wide(Positions(formula(WIDTH), kind), X)
    torch.testing.assert_close(new.pe, formula(2 * WIDTH), atol=1e-5, rtol=0)
    assert ("pe" in new.state_dict()) == (kind == "buffer")


@pytest.mark.parametrize("kind", ["buffer", "plain"])
def test_any_other_table_that_is_added_is_repeated_and_said(kind: str) -> None:
    table = torch.randn(ROWS, WIDTH)
    new, _ = wide(Positions(table, kind), X)
    assert torch.equal(new.pe, torch.cat((table, table), 1))
    done = transformation_of(new)
    assert done is not None
    (note,) = done.notes
    assert note == "pe (16x32 -> 16x64) is no parameter and follows no known formula: its entries are repeated"


def test_plan_and_cost_are_those_of_a_parameter() -> None:
    table = torch.randn(ROWS, WIDTH)
    (_, buffer), (_, parameter) = (wide(Positions(table, kind), X) for kind in ("buffer", "parameter"))
    assert [r.macs for r in buffer.layers if r.macs] == [r.macs for r in parameter.layers if r.macs]


@pytest.mark.parametrize("kind", ["buffer", "unsaved", "plain"])
@pytest.mark.parametrize("formula", [halves, torch.randn])
def test_a_preserved_table_keeps_the_function(formula: Any, kind: str) -> None:
    table = formula(WIDTH) if formula is halves else formula(ROWS, WIDTH)
    model = Positions(table, kind).eval()
    new, _ = wide(model, X, options=sparseift.Options(start="preserve", preserve_slack=0))
    torch.testing.assert_close(new.eval()(X), model(X), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["buffer", "unsaved", "plain"])
@pytest.mark.parametrize("start", ["fresh", "preserve"])
def test_a_saved_table_is_loaded(kind: str, start: Any, tmp_path: Path) -> None:
    new, _ = wide(Positions(torch.randn(ROWS, WIDTH), kind), X, options=sparseift.Options(start=start))
    sparseift.save(new, tmp_path / "m")
    other = Positions(torch.randn(ROWS, WIDTH), kind)  # the same network, built again with another draw
    again = sparseift.load(tmp_path / "m", into=other)
    assert torch.equal(again.pe, new.pe) and torch.equal(again(X), new.eval()(X))


def test_the_dense_model_keeps_its_table() -> None:
    model = Positions(table := torch.randn(ROWS, WIDTH), "plain")
    wide(model, X)
    assert model.pe is table and "pe" in model.__dict__


class Rotary(nn.Module):
    """Attention with cached angles, [positions, head_dim] or complex [positions, head_dim / 2]."""

    cos: Tensor
    sin: Tensor | None

    def __init__(self, cos: Tensor, sin: Tensor | None = None, kind: str = "buffer") -> None:
        super().__init__()
        self.i, self.qkv, self.p, self.o = nn.Linear(8, 32), nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 3)
        for name, value in (("cos", cos), ("sin", sin)):
            self.register_buffer(name, value, persistent=False) if kind == "buffer" else setattr(self, name, value)

    def turned(self, x: Tensor) -> Tensor:
        if self.sin is None:
            pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
            return torch.view_as_real(pairs * self.cos[: x.shape[-2]]).flatten(-2)
        a, b = x.chunk(2, -1)
        return x * self.cos[: x.shape[-2]] + torch.cat((-b, a), -1) * self.sin[: x.shape[-2]]

    def forward(self, x: Tensor) -> Tensor:
        x = self.i(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v)
        return self.o(x + self.p(y.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("kind", ["buffer", "plain"])
def test_cached_rotary_angles_follow_the_head_dim(kind: str) -> None:
    twice = torch.cat((angles(ROWS, 4), angles(ROWS, 4)), 1).float()
    new, _ = wide(Rotary(twice.cos(), twice.sin(), kind), X)
    want = torch.cat((angles(ROWS, 8), angles(ROWS, 8)), 1).float()
    torch.testing.assert_close(new.cos, want.cos())
    torch.testing.assert_close(new.sin, want.sin())


def test_complex_rotary_angles_follow_the_head_dim() -> None:
    new, _ = wide(Rotary(torch.polar(torch.ones(ROWS, 4), angles(ROWS, 4).float())), X)
    torch.testing.assert_close(new.cos, torch.polar(torch.ones(ROWS, 8), angles(ROWS, 8).float()))


def scaled_angles() -> Rotary:
    """Frequencies that are stretched one by one, as YaRN does: no formula that is known here."""
    a = (torch.arange(ROWS)[:, None] * torch.tensor([1.0, 0.1, 0.003, 0.0001])).repeat(1, 2)
    return Rotary(a.cos(), a.sin())


class Projected(nn.Module):
    """A random projection that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.m, self.o = nn.Linear(8, 32), nn.Linear(16, 16), nn.Linear(16, 3)
        self.register_buffer("draw", torch.randn(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.m(self.i(x) @ self.draw).relu())


class Frozen(nn.Module):
    """Word vectors of a fixed size that are looked up and not trained: an input, like any other."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.m, self.o = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 3)
        self.register_buffer("words", torch.randn(11, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.m(self.i(F.embedding(x, self.words)).relu()).relu())


def test_tables_that_no_rule_makes_larger_keep_their_width_by_name() -> None:
    _, plan = sparseift.transform(scaled_angles(), X, sparsity=SPARSITY)
    reasons = {w.name: w.fixed for w in plan.table.widths}
    assert "tied to buffer cos, which is multiplied and follows no known formula" in reasons.values()
    _, plan = sparseift.transform(Projected(), X, sparsity=SPARSITY)
    kept = [w.size for w in plan.table.widths if w.fixed == "tied to buffer draw, which a product reads"]
    assert kept == [32, 16]
    new: Any = sparseift.transform(Frozen(), torch.zeros(2, 6, dtype=torch.long), sparsity=SPARSITY)[0]
    assert (new.words.shape, new.i.weight.shape, new.m.weight.shape) == ((11, 32), (64, 32), (64, 64))


class Constants(nn.Module):
    """A blur of every channel, a bias of zeros that is not trained, and factors that differ from part to part."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.c, self.d, self.e = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(32, 5, 1)
        self.register_buffer(
            "kernel", torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0])).repeat(16, 1, 1, 1)
        )
        self.zeros = torch.zeros(32)
        self.factors = torch.cat((torch.full((16,), 0.5), torch.full((16,), 2.0)))[:, None, None]

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.c(x).relu(), self.kernel, groups=self.kernel.shape[0])
        y = F.conv2d(x, self.d.weight, self.d.bias, padding=1)
        both = torch.cat((x, y), 1) + self.zeros[:, None, None]
        return self.e(both * self.factors)


def test_constants_stay_what_they_are_at_every_size() -> None:
    x = torch.randn(2, 3, 9, 9)
    new: Any = sparseift.transform(Constants(), x, sparsity=SPARSITY)[0]
    assert new.kernel.shape == (32, 1, 3, 3) and torch.equal(new.kernel[0], new.kernel[31])
    assert torch.equal(new.zeros, torch.zeros(64))
    assert new.factors.flatten().tolist() == [0.5] * 32 + [2.0] * 32
    assert new(x).shape == (2, 5, 5, 5)


@pytest.mark.parametrize("table", [torch.randn(9, 32), torch.zeros(9, 32), torch.ones(9, 32), torch.rand(9, 2).cos()])
def test_what_is_no_table_of_sines_is_not_taken_for_one(table: Tensor) -> None:
    assert find_sinusoids(table) is None


class Held(nn.Module):
    """A projection that is not trained, on the stream: nothing may grow."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.m, self.o = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 3)
        self.register_buffer("draw", torch.randn(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.o((y := self.i(x) @ self.draw) + self.m(y))


WHY = "tied to buffer draw, which a product reads (make it a parameter, or compute it in forward from the width)"


def test_widths_that_stay_are_said_with_what_to_do() -> None:
    audit = sparseift.flops(Projected(), X, sparsity=SPARSITY)
    assert audit.kept_widths() == f"1 of 2 widths of the body grew: m.weight[1] stays, {WHY}"
    assert (
        to_json(audit)["kept_widths"] == audit.kept_widths()
        and f"{audit.kept_widths()}." in totals_sheet(audit, "").notes
    )
    with pytest.raises(sparseift.UsageError, match="no width that Sparse Wide can grow") as error:
        sparseift.flops(Held(), X, sparsity=SPARSITY)
    assert error.value.message.endswith(f": m.weight[0] stays, {WHY}")


def test_widths_that_follow_from_a_fixed_one_give_its_reason() -> None:
    kept = sparseift.flops(scaled_angles(), X, sparsity=SPARSITY).kept_widths()
    assert kept == (
        "1 of 3 widths of the body grew: qkv.weight[0], p.weight[1] stay, tied to buffer cos, which is multiplied and follows "
        "no known formula (make it a parameter, or compute it in forward from the width)"
    )


def test_outputs_that_stay_are_nothing_to_mend() -> None:
    assert sparseift.flops(Positions(halves(WIDTH)), X, sparsity=SPARSITY).kept_widths() is None
    assert sparseift.flops(Positions(halves(WIDTH)), X, sparsity=SPARSITY, scope="inner").kept_widths() is None


def blurred() -> tuple[nn.Module, Tensor]:
    return Constants(), torch.zeros(2, 3, 9, 9)


def turned() -> tuple[nn.Module, Tensor]:
    twice = torch.cat((angles(ROWS, 4), angles(ROWS, 4)), 1).float()
    return Rotary(twice.cos(), twice.sin()), torch.zeros(2, 6, 8)


def stretched() -> tuple[nn.Module, Tensor]:
    return scaled_angles(), torch.zeros(2, 6, 8)


@pytest.mark.parametrize("make", [blurred, turned, stretched])
def test_flops_of_a_source_are_those_of_the_transform(make: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    """`flops` builds on meta, where no buffer has values: it reads them where they decide what grows."""
    source = sparseift.flops(f"{__name__}:{make.__name__}", sparsity=SPARSITY)
    model = sparseift.flops(*make(), sparsity=SPARSITY)
    assert [(r.layer.name, r.status, r.macs) for r in source.plan.layers] == [
        (r.layer.name, r.status, r.macs) for r in model.plan.layers
    ]
