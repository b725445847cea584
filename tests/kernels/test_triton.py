"""The Triton kernels against the dense layer in float64: on a GPU, or on a CPU in Triton's interpreter.

Without a GPU, `test_interpreter` runs this file in the interpreter (`TRITON_INTERPRET=1`), in float32 and at small sizes.
"""

from __future__ import annotations

import importlib
import os

import pytest
import torch

from sparseift_cli.kernels import KERNELS, LayerRequest
from sparseift_cli.kernels.linear import BlockLinear
from sparseift_cli.kernels.reference import ACTIVATIONS, slope_of
from tests.kernels.cases import MASKS, Case, ConvCase, mask_of, relative, window_of

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")
blocks = importlib.import_module("sparseift_cli.kernels.blocks")
conv_blocks = importlib.import_module("sparseift_cli.kernels.conv_blocks")

# Triton 3.6's interpreter takes scalars from arrays of one element, which numpy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32,) if INTERPRETED else (torch.bfloat16, torch.float16, torch.float32)
BOUND = {
    torch.bfloat16: 6e-3,
    torch.float16: 1e-3,
    torch.float32: 1e-5 if INTERPRETED else 1e-3,
}  # float32 runs as tf32
WAYS = ("descriptors", "pointers") if INTERPRETED else ("chosen", "descriptors", "pointers")
ways = pytest.mark.parametrize("way", WAYS)
sizes = pytest.mark.parametrize("block", [128, 64, 32])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def descriptors(way: str) -> bool | None:
    """The option of the functions in `blocks` for a way; skips where the device has no descriptors."""
    if way == "descriptors" and not INTERPRETED and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a device with tensor descriptors")
    return None if way == "chosen" else way == "descriptors"


def multiply_everything(case: Case, way: str, dtype: torch.dtype) -> None:
    """Forward with bias and GELU, forward alone, and dX."""
    option = {"descriptors": descriptors(way)}
    y, slope = blocks.multiply(case.x, case.values, case.index, False, case.bias, "gelu", True, **option)
    assert relative(slope, slope_of(case.z, "gelu")) < BOUND[dtype] and relative(y, case.y("gelu")) < BOUND[dtype]
    plain, nothing = blocks.multiply(case.x, case.values, case.index, **option)
    assert relative(plain, case.z - case.bias.double()) < BOUND[dtype] and nothing.numel() == 0
    assert relative(blocks.multiply(case.grad, case.values, case.index, True, **option)[0], case.dx) < BOUND[dtype]


@ways
@sizes
@dtypes
@pytest.mark.parametrize("tokens", [1, 37] if INTERPRETED else [1, 37, 777])
def test_products(block: int, dtype: torch.dtype, way: str, tokens: int) -> None:
    multiply_everything(
        Case.draw(mask_of("an empty row and an empty column"), block, tokens, dtype, DEVICE), way, dtype
    )


@ways
@sizes
@dtypes
def test_gradient_before_an_activation(block: int, dtype: torch.dtype, way: str) -> None:
    tokens = 37 if INTERPRETED else 777
    case = Case.draw(mask_of("an empty row and an empty column"), block, tokens, dtype, DEVICE)
    option = {"descriptors": descriptors(way)}
    dz, total = blocks.gradient_before(case.grad, case.values, case.index, case.x, **option)
    wanted = case.dx * case.x.double()
    assert relative(dz, wanted) < BOUND[dtype] and relative(total, wanted.sum(0)) < BOUND[dtype]
    alone, nothing = blocks.gradient_before(case.grad, case.values, case.index, case.x, False, **option)
    assert torch.equal(alone, dz) and nothing.numel() == 0


@ways
@dtypes
@pytest.mark.parametrize("name", [name for name in MASKS if "empty" not in name])
def test_corners(name: str, dtype: torch.dtype, way: str) -> None:
    for block in (32,) if INTERPRETED else (128, 64, 32):
        case = Case.draw(mask_of(name), block, 33, dtype, DEVICE)
        multiply_everything(case, way, dtype)
        gradient = blocks.weight_gradient(case.grad, case.x, case.index, descriptors=descriptors(way))
        assert relative(gradient, case.dvalues) < BOUND[dtype]


@ways
@sizes
@dtypes
@pytest.mark.parametrize("parts", [None, 1, 3])
def test_weight_gradient(block: int, dtype: torch.dtype, way: str, parts: int | None) -> None:
    tokens = 70 if INTERPRETED else 777
    case = Case.draw(mask_of("an empty row and an empty column"), block, tokens, dtype, DEVICE)
    found = blocks.weight_gradient(case.grad, case.x, case.index, parts=parts, descriptors=descriptors(way))
    assert relative(found, case.dvalues) < BOUND[dtype]


@ways
@dtypes
@pytest.mark.parametrize("shape", [(1, 50), (50, 1)], ids=str)
def test_weight_gradient_of_groups_of_eight(shape: tuple[int, int], dtype: torch.dtype, way: str) -> None:
    mask = torch.ones(shape, dtype=torch.bool)
    case = Case.draw(mask, 64, 40, dtype, DEVICE)
    assert case.index.groups.shape[1] == 8
    found = blocks.weight_gradient(case.grad, case.x, case.index, descriptors=descriptors(way))
    assert relative(found, case.dvalues) < BOUND[dtype]


