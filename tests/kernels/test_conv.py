"""BlockConv2d and its operators on a CPU, against nn.Conv2d in float64."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from sparseift_cli.errors import UsageError
from sparseift_cli.kernels.conv import BlockConv2d
from sparseift_cli.kernels.conv_ops import block_conv2d
from tests.kernels.cases import MASKS, ConvCase, mask_of, relative, window_of

CORNERS = mask_of("an empty row and an empty column")
WINDOWS = {
    "3x3": window_of(3, 1, 1),
    "3x3, stride 2": window_of(3, 2, 1),
    "3x3, no padding": window_of(3, 1, 0),
    "5x5, stride 3": window_of(5, 3, 2),
    "1x1": window_of(1, 1, 0),
    "1x1, stride 2": window_of(1, 2, 0),
    "1x1, padded": window_of(1, 1, 1),
    "2x3": window_of((2, 3), (1, 2), (0, 1)),
}
windows = pytest.mark.parametrize("name", WINDOWS)


@windows
@pytest.mark.parametrize("size", [(5, 6), (7, 5)], ids=str)
def test_layer_and_its_gradients_are_those_of_the_dense_layer(name: str, size: tuple[int, int]) -> None:
    case = ConvCase.draw(CORNERS, 2, (3, *size), WINDOWS[name], torch.float64)
    layer = case.layer()
    x = case.x.permute(0, 3, 1, 2).requires_grad_()
    y = layer(x)
    assert relative(y.permute(0, 2, 3, 1), case.y) < 1e-14
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.backward(case.grad.permute(0, 3, 1, 2))
    assert relative(x.grad.permute(0, 2, 3, 1), case.dx) < 1e-14
    assert relative(layer.values.grad, case.dvalues) < 1e-14
    assert relative(layer.bias.grad, case.grad.sum((0, 1, 2))) < 1e-14


@pytest.mark.parametrize("mask", MASKS)
def test_masks_with_corner_cases(mask: str) -> None:
    case = ConvCase.draw(mask_of(mask), 2, (1, 4, 3), WINDOWS["3x3"], torch.float64)
    layer = case.layer()
    layer(case.x.permute(0, 3, 1, 2)).backward(case.grad.permute(0, 3, 1, 2))
    assert relative(layer.values.grad, case.dvalues) < 1e-14


@pytest.mark.parametrize("stride", [1, 2])
def test_numerical_gradient(stride: int) -> None:
    layer = BlockConv2d(mask_of("one block"), 2, 3, stride=stride, padding=1, dtype=torch.float64)
    x = torch.randn(2, 4, 3, 4, dtype=torch.float64, requires_grad=True)

    def loss(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return block_conv2d(x, values, layer.index, layer.window, bias)

    assert torch.autograd.gradcheck(loss, (x, layer.values, layer.bias))


def test_from_dense_and_back() -> None:
    mask = CORNERS.repeat_interleave(4, 0).repeat_interleave(4, 1)[:, :, None, None]
    conv = nn.Conv2d(16, 20, 3, stride=2, padding=1)
    weight = (conv.weight * mask).detach().to(memory_format=torch.channels_last)
    layer = BlockConv2d.from_dense(weight, CORNERS, conv.bias, stride=conv.stride, padding=conv.padding)
    assert torch.equal(layer.dense(), weight) and torch.equal(layer.weight, weight) and layer.dense().is_contiguous()
    assert torch.equal(layer.weight_mask, mask.expand(weight.shape)) and layer.values.shape == (8, 9, 4, 4)
    x = torch.randn(2, 16, 7, 7)
    wanted = F.conv2d(x, weight, conv.bias, stride=2, padding=1)
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(layer(x[0]), wanted[0])
    assert "16, 20, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), bias=True, blocks=8 of 20, 4 x 4" in repr(layer)
    with pytest.raises(UsageError, match="outside the blocks"):
        BlockConv2d.from_dense(conv.weight.detach(), CORNERS)
    with pytest.raises(UsageError, match="square blocks"):
        BlockConv2d.from_dense(weight[:, :15], CORNERS)


def test_state_dict_holds_the_index_and_rebuilds_it() -> None:
    layer, other = (BlockConv2d(mask, 2, 3, padding="same") for mask in (CORNERS, CORNERS.flip(0, 1)))
    assert set(layer.state_dict()) == {"values", "bias", "row_offsets", "columns", "layout"}
    other.load_state_dict(layer.state_dict())
    x = torch.randn(1, 8, 4, 4)
    assert torch.equal(layer(x), other(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_operators_follow_the_rules_of_torch_library() -> None:
    case = ConvCase.draw(CORNERS, 2, (2, 4, 3), WINDOWS["3x3, stride 2"], torch.float32)
    index, window, ours = list(case.index), list(case.window), torch.ops.sparseift
    inputs = [tensor.clone().requires_grad_() for tensor in (case.x, case.values, case.bias)]
    torch.library.opcheck(ours.block_conv2d, (*inputs, index, window, "auto"))
    torch.library.opcheck(ours.block_conv2d_input_gradient, (case.grad, case.values, index, window, 4, 3, "auto"))
    torch.library.opcheck(ours.block_conv2d_weight_gradient, (case.grad, case.x, index, window, "auto"))


def test_compiles_without_graph_break() -> None:
    layer = BlockConv2d(CORNERS, 2, 3, stride=2, padding=1)
    torch._dynamo.reset()
    x = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


def test_autocast_as_nn_conv2d() -> None:
    layer = BlockConv2d(CORNERS, 2, 3)
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, wanted = layer(x), F.conv2d(x, layer.dense(), layer.bias)
    assert y.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(y, wanted, rtol=1e-2, atol=2e-2)
    y.sum().backward()
    assert layer.values.grad.dtype == torch.float32 and x.grad.dtype == torch.float32


@windows
def test_flops_are_those_of_the_stored_blocks(name: str) -> None:
    case = ConvCase.draw(CORNERS, 2, (2, 6, 5), WINDOWS[name], torch.float32)
    layer, x = case.layer(), case.x.permute(0, 3, 1, 2).requires_grad_()
    forward = 2 * case.grad[..., 0].numel() * layer.values.numel()
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * forward


def test_wrong_operands_are_refused() -> None:
    layer = BlockConv2d(CORNERS, 2, 3)
    with pytest.raises(UsageError, match="has 8 channels"):
        layer(torch.randn(1, 6, 5, 5))
    with pytest.raises(UsageError, match="does not fit an input of 2 x 5"):
        layer(torch.randn(1, 8, 2, 5))
    with pytest.raises(UsageError, match="of one dtype"):
        layer(torch.randn(1, 8, 5, 5).double())
    with pytest.raises(UsageError, match="values are"):
        block_conv2d(torch.randn(1, 8, 5, 5), layer.values, layer.index, window_of(1, 1, 0))


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(8, 8, 3, groups=2), "2 groups"),
        (nn.Conv2d(8, 8, 3, dilation=2), "dilated by 2 x 2"),
        (nn.Conv2d(8, 8, 3, padding_mode="reflect"), "reflect"),
        (nn.Conv2d(8, 8, 2, padding="same"), "'same' of a kernel of 2 x 2"),
        (nn.ConvTranspose2d(8, 8, 3), "ConvTranspose2d"),
        (nn.Conv2d(8, 8, 3, padding="same"), None),
        (nn.Conv2d(8, 8, (3, 1), stride=2, padding=(1, 0)), None),
    ],
)
def test_what_is_not_taken(conv: nn.Module, reason: str | None) -> None:
    found = BlockConv2d.why_not(conv)
    assert found is None if reason is None else reason in (found or "")


@pytest.mark.parametrize("module", ["conv_blocks", "conv_hopper"])
def test_kernels_can_be_imported_without_triton(module: str) -> None:
    """What they take from the kernels of linear layers is there, by the same names."""
    assert importlib.import_module(f"sparseift_cli.kernels.{module}")
