"""Tensors of a model that are no parameters: buffers, and tensors that are plain attributes of a module.

A table of positions that is added to a residual stream has the stream's width, so it must grow with it; what its new
entries are, no gradient will decide. `why_fixed` says whether a constant may grow, by what the forward pass does with it
(`Uses`), and `resized` fills the larger one:

- of equal slices (zeros, ones, one kernel for every channel): the slice again;
- of sines and cosines of positions (`sinusoids`): the formula, at the new width;
- a geometric series (frequencies): the series with the same base;
- anything else that is only added or has one entry a channel: its entries again, part by part.

A constant that products sum over (a projection that is not trained), one of whole numbers that differ, and a table that is
multiplied and follows no formula keep their widths, and so do rotary frequencies of no known form (`why_frequencies_fixed`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from .sinusoids import find_sinusoids

Runs = Sequence[tuple[int, int]]
"""How one dim grows, part by part: (dense size, new size) of each."""

_MARK = "_sparseift_constants"
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def plain_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value (any shape) of a module's floating-point attributes that are neither parameters nor buffers.

    Results of an earlier forward pass that a module keeps are left out where they have a gradient history.
    """
    for name, value in module.__dict__.items():
        if not isinstance(value, Tensor) or isinstance(value, nn.Parameter) or value.grad_fn is not None:
            continue
        if (value.is_floating_point() or value.is_complex()) and value.layout is torch.strided and value.numel() > 1:
            yield name, value


