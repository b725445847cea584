"""Subclasses of Linear and Conv whose forward is more than one product: adapters, second outputs, activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparseift_cli as sparseift
from sparseift_cli.transforms.members.base import MemberModule
from sparseift_cli.transforms.transformation import Options

LOCAL = ("parallel", "factorized", "doped")
X = torch.randn(4, 5, 16)


class WithBias(nn.Linear):
    """Returns its bias beside its product, as Megatron's layers do."""

    def forward(self, input: Tensor) -> Any:
        return super().forward(input), self.bias


class Scaled(nn.Linear):
    """Takes a second argument."""

    def forward(self, input: Tensor, scale: float = 2.0) -> Tensor:
        return super().forward(input) * scale


class Activated(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class LowRank(nn.Linear):
    """LoRA with parameters of its own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(4, inputs)), nn.Parameter(torch.randn(outputs, 4))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + F.linear(F.linear(input, self.lora_A), self.lora_B)


class LowRankLayers(nn.Linear):
    """LoRA with layers inside the layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.lora_A, self.lora_B = nn.Linear(inputs, 4, bias=False), nn.Linear(4, outputs, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.lora_B(self.lora_A(input))


class LearnedScale(nn.Linear):
    """Returns its product alone, but three copies of it would share one scale."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.scale = nn.Parameter(torch.ones(inputs))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * self.scale)


class Wrapping(nn.Linear):
    """LoRA around a layer, whose weight and sizes it gives out as its own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        nn.Module.__init__(self)
        self.base = nn.Linear(inputs, outputs)
        self.weight, self.bias = self.base.weight, self.base.bias
        self.lora_A, self.lora_B = nn.Linear(inputs, 4, bias=False), nn.Linear(4, outputs, bias=False)

    @property
    def in_features(self) -> int:  # type: ignore[override]
        return self.base.in_features

    @property
    def out_features(self) -> int:  # type: ignore[override]
        return self.base.out_features

    def forward(self, input: Tensor) -> Tensor:
        return self.base(input) + self.lora_B(self.lora_A(input))


class Net(nn.Module):
    """An odd layer between others, the first of its outputs read."""

    def __init__(self, odd: nn.Module, *arguments: float) -> None:
        super().__init__()
        self.a, self.odd, self.b, self.c = nn.Linear(16, 16), odd, nn.Linear(16, 16), nn.Linear(16, 3)
        self.arguments = arguments

    def forward(self, x: Tensor) -> Tensor:
        y = self.odd(torch.relu(self.a(x)), *self.arguments)
        return self.c(torch.relu(self.b(torch.relu(y[0] if isinstance(y, tuple) else y))))


ODD = {
    "second output": lambda: Net(WithBias(16, 16)),
    "second argument": lambda: Net(Scaled(16, 16), 3.0),
    "activation": lambda: Net(Activated(16, 16)),
    "low rank": lambda: Net(LowRank(16, 16)),
    "low rank layers": lambda: Net(LowRankLayers(16, 16)),
    "learned scale": lambda: Net(LearnedScale(16, 16)),
    "wrapping": lambda: Net(Wrapping(16, 16)),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("member", LOCAL)
def test_a_custom_forward_that_is_more_than_a_product_is_excluded_by_name(name: str, member: str) -> None:
    model = ODD[name]()
    new, plan = sparseift.transform(model, X, member=member, sparsity=0.75)
    assert new(X).shape == (4, 5, 3)
    rows = {r.layer.name: (r.status, r.reason) for r in plan.layers}
    layer = "odd.base" if name == "wrapping" else "odd"
    assert rows[layer] == (
        "untouched",
        f"its weight is used by {type(model.odd).__name__}: only Sparse Wide can transform it",
    )
    assert rows["b"][0] == "transformed"
    assert type(new.odd) is type(model.odd)


@pytest.mark.parametrize("name", ODD)
def test_wide_grows_a_forward_that_is_more_than_a_product(name: str) -> None:
    model = ODD[name]()
    new, plan = sparseift.transform(model, X, sparsity=0.75, options=Options(start="preserve", preserve_slack=0))
    torch.testing.assert_close(new.eval()(X), model.eval()(X), rtol=1e-4, atol=1e-5)
    layer: Any = new.odd
    assert tuple(layer.weight.shape) == (layer.out_features, layer.in_features) == (32, 32)
    row = next(r for r in plan.layers if r.layer.name in ("odd", "odd.base"))
    assert (row.status, row.macs) == ("transformed", 4 * 5 * 16 * 16)


class ByHand(nn.Linear):
    """As Falcon's layers are."""

    def forward(self, input: Tensor) -> Tensor:
        y = input @ self.weight.T
        return y + self.bias if isinstance(self.bias, Tensor) else y


class Same(nn.Conv2d):
    """Pads its input itself, as timm's TensorFlow-style layers do."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (0, 1, 0, 1)))


class ChannelsLast(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).permute(0, 2, 3, 1)


@pytest.mark.parametrize("member", LOCAL)
def test_a_custom_forward_that_is_one_product_is_transformed(member: str) -> None:
    new, _ = sparseift.transform(Net(ByHand(16, 16)), X, member=member, sparsity=0.75)
    assert isinstance(new.odd, MemberModule)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), Same(16, 16, 2), nn.ReLU(), nn.Conv2d(16, 4, 1))
    new, _ = sparseift.transform(net, torch.randn(2, 3, 8, 8), member=member, sparsity=0.75)
    assert isinstance(new[1], MemberModule)


@pytest.mark.parametrize("member", LOCAL)
def test_a_product_with_its_dims_in_another_order_is_left_out(member: str) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), ChannelsLast(16, 16, 3), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )
    new, _ = sparseift.transform(net, torch.randn(2, 3, 8, 8), member=member, sparsity=0.75)
    assert isinstance(new[1], ChannelsLast) and isinstance(new[3], MemberModule)


def test_a_trace_leaves_the_forward_where_it_was() -> None:
    model = Net(LowRank(16, 16))
    sparseift.inspect(model, X)
    assert "forward" not in vars(model.odd) and "forward" not in vars(model.a)
