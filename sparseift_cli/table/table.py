"""The LayerTable: what a dense model is at one input shape. Facts only, no decisions; no torch; JSON in and out.

Every size is a `Poly` over the model's *widths*: groups of dims that tracing found tied to each other (all that meet in
a residual add, a weight's input and what feeds it, ...). `equations` relate widths (`qkv = 3 * heads * head_dim`); solving
them for a transform's sizes is `widths.py`'s business.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal

from .poly import Poly
from .shape import Shape

SCHEMA = "sparseift.layers/1"

Role = Literal["input", "output", "body", "attention", "norm", "embedding"]
WidthKind = Literal["width", "heads", "head_dim", "count"]
_NUMBERED = re.compile(r"(?:^|[_-])\d+$")  # the name of one of several modules: 3, encoder_layer_3, block1-3


@dataclass(frozen=True, slots=True)
class Width:
    """A group of tied dims. `kind`: a width of weights; a number of heads; a head dim; any other count, never scaled."""

    name: str  # where it was met first: "layer1.0.conv1.weight[0]"
    size: int
    kind: WidthKind = "width"
    fixed: str | None = None  # why it must not change, if it must not
    residual: bool = False  # meets another layer's output in an addition
    attention: bool = False  # is part of an attention product


@dataclass(frozen=True, slots=True)
class Layer:
    """One row: a counted op, or parameters that cost no MACs (norms, embeddings, free parameters).

    MACs, parameters and activations are totals over all `calls`, at the table's input shape. `params` holds every
    parameter the row owns, biases too; a weight that two rows use belongs to the first, the other says `tied_to`.
    `grad_inputs` and `grad_weight` count the operand gradients a backward pass needs, each costing the forward MACs; a
    fraction where only some of the calls need one (an LSTM's first step has no state to pass a gradient to).
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
    weight: str | None = None  # state_dict key; None for products of activations and rows without MACs
    inputs: Poly = field(default_factory=Poly)
    outputs: Poly = field(default_factory=Poly)
    kernel: tuple[int, ...] = ()
    groups: Poly = field(default_factory=lambda: Poly.const(1))
    tied_to: str | None = None
    host: str | None = None  # the class that holds the weight, where no other layer can stand in for it
    projection: bool = False  # makes an attention product's query, key or value, or reads its result
    causal: tuple[int, int] | None = None  # (queries, keys) of an attention product under a causal mask
    note: str | None = None

    @property
    def weighted(self) -> bool:
        """Costs MACs through a weight of its own."""
        return self.weight is not None and bool(self.macs.terms)

    @property
    def block(self) -> str | None:
        """The repeated block that the row lies in: the outermost numbered module around it; None for a stem or a head.

        `layer1.0` of layer1.0.conv1, `encoder_layer_3` of encoder_layer_3.mlp.0. It is what activation checkpointing
        computes a second time (`train.recompute`).
        """
        parts = self.name.split(".")[:-1]
        at = next((i for i, part in enumerate(parts, 1) if _NUMBERED.search(part)), None)
        return None if at is None else ".".join(parts[:at])

    def shape(self, sizes: Sequence[int]) -> Shape:
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
        if self.calls != 1:
            data["calls"] = self.calls
        for key in ("grad_inputs", "grad_weight", "weight", "tied_to", "host", "projection", "note"):
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
        for key in ("macs", "params", "activations", "inputs", "outputs", "groups"):
            if key in fields:
                fields[key] = Poly.from_json(fields[key])
        for key in ("kernel", "causal"):
            if key in fields:
                fields[key] = tuple(fields[key])
        for key in ("grad_inputs", "grad_weight"):
            if isinstance(fields.get(key), str):
                fields[key] = Fraction(fields[key])
        return Layer(**fields)


@dataclass(frozen=True)
class LayerTable:
    """A dense model at one input shape: rows in execution order, widths, the equations between them, and what was not counted."""

    model: str
    input: tuple[int, ...]
    layers: tuple[Layer, ...]
    widths: tuple[Width, ...]
    equations: tuple[Poly, ...] = ()
    uncounted: tuple[str, ...] = ()  # ops that are neither counted nor known to cost no MACs
    untraceable: str | None = None  # why widths are unknown, if they are: then all of them are fixed

    @cached_property
    def sizes(self) -> list[int]:
        """The dense size of every width, by id."""
        return [w.size for w in self.widths]

    @property
    def macs(self) -> int:
        """Forward MACs of the dense model, attention counted in full."""
        return sum(layer.macs.evaluate(self.sizes) for layer in self.layers)

    @property
    def params(self) -> int:
        return sum(layer.params.evaluate(self.sizes) for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        widths = []
        for w in self.widths:
            entry: dict[str, Any] = {"name": w.name, "size": w.size}
            if w.kind != "width":
                entry["kind"] = w.kind
            entry |= {k: getattr(w, k) for k in ("fixed", "residual", "attention") if getattr(w, k)}
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
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> LayerTable:
        return LayerTable(
            model=data["model"],
            input=tuple(data["input"]),
            layers=tuple(Layer.from_json(row) for row in data["layers"]),
            widths=tuple(Width(**w) for w in data["widths"]),
            equations=tuple(Poly.from_json(e) for e in data["equations"]),
            uncounted=tuple(data["uncounted"]),
            untraceable=data.get("untraceable"),
        )
