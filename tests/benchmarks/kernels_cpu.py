"""The part of `tests.benchmarks.kernels` for `--device cpu`: linear layers of r x c cells beside the dense layer of as many FLOPs.

`python -m tests.benchmarks.kernels --device cpu [--json FILE] [--rounds N] [--threads N] [--only TEXT] [--ways TEXT,TEXT]`. All ways run in
turns, float32. `step` is the operators alone, forward and backward, over the three products of the dense layer; `layer` is forward and
backward through autograd over nn.Linear's. Both include every change of layout, the permutation of values and new outputs.
`kernels_cpu.md` keeps what was tried and measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparseift_cli.kernels.cpu import library
from sparseift_cli.kernels.cpu.ops import cell_linear
from sparseift_cli.kernels.index import BlockIndex
from tests.benchmarks.kernels import SPARSITIES, Ratio, balanced_mask

TOKENS = 1024
LAYERS = {"GPT-3 Small up": (768, 3072), "GPT 256 up": (256, 1024)}
PARTS = ("forward", "backward", "layer")
Calls = dict[str, Callable[[], object]]


@dataclass
class Row:
    """One layer at one sparsity, by one way; `dense_ms` are the medians of the dense layer's parts."""

    layer: str
    sparsity: float
    way: str
    grid: str
    forward: Ratio
    backward: Ratio
    step: Ratio
    whole_layer: Ratio
    dense_ms: list[float]
    rounds: int
    threads: int

    def __str__(self) -> str:
        parts = f"forward {self.forward}  backward {self.backward}  step {self.step}  layer {self.whole_layer}"
        return f"{self.layer:14} s={self.sparsity:<5} {self.way:12} {self.grid:24} {parts}"


def trained(layer: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor, weight: Tensor) -> Callable[[], object]:
    """Forward and backward of y [T, outputs] = layer(x [T, inputs]) through autograd; gradients are new tensors each time."""
    x, weight = x.detach().requires_grad_(), weight.requires_grad_()

    def run() -> object:
        return torch.autograd.grad(layer(x), (x, weight), grad)

    return run


def dense_calls(inputs: int, outputs: int) -> Calls:
    """The parts of a dense layer [outputs, inputs]."""
    x, grad, weight = torch.randn(TOKENS, inputs), torch.randn(TOKENS, outputs), torch.randn(outputs, inputs) * 0.02
    return {
        "forward": lambda: x @ weight.detach().T,
        "backward": lambda: (grad @ weight.detach(), grad.T @ x),
        "layer": trained(lambda x: F.linear(x, weight), x, grad, weight),
    }


def cell_calls(mask: Tensor, cell: tuple[int, int]) -> Calls:
    """The parts of a layer with the cells of `mask` [R, C]."""
    index = BlockIndex.from_mask(mask, block=1)
    (rows, columns), (r, c) = mask.shape, cell
    x, grad = torch.randn(TOKENS, columns * c), torch.randn(TOKENS, rows * r)
    values = torch.randn(index.num_blocks, r, c) * 0.02
    ours, where = torch.ops.sparseift, list(index)
    return {
        "forward": lambda: ours.cell_linear(x, values.detach(), None, where),
        "backward": lambda: ours.cell_linear_backward(grad, x, values.detach(), where, [True, True, False]),
        "layer": trained(lambda x: cell_linear(x, values, index), x, grad, values),
    }


def timed(ways: dict[str, Calls], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds by way and part, a time a round; the first round warms up and is not counted.

    With one thread they are times of the processor, which do not count the programs that ran in between.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, dict[str, list[float]]] = {way: {part: [] for part in PARTS} for way in ways}
    for turn in range(rounds + 1):
        for part in PARTS:
            for way, calls in ways.items():
                begin = clock()
                calls[part]()
                if turn:
                    times[way][part].append(1e3 * (clock() - begin))
    return times


def compare(layer: str, sparsity: float, rounds: int, wanted: list[str]) -> Iterator[Row]:
    """The dense layer's rivals at one sparsity, those whose name contains one of `wanted`."""
    inputs, outputs = LAYERS[layer]
    wider = [round(side * (1 - sparsity) ** -0.5 / 16) * 16 for side in (inputs, outputs)]
    generator = torch.Generator().manual_seed(0)
    ways, grids = {"dense": dense_calls(inputs, outputs)}, dict[str, str]()
    for r, c in library.CELLS:
        way = f"cells {r}x{c}"
        if any(text in way for text in wanted):
            rows, columns, count = wider[1] // r, wider[0] // c, round(inputs * outputs / (r * c))
            mask = balanced_mask(rows, columns, count, generator)
            ways[way], grids[way] = cell_calls(mask, (r, c)), f"{count:,} of {columns:,}x{rows:,}"
    if any(text in "masked-dense" for text in wanted):
        ways["masked-dense"], grids["masked-dense"] = dense_calls(*wider), ""
    times = timed(ways, rounds)
    dense = times.pop("dense")

    def step(parts: dict[str, list[float]]) -> list[float]:
        return [sum(pair) for pair in zip(parts["forward"], parts["backward"], strict=True)]

    medians = [statistics.median(dense[part]) for part in PARTS]
    for way, parts in times.items():
        ratios = [Ratio.of(parts[part], dense[part]) for part in PARTS]
        ratios.insert(2, Ratio.of(step(parts), step(dense)))
        yield Row(layer, sparsity, way, grids[way], *ratios, medians, rounds, torch.get_num_threads())


def main(options: argparse.Namespace) -> int:
    """Print the table, and write it as JSON where asked."""
    if reason := library.why_not():
        print(f"the kernels cannot run here: {reason}", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    vector = library.library().sparseift_vector_width()
    print(f"torch {torch.__version__}, {options.threads} threads, float32, vectors of {vector} floats, {TOKENS} tokens")
    rows: list[Row] = []
    for layer in filter(lambda name: options.only in name, LAYERS):
        for sparsity in SPARSITIES:
            for row in compare(layer, sparsity, options.rounds, options.ways.split(",")):
                print(row, flush=True)
                rows.append(row)
            print("  dense: " + ", ".join(f"{p} {ms:.2f} ms" for p, ms in zip(PARTS, rows[-1].dense_ms, strict=True)))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0
