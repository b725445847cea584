"""Attention with longer heads: the same scores, by scaled queries.

Scores are q . k / sqrt(d). A longer head, d' > d, whose added coordinates add nothing to q . k would divide by sqrt(d')
instead, so the queries are multiplied by sqrt(d' / d). Rotary frequencies: `transforms/rotary`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...trace.structure import AttentionScore, Structure
from ..edits import SetAttribute, Surgery
from .coordinates import Coordinates, LayerWeight
from .norms import WidenedNorm


def query_rows(weight: LayerWeight, structure: Structure, coordinates: Coordinates) -> Tensor | None:
    """Output indices of a projection that make queries, in the wider model: int64 [queries].

    Empty where the projection makes queries but the forward does not show which outputs; None where it makes none.
    """
    if weight.key not in structure.query_parts:
        return None
    part = structure.query_parts[weight.key]
    if part is None:  # a projection of its own, not a part of a fused one
        return torch.arange(coordinates.new_size(weight.outputs))
    rows = coordinates.part_positions(weight.outputs, part, coordinates.plan.sizes)
    return torch.arange(0) if rows is None else rows


def scale_queries(
    new: nn.Module,
    dense: nn.Module,
    surgery: Surgery,
    structure: Structure,
    coordinates: Coordinates,
    weights: Mapping[str, LayerWeight],
    norms: Sequence[WidenedNorm],
) -> tuple[list[str], set[SetAttribute]]:
    """Multiply the query projections of `new` by sqrt(d' / d), in place.

    Where a norm follows the query projection (QK-norm), its gain and bias are multiplied instead.

    Returns:
        A sentence for every attention where that is not possible, and the edits of `surgery` that set a module's own
        scale to d' ** -0.5: these must stay, since the queries make up for them.
    """
    notes: list[str] = []
    compensated: set[SetAttribute] = set()
    for key, score in structure.attention_scores.items():
        ratio = coordinates.new_size(score.dim) / coordinates.dense_size(score.dim)
        scales = set(_scale_edits(score, dense, surgery, ratio)) if ratio != 1 else set()
        if ratio == 1 or not (score.by_size or scales):
            continue
        compensated |= scales
        factor = math.sqrt(ratio)
        weight = weights.get(key)
        rows = None if weight is None else query_rows(weight, structure, coordinates)
        query_norms = [n for n in norms if key in structure.norm_inputs.get(n.path, ())]
        if query_norms:
            for norm in query_norms:
                if norm.gain_key:
                    gain = new.get_parameter(norm.gain_key)
                    gain.copy_(norm.scale_gain(gain, factor))
                if norm.bias_key:
                    new.get_parameter(norm.bias_key).mul_(factor)
        elif weight is None or rows is None or not len(rows) or weight.computed:
            why = (
                "is computed in forward"
                if weight and weight.computed
                else "does not show which outputs are its queries"
            )
            notes.append(f"not exact at {score.module}: {key} {why}")
        else:
            by_output = new.get_parameter(key).movedim(weight.axis, 0)  # a view: [out, in]
            by_output[rows] = by_output[rows] * factor
            path, _, name = weight.bias_key.rpartition(".")
            bias = new.get_submodule(path)._parameters.get(name)
            if bias is not None:
                bias[rows] = bias[rows] * factor
    return notes, compensated


def number_of(module: nn.Module, name: str) -> float | int:
    """A number that a module keeps as an attribute or as a buffer of one element."""
    value: Any = getattr(module, name)
    return float(value) if isinstance(value, (Tensor, float)) else int(value)


def _scale_edits(score: AttentionScore, dense: nn.Module, surgery: Surgery, ratio: float) -> Iterator[SetAttribute]:
    """Edits of floats in or around an attention module by a factor of sqrt(ratio) or its inverse: its scale."""
    modules = dict(dense.named_modules())
    for edit in surgery.attributes:
        near = any(
            a == b or not b or a.startswith(f"{b}.")
            for a, b in ((score.module, edit.owner), (edit.owner, score.module))
        )
        if near and type(edit.value) is float and edit.owner in modules:
            old = number_of(modules[edit.owner], edit.name)
            if old > 0 and math.isclose(abs(math.log(edit.value / old)), math.log(ratio) / 2, rel_tol=1e-5):
                yield edit
