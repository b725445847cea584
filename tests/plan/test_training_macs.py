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
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

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


def loss(output: Any) -> Tensor:
    """Of all that can have a gradient."""
    return torch.stack([t.square().sum() for t in tree_leaves(output) if t.requires_grad]).sum()


def executed(model: nn.Module, x: Tensor) -> int:
    """Of one training step, forward and backward."""
    with torch.backends.mkldnn.flags(enabled=False), Products() as products:  # one op would make a whole LSTM
        loss(model.train()(x)).backward()
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


# --- what reaches the loss, Functions, checkpoints ---


class Swish(torch.autograd.Function):
    """Its forward runs while gradients are switched off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grads[0] * s * (1 + x * (1 - s))


class Sign(torch.autograd.Function):
    """Straight through: no tensor inside passes a gradient on. New style, and a no_grad that means nothing."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        with torch.no_grad():
            return (x.detach() > 0).float()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class Product(torch.autograd.Function):
    """A linear layer with its own backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.detach() @ weight.detach().t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grads[0] @ weight, grads[0].t() @ x


class OwnCheckpoint(torch.autograd.Function):
    """As in several diffusion models."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.run(x)
        torch.autograd.backward(out, grads[0])
        assert x.grad is not None
        return None, x.grad


def layers(forward: Callable[[Net, Tensor], Any]) -> Net:
    """Four linear layers; a costs 2 * 4 * 6 MACs, b and c 2 * 6 * 6, d 2 * 6 * 3."""
    return Net(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 6), d=nn.Linear(6, 3))


def teacher(n: Net, x: Tensor) -> Tensor:
    y = torch.relu(n.a(x))
    with torch.no_grad():
        target = n.c(n.b(y))
    return n.d(y) - target.mean()


