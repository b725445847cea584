"""From one symbolic run to a LayerTable: variables become widths, rows get roles and reasons."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import UsageError
from ..poly import Poly
from ..table import Layer, LayerTable, Role, Width, WidthKind
from . import symbolise
from .record import Row, numel
from .symbolise import Place, Trace
from .symint import poly_of

_HEAD_DIM = ("head_dim", "head_size", "dim_head", "d_kv", "d_head", "per_head", "kv_channels", "head_channels")
_HEADS = ("head", "num_kv")


def layer_table(model: nn.Module, inputs: tuple[Any, ...], *, name: str, input_shape: tuple[int, ...]) -> LayerTable:
    """Trace `model(*inputs)` without memory and without running its arithmetic.

    `inputs` are tensors of the wanted shape (meta ones do); the model may live on any device and is left as it was. A model
    whose widths cannot be traced is still counted: then every width is fixed and `untraceable` says why.

    Raises:
        UsageError: the forward fails on these inputs even with plain sizes.
    """
    untraceable = None
    try:
        trace = symbolise.run(model, inputs)
    except Exception as symbolic_error:
        try:
            trace = symbolise.run(model, inputs, symbolic=False)
        except Exception as error:
            shapes = ", ".join("x".join(map(str, t.shape)) for t in inputs if isinstance(t, Tensor))
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UsageError(
                f"{name} does not run on input {shapes}: {type(error).__name__}: {first_line}",
                hint="give the input that the model expects: --input 3x224x224, or --seq 128 for token ids",
            ) from error
        first_line = (str(symbolic_error).strip() or "no message").splitlines()[0]
        untraceable = f"{type(symbolic_error).__name__}: {first_line}"
    return _Builder(model, trace).table(name, input_shape, untraceable)


class _Builder:
    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self.model = model
        self.trace = trace
        self.recorder = trace.recorder
        self.parent = list(range(len(trace.facts.sizes)))
        self.equations = self._unite()
        self.names: dict[int, int] = {}  # variable -> width id

    # --- variables to widths ---

    def _find(self, v: int) -> int:
        while self.parent[v] != v:
            self.parent[v] = self.parent[self.parent[v]]
            v = self.parent[v]
        return v

    def _unite(self) -> list[Poly]:
        """Merge variables that are plainly equal; then, until nothing moves, those that equal the same expression."""
        left: list[Poly] = []
        for equation in self.trace.facts.equations:
            pair = _equal_pair(equation)
            if pair:
                self._merge(*pair)
            else:
                left.append(equation)
        while True:
            renamed = dict.fromkeys(e.rename(_Finder(self._find)).primitive() for e in left)
            left, merged, by_rest = [], False, {}
            for equation in renamed:
                pair = _equal_pair(equation)
                if pair:
                    self._merge(*pair)
                    merged = True
                elif equation.terms:
                    left.append(equation)
                    for variable, rest in _solved_for(equation):
                        if rest in by_rest and self._find(by_rest[rest]) != self._find(variable):
                            self._merge(by_rest[rest], variable)
                            merged = True
                        by_rest.setdefault(rest, variable)
            if not merged:
                return left

    def _merge(self, a: int, b: int) -> None:
        a, b = sorted((self._find(a), self._find(b)))
        self.parent[b] = a

    def _widths(self) -> tuple[Width, ...]:
        members: dict[int, list[int]] = {}
        for v in range(len(self.parent)):
            members.setdefault(self._find(v), []).append(v)
        used = self._used(members)
        widths: list[Width] = []
        fixed = self._fixed()
        residual, attention = (self._roots(s) for s in (self.recorder.residual, self.recorder.attention))
        for root, variables in members.items():
            if root not in used:
                continue
            for v in variables:
                self.names[v] = len(widths)
            places = [p for v in variables for p in self.trace.places.get(v, ())]
            reason = next((fixed[v] for v in variables if v in fixed), None)
            first = next((p for p in places if p.kind == "parameter"), places[0] if places else None)
            label = "" if first is None else first.path + ("" if first.index is None else f"[{first.index}]")
            size = self.trace.facts.sizes[root]
            widths.append(
                Width(label or f"quotient {root}", size, _kind(places), reason, root in residual, root in attention)
            )
        return tuple(widths)

    def _used(self, members: dict[int, list[int]]) -> set[int]:
        """Widths that a parameter has or that an equation ties to one; lone attributes (a step count, say) are dropped."""
        used = {
            root
            for root, vs in members.items()
            if any(p.kind != "attribute" for v in vs for p in self.trace.places.get(v, ()))
        }
        used |= {self._find(v) for e in self.equations for v in e.variables}
        polys = [
            p
            for row in self.recorder.rows.values()
            for p in (row.macs, row.inputs, row.outputs, row.groups, row.activations)
        ]
        return used | {self._find(v) for p in polys for v in p.variables}

    def _roots(self, variables: Iterable[int]) -> set[int]:
        return {self._find(v) for v in variables}

    def _fixed(self) -> dict[int, str]:
        """Variables that must not change, with the reason."""
        fixed = dict(self.trace.facts.frozen)
        for v in self._output_variables():
            fixed.setdefault(v, "output of the model")
        for v, places in self.trace.places.items():
            for p in places:
                if p.kind == "buffer" and not p.path.rpartition(".")[2].startswith("running_"):
                    fixed.setdefault(v, f"tied to buffer {p.path}")
        return fixed

    def _output_variables(self) -> set[int]:
        variables: set[int] = set()
        for tensor in tree_leaves(_plain(self.trace.output)):
            if isinstance(tensor, Tensor):
                for dim in tensor.shape:
                    variables |= poly_of(dim).variables
        return variables

    # --- rows ---

    def table(self, name: str, input_shape: tuple[int, ...], untraceable: str | None) -> LayerTable:
        widths = self._widths()
        equations = tuple(dict.fromkeys(e.rename(_Finder(lambda v: self.names[self._find(v)])) for e in self.equations))
        return LayerTable(
            model=name,
            input=input_shape,
            layers=tuple(self._layers()),
            widths=widths,
            equations=equations,
            uncounted=tuple(self.recorder.uncounted),
            untraceable=untraceable,
        )

    def _layers(self) -> list[Layer]:
        rows = sorted(self.recorder.rows.values(), key=lambda r: r.order)
        output_weights = self._output_weights(rows)
        owned: dict[str, list[str]] = {}  # row name -> parameters; each parameter once
        tied = self._tied()
        placed: list[tuple[int, Layer]] = []
        taken: dict[str, str] = {}
        for row in rows:
            keys: list[str] = []
            label = _row_name(row, rows)
            if row.weight:
                module_keys = [k for k in self.trace.shapes if k.rpartition(".")[0] == row.owner and k in tied]
                if row.weight not in module_keys:
                    module_keys = [row.weight]
                free = "weight" not in row.weight.rpartition(".")[2]
                bias = row.weight.replace("weight", "bias")
                wanted = (
                    [row.weight]
                    if free
                    else dict.fromkeys([row.weight, bias] if row.owner + ".weight" != row.weight else module_keys)
                )
                keys = [k for k in wanted if k in tied and tied[k] == k and k not in taken]
                taken |= dict.fromkeys(keys, label)
            owned[label] = keys
            role: Role = "body"
            if row.weight is None or row.kind == "matmul":
                role = "attention"
            elif row.weight in output_weights:
                role = "output"
            elif row.first:
                role = "input"
            note = None
            if row.weight is None and row.kind in ("linear", "conv", "matmul", "conv_transpose"):
                note = "the weight is computed in forward, not a parameter"
            elif row.partial and role == "body":
                note = "its calls use parts of the weight, so its non-zeros have no one price"
            placed.append((row.order, self._layer(row, label, role, keys, note)))
        placed += self._without_macs(taken, tied)
        layers = [layer for _, layer in sorted(placed, key=lambda p: p[0])]
        return self._mark_tied(layers, tied)

    def _layer(self, row: Row, label: str, role: Role, keys: list[str], note: str | None) -> Layer:
        kind = row.kind
        groups, inputs = self._named(row.groups), self._named(row.inputs)
        if kind == "conv" and groups != Poly.const(1):
            kind = "depthwise" if groups == inputs else "grouped conv"
        return Layer(
            name=label,
            kind=kind,
            role=role,
            calls=row.calls,
            macs=self._named(row.macs),
            params=self._named(_total(self.trace.shapes[k] for k in keys)),
            activations=self._named(row.activations),
            grad_inputs=self._per_mac(row, row.grad_inputs),
            grad_weight=self._per_mac(row, row.grad_weight),
            weight=row.weight,
            inputs=inputs,
            outputs=self._named(row.outputs),
            kernel=row.kernel,
            groups=groups,
            projection=row.projection,
            causal=row.causal,
            note=note,
        )

    def _per_mac(self, row: Row, gradients: Poly) -> Fraction | int:
        sizes = self.trace.facts.sizes
        share = Fraction(gradients.evaluate(sizes), row.macs.evaluate(sizes) or 1)
        return share if share.denominator > 1 else share.numerator

    def _mark_tied(self, layers: list[Layer], tied: dict[str, str]) -> list[Layer]:
        """A weighted row whose weight another row owns says so (GPT-2's head and its token embedding)."""
        owner: dict[str, str] = {}
        marked = []
        for layer in layers:
            first = tied.get(layer.weight or "", layer.weight)
            if first and not layer.params.terms and first in owner:
                layer = replace(layer, tied_to=owner[first])
            if first and layer.params.terms:
                owner.setdefault(first, layer.name)
            marked.append(layer)
        return marked

    def _tied(self) -> dict[str, str]:
        """Parameter key -> the first key of the same parameter (itself, unless tied)."""
        first: dict[int, str] = {}
        return {k: first.setdefault(id(p), k) for k, p in self.model.named_parameters(remove_duplicate=False)}

    def _without_macs(self, taken: dict[str, str], tied: dict[str, str]) -> list[tuple[int, Layer]]:
        """Norms, embeddings and free parameters: rows with parameters and no MACs."""
        modules = dict(self.model.named_modules())
        by_module: dict[str, list[str]] = {}
        for key, first in tied.items():
            if key == first and key not in taken:
                by_module.setdefault(key.rpartition(".")[0], []).append(key)
        layers = []
        for path, keys in by_module.items():
            module = modules[path]
            kind, role = _kind_without_macs(module)
            params = self._named(_total(self.trace.shapes[k] for k in keys))
            seen = self.recorder.first_seen.get(path)
            note = "not used in this forward" if seen is None and kind != "parameter" else None
            weight = keys[0] if kind == "embedding" else None
            name = path or ", ".join(keys)
            if kind == "parameter":
                name = keys[0] if len(keys) == 1 else f"{path or 'model'} parameters"
            layers.append(
                (
                    seen or 0 if kind == "parameter" else seen or 10**9,
                    Layer(name, kind, role, params=params, weight=weight, note=note),
                )
            )
        return layers

    def _output_weights(self, rows: list[Row]) -> set[str]:
        """Weights of the layers that make the model's output: their output dim is one of it and no residual stream."""
        outputs = self._roots(self._output_variables())
        residual = self._roots(self.recorder.residual)
        found: dict[int, str] = {}
        for row in rows:
            width = row.outputs.as_variable
            if row.weight and width is not None and self._find(width) in outputs - residual:
                found[self._find(width)] = row.weight  # the last one that writes this dim
        if not found and rows:  # without symbols, or through a reshape: the last weight that runs
            last = next((r for r in reversed(rows) if r.weight), None)
            if (
                last
                and last.outputs.variables <= residual | outputs
                and not self._roots(last.outputs.variables) & residual
            ):
                found[-1] = last.weight or ""
        return set(found.values())

    def _named(self, poly: Poly) -> Poly:
        return poly.rename(_Finder(lambda v: self.names[self._find(v)]))


class _Finder(dict[int, int]):
    """A mapping that computes its answers: what `Poly.rename` wants."""

    def __init__(self, find: Any) -> None:
        super().__init__()
        self.find = find

    def __missing__(self, v: int) -> int:
        self[v] = self.find(v)
        return self[v]


def _equal_pair(equation: Poly) -> tuple[int, int] | None:
    """(a, b) if the equation says a - b == 0."""
    if len(equation.terms) == 2:
        (m, x), (n, y) = equation.terms
        if len(m) == len(n) == 1 and x == -y and abs(x) == 1:
            return m[0], n[0]
    return None


def _solved_for(equation: Poly) -> list[tuple[int, Poly]]:
    """(v, rest) for each variable that stands alone with coefficient +-1: v == rest."""
    answers = []
    for monomial, c in equation.terms:
        if len(monomial) == 1 and abs(c) == 1:
            rest = Poly((m, -x * c) for m, x in equation.terms if m != monomial)
            if monomial[0] not in rest.variables:
                answers.append((monomial[0], rest))
    return answers


def _kind(places: list[Place]) -> WidthKind:
    """What a width is, by where it stands: a parameter dim is a width; an attribute is named for what it counts."""
    names = [p.path.rpartition(".")[2].lower() for p in places if p.kind == "attribute"]
    if not places or any(part in n for n in names for part in _HEAD_DIM):
        return "head_dim"
    if any(p.kind == "parameter" for p in places):
        return "width"
    if any(part in n for n in names for part in _HEADS):
        return "heads"
    return "count"


def _kind_without_macs(module: nn.Module) -> tuple[str, Role]:
    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        return "embedding", "embedding"
    if "norm" in kind.lower():
        return _snake(kind), "norm"
    return "parameter", "embedding"


def _snake(name: str) -> str:
    known = {
        "BatchNorm2d": "batch_norm",
        "BatchNorm1d": "batch_norm",
        "LayerNorm": "layer_norm",
        "GroupNorm": "group_norm",
    }
    return known.get(name, "rms_norm" if "rms" in name.lower() else "norm")


def _row_name(row: Row, rows: list[Row]) -> str:
    if row.weight is None:
        return f"{row.owner or 'model'}.{row.kind}"
    return row.owner or row.weight


def _total(shapes: Iterable[tuple[Any, ...]]) -> Poly:
    total = Poly()
    for shape in shapes:
        total = total + numel(shape)
    return total


def _plain(output: Any) -> Any:
    """Dataclass-like outputs (Hugging Face's ModelOutput is a dict already) as plain containers."""
    return (
        vars(output) if hasattr(output, "__dict__") and not isinstance(output, (Tensor, dict, list, tuple)) else output
    )


def meta_inputs(shape: tuple[int, ...], *, tokens: bool) -> tuple[Tensor, ...]:
    """One input of a shape without memory: float images or signals, or int64 token ids."""
    return (torch.empty(shape, dtype=torch.int64 if tokens else torch.float32, device="meta"),)
