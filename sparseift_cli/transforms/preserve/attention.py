"""Attention with longer heads: the same scores, by scaled queries.

Scores are q . k / sqrt(d). A longer head, d' > d, whose added coordinates add nothing to q . k would divide by sqrt(d')
instead, so the queries are multiplied by sqrt(d' / d). Rotary frequencies: `transforms/rotary`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...table.poly import Poly
from ...trace.structure import AttentionScore, Structure
from ..edits import SetAttribute, Surgery, number_at
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
    """Multiply the query projections of `new` by what its scores are divided by more than before, in place: sqrt(d' / d).

    Where a norm follows the query projection (QK-norm, a BatchNorm), its gain and bias are multiplied instead.

    Returns:
        A sentence for every attention where that is not possible, and the edits of `surgery` that set a number which
        scales the scores: these must stay, since the queries make up for them.
    """
    notes: list[str] = []
    compensated: set[SetAttribute] = set()
    edits = {(edit.owner, edit.name): edit for edit in surgery.attributes}
    by_query: dict[str, AttentionScore] = {}
    for (
        score
    ) in structure.attention_scores:  # nn.MultiheadAttention is noted before the product inside it, which shows none
        by_query |= {key: score for key in score.queries if key not in by_query or not by_query[key].scale}
    for key, score in by_query.items():
        factor = 1.0
        for source, power in score.scale:
            if isinstance(source, Poly):
                factor *= (coordinates.dense_size(source) / coordinates.new_size(source)) ** power
            elif isinstance(source, tuple) and source in edits:
                compensated.add(edits[source])
                factor *= (number_at(dense, *source) / edits[source].value) ** power
        if factor == 1:
            continue
        read_by = [n for n in norms if key in structure.norm_inputs.get(n.path, ())]
        for norm in read_by:
            if norm.gain_key:
                gain = new.get_parameter(norm.gain_key)
                gain.copy_(norm.scale_gain(gain, factor))
            if norm.bias_key:
                new.get_parameter(norm.bias_key).mul_(factor)
        if not read_by:
            weight = weights.get(key)
            rows = None if weight is None else query_rows(weight, structure, coordinates)
            why = _scale_rows(new, key, weight, rows, structure.channel_norms.get(key), factor)
            notes += [f"not exact at {score.module}: {why}"] if why else []
    return notes, compensated


def _scale_rows(
    new: nn.Module, key: str, weight: LayerWeight | None, rows: Tensor | None, channel_norm: str | None, factor: float
) -> str | None:
    """Multiply the outputs `rows`, int64 [queries], of a query projection: by its weight, or by the BatchNorm that reads it.

    Returns:
        Why that is not possible, where it is not.
    """
    if weight is not None and weight.computed:
        return f"{key} is computed in forward"
    if weight is None or rows is None or not len(rows):
        return f"{key} does not show which outputs are its queries"
    if channel_norm is not None:  # it would divide what the weight is multiplied with out again
        norm = new.get_submodule(channel_norm)
        if norm._parameters.get("weight") is None:
            return f"a norm without a gain reads {key}"
        for parameter in norm.parameters(recurse=False):
            parameter[rows] = parameter[rows] * factor
        return None
    by_output = new.get_parameter(key).movedim(weight.axis, 0)  # a view: [out, in]
    by_output[rows] = by_output[rows] * factor
    path, _, name = weight.bias_key.rpartition(".")
    bias = new.get_submodule(path)._parameters.get(name)
    if bias is not None:
        bias[rows] = bias[rows] * factor
    return None
