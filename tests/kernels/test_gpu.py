"""What only a GPU shows: random shapes, compiled models, CUDA graphs, autocast, the same bits twice."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseift_cli.kernels import LayerRequest, LayerSize, measure, select
from sparseift_cli.kernels.conv import BlockConv2d
from sparseift_cli.kernels.linear import BlockLinear
from sparseift_cli.kernels.reference import ACTIVATIONS, slope_of
from sparseift_cli.kernels.registry import MASKED
from tests.kernels.cases import Case, ConvCase, relative, window_of

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton")
blocks = importlib.import_module("sparseift_cli.kernels.blocks")
conv_blocks = importlib.import_module("sparseift_cli.kernels.conv_blocks")

BOUND = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 1e-3}


def random_mask(rows: int, columns: int, density: float, seed: int) -> Tensor:
    """Bool [R, C] with at least one block."""
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density
    mask[seed % rows, seed % columns] = True
    return mask


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("block", [128, 64, 32])
@pytest.mark.parametrize("seed", range(8))
def test_random_shapes(block: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, columns, tokens = (int(torch.randint(1, top, (), generator=generator)) for top in (40, 40, 3000))
    case = Case.draw(random_mask(rows, columns, 0.05 + 0.1 * seed, seed), block, tokens, dtype, "cuda", seed)
    for _ in range(2):  # the second time in memory that the first has used
        for activation in ACTIVATIONS:
            y, slope = blocks.multiply(case.x, case.values, case.index, False, case.bias, activation, True)
            assert relative(y, case.y(activation)) < BOUND[dtype]
            wanted = (y > 0).double() if activation == "relu" else slope_of(case.z, activation)
            assert relative(slope, wanted) < BOUND[dtype]
        assert relative(blocks.multiply(case.grad, case.values, case.index, True)[0], case.dx) < BOUND[dtype]
        assert relative(blocks.weight_gradient(case.grad, case.x, case.index), case.dvalues) < BOUND[dtype]
        dz, total = blocks.gradient_before(case.grad, case.values, case.index, case.x)
        wanted = case.dx * case.x.double()
        assert relative(dz, wanted) < BOUND[dtype] and relative(total, wanted.sum(0)) < BOUND[dtype]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("window", [None, (3, 3, 1, 1, 1, 1)])
@pytest.mark.parametrize("block", [128, 64, 32])
def test_auto_measures_both_ways_as_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, window: tuple[int, ...] | None, dtype: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(measure, "_known", {})
    kind = "linear" if window is None else "conv2d"
    layer = LayerRequest(block, dtype, "cuda", torch.cuda.get_device_capability(), kind)
    size = LayerSize(2048 // block, 512 // block, max(8, 2048 * 512 // block**2 // 8), 4096, window=window)
    assert measure.check("blocks", layer) is None
    times = measure.milliseconds(["blocks"], layer, size)
    print(layer, times)
    assert set(times) == {"blocks", MASKED} and min(times.values()) > 0
    fastest = min(times, key=times.__getitem__)
    selected = select("auto", layer, size)
    assert selected.backend == fastest and bool(selected.reason) == (fastest == MASKED)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.ones(8, device="cuda").sum().item() == 8, "no capture is left open"


@pytest.mark.parametrize("block", [128, 64, 32])
def test_same_bits_twice(block: int) -> None:
    case = Case.draw(random_mask(24, 12, 0.3, 0), block, 4096, torch.bfloat16, "cuda")

    def once() -> list[Tensor]:
        y, slope = blocks.multiply(case.x, case.values, case.index, False, case.bias, "gelu", True)
        dx, _ = blocks.multiply(case.grad, case.values, case.index, True)
        before = blocks.gradient_before(case.grad, case.values, case.index, case.x)
        return [y, slope, dx, blocks.weight_gradient(case.grad, case.x, case.index), *before]

    first = once()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


class Feedforward(nn.Module):
    """Two block-sparse layers with a GELU between them, on a residual stream of 256 features."""

    def __init__(self) -> None:
        super().__init__()
        self.up = BlockLinear(random_mask(16, 4, 0.5, 1), 64, activation="gelu_tanh", device="cuda")
        self.down = BlockLinear(random_mask(4, 16, 0.5, 2), 64, device="cuda")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x))


def dense(model: Feedforward, x: Tensor) -> Tensor:
    """What `model` computes, in float64, from dense weights."""
    up, down = model.up, model.down
    hidden = F.gelu(F.linear(x.double(), up.dense().double(), up.bias.double()), approximate="tanh")
    return x.double() + F.linear(hidden, down.dense().double(), down.bias.double())


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # of torch's own warm-up
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_under_autocast_while_blocks_move(mode: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    model = Feedforward()
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    x = torch.randn(2, 333, 256, device="cuda")
    for step in range(5):
        if step == 3:
            model.up.index.move_(model.up.index.mask().flip(0))
        model.zero_grad()
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast("cuda", torch.bfloat16):
            y = compiled(x)
        assert relative(y, dense(model, x)) < 2e-2
        y.float().square().mean().backward()
        found = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            model(x).float().square().mean().backward()
        assert all(relative(a, p.grad) < 2e-2 for a, p in zip(found, model.parameters(), strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_cuda_graph_replays_moved_blocks() -> None:
    layer = BlockLinear(random_mask(16, 4, 0.5, 1), 128, activation="relu", device="cuda", dtype=torch.bfloat16)
    x = torch.randn(1000, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            layer(x).sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    layer.zero_grad(set_to_none=True)
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        y.sum().backward()
    layer.index.move_(layer.index.mask().flip(0, 1))
    with torch.no_grad():
        x.normal_()
        layer.values.normal_()
    graph.replay()
    torch.cuda.synchronize()
    wanted = F.relu(F.linear(x.double(), layer.dense().double(), layer.bias.double()))
    assert relative(y, wanted) < BOUND[torch.bfloat16]
    mask = (wanted > 0).double()
    assert relative(x.grad, mask @ layer.dense().double()) < 2e-2


def test_trains() -> None:
    torch.manual_seed(0)
    model = Feedforward()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
    x = torch.randn(512, 256, device="cuda")
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = (model(x) - x.roll(1, 1)).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def convolve(case: ConvCase) -> list[Tensor]:
    """Forward, dX and dW."""
    return [
        conv_blocks.conv2d(case.x, case.values, case.index, case.window, case.bias),
        conv_blocks.conv2d_input_gradient(case.grad, case.values, case.index, case.window, case.x.shape[1:3]),
        conv_blocks.conv2d_weight_gradient(case.grad, case.x, case.index, case.window),
    ]


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("block", [128, 64, 32])
@pytest.mark.parametrize("seed", range(8))
def test_random_convolutions(block: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def number(top: int) -> int:
        return int(torch.randint(1, top, (), generator=generator))

    mask = random_mask(number(8), number(8), 0.2 + 0.1 * seed, seed)
    images = (number(40) if seed % 2 else 100 + number(300), 3 + number(10), 3 + number(10))
    window = window_of((3, 3) if seed < 4 else (number(4), number(4)), 1 + seed % 3, seed % 3)
    case = ConvCase.draw(mask, block, images, window, dtype, "cuda", seed)
    wanted = case.y, case.dx, case.dvalues
    for _ in range(2):  # the second time in memory that the first has used
        found = dict(zip(("y", "dX", "dW"), map(relative, convolve(case), wanted), strict=True))
        assert max(found.values()) < BOUND[dtype], (found, case.window, images)
    assert all(torch.equal(a, b) for a, b in zip(convolve(case), convolve(case), strict=True))


@pytest.mark.parametrize("images", [(256, 14, 14), (389, 6, 5), (190, 1, 9), (60, 7, 7)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("block", [128, 64, 32])
def test_convolutions_of_many_images(block: int, stride: int, images: tuple[int, int, int]) -> None:
    mask = random_mask(5, 4, 0.4, 3)
    mask[1] = mask[:, 2] = False
    case = ConvCase.draw(mask, block, images, window_of(3, stride, 1), torch.bfloat16, "cuda")
    found = convolve(case), convolve(case)
    for a, b, wanted in zip(*found, (case.y, case.dx, case.dvalues), strict=True):
        assert relative(a, wanted) < BOUND[torch.bfloat16] and torch.equal(a, b)


def test_convolutions_compile_under_autocast_and_keep_channels_last() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(
        BlockConv2d(random_mask(6, 4, 0.5, 1), 64, 3, padding=1, bias=False, device="cuda"),
        nn.BatchNorm2d(384, device="cuda"),
        nn.ReLU(),
        BlockConv2d(random_mask(4, 6, 0.5, 2), 64, 3, stride=2, padding=1, device="cuda"),
        BlockConv2d(random_mask(4, 4, 0.5, 3), 64, 1, stride=2, device="cuda"),
    )
    x = torch.randn(128, 256, 9, 9, device="cuda").to(memory_format=torch.channels_last).requires_grad_()
    found = []
    for run in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        x.grad = None
        with torch.autocast("cuda", torch.bfloat16):
            y = run(x)
        assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == torch.bfloat16
        y.float().square().mean().backward()
        found.append([y.detach(), x.grad, *(p.grad for p in model.parameters())])
    assert all(relative(a, b) < 2e-2 for a, b in zip(*found, strict=True))
