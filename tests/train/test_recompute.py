"""Activation checkpointing: the same numbers to the bit, less memory, and as many FLOPs as the audit says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sparseift_cli.errors import UsageError
from sparseift_cli.models.source import Request, load_table
from sparseift_cli.models.zoo import registry
from sparseift_cli.plan.audit import audit
from sparseift_cli.plan.spec import TrainingSpec
from sparseift_cli.recipe.load import load
from sparseift_cli.table.table import Layer, LayerTable
from sparseift_cli.trace.build import trace
from sparseift_cli.train.graphed import can_be_graphed
from sparseift_cli.train.prepare import Prepared, prepare
from sparseift_cli.train.processes import Processes
from sparseift_cli.train.recompute import COMPILES, recompute
from sparseift_cli.train.run import run_seeds
from sparseift_cli.train.step import EagerStep
from tests.helpers.nets import Residual, mlp, residual

Write = Callable[..., Path]
CPU = Processes(torch.device("cpu"))
ON, OFF = "training.recompute=true", "training.recompute=false"


def table_of(model: nn.Module, x: Tensor) -> LayerTable:
    return trace(model, (x,), {}, name="net", input_shape=tuple(x.shape)).table


def trained(recipe: Path, *sets: str, steps: int = 7) -> Prepared:
    run = prepare(load(recipe, sets), 0, CPU)
    make_step = EagerStep(run, GradScaler("cpu", enabled=False), CPU)
    for step in range(steps):
        torch.manual_seed(step)
        make_step(step)
        run.flop_meter.add(run.sparsifier.last if run.sparsifier else None)
    return run


def in_train_mode(*, again: bool, made: Callable[[], tuple[nn.Module, Tensor]] = residual) -> nn.Module:
    torch.manual_seed(0)
    model, x = made()
    if again:
        recompute(model, table_of(model, x), x)
    return model.train()


@pytest.mark.parametrize("member", ["wide", "parallel", None])
@pytest.mark.parametrize("more", [(), ("training.accumulate=2", "training.precision=bf16", "optimizer.name=adamw")])
def test_training_is_the_same_to_the_bit(write_recipe: Write, member: str | None, more: tuple[str, ...]) -> None:
    """Weights, gradients' moments, masks, and the statistics of batch norms, with dropout, over mask updates."""
    recipe = write_recipe("rigl" if member else None, "adamw" if more else "sgd", net="residual")
    sets = (*more, *([f"transform.member={member}", "transform.match=layer"] if member else ()))
    plain, again = trained(recipe, OFF, *sets), trained(recipe, ON, *sets)
    want, have = plain.model.state_dict(), again.model.state_dict()
    assert list(have) == list(want)
    assert [n for n in want if not torch.equal(have[n], want[n])] == []
    moments = [list(run.optimizer.state_dict()["state"].values()) for run in (plain, again)]
    assert all(torch.equal(a[k], b[k]) for a, b in zip(*moments, strict=True) for k in a)
    if plain.sparsifier and again.sparsifier:
        masks = plain.sparsifier.masks(), again.sparsifier.masks()
        assert all(torch.equal(masks[1][name], mask) for name, mask in masks[0].items())
    assert int(again.model.get_buffer("blocks.0.bn.num_batches_tracked")) == 7 * (2 if more else 1)


def test_gradients_and_the_random_state_are_the_same() -> None:
    models = in_train_mode(again=False), in_train_mode(again=True)
    x = torch.randn(4, 3, 8, 8)
    after = []
    for model in models:
        torch.manual_seed(1)
        model(x).square().sum().backward()
        after.append(torch.get_rng_state())
    assert torch.equal(*after)
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


def test_a_graph_that_is_kept_can_be_gone_through_twice() -> None:
    model = in_train_mode(again=True)
    loss = model(torch.randn(4, 3, 8, 8)).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert int(model.get_buffer("blocks.1.bn.num_batches_tracked")) == 1


def executed(model: nn.Module, x: Tensor) -> int:
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):  # it knows no fused attention of a CPU
        model(x).square().mean().backward()
    return counter.get_total_flops()


def bytes_gpt() -> tuple[nn.Module, Tensor]:
    return registry.build("bytes_gpt"), torch.zeros(1, 128, dtype=torch.int64)


