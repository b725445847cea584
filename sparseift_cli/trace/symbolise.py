"""Puts a symbolic int in place of every parameter dim and every int attribute of a model, runs it once, and takes all back.

The forward is the model's own, unmodified; parameters become fake tensors without memory. Sizes that describe space, not
width (kernel, stride, window, ...) stay plain numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map_only

from .fake_mode import fake_mode
from .record import FROM_INPUT, Recorder, mark
from .shape_rules import ShapeRules
from .symint import Facts

# Attributes that are no widths, or only repeat a parameter's shape (forward never reads the latter).
_NOT_WIDTHS = frozenset(
    [
        "training",
        "padding_idx",
        "in_features",
        "out_features",
        "in_channels",
        "out_channels",
        "num_features",
        "num_embeddings",
        "embedding_dim",
        "nx",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "output_padding",
        "_reversed_padding_repeated_twice",
        "output_size",
        "shift_size",
        "window_size",
        "image_size",
        "patch_size",
        "num_layers",
        "num_hidden_layers",
        "layer_idx",
        "grid_size",
        "n_partitions",
        "max_seq_len",
        "partition_size",
        "p",
        "upscale_factor",
        "downscale_factor",
        "scale_factor",
        "max_positions",
        "num_layers",
        "vocab_size",
        "num_classes",
        "_version",
    ]
)


@dataclass(slots=True)
class Place:
    """Where a variable stands: a dim of a parameter or buffer, or an int attribute (`index` into a tuple, if it is one)."""

    kind: str  # parameter | buffer | attribute
    path: str
    index: int | None
    size: int


@dataclass
class Trace:
    """One run: the facts, the rows, where every variable stands, and the shapes that came out."""

    facts: Facts
    recorder: Recorder
    places: dict[int, list[Place]] = field(default_factory=dict)
    shapes: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # parameter or buffer key -> symbolic shape
    output: Any = None


def run(model: nn.Module, inputs: tuple[Any, ...], *, symbolic: bool = True) -> Trace:
    """Run `model(*inputs)` on fake tensors; `inputs` may be meta tensors, only their shapes and dtypes are used.

    Without `symbolic` all sizes stay plain numbers: the count is the same, the widths stay unknown.
    """
    facts = Facts()
    recorder = Recorder()
    trace = Trace(facts, recorder)
    with fake_mode(facts), _in_place_of_parameters(model, trace, symbolic), _following_modules(model, recorder):
        fakes = tree_map_only(
            Tensor, lambda t: mark(torch.empty(t.shape, dtype=t.dtype, device="cpu"), FROM_INPUT), inputs
        )
        with warnings.catch_warnings(), recorder, ShapeRules(facts, recorder):
            warnings.simplefilter("ignore")  # about performance of a run that computes nothing
            trace.output = model(*fakes)
    return trace


@contextmanager
def _in_place_of_parameters(model: nn.Module, trace: Trace, symbolic: bool) -> Iterator[None]:
    undo: list[tuple[dict[str, Any], str, Any]] = []
    made: dict[int, Tensor] = {}

    def replace(store: dict[str, Any], key: str, value: Any) -> None:
        undo.append((store, key, store[key]))
        store[key] = value

    try:
        for path, module in model.named_modules():
            prefix = f"{path}." if path else ""
            for kind, store in (("parameter", module._parameters), ("buffer", module._buffers)):
                for key, tensor in list(store.items()):
                    if tensor is not None:
                        if id(tensor) not in made:
                            made[id(tensor)] = _fake(tensor, kind, prefix + key, module, trace, symbolic)
                        if kind == "parameter":
                            trace.recorder.own(prefix + key, made[id(tensor)], tensor.requires_grad)
                        trace.shapes[prefix + key] = tuple(made[id(tensor)].shape)
                        replace(store, key, made[id(tensor)])
            for key, indices in _int_attributes(module) if symbolic else ():
                value = module.__dict__[key]
                if not indices:
                    replace(module.__dict__, key, _variable(trace, Place("attribute", prefix + key, None, value)))
                else:
                    items = [
                        _variable(trace, Place("attribute", prefix + key, i, v)) if i in indices else v
                        for i, v in enumerate(cast(Any, value))
                    ]
                    replace(module.__dict__, key, items if isinstance(value, list) else tuple(items))
        yield
    finally:
        for store, key, value in reversed(undo):
            store[key] = value


def _variable(trace: Trace, place: Place) -> Any:
    expr = trace.facts.new_variable(place.size)
    trace.places[next(iter(expr.variables))] = [place]
    return trace.facts.symint(expr)


def _fake(tensor: Tensor, kind: str, path: str, module: nn.Module, trace: Trace, symbolic: bool) -> Tensor:
    def dim(i: int, size: int) -> Any:
        spatial = isinstance(module, _ConvNd) and i >= 2
        return _variable(trace, Place(kind, path, i, size)) if symbolic and size > 1 and not spatial else size

    shape = [dim(i, size) for i, size in enumerate(tensor.shape)]
    return torch.empty(shape, dtype=tensor.dtype, device="cpu")


def _int_attributes(module: nn.Module) -> Iterator[tuple[str, set[int]]]:
    """Attributes that are an int above 1, or a tuple of ints with the positions of those above 1."""
    attributes: dict[str, Any] = module.__dict__
    for key, value in list(attributes.items()):
        if key in _NOT_WIDTHS:
            continue
        if type(value) is int:
            if value > 1:
                yield key, set()
        elif type(value) in (tuple, list, torch.Size) and value and all(type(v) is int for v in value):
            positions = {i for i, v in enumerate(cast(Any, value)) if v > 1}
            if positions:
                yield key, positions


@contextmanager
def _following_modules(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Tell the recorder which module runs."""
    names = {id(m): path for path, m in model.named_modules()}
    depth: list[bool] = []

    def before(module: nn.Module, args: Any) -> None:
        depth.append(id(module) in names)
        if depth[-1]:
            recorder.enter(names[id(module)])

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if depth.pop():
            recorder.leave()

    handles: list[Callable[[], None]] = [
        hooks.register_module_forward_pre_hook(before).remove,
        hooks.register_module_forward_hook(after, always_call=True).remove,
    ]
    try:
        yield
    finally:
        for remove in handles:
            remove()
