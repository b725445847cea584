"""A user's forward hooks during a trace: watching ones change nothing and get nothing, others take part."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from sparseift_cli.table.table import LayerTable
from sparseift_cli.trace.build import layer_table
from tests.helpers.parts import Net

X = (8, 16)


def traced(model: nn.Module) -> LayerTable:
    return layer_table(model, (torch.zeros(X),), name="net", input_shape=X)


def chain(middle: int = 32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(middle, 4))


seen: list[Any] = []


def shape(module: nn.Module, args: Any, output: Tensor) -> None:
    seen.append(output.shape)


def value(module: nn.Module, args: Any, output: Tensor) -> None:
    seen.append(output.mean().item())


def counts(module: Any, args: Any, output: Tensor) -> None:
    module.total_ops = getattr(module, "total_ops", 0) + int(output.shape[-1])


def products(module: nn.Module, args: Any, output: Tensor) -> None:
    seen.append(output.t() @ output)


def prints(module: nn.Module, args: Any, output: Tensor) -> None:
    print(output.shape)


class Collector:
    def __init__(self) -> None:
        self.widths: list[int] = []

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.widths.append(int(output.shape[-1]))

    def method(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.widths.append(int(output.shape[-1]))


WATCHING: dict[str, Callable[..., Any]] = {
    "shape": shape,
    "value": value,
    "numpy": lambda m, i, o: seen.append(o.detach().numpy()),
    "counter": counts,
    "product": products,
    "print": prints,
    "lambda that prints": lambda m, i, o: print(int(o.shape[-1])),
    "object": Collector(),
    "method": Collector().method,
    "partial": partial(lambda name, m, i, o: [name, int(o.shape[1])][2:] or None, "layer"),
    "closure": (lambda found: lambda m, i, o: found.append(int(o.shape[1])))([]),
}


@pytest.mark.parametrize("name", WATCHING)
def test_a_hook_that_watches_changes_no_row(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = chain()
    for layer in (model[0], model[2]):
        layer.register_forward_hook(WATCHING[name])
    kept = [dict(m._forward_hooks) for m in model.modules()]
    assert traced(model) == traced(chain())
    assert capsys.readouterr().out == ""
    assert [dict(m._forward_hooks) for m in model.modules()] == kept
    assert "total_ops" not in vars(model[0])


def test_what_a_user_collects_gets_nothing() -> None:
    seen.clear()
    model = chain()
    model[0].register_forward_hook(shape)
    model[2].register_forward_pre_hook(lambda m, i: seen.append(i[0].mean().item()))
    everywhere = register_module_forward_hook(value)
    try:
        assert traced(model) == traced(chain()) and seen == []
    finally:
        everywhere.remove()


def test_a_hook_that_changes_the_output_takes_part() -> None:
    model = chain(64)
    model[2].register_forward_hook(lambda m, i, o: torch.cat([o, o], -1))
    table = traced(model)
    assert (table.macs, table.untraceable) == (8 * (16 * 32 + 32 * 32 + 64 * 4), None)


def test_a_hook_that_computes_the_weight_takes_part() -> None:
    def standardise(module: Any, args: Any) -> None:
        raw = module.raw
        module.weight = (raw - raw.mean(1, keepdim=True)) @ module.mix

    model = chain()
    layer: Any = model[2]
    raw = layer.weight
    del layer.weight
    layer.raw, layer.mix = nn.Parameter(raw.detach()), nn.Parameter(torch.eye(32))
    layer.register_forward_pre_hook(standardise)
    assert traced(model).macs == 8 * (16 * 32 + 32 * 32 + 32 * 4) + 32 * 32 * 32


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_hooks_of_pytorch_run(norm: Callable[[nn.Module], Any]) -> None:
    model = chain()
    norm(model[2])
    assert traced(model).macs == 8 * (16 * 32 + 32 * 32 + 32 * 4)


def test_features_that_hooks_hand_to_the_model_arrive() -> None:
    class Features(Net):
        kept: dict[str, Tensor]
        body: nn.Sequential

        def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
            self.kept["first"] = output

    model = Features(
        lambda n, x: (n.body(x), n.c(n.kept["first"] * n.kept["second"]))[1], body=chain(), c=nn.Linear(32, 3)
    )
    model.kept = {}
    model.body[0].register_forward_hook(model.keep)
    model.body[2].register_forward_hook(lambda m, i, o: model.kept.__setitem__("second", o))
    assert traced(model).macs == 8 * (16 * 32 + 32 * 32 + 32 * 4 + 32 * 3)
    assert model.kept == {}