class CalledObject:
    """No function and no module, but called like one."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(x))


def teacher_in_a_checkpoint(n: Net, x: Tensor) -> Tensor:
    def inside(y: Tensor) -> Tensor:
        with torch.no_grad():
            target = n.c(y)
        return torch.relu(n.b(y)) - target

    return n.d(checkpoint(inside, n.a(x), use_reentrant=True))


def stores(n: Net, x: Tensor) -> Tensor:
    y = n.a(x)
    n.loss = n.b(y).square().mean()
    return n.d(y)


def writes_in_place(n: Net, x: Tensor) -> Tensor:
    y = x.new_zeros(2, 6)
    y[:, :3] = n.b(n.a(x))[:, :3]
    return n.d(y)


def nested(n: Net, x: Tensor) -> Tensor:
    def inner(y: Tensor) -> Tensor:
        return torch.tanh(n.c(torch.tanh(n.b(y))))

    return n.d(checkpoint(lambda y: torch.tanh(checkpoint(inner, y, use_reentrant=False)), n.a(x), use_reentrant=False))


def recomputed(n: Net, x: Tensor, *, reentrant: bool) -> Tensor:
    def block(y: Tensor) -> Tensor:
        return torch.tanh(n.c(torch.tanh(n.b(y))))

    return n.d(checkpoint(block, torch.relu(n.a(x)), use_reentrant=reentrant))


REACHED: dict[str, Callable[[Net, Tensor], Any]] = {
    "Function": lambda n, x: n.d(Swish.apply(n.c(Swish.apply(n.b(Swish.apply(n.a(x))))))),
    "Function of a comparison": lambda n, x: n.d(Sign.apply(n.b(Sign.apply(n.a(x))))),
    "Function with a product": lambda n, x: n.d(Product.apply(Product.apply(n.a(x), n.b.weight), n.c.weight)),
    "Function of an input": lambda n, x: n.a(Swish.apply(x)),
    "reentrant checkpoint": lambda n, x: recomputed(n, x, reentrant=True),
    "checkpoint": lambda n, x: recomputed(n, x, reentrant=False),
    "own checkpoint": lambda n, x: n.d(OwnCheckpoint.apply(lambda y: torch.relu(n.b(y)), n.a(x))),
    "reentrant checkpoint of the input alone": lambda n, x: n.d(checkpoint(n.a, x, use_reentrant=True)),
    "reentrant checkpoint of an object": lambda n, x: n.d(checkpoint(CalledObject(n.b), n.a(x), use_reentrant=True)),
    "nested checkpoints": nested,
    "checkpoint without a reader": lambda n, x: (checkpoint(n.b, n.a(x), use_reentrant=True), n.d(n.a(x)))[1],
    "no_grad in a reentrant checkpoint": teacher_in_a_checkpoint,
    "teacher": teacher,
    "detach in the middle": lambda n, x: n.d(n.c(n.b(n.a(x)).detach())),
    "detach as a function": lambda n, x: n.d(torch.detach(n.b(n.a(x)))),
    "detach in place": lambda n, x: n.d(n.b(n.a(x)).detach_()),
    "data": lambda n, x: n.d(n.b(n.a(x)).data),
    "detached weight": lambda n, x: n.d(nn.functional.linear(n.a(x), n.b.weight.detach())),
    "data of a weight": lambda n, x: n.d(n.a(x) @ n.b.weight.data.t()),
    "unused branch": lambda n, x: (n.b(n.a(x)), n.d(n.a(x)))[1],
    "argmax": lambda n, x: n.d(nn.functional.one_hot(n.b(n.a(x)).argmax(-1), 6).float()),
    "straight through": lambda n, x: n.d((y := n.a(x)) + (n.b(y) - y).detach()),
    "comparison": lambda n, x: n.d(n.a(x) * (n.b(n.a(x)) > 0)),
    "shape alone": lambda n, x: n.d(torch.ones_like(n.b(n.a(x)))),
    "two outputs": lambda n, x: {"one": n.d(n.a(x)), "two": [n.b(n.a(x)), n.c(n.a(x)).detach()]},
    "writes in place": writes_in_place,
    "attention mask": lambda n, x: n.d(
        nn.functional.scaled_dot_product_attention(*[n.a(x)[None]] * 3, attn_mask=n.b(n.a(x)).mean(-1, keepdim=True))
    ),
    "vmap": lambda n, x: n.d(torch.vmap(lambda row: torch.relu(n.b(n.a(row))))(x)),
}


@pytest.mark.parametrize("name", REACHED)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_training_costs_what_autograd_executes(name: str) -> None:
    model, x = layers(REACHED[name]), torch.randn(2, 4)
    assert sparseift.flops(model, x).dense.training_macs == executed(model, x)


def test_what_a_function_and_a_checkpoint_cost_by_hand() -> None:
    """Each layer three times, but the first, whose input needs no gradient; what is checkpointed a fourth time."""
    a, b, c, d = 2 * 4 * 6, 2 * 6 * 6, 2 * 6 * 6, 2 * 6 * 3
    for name, macs in (("Function", 2 * a + 3 * (b + c + d)), ("reentrant checkpoint", 2 * a + 4 * (b + c) + 3 * d)):
        assert sparseift.flops(layers(REACHED[name]), torch.randn(2, 4)).dense.training_macs == macs


def test_a_loss_that_a_module_stores_is_a_loss() -> None:
    a, b, d = 2 * 4 * 6, 2 * 6 * 6, 2 * 6 * 3
    dense = sparseift.flops(layers(stores), torch.randn(2, 4)).dense
    assert dense.training_macs == 2 * a + 3 * b + 3 * d


def test_a_model_that_returns_classes_trains_by_a_loss_elsewhere() -> None:
    a, d = 2 * 4 * 6, 2 * 6 * 3
    dense = sparseift.flops(layers(lambda n, x: n.d(n.a(x)).argmax(-1)), torch.randn(2, 4)).dense
    assert dense.training_macs == 2 * a + 3 * d


def test_match_train_counts_what_is_checkpointed_twice() -> None:
    model, x = layers(REACHED["reentrant checkpoint"]), torch.randn(2, 4)
    plain = layers(lambda n, x: n.d(torch.tanh(n.c(torch.tanh(n.b(torch.relu(n.a(x))))))))
    spent = [sparseift.flops(m, x, sparsity=0.5, match="train") for m in (model, plain)]
    for result in spent:
        assert result.transformed is not None
        assert result.transformed.training_macs <= result.dense.training_macs
    assert spent[0].dense.training_macs - spent[1].dense.training_macs == 2 * 2 * 6 * 6


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
