"""Whether a parameter is a layer, a table or experts follows from how forward multiplies with it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseift_cli import transform
from sparseift_cli.errors import UsageError
from sparseift_cli.table.table import Layer
from sparseift_cli.trace.build import layer_table

WIDTH, HEADS, DIM, TOKENS = 16, 4, 6, 10
X = torch.zeros(2, 5, 8)


class Body(nn.Module):
    """8 features -> 16 -> a product with a parameter of the given shape -> 3."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.stem, self.mid, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.table, self.use = nn.Parameter(torch.randn(*shape)), use

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(F.relu(self.stem(x)))
        y = self.use(F.relu(x), self.table)
        return self.head(y.flatten(2).mean(-1, keepdim=True) + x)


def grouped(x: Tensor, w: Tensor) -> Tensor:
    """One block [in, out] a head, as RecurrentGemma's gates."""
    b, t, _ = x.shape
    blocks = x.reshape(b * t, w.shape[0], w.shape[1]).transpose(0, 1)
    return torch.bmm(blocks, w).transpose(0, 1).reshape(b, t, -1)


def each_sees_all(x: Tensor, w: Tensor) -> Tensor:
    """Four matrices, every one of them for every token: experts without a router."""
    tokens = x.flatten(0, 1).expand(w.shape[0], -1, -1)
    return torch.bmm(tokens, w).mean(0).view(*x.shape[:2], -1)


def scores_of_heads(x: Tensor, w: Tensor) -> Tensor:
    """Two embeddings [2, heads, head_dim] against the queries of every head, as Funnel's segments."""
    q = x.view(*x.shape[:2], w.shape[1], w.shape[2])
    return torch.einsum("btnd,snd->btns", q, w)


LAYERS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], int]] = {
    "into heads": (lambda x, w: torch.einsum("bth,hnd->btnd", x, w), (WIDTH, HEADS, DIM), WIDTH * HEADS * DIM),
    "out of heads": (
        lambda x, w: torch.einsum("btnd,hnd->bth", x.view(2, 5, HEADS, -1), w),
        (9, HEADS, WIDTH // HEADS),
        9 * WIDTH,
    ),
    "a block a head": (grouped, (HEADS, WIDTH // HEADS, 5), WIDTH * 5),
}


def relative(x: Tensor, q: Tensor, k: Tensor, o: Tensor) -> Tensor:
    """Attention of four heads by weights [features, heads, head_dim] alone, as XLNet's."""
    query, key = (torch.einsum("bth,hnd->btnd", x, w) for w in (q, k))
    weights = torch.einsum("bind,bjnd->bnij", query, key).softmax(-1)
    return torch.einsum("bnij,bjnd,hnd->bih", weights, key, o)


def test_heads_that_only_weights_show_stay_in_number() -> None:
    class Relative(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 3)
            self.q, self.k, self.o = (nn.Parameter(torch.randn(WIDTH, HEADS, 4)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(x + relative(x, self.q, self.k, self.o))

    new, plan = transform(Relative().eval(), X, sparsity=0.75)
    assert new.q.shape == new.k.shape == new.o.shape == (2 * WIDTH, HEADS, 8)
    assert [p.layer.name for p in plan.layers if p.status == "transformed"] == ["q", "k", "o"]
    assert new(X).shape == (2, 5, 3)


def row(model: nn.Module, name: str = "table") -> tuple[Layer, int]:
    table = layer_table(model, (X,), name="net", input_shape=(2, 5, 8))
    (found,) = (layer for layer in table.layers if layer.name == name)
    return found, found.macs.evaluate(table.sizes)


@pytest.mark.parametrize("name", LAYERS)
def test_a_parameter_of_three_dims_is_a_layer_and_grows(name: str) -> None:
    use, shape, weights = LAYERS[name]
    model = Body(use, *shape).eval()
    layer, macs = row(model)
    assert (layer.kind in ("linear", "grouped linear"), layer.role, macs) == (True, "body", TOKENS * weights)
    new, plan = transform(model, X, sparsity=0.75)
    (planned,) = (p for p in plan.layers if p.layer.name == "table")
    assert planned.status == "transformed" and planned.macs == macs
    assert int(new.table.count_nonzero()) == planned.nnz == weights
    assert new.table.numel() > weights
    assert new(X).shape == (2, 5, 3)


@pytest.mark.parametrize("name", LAYERS)
def test_a_pattern_needs_to_know_the_outputs(name: str) -> None:
    use, shape, _ = LAYERS[name]
    with pytest.raises(UsageError, match="pattern 2x2 does not fit table: which of the 3 dims"):
        transform(Body(use, *shape).eval(), X, sparsity=0.75, pattern="2x2")


def test_what_is_no_layer() -> None:
    assert row(Body(each_sees_all, 4, WIDTH, 5))[0].kind == "experts"
    layer, macs = row(Body(scores_of_heads, 2, HEADS, WIDTH // HEADS))
    assert (layer.kind, layer.role, macs) == ("matmul", "attention", TOKENS * 2 * WIDTH)


@pytest.mark.parametrize(
    "copy",
    [lambda w: w.to(torch.float64).float(), lambda w: w.clone(), lambda w: w.t().contiguous().t()],
    ids=["in another dtype and back", "a clone", "in another order"],
)
@pytest.mark.parametrize("member", ["wide", "factorized"])
def test_a_copy_of_a_weight_is_that_weight(copy: Callable[[Tensor], Tensor], member: str) -> None:
    class Copied(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, copy(self.weight), self.bias)

    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), Copied(16, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    _, plan = transform(model, X, sparsity=0.75, member=member)
    assert [p.layer.name for p in plan.layers if p.status == "transformed"] == ["2"]


def test_a_copy_that_is_changed_is_no_weight() -> None:
    def shifted(x: Tensor, w: Tensor) -> Tensor:
        w = w.clone()
        w[:2] += 0.5  # its zeros are no zeros of the product
        return x @ w

    table = layer_table(Body(shifted, WIDTH, WIDTH), (X,), name="net", input_shape=(2, 5, 8))
    assert [layer.weight for layer in table.layers if layer.kind == "matmul"] == [None]


class GroupedLinear(nn.Linear):
    """A matrix for each of four groups, kept as one below the other: [..., 4, in] -> [..., 4, out]."""

    def forward(self, input: Tensor) -> Tensor:
        matrices = self.weight.view(4, -1, input.shape[-1]).transpose(1, 2)
        return torch.bmm(input.flatten(0, 1).transpose(0, 1), matrices).transpose(0, 1).unflatten(0, input.shape[:2])


def test_a_matrix_that_is_viewed_as_a_batch_is_a_grouped_layer() -> None:
    """96 x 32 weights, six tokens: 18,432 MACs. Twice as wide 192 x 64, of which 3,072 are non-zero."""
    model = nn.Sequential(nn.Linear(16, 32), GroupedLinear(32, 96, bias=False), nn.Linear(24, 5))
    x = torch.randn(2, 3, 4, 16)
    new, plan = transform(model, x, sparsity=0.75)
    (row,) = (p for p in plan.layers if p.layer.name == "1")
    assert (row.layer.kind, row.dense_macs, row.macs, row.parts[0].shape.groups) == ("grouped linear", 18432, 18432, 4)
    assert (new[1].weight.shape, int(new[1].weight.count_nonzero())) == ((192, 64), 3072)
    new(x).sum().backward()
    assert new[1].weight.grad.isfinite().all()
