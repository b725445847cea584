"""Products of every kind against MACs by hand; what hides products (vmap, derivatives, compilers); what is refused in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparseift_cli as sparseift
from sparseift_cli.errors import UsageError
from sparseift_cli.plan.audit import audit
from sparseift_cli.table.table import LayerTable
from sparseift_cli.trace.build import layer_table
from sparseift_cli.transforms.transformation import Options
from tests.helpers.parts import Net

X = (8, 16)


def traced(model: nn.Module, shape: tuple[int, ...] = X) -> LayerTable:
    return layer_table(model, (torch.zeros(shape),), name="net", input_shape=shape)


def net(forward: Callable[..., Any], **more: nn.Module) -> Net:
    """Layers `a` 16 > 16 and `c` 16 > 4, and parameters: a square matrix, a vector and a cube of 16."""
    found = Net(forward, a=nn.Linear(16, 16), c=nn.Linear(16, 4), **more)
    for name, dims in (("matrix", 2), ("vector", 1), ("cube", 3)):
        found.register_parameter(name, nn.Parameter(torch.randn((16,) * dims)))
    return found


AROUND = 8 * 16 * 16 + 8 * 16 * 4  # what a and c cost

# What is computed of h [8, 16] between a and c, and its MACs.
PRODUCTS: dict[str, tuple[Callable[[Any, Tensor], Tensor], int]] = {
    "mv": (lambda n, h: h * (h @ n.vector)[:, None], 8 * 16),
    "mv of a parameter": (lambda n, h: h + n.matrix @ n.vector, 16 * 16),
    "addmv": (lambda n, h: h * torch.addmv(h[:, 0], h, n.vector)[:, None], 8 * 16),
    "addmv in place": (lambda n, h: h * (h[:, 0] * 1).addmv_(h, n.vector)[:, None], 8 * 16),
    "mv with out": (lambda n, h: h * torch.mv(h, n.vector, out=torch.empty(8))[:, None], 8 * 16),
    "dot": (lambda n, h: h * torch.dot(n.vector, h[0]), 16),
    "vdot": (lambda n, h: h * torch.vdot(n.vector, h[0]), 16),
    "inner": (lambda n, h: torch.inner(h, n.matrix), 8 * 16 * 16),
    "addmm": (lambda n, h: torch.addmm(h, h, n.matrix), 8 * 16 * 16),
    "addmm in place": (lambda n, h: (h * 1).addmm_(h, n.matrix), 8 * 16 * 16),
    "addmm with out": (lambda n, h: torch.addmm(h, h, n.matrix, out=torch.empty(8, 16)), 8 * 16 * 16),
    "mm with out": (lambda n, h: torch.mm(h, n.matrix, out=torch.empty(8, 16)), 8 * 16 * 16),
    "addbmm": (lambda n, h: torch.addbmm(h, h.view(2, 8, 8), n.matrix.view(2, 8, 16)), 2 * 8 * 8 * 16),
    "addbmm in place": (lambda n, h: (h * 1).addbmm_(h.view(2, 8, 8), n.matrix.view(2, 8, 16)), 2 * 8 * 8 * 16),
    "baddbmm": (lambda n, h: torch.baddbmm(h[None], h[None], n.matrix[None])[0], 8 * 16 * 16),
    "baddbmm in place": (lambda n, h: (h[None] * 1).baddbmm_(h[None], n.matrix[None])[0], 8 * 16 * 16),
    "einsum of three": (lambda n, h: torch.einsum("bi,ij,jk->bk", h, n.matrix, n.matrix), 2 * 8 * 16 * 16),
    "tensordot": (lambda n, h: torch.tensordot(h, n.matrix, dims=1), 8 * 16 * 16),
    "multi_dot": (lambda n, h: torch.linalg.multi_dot([h, n.matrix, n.matrix]), 2 * 8 * 16 * 16),
    "broadcast": (lambda n, h: (h.view(2, 1, 4, 16) @ n.matrix[None]).view(8, 16), 8 * 16 * 16),
    "bilinear": (lambda n, h: F.bilinear(h, h, n.cube, n.vector), 8 * 16 * (16 * 16 + 16)),
    "distances": (lambda n, h: torch.cdist(h, n.matrix), 8 * 16 * 16),
    "many distances": (lambda n, h: torch.cdist(h.repeat(4, 1), n.matrix)[:8], 32 * 16 * 16),
    "int8": (lambda n, h: torch.ops.aten._int_mm(h.repeat(3, 1).char(), n.matrix.char())[:8].float(), 24 * 16 * 16),
    "fp8": (
        lambda n, h: torch.ops.aten._scaled_mm(
            h.to(torch.float8_e4m3fn), n.matrix.to(torch.float8_e4m3fn).t(), torch.ones(()), torch.ones(())
        ).float(),
        8 * 16 * 16,
    ),
    "a channel behind time": (
        lambda n, h: torch.conv_tbc(h.view(2, 4, 16), n.matrix[None], n.vector).view(8, 16),
        8 * 16 * 16,
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    product, macs = PRODUCTS[name]
    table = traced(net(lambda n, x: n.c(product(n, n.a(x)))))
    assert (table.macs, table.uncounted) == (AROUND + macs, ())


def test_a_product_of_a_vector_has_two_gradients() -> None:
    """mv: of the matrix and of the vector, 128 each. The first layer has no gradient of its input."""
    table = traced(net(lambda n, x: n.c((h := n.a(x)) * (h @ n.vector)[:, None])))
    assert audit(table).dense.training_macs == 2 * 2048 + 3 * 128 + 3 * 512


def test_other_norms_than_the_euclidean_are_no_products() -> None:
    table = traced(net(lambda n, x: n.c(torch.cdist(n.a(x), n.matrix, p=1))))
    assert (table.macs, table.uncounted) == (AROUND, ("aten._cdist_forward in the model",))


@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_bilinear_layers_widen_and_keep_the_function(sparsity: float) -> None:
    """At k times the width it has k ** 3 times the weights, of which the dense number is not zero."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Twice(nn.Bilinear(8, 8, 10)), nn.ReLU(), nn.Linear(10, 3))
    x = torch.randn(4, 6)
    new, plan = sparseift.transform(model, x, sparsity=sparsity, options=Options(start="preserve", preserve_slack=0))
    row = next(row for row in plan.layers if row.layer.kind == "bilinear")
    assert (row.status, row.nnz) == ("transformed", 8 * 8 * 10)
    torch.testing.assert_close(new.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    sparseift.audit(new, x)


class Twice(nn.Module):
    """A bilinear layer of its input with itself."""

    def __init__(self, layer: nn.Bilinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x)


@pytest.mark.parametrize(
    ("a", "b", "macs"), [((10, 8), (3, 8, 6), 10 * 8 * 6), ((3, 5, 8), (3, 8, 16), 3 * 5 * 8 * 16)]
)
def test_grouped_products(a: tuple[int, ...], b: tuple[int, ...], macs: int) -> None:
    if not hasattr(F, "grouped_mm"):
        pytest.skip("this PyTorch has no grouped_mm")
    model = Net(lambda n, x: F.grouped_mm(x.bfloat16(), n._parameters["w"], offs=n.ends if len(a) == 2 else None))
    model.register_parameter("w", nn.Parameter(torch.randn(b, dtype=torch.bfloat16)))
    model.ends = torch.tensor([2, 5, 10], dtype=torch.int32)
    assert traced(model, a).macs == macs


# --- what hides products ---


def layers(forward: Callable[[Any, Tensor], Any]) -> Net:
    return Net(forward, a=nn.Linear(16, 16), b=nn.Linear(16, 16), c=nn.Linear(16, 1))


def inner(n: Any, x: Tensor) -> Tensor:
    return n.c(torch.tanh(n.b(torch.tanh(n.a(x)))))


ONCE = 8 * (256 + 256 + 16)  # `inner` on all samples; its gradient by the input is three products of the same size


def energy_and_force(n: Net, x: Tensor) -> Any:
    place = x.detach().requires_grad_(True)
    energy = inner(n, place)
    return energy, torch.autograd.grad(energy.sum(), place, create_graph=True)[0]


def ensemble(n: Any, x: Tensor) -> Tensor:
    """Three members, each a linear layer 16 > 16 with a weight of its own."""
    member = nn.Linear(16, 16, bias=False).to("meta")
    weights = torch.stack([n.a.weight, n.b.weight, n.a.weight + n.b.weight])
    out = torch.vmap(lambda w: torch.func.functional_call(member, {"weight": w}, (x,)))(weights)
    return n.c(out.mean(0))


HIDDEN: dict[str, tuple[Callable[[Any, Tensor], Any], int]] = {
    "vmap": (lambda n, x: torch.vmap(lambda row: inner(n, row))(x), ONCE),
    "vmap of an ensemble": (ensemble, 3 * 8 * 256 + 8 * 16),
    "func.grad": (lambda n, x: torch.vmap(torch.func.grad(lambda row: inner(n, row).sum()))(x), 2 * ONCE),
    # PyTorch also multiplies with the tangent of every weight, which is zero
    "jvp": (lambda n, x: torch.func.jvp(lambda y: inner(n, y), (x,), (x,))[1], 3 * ONCE),
    "autograd.grad": (energy_and_force, 2 * ONCE),
    "functional_call": (
        lambda n, x: n.c(torch.func.functional_call(n.a, {"weight": n.b.weight * 2, "bias": n.b.bias}, (x,))),
        8 * (256 + 16),
    ),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_products_behind_transforms_of_functions(name: str) -> None:
    forward, macs = HIDDEN[name]
    table = traced(layers(forward))
    assert (table.macs, table.uncounted) == (macs, ())


def test_attention_under_vmap_counts_every_sample() -> None:
    """2 samples of 4 heads, 5 tokens of 4: PyTorch's counter sees no product of attention on a CPU."""
    model = Net(
        lambda n, x: torch.vmap(lambda s: n.m(s, s, s, need_weights=False)[0])(x),
        m=nn.MultiheadAttention(16, 4, batch_first=True),
    )
    assert traced(model, (2, 5, 16)).macs == 10 * 16 * 64 + 2 * (2 * 4 * 5 * 5 * 4)


def test_a_force_field_widens() -> None:
    model, x = layers(energy_and_force), torch.randn(8, 16)
    new, plan = sparseift.transform(model, x, sparsity=0.75)
    assert [row.layer.name for row in plan.layers if row.status == "transformed"] == ["b"]
    sparseift.audit(new, x)


def test_flex_attention_counts_as_attention() -> None:
    """2 samples, 1 head, 4 queries and keys of 16."""
    flex = pytest.importorskip("torch.nn.attention.flex_attention").flex_attention
    model = net(
        lambda n, x: n.c(flex(*[n.a(x).view(2, 1, 4, 16)] * 3, score_mod=lambda s, b, h, q, k: s + q).view(8, 16))
    )
    table = traced(model)
    assert (table.macs, table.uncounted) == (AROUND + 2 * (2 * 4 * 4 * 16), ())


MLP = 8 * (16 * 16 + 16 * 4)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.compile(mlp()),
        lambda: nn.Sequential(torch.compile(mlp()[:2]), mlp()[2]),
        lambda: Net(torch.compile(lambda n, x: n.inner(x)), inner=mlp()),
        lambda: torch.jit.script(mlp()),
        lambda: torch.jit.trace(mlp(), torch.zeros(X)),
        lambda: torch.fx.symbolic_trace(mlp()),
        lambda: torch.export.export(mlp(), (torch.zeros(X),)).module(),
    ],
    ids=["compiled", "compiled part", "compiled function", "script", "jit trace", "fx", "exported"],
)
def test_what_compilers_made_costs_what_was_compiled(make: Callable[[], nn.Module]) -> None:
    table = traced(make())
    assert (table.macs, audit(table).dense.training_macs) == (MLP, 2 * 2048 + 3 * 512)


# --- what is refused, in one line ---


def branches(n: Net, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda y: n.a(y), lambda y: n.c(y), (x,))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "cond": (lambda: net(branches), "calls torch.cond"),
    "sparse": (lambda: net(lambda n, x: n.c(torch.eye(8).to_sparse() @ n.a(x))), "sparse tensors"),
    "nested": (
        lambda: net(lambda n, x: n.a(torch.nested.nested_tensor([x[:3], x[3:]])).to_padded_tensor(0.0)),
        "nested tensors",
    ),
    "numpy": (lambda: net(lambda n, x: n.c(torch.from_numpy(n.a(x).detach().numpy()))), "the values of tensors"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(16), nn.Linear(16, 4)), "lazy layers"),
    "exported program": (lambda: torch.export.export(mlp(), (torch.zeros(X),)), "no module but of class"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:Lazy modules", "ignore:The PyTorch API of nested tensors")
def test_what_shapes_cannot_tell_is_refused_in_one_line(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(UsageError, match=message) as error:
        traced(make())
    assert "\n" not in error.value.message and len(error.value.message) < 200 and error.value.hint
