"""The LayerTable: what a dense model is at one input shape. Facts only, no decisions; no torch; JSON in and out.

Every size is a `Poly` over the model's *widths*: a width is a group of dims that must be equal (all that meet in a
residual addition, the output of a layer and the input of the next one). `equations` relate widths to each other
(`qkv = 3 * heads * head_dim`); `plan/widths` solves them for the sizes of a transformed model. `trace/` makes tables; those
of the zoo's models are stored as JSON.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal

from ..base.sheets import Column, Sheet, ShownAsSheets, integer
from ..base.text import shape_text
from .poly import Poly
from .shape import Shape

SCHEMA = "sparseift.layers/1"

Role = Literal["input", "output", "body", "attention", "norm", "embedding"]
WidthKind = Literal["width", "heads", "head_dim", "count"]
OUTPUT = "output of the model"
"""Why a width is fixed that is a dim of what the model returns."""
_NUMBERED = re.compile(r"(?:^|[_-])\d+$")  # a module that is one of several: 3, encoder_layer_3, block1-3


@dataclass(frozen=True, slots=True)
class Width:
    """A group of dims that must be equal. `kind`: "width" of weights, number of "heads", "head_dim", or another "count".

    Only a count is never scaled by a transform.
    """

    name: str  # the first dim of the group: "layer1.0.conv1.weight[0]"
    size: int
    kind: WidthKind = "width"
    fixed: str | None = None  # why it must not change, if it must not
    residual: bool = False  # a dim of a residual addition of two layers' outputs
    attention: bool = False  # a dim of an attention product
    outputs: tuple[str, ...] = ()  # names of the model's outputs that it is a dim of, where only they fix it

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Width:
        fields: dict[str, Any] = dict(data)
        outputs = fields.pop("outputs", [""] if data.get("fixed") == OUTPUT else [])
        return Width(**fields, outputs=tuple(outputs))


@dataclass(frozen=True, slots=True)
class Layer:
    """One row: a counted op, or parameters that cost no MACs (norms, embeddings, bare parameters).

    `macs` (multiply-accumulates of the forward pass; 1 MAC is 2 FLOPs) and `activations` (output elements) are totals
    over all `calls` at the table's input shape, batch included. `params` counts every parameter of the row, biases too.
    A weight that two rows use is counted in the first one; both name each other in `tied_to`. `grad_inputs` and
    `grad_weight` are the gradients that a backward pass computes, in units of the row's forward MACs: 0, 1, 2 (both
    operands of an attention product), or a fraction where only some of the calls need one (the first step of an LSTM
    passes no gradient to its initial state). `recomputed`, in the same unit, is the forward work that the backward pass
    repeats, because the model's own forward checkpoints activations.

    >>> linear = Layer("fc", "linear", "body", macs=Poly.const(32) * Poly.var(0) * Poly.var(1), weight="fc.weight",
    ...                inputs=Poly.var(0), outputs=Poly.var(1))
    >>> linear.macs, linear.macs.evaluate([8, 16]), linear.shape([8, 16]).weights
    (32*w0*w1, 4096, 128)
    """

    name: str
    kind: str
    role: Role
    calls: int = 1
    macs: Poly = field(default_factory=Poly)
    params: Poly = field(default_factory=Poly)
    activations: Poly = field(default_factory=Poly)
    grad_inputs: Fraction | int = 0
    grad_weight: Fraction | int = 0
    recomputed: Fraction | int = 0
    weight: str | None = None  # state_dict key; None for products of activations and rows without MACs
    inputs: Poly = field(default_factory=Poly)
    outputs: Poly = field(default_factory=Poly)
    kernel: tuple[int, ...] = ()
    groups: Poly = field(default_factory=lambda: Poly.const(1))
    computed: bool = False  # the weight is computed from the parameter, and is zero where that is (weight_norm)
    active: Fraction | int = 1  # share of the weights that one token uses: of experts, those that it is routed to
    stacked: bool = False  # the weight has more dims than a matrix, and forward decides which of them are outputs
    start: Poly | None = None  # where it uses rows [start, start + outputs) of the weight, not all of it
    tied_to: str | None = None
    host: str | None = None  # the class that holds or reads the weight, where a transformed layer cannot replace it
    projection: bool = False  # makes an attention product's query, key or value, or reads its result
    causal: tuple[int, int] | None = None  # (queries, keys) of an attention product under a causal mask
    note: str | None = None

    @property
    def weighted(self) -> bool:
        """Whether it costs MACs by a weight that is a parameter."""
        return self.weight is not None and bool(self.macs.terms)

    @property
    def block(self) -> str | None:
        """The repeated block that contains the row: the outermost numbered module around it; None for a stem or a head.

        `layer1.0` for layer1.0.conv1, `encoder_layer_3` for encoder_layer_3.mlp.0. Activation checkpointing computes
        blocks a second time (`train/recompute`).
        """
        parts = self.name.split(".")[:-1]
        at = next((i for i, part in enumerate(parts, 1) if _NUMBERED.search(part)), None)
        return None if at is None else ".".join(parts[:at])

    def shape(self, sizes: Sequence[int]) -> Shape:
        """Its dims where width i has size `sizes[i]`."""
        taps = 1
        for k in self.kernel:
            taps *= k
        return Shape(self.inputs.evaluate(sizes), self.outputs.evaluate(sizes), taps, self.groups.evaluate(sizes))

    def to_json(self) -> dict[str, Any]:
        """Only what differs from the defaults, so that big tables stay small."""
        data: dict[str, Any] = {"name": self.name, "kind": self.kind, "role": self.role}
        for key in ("macs", "params", "activations", "inputs", "outputs"):
            poly: Poly = getattr(self, key)
            if poly.terms:
                data[key] = poly.to_json()
        if self.groups != Poly.const(1):
            data["groups"] = self.groups.to_json()
        if self.active != 1:
            data["active"] = str(self.active)
        if self.start is not None:
            data["start"] = self.start.to_json()
        if self.calls != 1:
            data["calls"] = self.calls
        for key in (
            "grad_inputs",
            "grad_weight",
            "recomputed",
            "weight",
            "tied_to",
            "host",
            "projection",
            "computed",
            "stacked",
            "note",
        ):
            if value := getattr(self, key):
                data[key] = str(value) if isinstance(value, Fraction) else value
        if self.kernel:
            data["kernel"] = list(self.kernel)
        if self.causal:
            data["causal"] = list(self.causal)
        return data

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Layer:
        fields: dict[str, Any] = dict(data)
        for key in ("macs", "params", "activations", "inputs", "outputs", "groups", "start"):
            if key in fields:
                fields[key] = Poly.from_json(fields[key])
        for key in ("kernel", "causal"):
            if key in fields:
                fields[key] = tuple(fields[key])
        for key in ("grad_inputs", "grad_weight", "recomputed", "active"):
            if isinstance(fields.get(key), str):
                fields[key] = Fraction(fields[key])
        return Layer(**fields)


@dataclass(frozen=True, repr=False)
class LayerTable(ShownAsSheets):
    """A dense model at one input shape: rows in the order of execution, widths, and equations between widths.

    A model of two linear layers, 8 -> 16 -> 4, on 32 samples:

    >>> batch, (w0, w1, w2) = Poly.const(32), map(Poly.var, range(3))
    >>> first = Layer("0", "linear", "input", macs=batch * w0 * w1, params=w0 * w1 + w1, weight="0.weight", inputs=w0, outputs=w1)
    >>> last = Layer("2", "linear", "output", macs=batch * w1 * w2, params=w1 * w2 + w2, weight="2.weight", inputs=w1, outputs=w2)
    >>> widths = (Width("0.weight[1]", 8), Width("0.weight[0]", 16), Width("2.weight[0]", 4, fixed=OUTPUT, outputs=("",)))
    >>> table = LayerTable("mlp", (32, 8), (first, last), widths)
    >>> table.macs, table.params  # 32 * (8*16 + 16*4), and 8*16 + 16 + 16*4 + 4
    (6144, 212)
    >>> LayerTable.from_json(table.to_json()) == table
    True
    """

    model: str
    input: tuple[int, ...]
    layers: tuple[Layer, ...]
    widths: tuple[Width, ...]
    equations: tuple[Poly, ...] = ()  # each polynomial over widths is 0
    uncounted: tuple[str, ...] = ()  # ops that are neither counted nor known to cost no MACs
    untraceable: str | None = None  # why the widths are unknown, where they are: then all of them are fixed
    by_products: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]], hash=False)
    """What the model returns beside its outputs (hidden states, caches) and may change its shape -> the widths in it."""

    def sheets(self) -> list[Sheet]:
        """One row a counted operation, in MACs of a forward pass."""
        entries = [
            {
                "name": layer.name,
                "kind": layer.kind,
                "role": layer.role,
                "macs": layer.macs.evaluate(self.sizes),
                "params": layer.params.evaluate(self.sizes),
                "note": layer.note,
            }
            for layer in self.layers
        ]
        columns = [
            Column("name", "layer"),
            Column("kind", "kind", priority=2),
            Column("role", "role", priority=1),
            Column("macs", "MACs", integer, right=True),
            Column("params", "parameters", integer, right=True, priority=2),
            Column("note", "note", priority=3),
        ]
        shape = shape_text(self.input)
        title = f"{self.model}, input {shape}: {self.macs:,} MACs, {self.params:,} parameters"
        return [Sheet(title, columns, entries)]

    @cached_property
    def sizes(self) -> list[int]:
        """The dense size of every width, by id."""
        return [w.size for w in self.widths]

    @property
    def macs(self) -> int:
        """Forward MACs of the dense model; attention under a causal mask is counted in full."""
        return sum(layer.macs.evaluate(self.sizes) for layer in self.layers)

    @property
    def params(self) -> int:
        """Number of parameters of the dense model, each tied one once."""
        return sum(layer.params.evaluate(self.sizes) for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        widths = []
        for w in self.widths:
            entry: dict[str, Any] = {"name": w.name, "size": w.size}
            if w.kind != "width":
                entry["kind"] = w.kind
            entry |= {k: getattr(w, k) for k in ("fixed", "residual", "attention") if getattr(w, k)}
            if any(w.outputs):  # the only output of most models has no name
                entry["outputs"] = list(w.outputs)
            widths.append(entry)
        return {
            "schema": SCHEMA,
            "model": self.model,
            "input": list(self.input),
            "widths": widths,
            "equations": [e.to_json() for e in self.equations],
            "layers": [layer.to_json() for layer in self.layers],
            "uncounted": list(self.uncounted),
            **({"untraceable": self.untraceable} if self.untraceable else {}),
            **({"by_products": {k: list(v) for k, v in self.by_products.items()}} if self.by_products else {}),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> LayerTable:
        return LayerTable(
            model=data["model"],
            input=tuple(data["input"]),
            layers=tuple(Layer.from_json(row) for row in data["layers"]),
            widths=tuple(Width.from_json(w) for w in data["widths"]),
            equations=tuple(Poly.from_json(e) for e in data["equations"]),
            uncounted=tuple(data["uncounted"]),
            untraceable=data.get("untraceable"),
            by_products={k: tuple(v) for k, v in data.get("by_products", {}).items()},
        )
