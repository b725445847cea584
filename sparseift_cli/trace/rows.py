"""From counted ops to the rows of a LayerTable: their names and roles, the parameters of each, and rows without MACs.

Each `CountedOp` becomes one row, in the order of execution. Parameters that no op multiplies with (norms, embeddings,
bare parameters) make rows of their own, so that the table's total is the parameter count of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..table.poly import Poly
from ..table.table import Layer, Role
from .record import LAYERS, CountedOp, numel
from .symbolise import SymbolicRun

_NORMS = {
    "BatchNorm1d": "batch_norm",
    "BatchNorm2d": "batch_norm",
    "BatchNorm3d": "batch_norm",
    "SyncBatchNorm": "batch_norm",
    "BatchNormAct2d": "batch_norm",
    "LayerNorm": "layer_norm",
    "LayerNorm2d": "layer_norm",
    "GroupNorm": "group_norm",
}


class RowBuilder:
    """Makes the rows of one run.

    Args:
        named: turns a polynomial over variables into one over width ids.
    """

    def __init__(self, model: nn.Module, run: SymbolicRun, named: Callable[[Poly], Poly]) -> None:
        self.run = run
        self.recorder = run.recorder
        self.named = named
        self.modules = dict(model.named_modules())
        first: dict[int, str] = {}
        self.tied = {k: first.setdefault(id(p), k) for k, p in model.named_parameters(remove_duplicate=False)}
        self.holders: dict[str, list[nn.Module]] = {}  # by the first key of a parameter: a shared layer is there once
        for key, first_key in self.tied.items():
            if (holder := self.modules.get(key.rpartition(".")[0])) is not None:
                self.holders.setdefault(first_key, []).append(holder)
        self.by_module: dict[str, list[str]] = {}
        for key in run.shapes:
            if key in self.tied:
                self.by_module.setdefault(key.rpartition(".")[0], []).append(key)
        self.shared = self._name_parts()
        self.names = self._names()

    def _names(self) -> dict[int, str]:
        """Number of an op -> the name of its row, which no other row has.

        A name that a module or a parameter of the model has belongs to the row of that one: where a layer is called `attn.qk`,
        the product of queries and keys in `attn` is `attn.qk product`.
        """
        reserved, names = {*self.modules, *self.tied}, dict[int, str]()
        for op in sorted(self.recorder.ops.values(), key=lambda op: op.order):
            name = _row_name(op)
            own = () if op.weight is None else (op.weight, op.weight.rpartition(".")[0])
            own = (*own, op.owner) if op.computed else own
            if (name in reserved and name not in own) or name in names.values():
                name = f"{name} product" if op.weight is None else op.weight
            while name in names.values():
                name = f"{name} {op.kind}"
            names[op.number] = name
        return names

    def layers(self) -> list[Layer]:
        """Every row in the order of execution."""
        owned: set[str] = set()
        placed: list[tuple[int, Layer]] = []
        for row in sorted(self.recorder.ops.values(), key=lambda r: r.order):
            keys = [k for k in self._parameter_keys(row) if self.tied.get(k) == k and k not in owned]
            owned.update(keys)
            placed.append((row.order, self._layer(row, keys)))
        placed += self._without_macs(owned)
        return self._mark_tied([layer for _, layer in sorted(placed, key=lambda p: p[0])])

    def _name_parts(self) -> set[str]:
        """Name the parts of weights that are used in parts; returns the weights that do not fall into separate parts.

        Those are used in overlapping parts, in parts that are not whole rows, or as a whole too. Keys are as in `tied`.
        """
        used: dict[str, dict[tuple[int, ...] | None, list[CountedOp]]] = {}
        for op in self.recorder.ops.values():
            if op.weight is not None:
                used.setdefault(self.tied.get(op.weight, op.weight), {}).setdefault(op.at, []).append(op)
        shared = set[str]()
        for key, parts in used.items():
            if set(parts) == {None}:
                continue
            ends = sorted((at[0], sum(at)) for at in parts if at is not None and len(at) == 2)
            rows = len(ends) == len(parts) and all(op.start is not None for ops in parts.values() for op in ops)
            if not rows or any(a[1] > b[0] for a, b in pairwise(ends)):
                shared.add(key)
            for i, at in enumerate(sorted(at for at in parts if at is not None)):
                for op in parts[at]:
                    op.part = self._part_name(key, at) or str(i)
        return shared

    def _part_name(self, key: str, at: tuple[int, ...]) -> str:
        """What nn.MultiheadAttention makes with these rows of its fused weight: q, k, v or kv; nothing for other weights."""
        module = self.modules.get(key.rpartition(".")[0])
        if not isinstance(module, nn.MultiheadAttention) or len(at) != 2:
            return ""
        size = module.get_parameter(key.rpartition(".")[2]).shape[0] // 3
        return "qkv"[at[0] // size : sum(at) // size]

    def _parameter_keys(self, row: CountedOp) -> Iterable[str]:
        """Keys of the parameters that belong to a row: those of its module, or where it has several weights, one and its bias."""
        if row.weight is None:
            return ()
        if row.computed:
            path = row.weight.rpartition(".")[0]
            return dict.fromkeys((row.weight, *self.by_module.get(path, ()), *self.by_module.get(row.owner, ())))
        if "weight" not in row.weight.rpartition(".")[2]:
            return (row.weight,)
        if row.owner + ".weight" != row.weight:
            return dict.fromkeys((row.weight, row.weight.replace("weight", "bias")))
        return self.by_module.get(row.owner, (row.weight,))

    def _layer(self, row: CountedOp, keys: list[str]) -> Layer:
        kind = row.kind
        groups, inputs = self.named(row.groups), self.named(row.inputs)
        if kind == "conv" and groups != Poly.const(1):
            kind = "depthwise" if groups == inputs else "grouped conv"
        role = self._role(row)
        return Layer(
            name=self.names[row.number],
            kind=kind,
            role=role,
            calls=row.calls,
            macs=self.named(row.macs),
            params=self.named(_total(self.run.shapes[k] for k in keys)),
            activations=self.named(row.activations),
            grad_inputs=self._per_mac(row, row.grad_inputs),
            grad_weight=self._per_mac(row, row.grad_weight),
            recomputed=self._per_mac(row, row.recomputed),
            weight=row.weight,
            inputs=inputs,
            outputs=self.named(row.outputs),
            kernel=row.kernel,
            groups=groups,
            computed=row.computed,
            stacked=kind in ("linear", "grouped linear") and len(self.run.shapes.get(row.weight or "", ())) > 2,
            active=self._active(row),
            start=None if row.start is None else self.named(row.start),
            projection=row.projection,
            causal=row.causal,
            host=self._host(row) if role == "body" else None,
            note=_note(row, role, in_parts=self.tied.get(row.weight or "", row.weight) in self.shared),
        )

    def _role(self, row: CountedOp) -> Role:
        if row.kind == "matmul" or (row.weight is None and row.kind not in LAYERS):
            return "attention"
        if row.output:
            return "output"
        return "input" if row.first and row.weight is not None else "body"

    def _host(self, row: CountedOp) -> str | None:
        """Why a transformed layer cannot replace this one: the class of the module that holds or reads the weight; else None.

        A linear or conv layer can be replaced if its forward pass is the product with its weight plus its bias, and if
        no other module reads the weight. Of nn.MultiheadAttention only a fused input projection of self-attention can.
        """
        if row.computed:
            return type(self.modules[row.owner]).__name__
        key = row.weight or ""
        path, _, name = key.rpartition(".")
        module = self.modules.get(path)
        if isinstance(module, nn.MultiheadAttention):
            replaceable = name == "in_proj_weight" and self._attends_to_itself(path)
            return None if replaceable else type(module).__name__
        for user in sorted(row.users):
            inside_attention = isinstance(self.modules[user], nn.MultiheadAttention) and self._attends_to_itself(user)
            if not inside_attention:
                return type(self.modules[user]).__name__
        if holder := self._other_holder(key, module):
            return type(holder).__name__
        known = isinstance(module, (nn.Linear, _ConvNd)) and not isinstance(module, _ConvTransposeNd)
        known = (
            known and row.at is None and path not in self.recorder.computes_more and not _has_more_parameters(module)
        )
        return None if name == "weight" and (known or type(module).__name__ == "Conv1D") else type(module).__name__

    def _attends_to_itself(self, path: str) -> bool:
        """Whether an nn.MultiheadAttention makes query, key and value of one tensor by one weight, and of nothing else."""
        module = self.modules[path]
        assert isinstance(module, nn.MultiheadAttention)
        parts = (op for op in self.recorder.ops.values() if op.weight == f"{path}.in_proj_weight" and op.at is not None)
        fused = module._qkv_same_embed_dim and module.bias_k is None and not module.add_zero_attn
        return fused and not any(parts)

    def _other_holder(self, key: str, module: nn.Module | None) -> nn.Module | None:
        """Another module than `module` with the same parameter: an adapter around a layer, with `weight = layer.weight`."""
        holders = self.holders.get(self.tied.get(key, key), [])
        return next((holder for holder in holders if holder is not module), None)

    def _active(self, row: CountedOp) -> Fraction | int:
        """Which share of stacked experts one token uses: top_k of them; 1 for any other layer, or where that is not known."""
        sizes = self.run.facts.sizes
        if row.kind != "experts" or not row.tokens:
            return 1
        weights = (row.inputs * row.outputs).evaluate(sizes) // row.groups.evaluate(sizes)
        share = min(Fraction(row.macs.evaluate(sizes), row.calls * row.tokens * weights), Fraction(1))
        return share if share.denominator > 1 else 1

    def _per_mac(self, row: CountedOp, gradients: Poly) -> Fraction | int:
        """MACs of a backward pass as a share of the forward MACs."""
        sizes = self.run.facts.sizes
        share = Fraction(gradients.evaluate(sizes), row.macs.evaluate(sizes) or 1)
        return share if share.denominator > 1 else share.numerator

    def _mark_tied(self, layers: list[Layer]) -> list[Layer]:
        """Set `tied_to` of rows that share a weight with another row (GPT-2's output layer and its token embedding)."""
        owner: dict[tuple[str, Poly | None], str] = {}
        marked = []
        for layer in layers:
            first = self.tied.get(layer.weight or "", layer.weight)
            if first and (first, layer.start) in owner:
                layer = replace(layer, tied_to=owner[first, layer.start])
            elif first:
                owner[first, layer.start] = layer.name
            marked.append(layer)
        shared = {layer.tied_to: layer.name for layer in marked if layer.tied_to}
        return [replace(x, tied_to=shared[x.name]) if x.weighted and x.name in shared else x for x in marked]

    def _without_macs(self, owned: set[str]) -> list[tuple[int, Layer]]:
        """(order, row) of parameters without MACs: norms, embeddings and bare parameters."""
        layers = []
        for path, keys in self.by_module.items():
            keys = [k for k in keys if self.tied[k] == k and k not in owned]
            if not keys:
                continue
            kind, role = _kind_without_macs(self.modules[path])
            seen = self.recorder.first_seen.get(path)
            parameter = kind == "parameter"
            name = path or ", ".join(keys)
            if parameter:
                name = keys[0] if len(keys) == 1 else f"{path or 'model'} parameters"
            layer = Layer(
                name,
                kind,
                role,
                params=self.named(_total(self.run.shapes[k] for k in keys)),
                weight=keys[0] if kind == "embedding" else None,
                note="not used in this forward" if seen is None and not parameter else None,
            )
            layers.append((seen or (0 if parameter else 10**9), layer))
        return layers


def _row_name(row: CountedOp) -> str:
    """The module of the weight, and which part of it; for a product of activations, the module and the kind of product."""
    if row.weight is None:
        return f"{row.owner or 'model'}.{row.kind}"
    return f"{row.owner or row.weight}.{row.part}" if row.part else row.owner or row.weight


def _note(row: CountedOp, role: Role, *, in_parts: bool) -> str | None:
    if row.weight is None and row.kind in (*LAYERS, "matmul"):
        return "the weight is computed in forward, not a parameter"
    if row.kind == "experts" and row.groups == Poly.const(1):
        return "a part of the experts that are stacked in one tensor: what a non-zero costs depends on the routing"
    if in_parts and role == "body":
        return "its calls use parts of the weight that are no separate rows, so its non-zeros differ in cost"
    return None


def _has_more_parameters(layer: nn.Module | None) -> bool:
    """Whether a layer has parameters other than weight and bias (low-rank adapters, a learned scale), which would be lost."""
    return layer is not None and any(name not in ("weight", "bias") for name, _ in layer.named_parameters())


def _kind_without_macs(module: nn.Module) -> tuple[str, Role]:
    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        return "embedding", "embedding"
    if "norm" in kind.lower():
        return _NORMS.get(kind, "rms_norm" if "rms" in kind.lower() else "norm"), "norm"
    return "parameter", "embedding"


def _total(shapes: Iterable[tuple[Any, ...]]) -> Poly:
    total = Poly()
    for shape in shapes:
        total = total + numel(shape)
    return total