@pytest.mark.parametrize("made", [residual, bytes_gpt])
def test_what_is_executed_is_what_is_audited(made: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    model, x = made()
    table = table_of(model, x)
    training = {
        again: audit(table, training=TrainingSpec(algorithm="dense", recompute=again)).dense.training_flops
        for again in (False, True)
    }
    inside = sum(row.macs.evaluate(table.sizes) for row in table.layers if row.block)
    assert 0 < inside < table.macs
    assert training[True] == training[False] + 2 * inside
    one = x if x.dtype == torch.int64 else torch.randn(x.shape)
    assert executed(in_train_mode(again=False, made=made), one) == training[False]
    assert executed(in_train_mode(again=True, made=made), one) == training[True]


@pytest.mark.parametrize("algorithm", [None, "static", "rigl"])
def test_flops_spent_are_the_flops_audited(write_recipe: Write, tmp_path: Path, algorithm: str | None) -> None:
    recipe = load(write_recipe(algorithm, net="residual"), [ON])
    (summary,) = run_seeds(recipe, [0], tmp_path / "runs", None, lambda _: None, lambda *_: None)
    assert summary["flops"]["spent"] == summary["flops"]["audited"]
    (plain,) = run_seeds(load(recipe.path), [0], tmp_path / "runs", None, lambda _: None, lambda *_: None)
    assert summary["flops"]["spent"] > plain["flops"]["spent"]
    assert summary["metrics"]["loss"] == plain["metrics"]["loss"]


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """What the graph of a forward pass holds beside the parameters, the inputs of blocks too."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        held[t.untyped_storage().data_ptr()] = t
        return t

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        keep(args[0])

    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, Residual)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = model(x).square().sum()
    loss.backward()
    for hook in hooks:
        hook.remove()
    return sum(t.untyped_storage().nbytes() for key, t in held.items() if key not in parameters)


def test_less_is_kept_for_the_backward_pass() -> None:
    x = torch.randn(32, 3, 8, 8)
    block = 32 * 8 * 8 * 8 * 4  # bytes of one activation
    plain, again = (kept_bytes(in_train_mode(again=a), x) for a in (False, True))
    assert plain > 16 * block
    assert again < 5 * block  # the inputs of the norm, of three blocks and (3 channels of 8) of the stem


def test_evaluation_keeps_nothing_and_names_stay() -> None:
    plain, again = in_train_mode(again=False), in_train_mode(again=True)
    assert [n for n, _ in again.named_modules()] == [n for n, _ in plain.named_modules()]
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in plain.named_parameters()]
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(again.eval()(x), plain.eval()(x))
    assert executed(again, x) == executed(plain, x)


def test_torch_compile_takes_it_in() -> None:
    """Without the code generator, which needs a C++ compiler: statistics once, gradients as without recomputation."""
    plain, again = in_train_mode(again=False), in_train_mode(again=True)
    for model in (plain, again):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # compiled dropout draws otherwise
    x = torch.randn(4, 3, 8, 8)
    torch.compile(again, backend="aot_eager", fullgraph=COMPILES)(x).square().sum().backward()
    plain(x).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, msg=name)
    torch.testing.assert_close(
        again.get_buffer("blocks.2.bn.running_mean"), plain.get_buffer("blocks.2.bn.running_mean")
    )
    assert int(again.get_buffer("blocks.2.bn.num_batches_tracked")) == 1


def test_no_cuda_graph_with_recomputation(write_recipe: Write) -> None:
    recipe = write_recipe("rigl", net="residual")
    graphed = [can_be_graphed(prepare(load(recipe, [s]), 0, CPU), Processes(torch.device("cuda"))) for s in (OFF, ON)]
    assert graphed == [True, False]


# --- blocks ---


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("layer1.0.conv1", "layer1.0"),
        ("layer2.0.downsample.0", "layer2.0"),
        ("transformer.h.11.attn.qk", "transformer.h.11"),
        ("encoder.encoder_layer_3.mlp.0", "encoder.encoder_layer_3"),
        ("trunk_output.block1.block1-2.f.a.0", "trunk_output.block1.block1-2"),
        ("stages.1.blocks.2.fc", "stages.1"),
        ("conv1", None),
        ("classifier.1", None),
        ("layer1.conv1", None),
        ("0", None),
    ],
)
def test_the_block_of_a_layer(name: str, block: str | None) -> None:
    assert Layer(name, "conv", "body").block == block


@pytest.mark.parametrize("name", [name for name in registry.names() if not name.startswith("digits")])
def test_every_zoo_model_is_mostly_blocks(name: str) -> None:
    table = load_table(Request(name))
    outside = [row for row in table.layers if row.macs.terms and not row.block]
    assert len(outside) <= 3 and all(row.role in ("input", "output", "body") for row in outside)


class Bypassed(nn.Module):
    """Calls the layers of its blocks, and never the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block.get_submodule("1")(F.relu(block.get_submodule("0")(x)))
        return x


def test_models_that_cannot_say_so(write_recipe: Write) -> None:
    model, x = mlp()
    with pytest.raises(UsageError, match="has no numbered blocks") as error:
        recompute(model, table_of(model, x), x)
    assert error.value.hint == "leave training.recompute out"
    with pytest.raises(
        UsageError, match=r"blocks\.0\.0, blocks\.0\.1, blocks\.1\.0 and 3 more of the model would not be"
    ):
        recompute(Bypassed(), table_of(Bypassed(), torch.zeros(1, 8)), torch.zeros(1, 8))
    with pytest.raises(UsageError, match="has no numbered blocks"):
        prepare(load(write_recipe("rigl", net="mlp"), [ON]), 0, CPU)


def test_a_second_call_changes_nothing() -> None:
    model, x = residual()
    table: Any = table_of(model, x)
    assert recompute(model, table, x) == recompute(model, table, x) == ("blocks.0", "blocks.1", "blocks.2")
    assert (
        executed(model.train(), x)
        == audit(table, training=TrainingSpec(algorithm="dense", recompute=True)).dense.training_flops
    )
