"""What a block-sparse layer costs on a GPU, beside the dense layer of as many FLOPs and the masked-dense layer.

`python -m tests.benchmarks.kernels [--device cuda] [--json FILE] [--rounds N] [--only TEXT] [--ways TEXT,TEXT]`. A dense layer (inputs, outputs)
is widened by (1 - s)^-1/2 at sparsity s, so that all three do the same useful FLOPs. Convolutions are ResNet-50's 3x3, on 256 images
in channels_last; the dense ones run in cuDNN with the algorithm that `cudnn.benchmark` finds fastest. Timed are forward, dX and dW, each as a
CUDA graph of a few launches; all of them in turns, so that a change of the GPU's clock meets all. Printed are ratios to the
dense layer: the median over the rounds and, in brackets, the smallest and largest. `kernels.md` keeps what was measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from sparseift_cli.kernels import choose
from sparseift_cli.kernels.index import BlockIndex
from sparseift_cli.kernels.reference import ConvWindow
from sparseift_cli.kernels.registry import LayerRequest

SPARSITIES = (0.5, 0.75, 0.9)
BLOCKS = (128, 64, 32)
TOKENS = 16384
IMAGES = 256
LAUNCHES = 4
PHASES = ("forward", "dX", "dW")
Calls = dict[str, Callable[[], object]]


@dataclass
class Ratio:
    """Time of one way over that of the dense layer: median, smallest and largest over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, times: list[float], dense: list[float]) -> Ratio:
        """From times of the same rounds, in any unit."""
        ratios = [time / base for time, base in zip(times, dense, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f},{self.high:.2f}]"


@dataclass
class Row:
    """One layer at one sparsity, by one way; `dense_ms` are the medians of the dense layer's three phases."""

    layer: str
    sparsity: float
    way: str
    grid: str
    forward: Ratio
    dX: Ratio
    dW: Ratio
    step: Ratio
    dense_ms: list[float]
    rounds: int

    def __str__(self) -> str:
        phases = "  ".join(f"{name} {getattr(self, name)}" for name in (*PHASES, "step"))
        return f"{self.layer:16} s={self.sparsity:<5} {self.way:13} {self.grid:16} {phases}"


