"""Layers that torch.compile joins with the activation behind them compute the same, forward and backward."""

from __future__ import annotations

import contextlib
import importlib
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sparseift_cli.kernels.fuse import joined_before, sparseift
from sparseift_cli.kernels.linear import BlockLinear
from tests.kernels.cases import relative

ACTIVATIONS = {
    "relu": F.relu,
    "relu method": lambda z: z.relu(),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": nn.GELU(approximate="tanh"),
}


class Feedforward(nn.Module):
    """x + down(dropout(activation(up(x)))), for x [.., 16]; blocks of 8, by the reference in float64."""

    def __init__(
        self, activation: Callable[[Tensor], Tensor] = F.silu, bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        masks = torch.rand(5, 2) < 0.6, torch.rand(2, 5) < 0.6
        options: dict[str, Any] = {"bias": bias, "backend": "reference", "dtype": torch.float64}
        self.up, self.down = (BlockLinear(mask, 8, **options) for mask in masks)
        self.activation, self.dropout = activation, nn.Dropout(dropout)

    def hidden(self, x: Tensor) -> Tensor:
        """[.., 40]."""
        return self.dropout(self.activation(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.hidden(x))


class ReadTwice(Feedforward):
    """Something else reads the values after the activation."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x)
        return self.down(hidden) + hidden.mean()


class ReadBefore(Feedforward):
    """Something else reads the values before the activation."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.up(x)
        return self.down(self.activation(z)) + z.mean()


class OwnMode(Feedforward):
    """The second layer runs in another mode of autocast."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x)
        with torch.autocast("cpu", enabled=False):
            return self.down(hidden)


class AnotherOrder(Feedforward):
    """The rows of the second layer are not those of the first."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.hidden(x).reshape(2, 40, 3).transpose(1, 2))


def compiled(model: nn.Module) -> tuple[Callable[[Tensor], Tensor], list[fx.GraphModule]]:
    """The model behind a backend that joins and then runs the graph as it is, and the graphs that it had."""
    torch._dynamo.reset()
    graphs: list[fx.GraphModule] = []

    def keep(module: fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(module)
        return module.forward

    return torch.compile(model, backend=joined_before(keep), fullgraph=True), graphs


def operators(graph: fx.GraphModule) -> list[str]:
    """Of our own, by name, with their activations."""
    found = []
    for node in graph.graph.nodes:
        if "sparseift" in str(node.target):
            found.append(f"{str(node.target).rpartition('.')[2]} {next(a for a in node.args if isinstance(a, str))}")
    return found


def require_same(model: nn.Module, x: Tensor) -> list[str]:
    """Output and gradients, compiled and not, are equal; the operators of the one graph."""
    run, graphs = compiled(model)
    results = []
    for call in (model, run):
        x = x.detach().requires_grad_()
        model.zero_grad()
        y = call(x)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        assert x.grad is not None
        results.append([y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1])
    assert all(relative(a, b) < 1e-12 for a, b in zip(*results, strict=True))
    (graph,) = graphs
    return operators(graph)


def draw() -> Tensor:
    """[2, 3, 16]."""
    return torch.randn(2, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_two_layers_become_one_operator(name: str, bias: bool) -> None:
    assert require_same(Feedforward(ACTIVATIONS[name], bias), draw()) == [f"block_feedforward {name.split()[0]}"]


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        (ReadTwice, ["block_linear silu", "block_linear none"]),
        (ReadBefore, ["block_linear none", "block_linear none"]),
        (OwnMode, ["block_linear silu", "block_linear none"]),
        (AnotherOrder, ["block_linear silu", "block_linear none"]),
    ],
)
def test_what_others_read_stays(model: type[Feedforward], wanted: list[str]) -> None:
    assert require_same(model(), draw()) == wanted


def test_dropout_between_the_layers() -> None:
    model = Feedforward(dropout=0.5)
    run, graphs = compiled(model)
    run(draw())
    assert operators(graphs[0]) == ["block_linear silu", "block_linear none"]
    assert require_same(model.eval(), draw()) == ["block_feedforward silu"]


def test_an_activation_of_its_own() -> None:
    assert require_same(Feedforward(torch.tanh), draw()) == ["block_linear none", "block_linear none"]
    assert require_same(nn.Sequential(Feedforward().up, nn.ReLU()), draw()) == ["block_linear relu"]


def test_without_gradients_nothing_is_kept() -> None:
    model = Feedforward()
    run, graphs = compiled(model)
    with torch.no_grad():
        assert relative(run(draw()), model(draw())) < 1e-12
    (call,) = [node for node in graphs[0].graph.nodes if "feedforward" in str(node.target)]
    assert call.args[7] is False


def test_autocast_reaches_the_joined_layers() -> None:
    model = Feedforward().float()
    run, graphs = compiled(model)
    x = draw().float()
    for context in (torch.autocast("cpu", torch.bfloat16), contextlib.nullcontext()):
        with context:
            assert relative(run(x), model(x)) < 2e-2
    assert all(operators(graph) == ["block_feedforward silu"] for graph in graphs)
    with torch.autocast("cpu", torch.bfloat16):
        y, hidden, slope = torch.ops.sparseift.block_feedforward(
            x.view(-1, 16),
            model.up.values,
            None,
            model.down.values,
            None,
            [*model.up.index, *model.down.index],
            "silu",
            True,
            "reference",
        )
    assert y.dtype == hidden.dtype == slope.dtype == torch.bfloat16


def test_moved_blocks_need_no_new_graph() -> None:
    model = Feedforward()
    run, graphs = compiled(model)
    for _ in range(2):
        assert relative(run(draw()), model(draw())) < 1e-12
        model.up.index.move_(model.up.index.mask().flip(0))
    assert len(graphs) == 1


def test_operator_is_well_formed() -> None:
    model = Feedforward()
    index = [*model.up.index, *model.down.index]
    x = draw().view(-1, 16).requires_grad_()
    arguments = (
        x,
        model.up.values,
        model.up.bias,
        model.down.values,
        model.down.bias,
        index,
        "gelu",
        True,
        "reference",
    )
    torch.library.opcheck(torch.ops.sparseift.block_feedforward.default, arguments)
    grad, slope = torch.randn(6, 16, dtype=torch.float64), torch.randn(6, 40, dtype=torch.float64)
    for with_sum in (True, False):
        arguments = (grad, model.down.values.detach(), slope, list(model.down.index), with_sum, "reference")
        torch.library.opcheck(torch.ops.sparseift.block_gradient_before.default, arguments)


def test_the_backend_has_the_name_that_the_readme_uses() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
    module, _, name = project["entry-points"]["torch_dynamo_backends"]["sparseift"].partition(":")
    assert getattr(importlib.import_module(module), name) is sparseift
