"""What training costs, against every product that autograd makes on real tensors, counted one by one."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparseift_cli as sparseift
from sparseift_cli.plan.plan import Plan
from sparseift_cli.plan.training_cost import executed_macs
from tests.helpers.parts import Net

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration")  # of switching oneDNN off
aten = torch.ops.aten


class Products(TorchDispatchMode):
    """Adds up the multiply-accumulates of what is executed: matrix products, and convolutions forward and backward."""

    macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        op = func.overloadpacket
        if op in (aten.mm, aten.addmm):
            a, b = args[-2:]
            self.macs += a.shape[0] * a.shape[1] * b.shape[1]
        elif op is aten.bmm:
            self.macs += math.prod(args[0].shape) * args[1].shape[2]
        elif op is aten.convolution:
            self.macs += out.numel() * args[1][0].numel()
        elif op is aten.convolution_backward:
            self.macs += args[0].numel() * args[2][0].numel() * sum(args[10][:2])
        return out


def executed(model: nn.Module, x: Tensor) -> int:
    """Of one training step, forward and backward."""
    with torch.backends.mkldnn.flags(enabled=False), Products() as products:  # one op would make a whole LSTM
        model.train()(x).square().sum().backward()
    return products.macs


def unmasked(plan: Plan) -> int:
    """Training MACs of the planned model before a weight is masked: what dense kernels execute."""
    return int(executed_macs(plan.layers, plan.training))


def frozen(module: nn.Module) -> Any:
    return module.requires_grad_(False)


# --- recurrent layers ---


def with_rnn(n: Net, x: Tensor) -> Tensor:
    """A state that is learned, before the first step."""
    state = n._parameters["state"]
    return n.out(n.rnn(x, (state, torch.zeros_like(state)) if isinstance(n.rnn, nn.LSTM) else state)[0])


def learned_state(rnn: nn.RNNBase) -> Net:
    net = Net(with_rnn, rnn=rnn, out=nn.Linear(16, 3))
    net.register_parameter("state", nn.Parameter(torch.randn(1, 2, 16)))
    return net


def last(n: Net, x: Tensor) -> Tensor:
    return n.out(n.rnn(x)[0])


def decoded(n: Net, x: Tensor) -> Tensor:
    return n.out(n.decoder(x[:, :3], n.rnn(x)[1])[0])


def projection_alone() -> nn.LSTM:
    rnn = frozen(nn.LSTM(8, 16, proj_size=6, batch_first=True))
    rnn.weight_hr_l0.requires_grad_(True)
    return rnn


RECURRENT: dict[str, Callable[[], Net]] = {
    "lstm": lambda: Net(last, rnn=nn.LSTM(8, 16, batch_first=True), out=nn.Linear(16, 3)),
    "frozen": lambda: Net(last, rnn=frozen(nn.LSTM(8, 16, batch_first=True)), out=nn.Linear(16, 3)),
    "two layers": lambda: Net(last, rnn=nn.RNN(8, 16, 2, bidirectional=True, batch_first=True), out=nn.Linear(32, 3)),
    "projected": lambda: Net(
        last, rnn=nn.LSTM(8, 16, 2, proj_size=6, bidirectional=True, batch_first=True), out=nn.Linear(12, 3)
    ),
    "projection alone": lambda: Net(last, rnn=projection_alone(), out=nn.Linear(6, 3)),
    "decoder": lambda: Net(
        decoded, rnn=nn.LSTM(8, 16, batch_first=True), decoder=nn.LSTM(8, 16, batch_first=True), out=nn.Linear(16, 3)
    ),
    "frozen decoder": lambda: Net(
        decoded,
        rnn=nn.GRU(8, 16, batch_first=True),
        decoder=frozen(nn.GRU(8, 16, batch_first=True)),
        out=nn.Linear(16, 3),
    ),
    "learned state": lambda: learned_state(nn.LSTM(8, 16, batch_first=True)),
    "learned state of a gru": lambda: learned_state(nn.GRU(8, 16, batch_first=True)),
}


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_recurrent_layers(name: str) -> None:
    model, x = RECURRENT[name](), torch.randn(2, 4, 8)
    assert sparseift.flops(model, x).dense.training_macs == executed(model, x)


# --- through the library and the command ---


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients_gets_the_cost_of_training(
    context: Callable[[], AbstractContextManager[Any]],
) -> None:
    model, x = chain(), torch.randn(2, 4)
    with context():
        dense = sparseift.flops(model, x).dense
        new, plan = sparseift.transform(model, x, sparsity=0.5, match="train")
        sparseift.audit(new, x)
    assert dense.training_macs == executed(model, x)
    assert [layer.nnz for layer in plan.layers] == [
        layer.nnz for layer in sparseift.transform(model, x, sparsity=0.5, match="train")[1].layers
    ]
    new(x).sum().backward()
    assert all(p.grad is not None for p in new.parameters())


# --- frozen layers ---


def backbone() -> nn.Sequential:
    blocks = [(nn.Conv2d(a, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for a in (3, 8, 8, 8)]
    flat = [module for block in blocks for module in block]
    for module in flat[:9]:
        frozen(module)
    return nn.Sequential(*flat, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


@pytest.mark.parametrize("member", ["wide", "parallel", "factorized", "doped"])
def test_nothing_trains_inside_of_what_is_frozen(member: str) -> None:
    model, x = backbone(), torch.randn(4, 3, 8, 8)
    new, plan = sparseift.transform(model, x, member=member, sparsity=0.5)
    assert {int(name.split(".")[0]) for name, p in new.named_parameters() if p.requires_grad} == {9, 10, 14}
    assert unmasked(plan) == executed(new, x)


@pytest.mark.parametrize("member", ["wide", "parallel", "factorized", "doped"])
@pytest.mark.parametrize("trains", ["weight", "bias"])
def test_weights_and_biases_are_frozen_each_by_themselves(member: str, trains: str) -> None:
    model, x = chain(), torch.randn(2, 4)
    for name in ("weight", "bias"):
        model.get_parameter(f"2.{name}").requires_grad_(name == trains)
    new, plan = sparseift.transform(model, x, member=member, sparsity=0.5)
    found = {name.rpartition(".")[2]: p.requires_grad for name, p in new.named_parameters() if name.startswith("2.")}
    assert found == {"weight": trains == "weight", "bias": trains == "bias"}
    assert unmasked(plan) == executed(new, x)


def test_a_bag_of_embeddings_costs_nothing_where_gradients_are_wanted() -> None:
    model = nn.Sequential(nn.EmbeddingBag(10, 4), nn.Linear(4, 3))
    dense = sparseift.flops(model, torch.zeros(2, 5, dtype=torch.int64))
    assert (dense.table.uncounted, dense.dense.forward_macs) == ((), 2 * 4 * 3)
