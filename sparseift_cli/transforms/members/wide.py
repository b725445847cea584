"""Sparse Wide: the edits that set every dim of every parameter, and every attribute that holds a width, to the new widths.

The paper (Sparse-IFT, section 3.1) multiplies all widths by sqrt(1/density). The trace finds which dims and attributes
are widths. Other numbers depend on a width without being one: an attention scale head_dim ** -0.5 stored as a float,
the frequencies of a rotary embedding, the sizes in a Hugging Face configuration.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ...base.text import some_of
from ...errors import UsageError
from ...mask.attached import is_transposed
from ...plan.layer_plan import EXPERTS, LayerPlan
from ...plan.plan import Plan
from ...table.poly import Poly
from ...table.table import Layer
from ...trace.constants import is_statistic, named_constants
from ...trace.structure import AttentionScore, Structure
from ...trace.symbolise import NOT_WIDTHS, is_config
from ..edits import Masked, Resize, SetAttribute, Surgery, number_at
from ..preserve import DenseStart, Preserved
from ..preserve.wide import fill_wide, keep_largest
from .base import TorchHalf

_STREAM = ("hidden_size", "n_embd", "d_model", "model_dim", "embed_dim", "hidden_dim", "word_embed_proj_dim")
_HEAD_DIM = ("head_dim", "d_kv", "kv_channels", "attention_head_size", "head_size")
_COUNTS = (
    "num",
    "layer",
    "position",
    "vocab",
    "token",
    "head",
    "group",
    "bucket",
    "expert",
    "image",
    "patch",
    "channels",
    "distance",
    "window",
    "length",
)


class SparseWide(TorchHalf):
    """Widen every layer of a module at once."""

    def surgery(self, plan: Plan, structure: Structure, model: nn.Module) -> Surgery:
        return Surgery(
            resizes=tuple(_resizes(plan, structure, model)),
            attributes=tuple(_attributes(plan, structure, model)),
            masked=tuple(_masked(plan, structure, model)),
        )

    def notes(self, plan: Plan, structure: Structure, model: nn.Module, surgery: Surgery) -> Iterator[str]:
        """Attention scores with a scale that does not follow the head dim: their softmax gets sharper."""
        edited = {(edit.owner, edit.name) for edit in surgery.attributes}
        sharper: dict[tuple[str, int, int], dict[str, None]] = {}
        for score in structure.attention_scores:
            old, new = score.dim.evaluate(plan.table.sizes), score.dim.evaluate(plan.sizes)
            follows = any(
                source.evaluate(plan.sizes) != source.evaluate(plan.table.sizes)
                if isinstance(source, Poly)
                else source in edited
                for source, _ in score.scale
            )
            if old != new and score.softmaxed and score.scale and not follows:
                sharper.setdefault((_words(score, plan, model), old, new), {})[score.module or "the model itself"] = (
                    None
                )
        for (scale, old, new), modules in sharper.items():
            yield (
                f"attention scores are scaled by {scale}, which does not follow the head dim ({old} -> {new}): with "
                f"new weights their softmax starts up to {math.sqrt(new / old):.2f} times sharper, in {some_of(modules, 3)}. "
                "Scale by q.shape[-1] ** -0.5, or by an attribute of that value"
            )

    def preserve(self, start: DenseStart) -> Preserved:
        """The dense weights at the dense coordinates; with scope none, which has no others, the largest of them.

        Raises:
            UsageError: a pattern or an order of channels that no dense weights fit.
        """
        return keep_largest(start) if start.plan.spec.scope == "none" else fill_wide(start)


def _masked(plan: Plan, structure: Structure, model: nn.Module) -> Iterator[Masked]:
    """Every weight that gets a mask; for an attention projection with its number of heads."""
    blocks = HeadBlocks(plan, structure)
    for row in plan.layers:
        if row.status != "transformed":
            continue
        key = row.layer.weight or ""
        path, _, _ = key.rpartition(".")
        module = model.get_submodule(path)
        rows, columns = structure.shapes[key][:2]
        if row.layer.start is not None:
            rows = row.layer.outputs
        transposed = is_transposed(module) and key.endswith("weight")
        if transposed:
            rows, columns = columns, rows
        heads, on_inputs = 1, False
        if row.layer.projection and row.parts[0].shape.groups == 1:  # of groups, each is a head
            heads = blocks.along(rows)
            if heads == 1:
                heads = blocks.along(columns)
                on_inputs = heads > 1
        (part,) = row.parts
        stacked = row.layer.kind == EXPERTS or row.layer.stacked
        if not row.mask_pattern.unrestricted and stacked:
            raise UsageError(
                f"pattern {row.pattern} does not fit {row.layer.name}: which of the {len(structure.shapes[key])} dims of "
                f"its weight are outputs, {type(module).__name__} decides",
                hint=f"--exclude '{row.layer.name}', or pattern unstructured",
            )
        if row.layer.kind == EXPERTS:
            yield from _masked_experts(row, structure, plan)
            continue
        yield Masked(
            row.layer.name,
            part.name,
            key,
            part.nnz,
            part.shape.groups,
            transposed,
            heads,
            on_inputs,
            rows=_rows(row.layer, plan.sizes),
        )


def _masked_experts(row: LayerPlan, structure: Structure, plan: Plan) -> Iterator[Masked]:
    """One entry an expert, each with as many non-zeros."""
    (part,), key = row.parts, row.layer.weight or ""
    transposed = structure.shapes[key][1].evaluate(plan.sizes) * part.shape.groups == part.shape.inputs
    transposed = transposed and part.shape.inputs != part.shape.outputs
    for i in range(row.copies):
        nnz = part.nnz // row.copies
        yield Masked(row.layer.name, part.name, key, nnz, transposed=transposed, rows=(i, i + 1), expert=True)


def _rows(layer: Layer, sizes: Sequence[int]) -> tuple[int, int] | None:
    """The rows of its parameter that a row of the table uses; None for all of them."""
    if layer.start is None:
        return None
    start = layer.start.evaluate(sizes)
    return start, start + layer.outputs.evaluate(sizes)


def _resizes(plan: Plan, structure: Structure, model: nn.Module) -> Iterator[Resize]:
    """Every parameter, buffer and plain tensor whose shape changes."""
    constants = {key for key, _ in named_constants(model) if not is_statistic(key)}
    blocks = HeadBlocks(plan, structure)
    for key, dims in structure.shapes.items():
        new = tuple(d.evaluate(plan.sizes) for d in dims)
        if new == tuple(d.evaluate(plan.table.sizes) for d in dims):
            continue
        rotary = key.endswith("inv_freq")
        runs = tuple(blocks.runs(d) for d in dims) if key in constants and not rotary else ()
        yield Resize(key, new, rotary, runs)


def _attributes(plan: Plan, structure: Structure, model: nn.Module) -> Iterator[SetAttribute]:
    """Every attribute of a module or configuration that changes with the widths."""
    if plan.sizes == plan.table.sizes:
        return
    for (owner, name, index), width in structure.attributes.items():
        new = width.evaluate(plan.sizes)
        if new != width.evaluate(plan.table.sizes):
            yield SetAttribute(owner, name, new, index)
    yield from _scales(plan, structure, model)
    yield from _untied(plan, structure, model)


def _words(score: AttentionScore, plan: Plan, model: nn.Module) -> str:
    """The scale of a score that follows no width: the attributes in it by name, or the number that the code has."""
    names = [source for source, _ in score.scale if isinstance(source, tuple)]
    if names:
        return ", ".join(f"{name} = {number_at(model, owner, name):.4g}" for owner, name in names)
    sizes = plan.table.sizes
    numbers = [(s.evaluate(sizes) if isinstance(s, Poly) else s, power) for s, power in score.scale]
    return f"{math.prod(number**power for number, power in numbers if not isinstance(number, tuple)):.4g}"


def _scales(plan: Plan, structure: Structure, model: nn.Module) -> Iterator[SetAttribute]:
    """Floats that a forward multiplies with and that are a power of a width, as attention scales. They appear in no shape.

    Which width: of what the number multiplies. For an attention score that is the dim that the product sums over
    (head_dim), else a dim of the projections that make the query; for any other tensor one of its own dims.
    """
    summed: dict[tuple[str, str], dict[Poly, None]] = {}
    for score in structure.attention_scores:
        around = [d for key in score.queries for d in structure.shapes[key]]
        for source, _ in score.scale:
            if isinstance(source, tuple):
                summed.setdefault(source, {}).update(dict.fromkeys([score.dim, *around]))
    for owner, name in structure.scaled_dims.keys() | summed.keys():
        value = number_at(model, owner, name)
        found = _power(value, summed.get((owner, name), ()), (-0.5, 0.5, -0.25, 0.25, -1, 1), plan)
        if found is None:
            found = _power(value, structure.scaled_dims.get((owner, name), ()), (-0.5, 0.5), plan)
        if found is not None and found != value:
            yield SetAttribute(owner, name, found)


def _power(value: float, dims: Iterable[Poly], powers: Iterable[float], plan: Plan) -> float | None:
    """The power of a new size, where `value` is that power of the dense size of the first such dim."""
    for dim in dims:
        old, new = dim.evaluate(plan.table.sizes), dim.evaluate(plan.sizes)
        for power in powers:
            if old > 1 and math.isclose(value, old**power, rel_tol=1e-5):
                return value if old == new else new**power
    return None


def _untied(plan: Plan, structure: Structure, model: nn.Module) -> Iterator[SetAttribute]:
    """Sizes that the forward never compares with a shape: in a Hugging Face configuration, or used only in a formula.

    They are recognised by name and value. A name of the residual stream gets the width of the token embedding, a name
    of the head dim that of attention. In configurations any other size is changed if all widths of that dense size have
    the same new size. Sizes that the forward found equal stay equal.
    """
    found = {(edit.owner, edit.name): edit for edit in _by_name(_NewSizes(plan, structure), model)}
    for equal in structure.equal_attributes:
        values = {found[key].value for key in equal if key in found}
        for key in equal if values else ():
            found.pop(key, None)
            if len(values) == 1:
                found[key] = SetAttribute(*key, value=max(values))
    yield from found.values()


def _by_name(sizes: _NewSizes, model: nn.Module) -> Iterator[SetAttribute]:
    seen: set[int] = set()
    for path, module in model.named_modules():
        yield from sizes.of(path, module.__dict__, by_value=False)
        for key, config in module.__dict__.items():
            if is_config(config) and id(config) not in seen:
                seen.add(id(config))
                yield from sizes.of(f"{path}.{key}" if path else key, config.__dict__, by_value=True)


class _NewSizes:
    """The new size for an attribute, by its name and its dense size."""

    def __init__(self, plan: Plan, structure: Structure) -> None:
        self.tied = {(owner, name) for owner, name, _ in structure.attributes}
        self.by_value: dict[int, set[int]] = {}
        for dims in structure.shapes.values():
            for d in dims:
                self.by_value.setdefault(d.evaluate(plan.table.sizes), set()).add(d.evaluate(plan.sizes))
        embeddings = (structure.shapes[r.layer.weight or ""] for r in plan.layers if r.layer.kind == "embedding")
        residual = (Poly.var(i) for i, w in enumerate(plan.table.widths) if w.residual)
        self.stream = _pairs(residual, plan) | _pairs((dims[1] for dims in embeddings if len(dims) == 2), plan)
        self.head_dim = _pairs((d for dims in structure.contracted_dims.values() for d in dims), plan)

    def of(self, owner: str, numbers: Mapping[str, Any], *, by_value: bool) -> Iterator[SetAttribute]:
        for name, value in numbers.items():
            if type(value) is not int or (owner, name) in self.tied or name in NOT_WIDTHS:
                continue
            if name in _STREAM:
                new = self.stream.get(value)
            elif name in _HEAD_DIM:
                new = self.head_dim.get(value)
            elif by_value and not any(word in name for word in _COUNTS):
                sizes = self.by_value.get(value, set())  # also those of widths that stay
                new = next(iter(sizes)) if len(sizes) == 1 else None
            else:
                continue
            if new is not None and new != value:
                yield SetAttribute(owner, name, new)
        heads, number, hidden = (
            set(self.head_dim.values()),
            numbers.get("num_attention_heads"),
            numbers.get("hidden_size"),
        )
        if by_value and numbers.get("head_dim") is None and number and len(heads) == 1:
            new = heads.pop()
            if hidden is None or self.stream.get(hidden, hidden) != number * new:
                yield SetAttribute(owner, "head_dim", new)  # or it would be hidden_size // num_attention_heads


def _pairs(dims: Iterable[Poly], plan: Plan) -> dict[int, int]:
    """Dense size -> new size."""
    return {d.evaluate(plan.table.sizes): d.evaluate(plan.sizes) for d in dims}


class HeadBlocks:
    """The number of equal blocks along a dim of an attention projection: heads, times the parts of a fused projection.

    The forward's views show it: (3, heads, head_dim) for a fused QKV, (heads, head_dim) for the input of an output
    projection. A view and the trace may write one dim as two different polynomials, so dims are compared by their value
    at a probe.
    """

    def __init__(self, plan: Plan, structure: Structure) -> None:
        assert plan.widening is not None
        self.sizes, self.dense = plan.sizes, plan.table.sizes
        self.probe = plan.widening.solution.probe()
        self.layouts = {whole.evaluate(self.probe): layout for whole, layout in structure.layouts.items()}

    def along(self, width: Poly) -> int:
        """Blocks along `width`; 1 where no view splits it, or where one splits it in another order."""
        layout = self.layouts.get(width.evaluate(self.probe))
        if layout is None:
            return 1
        if layout.kind == "sum":
            parts = {(self.along(p), p.evaluate(self.sizes)) for p in layout.parts}
            return len(layout.parts) * parts.pop()[0] if len(parts) == 1 else 1
        return math.prod(p.evaluate(self.sizes) for p in layout.parts[:-1])

    def runs(self, width: Poly) -> tuple[tuple[int, int], ...]:
        """How `width` grows, part by part in the order of its entries: (dense size, new size) of each."""
        old, new = width.evaluate(self.dense), width.evaluate(self.sizes)
        layout = self.layouts.get(width.evaluate(self.probe))
        if layout is None or old == new:
            return ((old, new),)
        if layout.kind == "sum":
            parts = tuple(run for p in layout.parts for run in self._smaller(p, old))
        else:
            *outer, last = layout.parts
            count = math.prod(p.evaluate(self.sizes) for p in outer)
            parts = self._smaller(last, old) * count
        return parts if tuple(map(sum, zip(*parts, strict=True))) == (old, new) else ((old, new),)

    def _smaller(self, part: Poly, whole: int) -> tuple[tuple[int, int], ...]:
        """The runs of a part of a dim of dense size `whole`."""
        old, new = part.evaluate(self.dense), part.evaluate(self.sizes)
        return self.runs(part) if old < whole else ((old, new),)
