"""What attention needs to compute the same scores with longer heads: its scale, and its rotary frequencies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...table.poly import Poly
from ...trace.structure import Score, Structure
from ..edits import SetAttribute, Surgery
from .live import Live
from .norms import Norm
from .products import Product

_BASES = ("theta", "rope_theta", "base")


def query_rows(product: Product, structure: Structure, live: Live) -> Tensor | None:
    """Outputs of a projection that become queries, at the new sizes; None where it makes none."""
    if product.key not in structure.queries:
        return None
    part = structure.queries[product.key]
    if part is None:
        return torch.arange(live.new(product.outputs))
    rows = live.part(product.outputs, part, live.plan.sizes)
    return torch.arange(0) if rows is None else rows


def fold_scales(
    new: nn.Module,
    dense: nn.Module,
    surgery: Surgery,
    structure: Structure,
    live: Live,
    products: Mapping[str, Product],
    norms: Sequence[Norm],
    folded: set[SetAttribute],
) -> Iterator[str]:
    """Multiply queries by sqrt(d' / d), which undoes a scale d' ** -0.5; yields what could not be done.

    Where a module holds the scale, the edit that changed it is added to `folded`.
    Where a norm follows the query's projection, its gain is multiplied instead of the weight.
    """
    for key, score in structure.scores.items():
        ratio = live.new(score.dim) / live.dense(score.dim)
        held = set(_scales_held(score, dense, surgery, ratio)) if ratio != 1 else set()
        if ratio == 1 or not (score.by_size or held):
            continue
        folded |= held
        factor = math.sqrt(ratio)
        product = products.get(key)
        rows = None if product is None else query_rows(product, structure, live)
        between = [n for n in norms if key in structure.streams.get(n.path, ())]
        if between:
            for norm in between:
                if norm.gain_key:
                    gain = new.get_parameter(norm.gain_key)
                    gain.copy_(norm.gains(gain, factor))
                if norm.bias_key:
                    new.get_parameter(norm.bias_key).mul_(factor)
        elif product is None or rows is None or not len(rows):
            yield f"not exact at {score.module}: which outputs of {key} are its queries is not known"
        else:
            lines = new.get_parameter(key).movedim(product.axis, 0)
            lines[rows] = lines[rows] * factor
            path, _, name = product.bias.rpartition(".")
            bias = new.get_submodule(path)._parameters.get(name)
            if bias is not None:
                bias[rows] = bias[rows] * factor


def number(module: nn.Module, name: str) -> float | int:
    """A number that a module holds, as an attribute or as a buffer of one element."""
    held: Any = getattr(module, name)
    return float(held) if isinstance(held, (Tensor, float)) else int(held)


def _scales_held(score: Score, dense: nn.Module, surgery: Surgery, ratio: float) -> Iterator[SetAttribute]:
    """Edits of numbers in or around the module of an attention that moved by the square root of its head dim's ratio."""
    modules = dict(dense.named_modules())
    for edit in surgery.attributes:
        near = any(
            a == b or not b or a.startswith(f"{b}.")
            for a, b in ((score.module, edit.owner), (edit.owner, score.module))
        )
        if near and type(edit.value) is float and edit.owner in modules:
            held = number(modules[edit.owner], edit.name)
            if held > 0 and math.isclose(abs(math.log(edit.value / held)), math.log(ratio) / 2, rel_tol=1e-5):
                yield edit


def rotary(dense: nn.Module, structure: Structure, live: Live) -> Iterator[SetAttribute]:
    """Bases that keep the frequencies of the first pairs, theta ** (i / n), where a forward computes them from head_dim.

    theta' = theta ** (n' / n), since theta' ** (i / n') = theta ** (i / n).
    """
    sizes: dict[str, Poly] = {owner: dim for (owner, _, _), dim in structure.attributes.items()}
    for path, module in dense.named_modules():
        dim = sizes.get(path)
        if dim is None or live.new(dim) == live.dense(dim) or any(k.endswith("inv_freq") for k in module._buffers):
            continue
        if module._parameters or module._modules:
            continue
        for name in _BASES:
            held = module.__dict__.get(name)
            if isinstance(held, (float, int)) and held > 1:
                yield SetAttribute(path, name, float(held) ** (live.new(dim) / live.dense(dim)))