@ways
@dtypes
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogues(activation: str, dtype: torch.dtype, way: str) -> None:
    for block in (32,) if INTERPRETED else (128, 64, 32):
        case = Case.draw(mask_of("an empty row and an empty column"), block, 33, dtype, DEVICE)
        option = {"descriptors": descriptors(way)}
        y, slope = blocks.multiply(case.x, case.values, case.index, False, case.bias, activation, True, **option)
        wanted = (y > 0).double() if activation == "relu" else slope_of(case.z, activation)
        assert relative(y, case.y(activation)) < BOUND[dtype] and relative(slope, wanted) < BOUND[dtype]


def test_layer_takes_the_kernels() -> None:
    mask = mask_of("an empty row and an empty column")
    layer = BlockLinear(mask, 32, activation="gelu_tanh", device=DEVICE, dtype=torch.float32)
    request = LayerRequest(32, "float32", DEVICE, None if INTERPRETED else torch.cuda.get_device_capability())
    assert KERNELS.get("blocks").why_not(request) is None
    x = torch.randn(2, 5, 128, device=DEVICE, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    found = [y.detach(), x.grad, layer.values.grad, layer.bias.grad]
    layer.backend = "reference"
    layer.zero_grad()
    x.grad = None
    y = layer(x)
    y.square().sum().backward()
    for a, b in zip(found, [y.detach(), x.grad, layer.values.grad, layer.bias.grad], strict=True):
        assert relative(a, b) < (1e-5 if INTERPRETED else 3e-3)


def test_moved_blocks_are_the_ones_computed() -> None:
    mask = mask_of("an empty row and an empty column")
    case = Case.draw(mask, 32, 9, torch.float32, DEVICE)
    moved = mask.flip(0, 1)
    case.index.move_(moved.to(DEVICE))
    fresh = Case.draw(moved, 32, 9, torch.float32, DEVICE)
    y, _ = blocks.multiply(fresh.x, fresh.values, case.index)
    assert relative(y, fresh.z - fresh.bias.double()) < BOUND[torch.float32]
    gradient = blocks.weight_gradient(fresh.grad, fresh.x, case.index)
    assert relative(gradient, fresh.dvalues) < BOUND[torch.float32]


def test_memory_that_is_not_aligned() -> None:
    case = Case.draw(mask_of("all blocks"), 32, 5, torch.float32, DEVICE)
    shifted = torch.empty(case.x.numel() + 1, device=DEVICE)[1:].view_as(case.x).copy_(case.x)
    y, _ = blocks.multiply(shifted, case.values, case.index, bias=case.bias)
    assert relative(y, case.z) < BOUND[torch.float32]


WINDOWS = {
    "3x3": window_of(3, 1, 1),
    "3x3, stride 2": window_of(3, 2, 1),
    "1x1, padded": window_of(1, 3, 2),
    "2x5": window_of((2, 5), (1, 2), (0, 1)),
}


def convolve_everything(case: ConvCase, way: str, parts: int | None = None) -> None:
    """Forward, dX and dW."""
    option, bound, window = {"descriptors": descriptors(way)}, BOUND[case.x.dtype], case.window
    assert relative(conv_blocks.conv2d(case.x, case.values, case.index, window, case.bias, **option), case.y) < bound
    dx = conv_blocks.conv2d_input_gradient(case.grad, case.values, case.index, window, case.x.shape[1:3], **option)
    assert relative(dx, case.dx) < bound
    dvalues = conv_blocks.conv2d_weight_gradient(case.grad, case.x, case.index, window, parts=parts, **option)
    assert relative(dvalues, case.dvalues) < bound


@ways
@dtypes
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("images", [(100, 3, 4), (3, 5, 6)], ids=["many images", "few images"])
def test_convolutions(images: tuple[int, int, int], window: str, dtype: torch.dtype, way: str) -> None:
    case = ConvCase.draw(mask_of("one block"), 32, images, WINDOWS[window], dtype, DEVICE)
    convolve_everything(case, way, parts=2)


@ways
@sizes
@dtypes
def test_convolutions_with_an_empty_row_and_column(block: int, dtype: torch.dtype, way: str) -> None:
    mask = mask_of("an empty row and an empty column")
    images = (90, 2, 1) if INTERPRETED else (90, 7, 5)
    convolve_everything(ConvCase.draw(mask, block, images, WINDOWS["3x3"], dtype, DEVICE), way)


def test_convolution_takes_the_kernels() -> None:
    case = ConvCase.draw(mask_of("all blocks"), 32, (2, 3, 3), WINDOWS["3x3"], torch.float32, DEVICE)
    layer = case.layer()
    request = LayerRequest(32, "float32", DEVICE, None if INTERPRETED else torch.cuda.get_device_capability(), "conv2d")
    assert KERNELS.get("blocks").why_not(request) is None
    x = case.x.permute(0, 3, 1, 2).requires_grad_()
    y = layer(x)
    y.backward(case.grad.permute(0, 3, 1, 2))
    assert relative(y.permute(0, 2, 3, 1), case.y) < BOUND[torch.float32]
    assert relative(x.grad.permute(0, 2, 3, 1), case.dx) < BOUND[torch.float32]
    assert relative(layer.values.grad, case.dvalues) < BOUND[torch.float32]
