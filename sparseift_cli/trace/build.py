"""The entry point of a trace: from a model and its inputs to a LayerTable and a Structure.

`trace` runs the model (`symbolise`), merges the variables that were found equal (`union_find`), and gives each group of
them a *width*: a name, its size, a kind (width, heads, head_dim, count), and the reason why it must not change, if
there is one. Then `rows` makes the rows of the table, and `_Builder._structure` the second result.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, enable_grad, inference_mode, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._pytree import tree_leaves

from ..errors import UsageError
from ..plan.widths import solve
from ..table.poly import Poly, in_parentheses
from ..table.table import OUTPUT, LayerTable, Width
from . import symbolise
from .constants import depends_on_values, is_statistic, named_constants, plain_tensors, why_fixed, why_frequencies_fixed
from .kinds import ROTARY, Kinds
from .layouts import equal_parts
from .outputs import FEEDS_LOSS, mark_output_layers, returned, variables_of
from .record import CountedOp
from .rows import RowBuilder
from .scales import Formulas, Score
from .structure import AttentionScore, DimLayout, LayoutKind, Structure
from .symbolise import Origin, SymbolicRun, Way
from .symint import poly_of
from .union_find import LazyRenaming, UnionFind


@dataclass(frozen=True, slots=True)
class TraceResult:
    """The result of a trace: the table, and where its widths are in the module."""

    table: LayerTable
    structure: Structure
    needs_values: bool = False
    """A width is kept, or not, because of a buffer whose values decide it, and the model is on meta."""


def layer_table(model: nn.Module, inputs: tuple[Any, ...], *, name: str, input_shape: tuple[int, ...]) -> LayerTable:
    """The LayerTable of `model(*inputs)`; see `trace`. The tensors in `inputs` may have any shape.

    Raises:
        UsageError: the forward fails on these inputs even with plain sizes.
    """
    return trace(model, inputs, name=name, input_shape=input_shape).table


def trace(
    model: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    name: str,
    input_shape: tuple[int, ...],
    symbolic: bool = True,
) -> TraceResult:
    """Trace `model(*inputs, **kwargs)` in eval mode, without memory for values and without arithmetic.

    Modules that eval mode does not call (auxiliary heads) are followed in a second pass in train mode, for their widths
    alone. A model whose widths cannot be traced is still counted: then every width is fixed and the table's
    `untraceable` says why.

    Args:
        model: on any device; it is left as it was.
        inputs, kwargs: tensors of the wanted shapes (any shape); meta tensors will do.
        name: the name of the model in the table.
        input_shape: the shape of its input in the table.
        symbolic: False where only the count is needed, not the widths.

    Raises:
        UsageError: the forward pass fails on these inputs even with plain sizes.
    """
    _require_dense_module(model, name)
    untraceable = None
    with inference_mode(False), enable_grad():  # the table counts gradients too, even under the caller's no_grad
        try:
            found = _run(model, inputs, kwargs, symbolic)
        except Exception as symbolic_error:
            try:
                found = _run(model, inputs, kwargs, symbolic=False)
            except Exception as error:
                raise _usage_error(error, name, (inputs, dict(kwargs or {}))) from error
            first_line = (str(symbolic_error).strip() or "no message").splitlines()[0]
            untraceable = f"{type(symbolic_error).__name__}: {first_line}"
    return _Builder(model, found).build(name, input_shape, untraceable)


def _require_dense_module(model: Any, name: str) -> None:
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"{name} is no module but of class {type(model).__name__}",
            hint="a torch.nn.Module is needed; of an exported program, what program.module() returns",
        )
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.layout is not torch.strided:
            raise UsageError(
                f"{name} holds sparse tensors ({key}), whose products cost what their entries say, not their shapes",
                hint="give it dense ones",
            )


# What the message of an error says -> what the model does, and what to do about it.
_KNOWN_ERRORS = {
    "Sparse": (
        "computes with sparse tensors, whose products cost what their entries say, not their shapes",
        "give it dense ones",
    ),
    "[Nn]ested|_jagged|create_symintnode": (
        "computes with nested tensors, whose sizes differ from sample to sample",
        "give it padded tensors, all of one length",
    ),
    "uninitialized parameter": ("has lazy layers that have no sizes yet", "run it once on an example input"),
    r"fake impl.*<CustomOpDef\((?P<op>\S+)\)>|fake impl.*(?P<name>\w+::\w+)": (
        "calls a custom operator without a shape function",
        "give it one: torch.library.register_fake",
    ),
    r"\.numpy\(\)|\.tolist\(\)": (
        "computes with the values of tensors, not with their shapes alone",
        "no .numpy(), .item() or .tolist() in forward",
    ),
}


def _usage_error(error: Exception, name: str, given: Any) -> UsageError:
    """The error for a model whose forward pass fails even with plain sizes."""
    if isinstance(error, UsageError):
        return UsageError(f"{name} {error.message}", hint=error.hint)
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    for pattern, (what, hint) in _KNOWN_ERRORS.items():
        if re.search(pattern, first_line):
            detail = first_line.split(". ")[0].rstrip(".")
            return UsageError(f"{name} {what} ({detail})", hint=hint)
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        return UsageError(
            f"{name} computes with the values of tensors, not with their shapes alone ({first_line}), so its FLOPs are "
            "not known before it runs",
            hint="no .item(), .tolist(), `if tensor` or indexing by a mask in forward; torch.where keeps shapes",
        )
    shapes = ", ".join("x".join(map(str, t.shape)) for t in tree_leaves(given) if isinstance(t, Tensor))
    return UsageError(
        f"{name} does not run on input {shapes}: {type(error).__name__}: {first_line}",
        hint="give the input that the model expects: --input 3x224x224, or --seq 128 for token ids",
    )


def _run(
    model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any] | None, symbolic: bool
) -> symbolise.SymbolicRun:
    """A run with as many symbolic numbers as the model accepts.

    Without those in its configuration object, `transforms/widen` finds by their values which ints of it must change.
    """
    if not symbolic:
        return symbolise.run_symbolically(model, inputs, kwargs, Way(symbolic=False))
    ways = [Way(), Way(keys="sizes"), Way(keys="values")]
    if any(symbolise.is_config(value) for m in model.modules() for value in m.__dict__.values()):
        ways += [Way(configs=False), Way(keys="sizes", configs=False)]
    if any(True for module in model.modules() for _ in plain_tensors(module)):
        ways.append(Way(tensors=False))
    first: Exception | None = None
    for way in ways:
        if way.keys and "unhashable" not in str(first):
            continue
        try:
            return _with_plain_widths(
                symbolise.run_symbolically(model, inputs, kwargs, way), way, model, inputs, kwargs
            )
        except Exception as error:
            first = first or error
    assert first is not None
    raise first


def _with_plain_widths(
    run: symbolise.SymbolicRun,
    way: Way,
    model: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
) -> symbolise.SymbolicRun:
    """`run`, or another one with symbolic ints that were left out by name and turned out to be widths."""
    if also := run.plain_widths():
        with suppress(Exception):
            return symbolise.run_symbolically(model, inputs, kwargs, replace(way, also=also))
    return run


class _Builder:
    """Turns one run into the two results; `width_ids` maps the representative of each group of variables to a width."""

    def __init__(self, model: nn.Module, run: SymbolicRun) -> None:
        self.model = model
        self.run = run
        self.recorder = run.recorder
        self.returned = [returned(output) for output in run.outputs]
        self.formulas = Formulas(self.recorder.scales, run.facts.sizes, run.facts.plain_floats)
        equations = [*run.facts.equations, *self._equal_by_formula()]
        constants = {v: run.facts.sizes[v] for v in run.facts.frozen}
        self.variables = UnionFind(len(run.facts.sizes), equations, constants)
        if more := equal_parts(run.facts, self.variables):
            self.variables = UnionFind(len(run.facts.sizes), [*equations, *more], constants)
        self.width_ids: dict[int, int] = {}  # variable -> width id
        self.renaming = LazyRenaming(lambda v: self.width_ids[self.variables.find(v)])

    def build(self, name: str, input_shape: tuple[int, ...], untraceable: str | None) -> TraceResult:
        mark_output_layers(self.recorder, self.returned, self.variables)
        self._group_stacked_weights()
        widths = self._widths()
        equations = tuple(dict.fromkeys(self._named(e) for e in self.variables.equations))
        rows = RowBuilder(self.model, self.run, self._named)
        table = LayerTable(
            model=name,
            input=input_shape,
            layers=tuple(rows.layers()),
            **_as_configured(self.model, widths, equations),
            uncounted=tuple(self.recorder.uncounted),
            by_products=self._by_products(),
            untraceable=untraceable,
        )
        return TraceResult(table, self._structure(rows.names), self._needs_values())

    def _named(self, poly: Poly) -> Poly:
        """A polynomial over variables as one over width ids."""
        return poly.rename(self.renaming)

    def _group_stacked_weights(self) -> None:
        """Give layers of stacked matrices their groups, and tell block-diagonal ones, one block a head, from experts.

        The blocks read the parts of one feature dim, which a view shows: (batch, tokens, heads * in) as (..., heads, in).
        The matrices of experts are each for other tokens.
        """
        roots = LazyRenaming(self.variables.find)
        views = {
            tuple(part.rename(roots) for part in parts[-2:])
            for seen in self.run.facts.all_layouts.values()
            for kind, parts in seen
            if kind == "product"
        }
        for op in self.recorder.layers():
            if op.kind == "experts" and op.weight is not None:
                blocks, *sides = (poly_of(size).rename(roots) for size in self.run.shapes[op.weight])
                inputs = op.inputs.rename(roots)
                if inputs in sides and op.at is None:
                    sides.remove(inputs)
                    op.kind = "grouped linear" if (blocks, inputs) in views else op.kind
                    op.groups, op.inputs, op.outputs = blocks, blocks * inputs, blocks * sides[0]
                if op.kind == "experts":
                    self.run.facts.freeze(blocks, "number of experts")

    # --- variables to widths ---

    def _equal_by_formula(self) -> Iterator[Poly]:
        """Equations of int attributes that forward uses in a formula alone, as `self.d_model ** -0.5`.

        No shape shows what they are: such an attribute is the dim of the same size that the number multiplies.
        """
        in_shapes = {v for equation in self.run.facts.equations for v in equation.variables}
        for size, dims in self.formulas.sizes_multiplying():
            v = size.as_variable
            if v is None or v in in_shapes or any(p.kind != "attribute" for p in self.run.origins.get(v, ())):
                continue
            same = (dim for dim in dims if dim.evaluate(self.run.facts.sizes) == self.run.facts.sizes[v])
            yield from (size - dim for dim in list(same)[:1] if dim != size)

    def _widths(self) -> tuple[Width, ...]:
        """One width for each group of equal variables that is used."""
        members = self.variables.groups()
        used = self._used(members)
        widths: list[Width] = []
        names = self._output_names()
        fixed, kinds = self._fixed(names), Kinds(self.run, self.variables)
        residual, attention = (self.variables.roots(s) for s in (self.recorder.residual, self.recorder.attention))
        for root, variables in members.items():
            if root not in used:
                continue
            for v in variables:
                self.width_ids[v] = len(widths)
            reasons = list(dict.fromkeys(fixed[v] for v in variables if v in fixed))
            outputs = tuple(dict.fromkeys(name for v in variables for name in names.get(v, ())))
            width = Width(
                name=self._label(root, members),
                size=self.run.facts.sizes[root],
                kind=kinds.of(root),
                fixed=reasons[0] if reasons else None,
                outputs=outputs if all(reason.startswith(OUTPUT) for reason in reasons) else (),
                residual=root in residual,
                attention=root in attention,
            )
            widths.append(width)
        return tuple(widths)

    def _label(self, root: int, members: Mapping[int, list[int]]) -> str:
        """The first parameter dim of a group, else its first attribute, else what was divided: "qkv.weight[0] / heads"."""
        origins = [p for v in members[root] for p in self.run.origins.get(v, ())]
        first = next((p for p in origins if p.kind == "parameter"), origins[0] if origins else None)
        if first is not None:
            return first.label
        divided = next(self.run.facts.divided[v] for v in members[root] if v in self.run.facts.divided)
        sides = [side.rename(LazyRenaming(self.variables.find)) for side in divided]
        names = {other: self._label(other, members) for side in sides for other in side.variables}
        texts = [side.text(names) for side in sides]
        return " / ".join(in_parentheses(text) for text in texts) if len(texts) > 1 else texts[0]

    def _used(self, members: dict[int, list[int]]) -> set[int]:
        """Variables of parameters, buffers, equations and counts.

        Attributes that meet none of them (a step count) are dropped, and so are plain tensors.
        """
        find = self.variables.find
        used = {
            root
            for root, vs in members.items()
            if any(p.kind in ("parameter", "buffer") for v in vs for p in self.run.origins.get(v, ()))
        }
        used |= {find(v) for e in self.variables.equations for v in e.variables}
        polys = [
            p for op in self.recorder.ops.values() for p in (op.macs, op.inputs, op.outputs, op.groups, op.activations)
        ]
        used |= {find(v) for p in polys for v in p.variables}
        for shape in self.run.shapes.values():  # of a plain tensor all dims or none
            dims = {find(v) for d in shape for v in poly_of(d).variables}
            used |= dims if dims & used else set()
        return used

    def _fixed(self, outputs: Mapping[int, list[str]]) -> dict[int, str]:
        """Variable that must not change -> the reason. `outputs`: the results that a variable is a dim of, by name."""
        fixed = dict(self.run.facts.frozen)
        for v, names in outputs.items():
            fixed.setdefault(v, f"{OUTPUT}: {names[0]}" if names[0] else OUTPUT)
        if self.returned and self.returned[0].is_loss:
            for op in self.recorder.layers():
                for v in op.outputs.variables if op.output else ():
                    fixed.setdefault(v, FEEDS_LOSS)
        constants, uses = dict(named_constants(self.model)), self.recorder.uses
        for v, p in self._origins("buffer", "tensor"):
            if p.name.endswith(ROTARY):
                reason = why_frequencies_fixed(p.path, constants[p.path], *self._holder(p))
            elif not is_statistic(p.path):
                reason = why_fixed(p.path, constants[p.path], p.index or 0, uses)
            else:
                reason = None
            if reason:
                fixed.setdefault(v, reason)
        return fixed

    def _holder(self, origin: Origin) -> tuple[nn.Module, object | None]:
        """The module that has it, and the configuration that this one holds."""
        module = self.model.get_submodule(origin.owner)
        config = module.__dict__.get("config")
        return module, config if symbolise.is_config(config) else None

    def _needs_values(self) -> bool:
        """See `TraceResult.needs_values`: a constant on meta meets a parameter, in one width or in an equation."""
        constants, uses = dict(named_constants(self.model)), self.recorder.uses
        met = self.variables.roots(v for v, _ in self._origins("parameter"))
        met |= {v for e in self.variables.equations if len(e.variables) > 1 for v in self.variables.roots(e.variables)}
        return any(
            constants[p.path].is_meta and self._holder(p)[1] is None
            if p.name.endswith(ROTARY)
            else depends_on_values(p.path, constants[p.path], uses)
            for v, p in self._origins("buffer", "tensor")
            if not is_statistic(p.path) and self.variables.find(v) in met
        )

    def _origins(self, *kinds: str) -> Iterator[tuple[int, Origin]]:
        """(variable, origin) of each variable that was made for one of `kinds`."""
        for v, origins in self.run.origins.items():
            for origin in origins:
                if origin.kind in kinds:
                    yield v, origin

    def _output_names(self) -> dict[int, list[str]]:
        """Variable -> the names of the results that it is a dim of, in the order in which they are returned."""
        names: dict[int, list[str]] = {}
        for output in self.returned:
            for name, tensor in output.results.items():
                for v in variables_of(tensor):
                    names.setdefault(v, []).append(name)
        return names

    def _by_products(self) -> dict[str, tuple[int, ...]]:
        """By-product -> the widths in it. All tensors of one name count as one: hidden_states, past_key_values."""
        widths: dict[str, set[int]] = {}
        for output in self.returned[:1]:
            for name, tensor in output.by_products.items():
                known = {v for v in variables_of(tensor) if self._known(Poly.var(v))}  # not a count that no weight has
                widths.setdefault(name.partition(".")[0], set()).update(self.renaming[v] for v in known)
        return {name: tuple(sorted(ids)) for name, ids in widths.items()}

    # --- the second result ---

    def _structure(self, names: Mapping[int, str]) -> Structure:
        """`names`: of the rows, by the number of their op."""
        flow, rows, recorder = self.recorder.flow, list(self.recorder.ops.values()), self.recorder
        output = self.returned[0]
        flow.note_read(output.results.values())
        return Structure(
            shapes={
                k: tuple(self._named(poly_of(d)) for d in shape)
                for k, shape in self.run.shapes.items()
                if all(self._known(poly_of(d)) for d in shape)  # not those of a plain tensor that nothing reads
            },
            attributes={
                (origin.owner, origin.name, origin.index): self._named(Poly.var(v))
                for v, origin in self._attributes(self.run.origins)
                if self._known(Poly.var(v))
            },
            equal_attributes=tuple(self._equal_attributes()),
            layouts=self._layouts(),
            all_layouts=self._all_layouts(),
            activations=self._activations(rows, names),
            own_activations=self._own_activations(rows, names),
            contracted_dims={
                module: tuple(self._named(p) for p in dict.fromkeys(dims) if self._known(p))
                for module, dims in recorder.contracted_dims.items()
            },
            query_parts=dict(recorder.query_parts),
            attention_scores=tuple(dict.fromkeys(self._score(s) for s in recorder.scales.scores if self._known(s.dim))),
            scaled_dims={
                source: tuple(self._named(dim) for dim in dims if self._known(dim))
                for source, dims in recorder.scales.scaled_dims.items()
                if isinstance(source, tuple)
            },
            norm_inputs=dict(flow.norm_inputs),
            weight_inputs=dict(flow.weight_inputs),
            read_by_others=frozenset(flow.read_by_others),
            channel_norms=dict(flow.channel_norms),
            float_attributes=frozenset(
                (origin.owner, origin.name)
                for expr in self.run.facts.floats
                for _, origin in self._attributes(expr.variables)
            ),
            output_shapes={name: tuple(map(int, tensor.shape)) for name, tensor in output.results.items()},
        )

    def _score(self, score: Score) -> AttentionScore:
        scale: dict[Any, float] = {}
        for source, power in self.formulas.resolve(score.scale).items():
            if isinstance(source, Poly):
                known = self._known(source)
                source = self._named(source) if known else float(source.evaluate(self.run.facts.sizes))
            scale[source] = scale.get(source, 0) + power
        return AttentionScore(
            score.module, self._named(score.dim), tuple(scale.items()), score.queries, score.softmaxed
        )

    def _known(self, poly: Poly) -> bool:
        """Whether all variables of `poly` have a width in the table."""
        return all(self.variables.find(v) in self.width_ids for v in poly.variables)

    def _attributes(self, variables: Iterable[int]) -> Iterator[tuple[int, Origin]]:
        """(variable, origin) for each int attribute that one of `variables` was made for."""
        for v in variables:
            for origin in self.run.origins.get(v, ()):
                if origin.kind == "attribute":
                    yield v, origin

    def _equal_attributes(self) -> Iterator[frozenset[tuple[str, str]]]:
        """See `Structure.equal_attributes`: the groups that have no width."""
        for root, variables in self.variables.groups().items():
            if root not in self.width_ids and len(variables) > 1:
                yield frozenset((p.owner, p.name) for _, p in self._attributes(variables) if p.index is None)

    def _layout(self, whole: Poly, kind: LayoutKind, parts: tuple[Poly, ...]) -> DimLayout | None:
        """A layout over widths; None where one of its sizes is no width of the table."""
        if self._known(whole) and all(map(self._known, parts)):
            return DimLayout(kind, tuple(map(self._named, parts)))
        return None

    def _layouts(self) -> dict[Poly, DimLayout]:
        found: dict[Poly, DimLayout] = {}
        for whole, (kind, parts) in self.run.facts.layouts.items():
            if layout := self._layout(whole, kind, parts):
                found.setdefault(self._named(whole), layout)
        return found

    def _all_layouts(self) -> dict[Poly, tuple[DimLayout, ...]]:
        found: dict[Poly, dict[DimLayout, None]] = {}
        for whole, seen in self.run.facts.all_layouts.items():
            for kind, parts in seen:
                if layout := self._layout(whole, kind, parts):
                    found.setdefault(self._named(whole), {})[layout] = None
        return {whole: tuple(seen) for whole, seen in found.items()}

    def _own_activations(self, rows: list[CountedOp], names: Mapping[int, str]) -> dict[str, str]:
        """Row -> the activation that reads it, where the row's output is not added to or joined with another."""
        found = {
            names[r.number]: self.recorder.own_activations.get(r.weight)
            for r in rows
            if r.weight and r.weight not in self.recorder.flow.merged
        }
        return {name: activation for name, activation in found.items() if activation}

    def _activations(self, rows: list[CountedOp], names: Mapping[int, str]) -> dict[str, str]:
        """Row -> the next activation that runs after it, or the last one of the model if there is none."""
        events = self.recorder.activations
        if not events:
            return {}
        times = [time for time, _ in events]
        return {
            names[r.number]: events[min(bisect_right(times, r.order), len(events) - 1)][1] for r in rows if r.weight
        }


