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
from ..version import __version__
from .index import BlockIndex
from .ops import block_linear
from .reference import ACTIVATIONS
from .registry import MASKED, LayerRequest, LayerSize

T = TypeVar("T")
Step = Callable[[], tuple[Tensor, ...]]
"""Forward and backward of a layer: y [T, R * B], dX [T, C * B], dW, and the gradient of the bias [R * B] where there is one."""

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
    return _checked(name, layer) if layer.kind == "linear" else None


@lru_cache(maxsize=256)
def _checked(name: str, layer: LayerRequest) -> str | None:
    operands = _Linear.draw(layer, LayerSize(rows=3, columns=2, blocks=4, tokens=24, activation="gelu"))
    exact = operands.as_type(torch.float64).masked_step()
    try:
        found = operands.block_step(name)
    except Exception as error:
        # whatever a compiler or driver raises here, the layer has another way to be computed
        return f"it fails on this {layer.device} device: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    allowed = TOLERANCE.get(layer.dtype, TOLERANCE["bfloat16"])
    for what, ours, wanted in zip(("output", "dX", "dW", "gradient of the bias"), found, exact, strict=True):
        wanted = operands.blocks_of(wanted) if what == "dW" else wanted
        difference = ((ours.double() - wanted).norm() / wanted.norm()).item()
        if not difference <= allowed:  # NaN is not
            return f"it is wrong on this {layer.device} device: its {what} differs by {difference:.1e} from the dense layer's"
    return None


def milliseconds(names: Sequence[str], layer: LayerRequest, size: LayerSize) -> dict[str, float]:
    """Median milliseconds of a step by way: those of `names`, and `MASKED`.

    A way that fails, for example for want of memory, is left out; for kinds of layers that are not measured the result is empty.
    """
    if layer.kind != "linear":
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
class _Linear:
    """Operands of one linear layer: x [T, C * B], values [n, B, B], bias [R * B] or None, grad [T, R * B] at the output."""

    index: BlockIndex
    x: Tensor
    values: Tensor
    bias: Tensor | None
    grad: Tensor
    activation: str

    @classmethod
    def draw(cls, layer: LayerRequest, size: LayerSize) -> _Linear:
        """Random operands on the device of `layer`; the random state of the process stays as it is."""
        device, dtype, side = torch.device(layer.device), getattr(torch, layer.dtype), layer.block
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=dtype, generator=generator)

        index = BlockIndex.from_mask(_balanced_mask(size.rows, size.columns, size.blocks).to(device), side)
        return cls(
            index,
            normal(size.tokens, size.columns * side),
            normal(size.blocks, side, side).mul_(math.sqrt(size.rows / (size.blocks * side))),
            normal(size.rows * side) if size.bias else None,
            normal(size.tokens, size.rows * side),
            size.activation,
        )

    def as_type(self, dtype: torch.dtype) -> _Linear:
        """The same numbers in another dtype."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return _Linear(self.index, self.x.to(dtype), self.values.to(dtype), bias, self.grad.to(dtype), self.activation)

    def blocks_of(self, weight: Tensor) -> Tensor:
        """[n, B, B]: the stored blocks of a dense `weight` [R * B, C * B]."""
        side = self.values.shape[-1]
        blocks = weight.unflatten(0, (-1, side)).unflatten(2, (-1, side)).transpose(1, 2)
        return blocks[self.index.rows.long(), self.index.columns.long()]

    def block_step(self, backend: str) -> tuple[Tensor, ...]:
        """A `Step` of the backend; dW is [n, B, B]."""
        return self._step(self.values, lambda x, w, b: block_linear(x, w, self.index, b, self.activation, backend))

    def masked_step(self) -> tuple[Tensor, ...]:
        """A `Step` of the masked dense layer; dW is [R * B, C * B]."""
        return self.make_masked_step()()

    def make_masked_step(self) -> Step:
        """The dense weight and its mask, and a `Step` that uses them."""
        side = self.values.shape[-1]
        mask = self.index.mask().repeat_interleave(side, 0).repeat_interleave(side, 1).to(self.values.dtype)
        weight = torch.zeros_like(mask)
        at = self.index.rows.long(), self.index.columns.long()
        weight.unflatten(0, (-1, side)).unflatten(2, (-1, side)).transpose(1, 2)[at] = self.values

        def step() -> tuple[Tensor, ...]:
            activate = ACTIVATIONS[self.activation]
            found = self._step(weight, lambda x, w, b: activate(F.linear(x, w, b)))
            found[2].mul_(mask)
            return found

        return step

    def _step(self, weight: Tensor, forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> tuple[Tensor, ...]:
        """y, and the gradients of x, of `weight` [n, B, B] or [R * B, C * B] and of the bias."""
        with torch.enable_grad(), torch.autocast(self.x.device.type, enabled=False):
            leaves = [t.detach().requires_grad_() for t in (self.x, weight, self.bias) if t is not None]
            y = forward(leaves[0], leaves[1], leaves[2] if self.bias is not None else None)
            return y.detach(), *torch.autograd.grad(y, leaves, self.grad)


def _balanced_mask(rows: int, columns: int, count: int) -> Tensor:
    """Bool [R, C] with `count` True at random places; rows, and nearly so columns, differ by at most one."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    used = torch.zeros(columns)
    extra = set(torch.randperm(rows, generator=generator)[: count % rows].tolist())
    for row in range(rows):
        order = (used + 0.9 * torch.rand(columns, generator=generator)).argsort()
        chosen = order[: count // rows + (row in extra)]
        mask[row, chosen] = True
        used[chosen] += 1
    return mask


def _measure(names: Sequence[str], layer: LayerRequest, size: LayerSize) -> dict[str, float]:
    """Median milliseconds by way, timed in turns; without those that fail."""
    operands = _Linear.draw(layer, size)
    makers: dict[str, Callable[[], Step]] = {MASKED: operands.make_masked_step}
    makers |= {name: lambda name=name: lambda: operands.block_step(name) for name in names}
    timers: dict[str, Callable[[], float]] = {}
    for name, make in makers.items():
        with contextlib.suppress(RuntimeError):  # no memory, no kernel: the way is left out
            timers[name] = _cuda_timer(make()) if layer.device == "cuda" else _timer(make())
    once = {name: timer() for name, timer in timers.items()}
    rounds = ROUNDS if sum(once.values()) < SLOW else 3
    times: dict[str, list[float]] = {name: [] for name in timers}
    for turn in range(rounds):
        for name in list(timers)[:: 1 if turn % 2 else -1]:
            times[name].append(timers[name]())
    timers.clear()
    if layer.device == "cuda":
        torch.cuda.empty_cache()
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

    def timer() -> float:
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
    epilogue = f"bias {size.bias}, {size.activation}"
    return "; ".join((_environment(layer.device), ", ".join(names), layer.dtype, shape, epilogue))


@cache
def _environment(device: str) -> str:
    """The device and every version that its speed depends on."""
    if device == "cuda":
        named = f"{torch.cuda.get_device_name()} {'.'.join(map(str, torch.cuda.get_device_capability()))}"
    else:
        named = f"{device} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} threads"
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    return f"{named}; torch {torch.__version__}, triton {triton}, sparseift {__version__}, kernels {_kernels_version()}"


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
