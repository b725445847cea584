"""Which ways compute a layer rightly on this device, and how long each takes: what `registry.select` chooses by.

The candidates are the backends and the dense layer with a mask on its gradient; each is timed over forward, dX and dW of random
tensors and a balanced random mask, in turns, so that a device that grows hot or slow does so for all of them. Times are cached
in the process and in a JSON file of the cache folder, by device, versions and shape. A file that is damaged or cannot be written
costs only the next measurement.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..base.atomic import as_json, replace_file
from ..base.locations import cache_dir
from ..mask.balanced import balanced_masks
from ..version import __version__
from . import feedforward as _feedforward  # registers its operators
from .conv_ops import block_conv2d
from .index import BlockIndex
from .ops import block_linear
from .reference import ACTIVATIONS, ConvWindow
from .registry import KERNELS, KINDS, MASKED, LayerRequest, LayerSize

assert _feedforward
T = TypeVar("T")
Step = Callable[[], tuple[Tensor, ...]]
"""Forward and backward of a layer: y, dX, dW, and the gradient of the bias [R * B] where there is one."""

MOST_TOKENS = 32768  # above it the times of all ways grow in proportion
ROUNDS = 9
SLOW = 0.1  # seconds of a step for which three rounds must do
GRAPH_SECONDS = 2e-3  # of the launches that a CUDA graph replays at once
MOST_ENTRIES = 2000  # of the file
TOLERANCE = {"float64": 1e-6, "float32": 5e-3, "float16": 5e-3, "bfloat16": 2e-2}
"""Largest relative difference to the product in float64, in the Frobenius norm; float32 may be computed as tf32."""


def check(name: str, layer: LayerRequest) -> str | None:
    """Compare the backend `name` with the dense layer in float64, once a process for each block size, dtype and device.

    Returns:
        The reason for which it must not be used here: it fails, or is wrong. None where it is right, and for kinds of layers that
        are not compared.
    """
    return _checked(name, layer) if layer.kind in KINDS else None


_RESULTS = ("output", "dX", "dW", "gradient of the bias", "gradient before an activation", "sum of that gradient")


@lru_cache(maxsize=256)
@torch.inference_mode(mode=False)
def _checked(name: str, layer: LayerRequest) -> str | None:
    size = LayerSize(rows=3, columns=2, blocks=4, tokens=24, activation="gelu")
    if layer.kind == "conv2d":
        size = replace(size, activation="none", window=(3, 3, 2, 2, 1, 1))
    operands = _Operands.draw(layer, size)
    exact = operands.exactly()
    right = (*exact.make_masked_step()(), *exact.masked_gradient_before())
    try:
        found = [tensor.double().cpu() for tensor in (*operands.block_step(name), *operands.gradient_before(name))]
    except Exception as error:
        # whatever a compiler or driver raises here, the layer has another way to be computed
        return f"it fails on this {layer.device} device: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    allowed = TOLERANCE.get(layer.dtype, TOLERANCE["bfloat16"])
    for what, ours, wanted in zip(_RESULTS[: len(right)], found, right, strict=True):
        ours = exact.dense(ours) if what == "dW" else ours
        difference = ((ours - wanted).norm() / wanted.norm()).item()
        if not difference <= allowed:  # NaN is not
            return f"it is wrong on this {layer.device} device: its {what} differs by {difference:.1e} from the dense layer's"
    return None


def milliseconds(names: Sequence[str], layer: LayerRequest, size: LayerSize) -> dict[str, float]:
    """Median milliseconds of a step by way: those of `names`, and `MASKED`.

    A way that fails, for example for want of memory, is left out; for kinds of layers that are not measured the result is empty.
    """
    if layer.kind not in KINDS or (layer.kind == "conv2d" and size.window is None):
        return {}
    size = replace(size, tokens=min(MOST_TOKENS, 2 ** round(math.log2(max(1, size.tokens)))))
    key = _key(names, layer, size)
    if key not in _known:
        on_disk = _read()
        _known.update(on_disk)
        if key not in on_disk:
            _known[key] = times = _measure(names, layer, size)
            if len(times) > len(names):  # what failed may succeed in the next process
                _write(on_disk | {key: times})
    return dict(_known[key])


_known: dict[str, dict[str, float]] = {}
"""The times that this process has measured or read."""


def from_first_process(make: Callable[[], T]) -> T:
    """What `make` returns; where training is distributed, what it returns in process 0, in all of them."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return make()
    made: list[Any] = [make() if distributed.get_rank() == 0 else None]
    distributed.broadcast_object_list(made, src=0)
    return made[0]


# --- what is timed ---


