"""Attention whose query, key or value is broadcast: the MACs of the broadcast shape, by hand. And products on older torch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher

import sparseift_cli as sparseift
from sparseift_cli.errors import UsageError
from sparseift_cli.trace import fake_mode
from sparseift_cli.trace.build import layer_table
from sparseift_cli.transforms.transformation import Options


class Attend(nn.Module):
    """Its input is the query."""

    def __init__(self, k: Tensor, v: Tensor, mask: Tensor | None = None, *, grouped: bool = False) -> None:
        super().__init__()
        self.rest, self.grouped = (k, v, mask), grouped

    def forward(self, q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, *self.rest, enable_gqa=self.grouped)


# Batch and heads of query, key and value; then of the scores and of the output. 3 queries meet 5 keys of 8, values of 6.
BROADCAST = {
    "query over samples": ((1, 4), (2, 4), (2, 4), (2, 4), (2, 4)),
    "query over heads": ((2, 1), (2, 4), (2, 4), (2, 4), (2, 4)),
    "query without either": ((), (2, 4), (2, 4), (2, 4), (2, 4)),
    "key over heads": ((2, 4), (2, 1), (2, 4), (2, 4), (2, 4)),
    "value over samples": ((2, 4), (2, 4), (1, 4), (2, 4), (2, 4)),
    "key and value without samples": ((2, 4), (4,), (4,), (2, 4), (2, 4)),
    "query over heads, key over samples": ((2, 1), (1, 4), (1, 4), (2, 4), (2, 4)),
    "scores over samples": ((1, 4), (1, 4), (2, 4), (1, 4), (2, 4)),
    "query over samples, two heads of keys": ((1, 4), (2, 2), (2, 2), (2, 4), (2, 4)),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", BROADCAST)
def test_attention_costs_what_its_broadcast_shape_costs(name: str, masked: bool) -> None:
    *given, scores, out = BROADCAST[name]
    q, k, v = (torch.zeros(*lead, *own) for lead, own in zip(given, ((3, 8), (5, 8), (5, 6)), strict=True))
    model = Attend(k, v, torch.zeros(3, 5) if masked else None, grouped="two heads of keys" in name)
    table = layer_table(model, (q,), name="net", input_shape=tuple(q.shape))
    products = {r.kind: (r.macs.evaluate(table.sizes), r.activations.evaluate(table.sizes)) for r in table.layers}
    samples_and_heads = [math.prod(scores), math.prod(out)]
    assert products == {
        "qk": (samples_and_heads[0] * 3 * 5 * 8, 0),
        "av": (samples_and_heads[1] * 3 * 5 * 6, samples_and_heads[1] * 3 * 6),
    }
    assert model(q).shape == (*out, 3, 6)
    assert table.uncounted == ()


def test_sizes_that_cannot_be_broadcast_are_refused() -> None:
    k = torch.zeros(2, 3, 5, 8)
    model = Attend(k, k)
    with pytest.raises(UsageError, match="sizes do not match: 4 and 3"):
        layer_table(model, (torch.zeros(2, 4, 3, 8),), name="net", input_shape=(2, 4, 3, 8))


class SharedQueries(nn.Module):
    """Learned queries that all samples share, and where `one` is set all heads too."""

    def __init__(self, one: bool) -> None:
        super().__init__()
        self.heads = 1 if one else 4
        self.latents = nn.Parameter(torch.randn(1, 3, 16))
        self.a, self.q, self.k, self.v = (
            nn.Linear(16, 16),
            nn.Linear(16, 4 * self.heads),
            nn.Linear(16, 16),
            nn.Linear(16, 16),
        )
        self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        q = self.q(self.latents).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (f(x).unflatten(-1, (4, -1)).transpose(1, 2) for f in (self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.c(torch.relu(self.b(mixed)))


@pytest.mark.parametrize("one", [False, True])
def test_wide_keeps_the_function_of_shared_queries(one: bool) -> None:
    model, x = SharedQueries(one), torch.randn(2, 5, 16)
    new, plan = sparseift.transform(model, x, sparsity=0.75, options=Options(start="preserve", preserve_slack=0))
    assert {r.layer.name for r in plan.layers if r.status == "transformed"} >= {"k", "v", "b"}
    torch.testing.assert_close(new.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    sparseift.audit(new, x)


class Product(nn.Module):
    """Three dimensions by a matrix that is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 24), nn.Linear(24, 3)
        self.matrix = nn.Parameter(torch.randn(24, 24))

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x) @ self.matrix)


@pytest.mark.parametrize("inner", [nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), Product()])
def test_what_older_versions_of_torch_need_changes_no_row(inner: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their native `linear` and `matmul` fail on symbolic sizes, so those traces take Python's."""
    model = nn.Sequential(nn.Linear(16, 16), inner).eval()
    x = torch.zeros(2, 5, 16)
    native = layer_table(model, (x,), name="net", input_shape=tuple(x.shape))
    monkeypatch.setattr(fake_mode, "_symbolic_sizes", enable_python_dispatcher)
    assert layer_table(model, (x,), name="net", input_shape=tuple(x.shape)) == native
    assert native.untraceable is None
