"""Names of rows are unique whatever the modules and parameters of a model are called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sparseift_cli import transform
from sparseift_cli.trace.build import layer_table

WIDTH = 16
X = torch.zeros(2, 5, 8)


class Attention(nn.Module):
    """One head by hand; `names` are those of the layers for query and key, for the value, and for the output."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        for name, outputs in zip(names, (2 * WIDTH, WIDTH, WIDTH), strict=True):
            self.add_module(name, nn.Linear(WIDTH, outputs))

    def forward(self, x: Tensor) -> Tensor:
        both, value, out = (self.get_submodule(name) for name in self.names)
        q, k = both(x).chunk(2, -1)
        return x + out((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ value(x))


class Model(nn.Module):
    """An embedding, what is tested under a name of its own, and a head."""

    def __init__(self, name: str, body: nn.Module) -> None:
        super().__init__()
        self.stem, self.body_name, self.head = nn.Linear(8, WIDTH), name, nn.Linear(WIDTH, 3)
        self.add_module(name, body)

    def forward(self, x: Tensor) -> Tensor:
        x = self.get_submodule(self.body_name)(self.stem(x))
        x = (x @ x.transpose(-2, -1)).softmax(-1) @ x  # products of the model itself
        return self.head(x)


class Bare(nn.Module):
    """Parameters called like modules without their `_weight`, in a list, and a layer without parameters called like a product."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.q_weight = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.zeros(WIDTH, WIDTH))
        self.items = nn.ParameterList([nn.Parameter(torch.zeros(WIDTH, WIDTH)) for _ in range(2)])
        self.matmul = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(self.q(x), self.q_weight) @ self.items[0] @ self.items[1]
        return self.matmul(x[0] @ x[0].T)[None] @ x


MODELS: dict[str, Any] = {
    "qk and v": lambda: Model("attn", Attention("qk", "v", "proj")),
    "qk and av": lambda: Model("attn", Attention("qk", "av", "matmul")),
    "model": lambda: Model("model", Attention("qkv", "v", "proj")),
    "model and qk": lambda: Model("model", Attention("qk", "av", "proj")),
    "bare": lambda: Model("body", Bare()),
}


@pytest.mark.parametrize("name", MODELS)
def test_no_two_rows_have_one_name(name: str) -> None:
    table = layer_table(MODELS[name](), (X,), name=name, input_shape=(2, 5, 8))
    names = [row.name for row in table.layers]
    assert len(set(names)) == len(names), names
    with FlopCounterMode(display=False) as counter:
        MODELS[name]().to("meta")(X.to("meta"))
    assert table.macs * 2 == counter.get_total_flops()


@pytest.mark.parametrize(
    "spec", [{}, {"member": "factorized", "projections": "transformed"}], ids=["wide", "factorized"]
)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_planned_by_name_is_measured_by_it(name: str, spec: dict[str, str]) -> None:
    new, plan = transform(MODELS[name]().eval(), X, sparsity=0.75, **spec)
    assert new(X).shape == (2, 5, 3)
    assert any(p.status == "transformed" for p in plan.layers)


def test_a_layer_keeps_its_name_and_the_product_beside_it_has_another() -> None:
    table = layer_table(MODELS["qk and av"](), (X,), name="net", input_shape=(2, 5, 8))
    rows = {row.name: row.macs.evaluate(table.sizes) for row in table.layers if row.macs.terms}
    tokens = 2 * 5
    assert rows["attn.qk"] == tokens * WIDTH * 2 * WIDTH and rows["attn.av"] == tokens * WIDTH * WIDTH
    assert rows["attn.qk product"] == rows["attn.av product"] == 2 * 5 * 5 * WIDTH == rows["model.qk"]