def named_constants(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Key and value (any shape) of every buffer and plain tensor of a model; a shared one under each of its names."""
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in (*module._buffers.items(), *plain_tensors(module)):
            if value is not None:
                yield f"{path}.{name}".removeprefix("."), value


def is_statistic(key: str) -> bool:
    """Whether a buffer holds running statistics of a norm, which start afresh at any size."""
    return key.rpartition(".")[2] in _STATISTICS


# --- what a forward pass does with them ---


def marks_of(tensor: Tensor) -> frozenset[str]:
    """Keys of the constants that a tensor (any shape) was made of, as long as nothing of the stream is in it."""
    return getattr(tensor, _MARK, frozenset())


class Uses:
    """What the forward pass does with each constant, by its key. A constant that is in neither set is only added."""

    def __init__(self) -> None:
        self.any = False
        self.contracted: set[str] = set()  # a product sums over it, or it is a kernel
        self.multiplied: set[str] = set()  # something else than added to the stream

    def register(self, key: str, tensor: Tensor) -> None:
        """Follow the fake tensor (any shape) of the constant `key`."""
        self.any = True
        setattr(tensor, _MARK, marks_of(tensor) | {key})

    def note_product(self, *tensors: Tensor) -> None:
        """A product sums over these."""
        for tensor in tensors if self.any else ():
            self.contracted |= marks_of(tensor)

    def follow(self, inputs: Iterable[Any], outputs: Iterable[Any], *, of_layer: int, linear: bool) -> None:
        """An op made `outputs` from `inputs` (any shapes).

        Args:
            of_layer: the flag of tensors that were computed by a layer.
            linear: the op adds, moves or joins, so that it treats no entry otherwise than a parameter that is added.
        """
        if not self.any:
            return
        tensors = [t for t in inputs if isinstance(t, Tensor)]
        marks: frozenset[str] = frozenset().union(*map(marks_of, tensors))
        if not marks:
            return
        joined = any(getattr(t, "_sparseift_flags", 0) & of_layer and not marks_of(t) for t in tensors)
        if joined and not linear:
            self.multiplied |= marks
        for out in () if joined else outputs:
            if isinstance(out, Tensor):
                setattr(out, _MARK, marks)


def why_fixed(key: str, value: Tensor, dim: int, uses: Uses) -> str | None:
    """Why the constant `key`, a tensor of any shape, must keep its size along `dim`; None where it may grow.

    Of a `value` on meta only the uses are known: see `depends_on_values`.
    """
    if not value.is_meta and _equal_along(value, dim):
        return None
    if not (value.is_floating_point() or value.is_complex()):
        return f"tied to buffer {key}"
    if key in uses.contracted:
        return f"tied to buffer {key}, which a product reads"
    table = key in uses.multiplied and _is_table(value)
    if table and not value.is_meta and find_sinusoids(value.movedim(dim, -1)) is None:
        return f"tied to buffer {key}, which is multiplied and follows no known formula"
    return None


def why_frequencies_fixed(key: str, value: Tensor, module: nn.Module, config: object | None) -> str | None:
    """Why the rotary frequencies `key`, a tensor [n] of `module`, must stay as many; None where more of them can be computed.

    They can if they are a geometric series, or if the class of `module` computes more from a size in `config`.

    Args:
        config: what `module` is built from; None where nothing says that.
    """
    name = key.rpartition(".")[2]
    made = None if config is None else computed_buffer(module, config, name)
    if made is not None and made.shape == value.shape:
        sizes = [n for n, size in vars(config).items() if type(size) is int and size > 1]
        if any(_grows_with(module, config, size, name, len(made)) for size in sizes):
            return None
        value = made
    if value.is_meta or value.dim() != 1 or geometric(value, len(value)) is not None:
        return None
    return f"tied to buffer {key}, whose frequencies follow no known formula"


def computed_buffer(module: nn.Module, config: object, name: str) -> Tensor | None:
    """The buffer `name`, of any shape, as the class of `module` computes it from `config`; None where it does not."""
    with torch.device("cpu"), suppress(Exception):  # any class may be meant: it need not take a configuration
        return type(module)(config)._buffers.get(name)
    return None


def _grows_with(module: nn.Module, config: object, size: str, name: str, n: int) -> bool:
    """Whether twice the size that `config` holds under `size` makes 2 n frequencies of n."""
    larger = copy.deepcopy(config)
    larger.__dict__[size] *= 2
    made = computed_buffer(module, larger, name)
    return made is not None and len(made) == 2 * n


def depends_on_values(key: str, value: Tensor, uses: Uses) -> bool:
    """Whether `why_fixed` cannot be sure about the constant `key` because its `value` (any shape) is on meta."""
    numbers = value.is_floating_point() or value.is_complex()
    read = key in uses.contracted or (key in uses.multiplied and _is_table(value))
    return value.is_meta and (read or not numbers)


def _is_table(value: Tensor) -> bool:
    return sum(size > 1 for size in value.shape) > 1


# --- larger ones ---


def _equal_along(value: Tensor, dim: int) -> bool:
    first = value.narrow(dim, 0, 1)
    return bool((value == first).all() or (value.isnan() & first.isnan()).all())


def resized(value: Tensor, runs: Sequence[Runs]) -> tuple[Tensor, bool]:
    """A constant of any shape at its new size, and whether its entries follow from a formula.

    Args:
        runs: how each dim grows.
    """
    exact = True
    for dim, parts in enumerate(runs):
        old, new = (sum(sizes) for sizes in zip(*parts, strict=True))
        if old == new:
            continue
        moved = value.movedim(dim, -1)
        by_formula = None if _equal_along(value, dim) else _by_formula(moved, new)
        if by_formula is None:
            index = _repeated(parts)
            exact = exact and all(_equal_along(part, dim) for part in value.split([n for n, _ in parts], dim))
            moved = moved[..., index.to(value.device)]
        else:
            moved = by_formula.to(value.device, value.dtype)
        value = moved.movedim(-1, dim)
    return value.contiguous(), exact


def _by_formula(table: Tensor, size: int) -> Tensor | None:
    """[..., n] -> [..., size] by the formula that the entries follow; None where there is none."""
    if not (table.is_floating_point() or table.is_complex()):
        return None
    if table.numel() == table.shape[-1] and not table.is_complex():
        series = geometric(table.flatten(), size)
        return None if series is None else series.view(*table.shape[:-1], size)
    found = find_sinusoids(table)
    return None if found is None else found.at(size)


def geometric(series: Tensor, size: int) -> Tensor | None:
    """The series base ** (-i / n), i < n, for another n: [n] -> [size], float64, with the same base; None if it is none."""
    n = series.shape[0]
    values = series.double().cpu()
    if n > 1 and not (values > 0).all():
        return None
    base = float(values[-1]) ** (-n / (n - 1)) if n > 1 else 1.0
    if not torch.allclose(values, base ** (-torch.arange(n, dtype=torch.float64) / n), rtol=1e-4):
        return None
    return base ** (-torch.arange(size, dtype=torch.float64) / size)


def _repeated(parts: Runs) -> Tensor:
    """Index of the old entry that each new one copies: within each part the entries start again at its end."""
    starts = [sum(n for n, _ in parts[:i]) for i in range(len(parts))]
    return torch.cat([start + torch.arange(new) % old for start, (old, new) in zip(starts, parts, strict=True)])