# --- sizes that a Hugging Face configuration can say ---

_OWN_HEAD_DIM = ("head_dim", "d_kv", "kv_channels", "head_size")  # parts of the names under which it has one


def _as_configured(model: nn.Module, widths: tuple[Width, ...], equations: tuple[Poly, ...]) -> dict[str, Any]:
    """The widths and equations of a table, with what the configurations of `model` ask of sizes, where no width stays for it.

    The library builds a saved model from its configuration alone, so sizes that this cannot say could not be loaded again.
    """
    for config in symbolise.configs_of(model):
        size, heads = (getattr(config, name, None) for name in ("hidden_size", "num_attention_heads"))
        if type(size) is not int or type(heads) is not int or heads < 2 or size % heads:
            continue
        stream = [i for i, w in enumerate(widths) if w.residual and w.size == size and w.fixed is None]
        for asks in (_derived_sizes, _whole_heads) if stream else ():
            more, asked = asks(config, size, heads, stream, widths, equations)
            trial = (*widths, *more), (*equations, *asked)
            if asked and solve(*trial).reasons.keys() <= solve(widths, equations).reasons.keys():
                widths, equations = trial
                break
    return {"widths": widths, "equations": equations}


def _whole_heads(
    config: Any, size: int, heads: int, stream: list[int], widths: tuple[Width, ...], equations: tuple[Poly, ...]
) -> tuple[list[Width], list[Poly]]:
    """The residual stream is a multiple of the number of heads: configuration classes refuse others, needed or not."""
    quotient = Width(f"{widths[stream[0]].name} / {heads} heads", size // heads, kind="head_dim")
    return [quotient], [Poly.var(i) - Poly.const(heads) * Poly.var(len(widths)) for i in stream]


def _derived_sizes(
    config: Any, size: int, heads: int, stream: list[int], widths: tuple[Width, ...], equations: tuple[Poly, ...]
) -> tuple[list[Width], list[Poly]]:
    """Without a head_dim in it a head is hidden_size / heads, and sizes that it does not name are multiples of hidden_size."""
    named = vars(config)
    if any(type(value) is int and any(part in name for part in _OWN_HEAD_DIM) for name, value in named.items()):
        return [], []
    values = (value if isinstance(value, (list, tuple)) else (value,) for value in named.values())
    numbers = {n for several in values for n in several if type(n) is int}
    tied = {v for e in equations for v in e.variables}
    whole, asked = Poly.var(stream[0]), [Poly.var(i) - Poly.var(stream[0]) for i in stream[1:]]
    for i, width in enumerate(widths):
        if width.fixed is not None or i in stream:
            continue
        if width.attention and width.size == size // heads:
            asked.append(whole - Poly.const(heads) * Poly.var(i))
        elif width.kind == "width" and i not in tied and width.size % size == 0 and width.size not in numbers - {size}:
            asked.append(Poly.var(i) - Poly.const(width.size // size) * whole)
    return [], asked