def balanced_mask(rows: int, columns: int, count: int, generator: torch.Generator) -> Tensor:
    """Bool [R, C] with `count` blocks at random; rows, and nearly so columns, differ by at most one."""
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    used = torch.zeros(columns)
    extra = set(torch.randperm(rows, generator=generator)[: count % rows].tolist())
    for row in range(rows):
        order = (used + 0.9 * torch.rand(columns, generator=generator)).argsort()
        chosen = order[: count // rows + (row in extra)]
        mask[row, chosen] = True
        used[chosen] += 1
    return mask


def normal(*shape: int) -> Tensor:
    """Random bfloat16 on the GPU: zeros would be faster than real data."""
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


@dataclass(frozen=True)
class Linear:
    """A dense layer [outputs, inputs] on TOKENS tokens; `multiple` is what its masked-dense width is rounded to."""

    inputs: int
    outputs: int
    multiple: int = 128

    def dense_calls(self, inputs: int, outputs: int) -> Calls:
        """The three products of a dense layer, by cuBLAS."""
        x, grad, weight = normal(TOKENS, inputs), normal(TOKENS, outputs), normal(outputs, inputs)
        return {"forward": lambda: x @ weight.T, "dX": lambda: grad @ weight, "dW": lambda: grad.T @ x}

    def block_calls(self, mask: Tensor, block: int) -> Calls:
        """The three products of a layer with the blocks of `mask` [R, C]."""
        functions = choose("auto", request(block, "linear")).functions()
        index = BlockIndex.from_mask(mask.cuda(), block)
        rows, columns = mask.shape
        x, grad = normal(TOKENS, columns * block), normal(TOKENS, rows * block)
        values = normal(index.num_blocks, block, block)
        return {
            "forward": lambda: functions.multiply(x, values, index),
            "dX": lambda: functions.multiply(grad, values, index, True),
            "dW": lambda: functions.weight_gradient(grad, x, index),
        }


@dataclass(frozen=True)
class Convolution:
    """A 3x3 convolution of IMAGES images of `size` x `size` pixels, with padding 1."""

    inputs: int
    outputs: int
    size: int
    stride: int = 1
    multiple: int = 32

    def dense_calls(self, inputs: int, outputs: int) -> Calls:
        """The three products of a dense convolution, by cuDNN."""
        last = torch.channels_last
        x, weight = (normal(IMAGES, inputs, self.size, self.size), normal(outputs, inputs, 3, 3))
        x, weight = x.to(memory_format=last), weight.to(memory_format=last)
        grad = torch.randn_like(F.conv2d(x, weight, None, self.stride, 1))

        def backward(*wanted: bool) -> object:
            stride, one, none = [self.stride] * 2, [1, 1], [0, 0]
            return torch.ops.aten.convolution_backward(
                grad, x, weight, None, stride, one, one, False, none, 1, [*wanted, False]
            )

        return {
            "forward": lambda: F.conv2d(x, weight, None, self.stride, 1),
            "dX": lambda: backward(True, False),
            "dW": lambda: backward(False, True),
        }

    def block_calls(self, mask: Tensor, block: int) -> Calls:
        """The three products of a convolution with the blocks of `mask` [R, C]."""
        functions = choose("auto", request(block, "conv2d")).conv_functions()
        index = BlockIndex.from_mask(mask.cuda(), block)
        window = ConvWindow(3, 3, self.stride, self.stride, 1, 1)
        rows, columns = mask.shape
        x = normal(IMAGES, self.size, self.size, columns * block)
        grad = normal(IMAGES, *window.output(self.size, self.size), rows * block)
        values = normal(index.num_blocks, window.taps, block, block)
        return {
            "forward": lambda: functions.conv2d(x, values, index, window),
            "dX": lambda: functions.conv2d_input_gradient(grad, values, index, window, (self.size, self.size)),
            "dW": lambda: functions.conv2d_weight_gradient(grad, x, index, window),
        }


def request(block: int, kind: str) -> LayerRequest:
    """A layer of this GPU."""
    return LayerRequest(block, "bfloat16", "cuda", torch.cuda.get_device_capability(), kind)


LAYERS: dict[str, Linear | Convolution] = {
    "Llama-1B up": Linear(2048, 8192),
    "GPT-3 Small up": Linear(768, 3072),
    "conv 128 at 28": Convolution(128, 128, 28),
    "conv 256 at 14": Convolution(256, 256, 14),
    "conv 512 at 7": Convolution(512, 512, 7),
    "conv 128 at 56/2": Convolution(128, 128, 56, stride=2),
    "conv 256 at 28/2": Convolution(256, 256, 28, stride=2),
    "conv 512 at 14/2": Convolution(512, 512, 14, stride=2),
}


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of LAUNCHES calls: replayed, it has no gaps between launches."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            call()
    return graph


def timed(ways: dict[str, Calls], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds by way and phase, a time a round; the first round warms up and is not counted."""
    times: dict[str, dict[str, list[float]]] = {way: {phase: [] for phase in PHASES} for way in ways}
    graphs = {way: {phase: captured(calls[phase]) for phase in PHASES} for way, calls in ways.items()}
    for turn in range(rounds + 1):
        for phase in PHASES:
            for way in ways:
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                graphs[way][phase].replay()
                end.record()
                end.synchronize()
                if turn:
                    times[way][phase].append(begin.elapsed_time(end) / LAUNCHES)
    return times


def compare(layer: str, sparsity: float, rounds: int, wanted: list[str]) -> Iterator[Row]:
    """The dense layer's rivals at one sparsity, those whose name contains one of `wanted`."""
    inputs, outputs = LAYERS[layer].inputs, LAYERS[layer].outputs
    wider = (1 - sparsity) ** -0.5
    generator = torch.Generator().manual_seed(0)
    ways = {"dense": LAYERS[layer].dense_calls(inputs, outputs)}
    grids = {}
    for block in BLOCKS:
        rows, columns = round(outputs * wider / block), round(inputs * wider / block)
        way = f"blocks of {block}"
        count = round(inputs * outputs / block**2)
        if any(text in way for text in wanted) and 2 * count > rows > 1:
            mask = balanced_mask(rows, columns, count, generator)
            ways[way], grids[way] = LAYERS[layer].block_calls(mask, block), f"{count} of {columns}x{rows}"
    if any(text in "masked-dense" for text in wanted):
        multiple = LAYERS[layer].multiple
        features = [round(side * wider / multiple) * multiple for side in (inputs, outputs)]
        ways["masked-dense"], grids["masked-dense"] = LAYERS[layer].dense_calls(*features), ""
    times = timed(ways, rounds)
    dense = times.pop("dense")
    base = [sum(parts) for parts in zip(*dense.values(), strict=True)]
    for way, phases in times.items():
        step = [sum(parts) for parts in zip(*phases.values(), strict=True)]
        ratios = [Ratio.of(phases[phase], dense[phase]) for phase in PHASES]
        medians = [statistics.median(dense[phase]) for phase in PHASES]
        yield Row(layer, sparsity, way, grids[way], *ratios, Ratio.of(step, base), medians, rounds)


def main() -> int:
    """Print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu (see kernels_cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--rounds", type=int, default=15, metavar="N")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="on a CPU")
    parser.add_argument("--only", default="", metavar="TEXT", help="layers whose name contains this")
    parser.add_argument(
        "--ways",
        default="blocks,cells 1x1,cells 4x4,masked",
        metavar="TEXT,TEXT",
        help="ways whose name contains one of these",
    )
    options = parser.parse_args()
    if options.device == "cpu":
        from tests.benchmarks import kernels_cpu  # which imports this module

        return kernels_cpu.main(options)
    if not options.device.startswith("cuda") or not torch.cuda.is_available():
        print("the kernels run on a CUDA device; there is none here", file=sys.stderr)
        return 2
    torch.backends.cudnn.benchmark = True
    torch.cuda.set_device(torch.device(options.device).index or 0)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {version('triton')}, bf16, {TOKENS} tokens, {IMAGES} images"
    )
    rows: list[Row] = []
    for layer in filter(lambda name: options.only in name, LAYERS):
        for sparsity in SPARSITIES:
            for row in compare(layer, sparsity, options.rounds, options.ways.split(",")):
                print(row, flush=True)
                rows.append(row)
            torch.cuda.empty_cache()
        print("  dense: " + ", ".join(f"{p} {ms:.3f} ms" for p, ms in zip(PHASES, rows[-1].dense_ms, strict=True)))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
