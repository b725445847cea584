"""BlockLinear and its operators on a CPU, against the dense layer in float64."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from sparseift_cli.errors import UsageError
from sparseift_cli.kernels import KERNELS, LayerRequest, choose, reference
from sparseift_cli.kernels.linear import BlockLinear
from sparseift_cli.kernels.ops import block_linear
from sparseift_cli.kernels.reference import ACTIVATIONS
from tests.kernels.cases import MASKS, Case, mask_of, relative

CORNERS = mask_of("an empty row and an empty column")


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("tokens", [1, 5])
def test_reference_is_the_dense_layer(name: str, tokens: int) -> None:
    case = Case.draw(mask_of(name), 4, tokens, torch.float64)
    y, slope = reference.multiply(case.x, case.values, case.index, bias=case.bias, activation="gelu", keep=True)
    assert relative(slope, reference.slope_of(case.z, "gelu")) < 1e-14 and relative(y, case.y("gelu")) < 1e-14
    assert relative(reference.multiply(case.grad, case.values, case.index, transposed=True)[0], case.dx) < 1e-14
    assert relative(reference.weight_gradient(case.grad, case.x, case.index), case.dvalues) < 1e-14


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_layer_and_its_gradients_are_those_of_the_dense_layer(activation: str, bias: bool) -> None:
    layer = BlockLinear(CORNERS, 4, bias=bias, activation=activation, dtype=torch.float64)
    x = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    weight = layer.dense().requires_grad_()
    offset = None if layer.bias is None else layer.bias.detach().clone().requires_grad_()
    twin = x.detach().clone().requires_grad_()
    y, wanted = layer(x), ACTIVATIONS[activation](F.linear(twin, weight, offset))
    torch.testing.assert_close(y, wanted)
    grad = torch.randn_like(y)
    y.backward(grad)
    wanted.backward(grad)
    torch.testing.assert_close(x.grad, twin.grad)
    blocks = weight.grad.view(5, 4, 4, 4).transpose(1, 2)[layer.rows.long(), layer.columns.long()]
    torch.testing.assert_close(layer.values.grad, blocks)
    if offset is not None:
        torch.testing.assert_close(layer.bias.grad, offset.grad)


def test_numerical_gradient() -> None:
    layer = BlockLinear(mask_of("one block"), 2, activation="silu", dtype=torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def loss(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return block_linear(x, values, layer.index, bias, "silu")

    assert torch.autograd.gradcheck(loss, (x, layer.values, layer.bias))


@pytest.mark.parametrize("shape", [(16,), (0, 16), (2, 0, 16), (3, 16)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    layer = BlockLinear(CORNERS, 4)
    y = layer(torch.randn(shape))
    assert y.shape == (*shape[:-1], 20)
    y.sum().backward()
    assert layer.values.grad.shape == layer.values.shape


def test_operators_follow_the_rules_of_torch_library() -> None:
    case = Case.draw(CORNERS, 4, 3, torch.float32)
    index, ours = list(case.index), torch.ops.sparseift
    inputs = [tensor.clone().requires_grad_() for tensor in (case.x, case.values, case.bias)]
    for keep in (True, False):
        torch.library.opcheck(ours.block_linear, (*inputs, index, "gelu" if keep else "none", keep, "auto"))
    torch.library.opcheck(ours.block_multiply, (case.grad, case.values, index, True, "auto"))
    torch.library.opcheck(ours.block_weight_gradient, (case.grad, case.x, index, "auto"))


def test_compiles_without_graph_break_or_recompilation() -> None:
    layer = BlockLinear(CORNERS, 4, activation="gelu")
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(len(inputs))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = torch.randn(3, 16)
    torch.testing.assert_close(compiled(x), layer(x))
    moved = CORNERS.flip(0, 1)
    layer.index.move_(moved)
    torch.testing.assert_close(compiled(x), F.gelu(F.linear(x, layer.dense(), layer.bias)))
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_as_nn_linear(dtype: torch.dtype) -> None:
    layer = BlockLinear(CORNERS, 4)
    x = torch.randn(3, 16, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y, wanted = layer(x), F.linear(x, layer.dense(), layer.bias)
    assert y.dtype == wanted.dtype == dtype
    torch.testing.assert_close(y, wanted, rtol=1e-2, atol=1e-2)
    y.sum().backward()
    assert layer.values.grad.dtype == torch.float32 and x.grad.dtype == torch.float32


def test_flops_are_those_of_the_stored_blocks() -> None:
    layer = BlockLinear(CORNERS, 4, activation="relu")
    x = torch.randn(2, 3, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
    forward = 2 * 6 * layer.values.numel()
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * forward


def test_from_dense_and_back() -> None:
    weight = torch.randn(20, 16)
    mask = CORNERS.repeat_interleave(4, 0).repeat_interleave(4, 1)
    bias = torch.randn(20)
    layer = BlockLinear.from_dense(weight * mask, CORNERS, bias)
    assert torch.equal(layer.dense(), weight * mask) and torch.equal(layer.bias, bias)
    assert "blocks=8 of 20, 4 x 4" in repr(layer)
    with pytest.raises(UsageError, match="outside the blocks"):
        BlockLinear.from_dense(weight, CORNERS)
    with pytest.raises(UsageError, match="square blocks"):
        BlockLinear.from_dense(weight[:, :15], CORNERS)


def test_state_dict_holds_the_index_and_rebuilds_it() -> None:
    layer = BlockLinear(CORNERS, 4)
    other = BlockLinear(CORNERS.flip(0, 1), 4)
    assert set(layer.state_dict()) == {"values", "bias", "row_offsets", "columns", "layout"}
    other.load_state_dict(layer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(layer.index, other.index, strict=True))
    x = torch.randn(3, 16)
    assert torch.equal(layer(x), other(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert isinstance(layer, nn.Module) and torch.equal(layer.double()(x.double()).float(), layer(x.double()).float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: (c.x[:, :-1], c.values, c.bias), r"\[tokens, 16\]"),
        (lambda c: (c.x, c.values[:-1], c.bias), r"\[8, B, B\]"),
        (lambda c: (c.x, c.values, c.bias[:-1]), r"the bias of these blocks is \[20\]"),
        (lambda c: (c.x, c.values.double(), c.bias), "of one dtype"),
    ],
)
def test_wrong_operands_are_refused(change: object, message: str) -> None:
    case = Case.draw(CORNERS, 4, 3, torch.float32)
    x, values, bias = change(case)
    with pytest.raises(UsageError, match=message):
        block_linear(x, values, case.index, bias)
    with pytest.raises(UsageError, match="unknown activation 'tanh'"):
        block_linear(case.x, case.values, case.index, None, "tanh")


def test_backends_say_why_not() -> None:
    def why(**changes: object) -> str:
        layer = {"block": 64, "dtype": "bfloat16", "device": "cuda", "capability": (9, 0), **changes}
        return KERNELS.get("blocks").why_not(LayerRequest(**layer)) or ""

    assert "128, 64 or 32" in why(block=48)
    assert "not float64" in why(dtype="float64")
    assert "not 7.5" in why(capability=(7, 5))
    assert "not conv3d" in why(kind="conv3d") and why(kind="conv2d") == why()
    on_cpu = LayerRequest(64, "float32", "cpu")
    assert choose("auto", on_cpu) is KERNELS.get("reference")
    with pytest.raises(UsageError, match="does not take this linear layer"):
        choose("blocks", LayerRequest(48, "float32", "cpu"))
    with pytest.raises(UsageError, match="no kernel backend takes a conv3d layer"):
        choose("auto", LayerRequest(64, "float32", "cpu", kind="conv3d"))
    with pytest.raises(UsageError, match="unknown kernel backend"):
        choose("cutlass", on_cpu)
    with pytest.raises(UsageError, match="no why_not and no functions"):
        KERNELS.register("mine", object())


def test_import_needs_neither_torch_nor_triton(root: Path) -> None:
    code = "import sparseift_cli.kernels, sys; print(sorted({'torch', 'triton', 'numpy'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_transposed_weight_is_that_of_conv1d() -> None:
    weight = torch.randn(20, 16) * CORNERS.repeat_interleave(4, 0).repeat_interleave(4, 1)
    plain = BlockLinear.from_dense(weight, CORNERS, torch.randn(20))
    layer = BlockLinear.from_dense(weight.t(), CORNERS, plain.bias, transposed=True)
    assert layer.weight.shape == layer.weight_mask.shape == (16, 20)
    assert torch.equal(layer.values, plain.values) and torch.equal(layer.dense(), weight.t())
    assert torch.equal(layer.weight_mask, plain.weight_mask.t()) and torch.equal(plain.weight_mask, weight != 0)
    assert torch.equal(layer.blocks_of(weight.t()), plain.values)
    x = torch.randn(3, 16)
    assert torch.equal(layer(x), plain(x))
    with pytest.raises(UsageError, match="square blocks"):
        BlockLinear.from_dense(weight, CORNERS, transposed=True)


def test_the_weight_that_others_read_has_the_gradient() -> None:
    layer = BlockLinear(CORNERS, 4, dtype=torch.float64)
    x, grad = torch.randn(3, 16, dtype=torch.float64), torch.randn(3, 20, dtype=torch.float64)
    layer(x).backward(grad)
    wanted, layer.values.grad = layer.values.grad, None
    F.linear(x, layer.weight, layer.bias).backward(grad)
    torch.testing.assert_close(layer.values.grad, wanted)


def test_blocks_move_with_the_state_of_the_optimiser() -> None:
    layer = BlockLinear(CORNERS, 4)
    before, moments = layer.dense(), torch.randn_like(layer.values)
    dense_moments = layer.scattered(moments)
    moved = CORNERS.flip(0, 1)
    addresses = [t.data_ptr() for t in (layer.values, moments, *layer.index)]
    layer.move_(moved, [moments])
    assert addresses == [t.data_ptr() for t in (layer.values, moments, *layer.index)]
    kept = (CORNERS & moved).repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert kept.any() and not kept.all() and torch.equal(layer.block_mask, moved)
    assert torch.equal(layer.dense(), before * kept) and torch.equal(layer.scattered(moments), dense_moments * kept)
    with pytest.raises(UsageError, match="this index has 8 blocks"):
        layer.move_(torch.ones_like(moved))
