"""What training code does with any model, done with block layers: copies, averages, DDP, pickles, devices, dtypes, wrappers."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sparseift_cli as sparseift
from sparseift_cli.kernels.convert import use_kernels
from sparseift_cli.kernels.layer import BlockLayer
from sparseift_cli.kernels.storage import to_dense_state
from sparseift_cli.models.zoo.gpt import GPT, GPTConfig
from tests.helpers.block_ranks import average_gradients, batch, net
from tests.helpers.forked import in_processes


def layer_of(model: nn.Module) -> BlockLayer:
    (found,) = (m for m in model.modules() if isinstance(m, BlockLayer))
    return found


def same(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    index = all(torch.equal(x, y) for x, y in zip(layer_of(a).index, layer_of(b).index, strict=True))
    return one.keys() == two.keys() and index and all(torch.equal(one[name], two[name]) for name in one)


def moved(model: nn.Module) -> Tensor:
    return layer_of(model).block_mask.flip(0)


def test_ddp_sends_the_stored_blocks_alone(tmp_path: Path) -> None:
    outs = [tmp_path / f"{rank}.pt" for rank in range(2)]
    calls = [(rank, str(tmp_path / "meet"), str(out)) for rank, out in enumerate(outs)]
    done = in_processes(average_gradients, calls)
    model = net()
    for process in done:
        assert process.returncode == 0, process.stderr
        sent = json.loads(process.stdout)
        assert sent["sent"] == 4 * sum(p.numel() for p in model.parameters())
        assert sent["buffers"] == sum(b.nbytes for b in model[1].buffers())  # of BatchNorm, none of an index
    one, two = (torch.load(out) for out in outs)
    grads = []
    for rank in range(2):
        model.zero_grad()
        model(batch(rank)).square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name in one:
        assert torch.equal(one[name], two[name])
        torch.testing.assert_close(one[name], (grads[0][name] + grads[1][name]) / 2)
    assert one["2.values"].shape == (5, 4, 4)


def test_an_average_holds_and_follows_the_blocks() -> None:
    model = net()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    first = layer_of(model).dense()
    average.update_parameters(model)
    with torch.no_grad():
        layer_of(model).values.add_(1)
    average.update_parameters(model)
    ours = layer_of(average)
    torch.testing.assert_close(ours.dense(), (first + layer_of(model).dense()) / 2)
    assert ours.values.shape == layer_of(model).values.shape
    assert average(torch.randn(4, 3)).shape == (4, 20)
    state = to_dense_state(average.state_dict())
    assert torch.equal(state["module.2.weight"], ours.dense())


def test_a_copy_is_a_copy() -> None:
    model = net()
    other = copy.deepcopy(model)
    assert same(model, other)
    before = copy.deepcopy(other.state_dict())
    layer_of(model).move_(moved(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_a_pickled_module() -> None:
    model = net()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert same(model, again)
    other = net()
    layer_of(other).move_(moved(other))
    again.load_state_dict(other.state_dict())
    assert same(again, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_dtype(dtype: torch.dtype) -> None:
    model = net().eval()
    x = torch.randn(4, 3)
    wanted = model(x)
    converted = copy.deepcopy(model).to(dtype)
    assert layer_of(converted).index.columns.dtype == torch.int32
    torch.testing.assert_close(converted(x.to(dtype)).float(), wanted, rtol=0.02, atol=0.02)
    again = net().to(dtype)
    again.load_state_dict(converted.state_dict())
    assert same(again, converted)
    half = net().half()
    assert layer_of(half).values.dtype == torch.float16 and torch.equal(
        layer_of(half).block_mask, layer_of(model).block_mask
    )


def test_to_meta_and_back_by_assignment() -> None:
    model = net()
    empty = net().to("meta")
    empty.load_state_dict(model.state_dict(), assign=True)
    assert same(empty, model)


def test_to_empty_is_filled_by_a_state_dict() -> None:
    model, empty = net(), net().to("meta").to_empty(device="cpu")
    for name in ("row_offsets", "columns", "rows", "column_offsets", "column_rows", "column_order", "groups"):
        layer_of(empty).get_buffer(name).fill_(-(2**31))  # what uninitialised memory may hold
    empty.load_state_dict(model.state_dict())
    assert same(empty, model)
    layer_of(empty).get_buffer("rows").fill_(2**30)
    empty.load_state_dict(to_dense_state(model.state_dict()))
    assert same(empty, model)


def test_the_state_dict_of_a_compiled_model() -> None:
    model = net()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    assert isinstance(compiled, nn.Module)
    compiled(torch.randn(4, 3))
    state = compiled.state_dict()
    assert "_orig_mod.2.values" in state
    assert torch.equal(to_dense_state(state)["_orig_mod.2.weight"], layer_of(model).dense())
    other = net()
    layer_of(other).move_(moved(other))
    compiled.load_state_dict({f"_orig_mod.{name}": t for name, t in other.state_dict().items()})
    assert same(model, other)


def test_gradients_moments_and_clipping_are_of_the_stored_blocks() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    model(batch(0)).square().sum().backward()
    values = layer_of(model).values
    assert values.grad is not None and values.grad.shape == values.shape
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert {t.shape for t in optimizer.state[values].values() if t.dim()} == {values.shape}
    elements = sum(t.numel() for held in optimizer.state.values() for t in held.values() if t.dim())
    assert elements == 2 * sum(p.numel() for p in model.parameters())


def held_bytes(model: nn.Module, ids: Tensor) -> int:
    """Bytes of weights, buffers, gradients and Adam's moments after one step."""
    optimizer = torch.optim.AdamW(model.parameters())
    model(ids).square().mean().backward()
    optimizer.step()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers(), *gradients, *moments))


def test_memory_at_90_percent_is_that_of_the_dense_model() -> None:
    """Ten times as large layers: with zeros, ten times the memory."""
    ids = torch.zeros(1, 8, dtype=torch.long)
    dense = GPT(GPTConfig(128, 2, 2, max_seq=8, vocab=64))
    wide, _ = sparseift.transform(dense, ids, sparsity=0.9, pattern="16x16")
    baseline, masked = held_bytes(dense, ids), held_bytes(copy.deepcopy(wide), ids)
    assert all(choice.backend == "reference" for choice in use_kernels(wide, "reference"))
    assert held_bytes(wide, ids) < 1.2 * baseline and masked > 9 * baseline