@dataclass
class _Operands:
    """Operands of one layer. Linear: x [T, C * B], values [n, B, B], grad at the output [T, R * B].

    Convolution: x [N, C * B, H, W] and grad [N, R * B, OH, OW] channels_last, values [n, taps, B, B]. Bias [R * B] or None.
    """

    index: BlockIndex
    x: Tensor
    values: Tensor
    bias: Tensor | None
    grad: Tensor
    activation: str
    window: ConvWindow | None

    @classmethod
    def draw(cls, layer: LayerRequest, size: LayerSize) -> _Operands:
        """Random operands on the device of `layer`; the random state of the process stays as it is."""
        device, dtype, side = torch.device(layer.device), getattr(torch, layer.dtype), layer.block
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=dtype, generator=generator)

        cells = balanced_masks((size.rows, size.columns), [size.blocks], torch.Generator().manual_seed(0))[0]
        window = None if size.window is None else ConvWindow(*size.window)
        taps = () if window is None else (window.taps,)
        inputs, outputs = size.columns * side, size.rows * side
        if window is None:
            x, grad = normal(size.tokens, inputs), normal(size.tokens, outputs)
        else:
            before, after = _image(size.tokens, window)
            x, grad = (normal(*at, width).permute(0, 3, 1, 2) for at, width in ((before, inputs), (after, outputs)))
        variance = size.rows / (size.blocks * side * math.prod(taps))
        values = normal(size.blocks, *taps, side, side).mul_(math.sqrt(variance))
        bias = normal(outputs) if size.bias else None
        return cls(BlockIndex.from_mask(cells.to(device), side), x, values, bias, grad, size.activation, window)

    def exactly(self) -> _Operands:
        """The same numbers in float64, on the CPU."""
        x, values, grad = (tensor.double().cpu() for tensor in (self.x, self.values, self.grad))
        bias = None if self.bias is None else self.bias.double().cpu()
        index = BlockIndex(*(tensor.cpu() for tensor in self.index))
        return _Operands(index, x, values, bias, grad, self.activation, self.window)

    def dense(self, values: Tensor) -> Tensor:
        """The weight [R * B, C * B], or [R * B, C * B, kh, kw] channels_last, with `values` [n, (taps,) B, B] in its blocks."""
        (down, across), side = self.index.grid, values.shape[-1]
        cells = values.new_zeros(down, across, *values.shape[1:])
        cells[self.index.rows.long(), self.index.columns.long()] = values
        if self.window is None:
            return cells.transpose(1, 2).reshape(down * side, across * side)
        weight = cells.permute(0, 3, 1, 4, 2).reshape(down * side, across * side, *self.window[:2])
        return weight.contiguous(memory_format=torch.channels_last)

    def block_step(self, backend: str) -> tuple[Tensor, ...]:
        """A `Step` of the backend; dW is [n, (taps,) B, B]."""

        def forward(x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
            if self.window is None:
                return block_linear(x, values, self.index, bias, self.activation, backend)
            return block_conv2d(x, values, self.index, self.window, bias, backend)

        return self._step(self.values, forward)

    def gradient_before(self, backend: str) -> tuple[Tensor, ...]:
        """What the backward pass of joined layers computes, with x for the slope: (dX times x [T, C * B], its sum [C * B])."""
        if self.window is not None:
            return ()
        index = list(self.index)
        return torch.ops.sparseift.block_gradient_before(self.grad, self.values, self.x, index, True, backend)

    def masked_gradient_before(self) -> tuple[Tensor, ...]:
        """The same by the dense weight."""
        if self.window is not None:
            return ()
        scaled = (self.grad @ self.dense(self.values)) * self.x
        return scaled, scaled.sum(0)

    def make_masked_step(self) -> Step:
        """The dense weight and its mask, and a `Step` that uses them; dW has the shape of the weight."""
        weight, mask = self.dense(self.values), self.dense(torch.ones_like(self.values))

        def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            if self.window is None:
                return ACTIVATIONS[self.activation](F.linear(x, weight, bias))
            return F.conv2d(x, weight, bias, self.window[2:4], self.window[4:])

        def step() -> tuple[Tensor, ...]:
            found = self._step(weight, forward)
            found[2].mul_(mask)
            return found

        return step

    def _step(self, weight: Tensor, forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> tuple[Tensor, ...]:
        """y, and the gradients of x, of `weight` (blocks or dense, any shape of the two) and of the bias [R * B]."""
        with torch.enable_grad(), torch.autocast(self.x.device.type, enabled=False):
            leaves = [t.detach().requires_grad_() for t in (self.x, weight, self.bias) if t is not None]
            y = forward(leaves[0], leaves[1], leaves[2] if self.bias is not None else None)
            return y.detach(), *torch.autograd.grad(y, leaves, self.grad)


def _image(positions: int, window: ConvWindow) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Images and height and width, before and after a convolution, so that about `positions` come out: 14 x 14 of each image.

    >>> _image(784, ConvWindow(3, 3, 2, 2, 1, 1))
    ((4, 27, 27), (4, 14, 14))
    """
    side = min(14, math.isqrt(positions)) or 1
    height, width = (
        max(kernel, (side - 1) * stride + kernel - 2 * padding)
        for kernel, stride, padding in zip(window[:2], window[2:4], window[4:], strict=True)
    )
    images = max(1, round(positions / side**2))
    return (images, height, width), (images, *window.output(height, width))


@torch.inference_mode(mode=False)
def _measure(names: Sequence[str], layer: LayerRequest, size: LayerSize) -> dict[str, float]:
    """Median milliseconds by way, timed in turns; without those that fail."""
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True  # as training has it
    try:
        return _timed(names, layer, size)
    except torch.OutOfMemoryError:
        return {}
    finally:
        torch.backends.cudnn.benchmark = benchmark
        if layer.device == "cuda":
            torch.cuda.empty_cache()


def _timed(names: Sequence[str], layer: LayerRequest, size: LayerSize) -> dict[str, float]:
    operands = _Operands.draw(layer, size)
    makers: dict[str, Callable[[], Step]] = {MASKED: operands.make_masked_step}
    makers |= {name: lambda name=name: lambda: operands.block_step(name) for name in names}
    timers: dict[str, Callable[[], float]] = {}
    for name, make in makers.items():
        with contextlib.suppress(Exception):  # no memory, or whatever a compiler raises: the way is left out
            timers[name] = _cuda_timer(make()) if layer.device == "cuda" else _timer(make())
    once = {name: timer() for name, timer in timers.items()}
    rounds = ROUNDS if sum(once.values()) < SLOW else 3
    times: dict[str, list[float]] = {name: [] for name in timers}
    for turn in range(rounds):
        for name in list(timers)[:: 1 if turn % 2 else -1]:
            times[name].append(timers[name]())
    return {name: round(1e3 * statistics.median(found), 5) for name, found in times.items()}


def _timer(step: Step) -> Callable[[], float]:
    """A function that makes one step and returns its seconds."""
    step()

    def timer() -> float:
        began = time.perf_counter()
        step()
        return time.perf_counter() - began

    return timer


def _cuda_timer(step: Step) -> Callable[[], float]:
    """A function that makes steps on the GPU and returns the seconds of one: as a CUDA graph, as training runs them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        launches = min(20, max(1, round(GRAPH_SECONDS / (time.perf_counter() - began))))
    torch.cuda.current_stream().wait_stream(side)

    def several() -> None:
        for _ in range(launches):
            step()

    run: Callable[[], None] = several
    with contextlib.suppress(RuntimeError):  # what cannot be recorded is launched
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            several()
        run = graph.replay

    def timer(_operands: Step = step) -> float:  # a graph does not keep the tensors that it reads
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / launches / 1e3

    return timer


# --- the cache ---


def _key(names: Sequence[str], layer: LayerRequest, size: LayerSize) -> str:
    """Everything that a time depends on."""
    shape = (
        f"{layer.kind} {size.rows}x{size.columns} blocks of {layer.block}, {size.blocks} stored, {size.tokens} tokens"
    )
    epilogue = f"bias {size.bias}, {size.activation}" + (f", window {size.window}" if size.window else "")
    ways = ", ".join(f"{name} {getattr(KERNELS.get(name), 'version', '')}".rstrip() for name in names)
    return "; ".join((_environment(layer.device), ways, layer.dtype, shape, epilogue))


def _environment(device: str) -> str:
    """The device and every version that its speed depends on."""
    if device == "cuda":
        named = f"{torch.cuda.get_device_name()} {'.'.join(map(str, torch.cuda.get_device_capability()))}"
        named += f" {torch.get_float32_matmul_precision()}"
    else:
        named = f"{device} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} threads"
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    return f"{named}; torch {torch.__version__}, triton {triton}, sparseift {__version__}, kernels {_kernels_version()}"


@cache
def _kernels_version() -> str:
    """A hash of this folder's code: times of other kernels say nothing."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _path() -> Path:
    return cache_dir() / "kernels.json"


def _read() -> dict[str, dict[str, float]]:
    """Every cached time, by key and way; those of a file that is damaged are lost."""
    try:
        found = json.loads(_path().read_bytes())
        return {
            str(key): {str(way): float(ms) for way, ms in times.items()}
            for key, times in found.items()
            if MASKED in times
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(known: dict[str, dict[str, float]]) -> None:
    """Keep the newest entries for the next process, where the folder can be written."""
    newest = dict(list(known.items())[-MOST_ENTRIES:])
    with contextlib.suppress(OSError):
        _path().parent.mkdir(parents=True, exist_ok=True)
        replace_file(_path(), as_json(newest), durable=False)
