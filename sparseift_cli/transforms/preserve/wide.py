"""Sparse Wide that starts as the dense network: its weights stand at the live coordinates, their positions are the mask.

Added channels are computed and read by nobody: no live output has a weight on an added input. So whatever works channel by
channel gives the live ones what it gave before, in train mode too; norms and attention scores, which mix channels, are made
to fit by `streams` and `attention`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ...errors import UsageError
from ...mask import generator_for
from ...plan.plan import Plan
from ...trace.flow import VALUE, is_layer_norm
from ...trace.structure import Structure
from ..edits import Masked, SetAttribute, Surgery
from .attention import fold_scales, number, query_rows, rotary
from .live import HINT, Live
from .norms import grown_norms
from .products import Product, canonical, products
from .spend import Places, Spent, spend
from .streams import find_streams

_NEUTRAL = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}


@dataclass
class Widening:
    """A dense module, the wide one that is being filled, and what is known about both."""

    new: nn.Module
    dense: nn.Module
    plan: Plan
    surgery: Surgery
    structure: Structure
    seed: int
    slack: float

    def __post_init__(self) -> None:
        if self.plan.spec.pattern != "unstructured":
            raise UsageError(f"the positions of the dense weights are no {self.plan.spec.pattern} pattern", hint=HINT)
        self.live = Live(self.plan, self.structure)
        self.names = canonical(self.dense)
        self.products = products(self.plan, self.structure, self.surgery, self.dense)
        self.by_name = {self.names[key]: p for key, p in self.products.items()}
        norms = grown_norms(self.dense, self.structure, self.live)
        self.streams = find_streams(self.dense, self.structure, self.live, norms, self.products, self.names)
        self.gains = {n.gain_key: n for n in norms}
        self.summands = {
            self.names[s.removeprefix(VALUE)]
            for read in self.structure.streams.values()
            for s in read
            if s.startswith(VALUE)
        }

    def run(self) -> tuple[dict[str, Tensor], list[str], list[SetAttribute]]:
        """Fill `new`; the masks, what is to be said, and the numbers of modules that changed."""
        state = {**dict(self.new.named_parameters()), **dict(self.new.named_buffers())}
        for name, value in (*self.dense.named_parameters(), *self.dense.named_buffers()):
            if name in self.structure.shapes:
                self._place(name, self._adjusted(name, value.detach()), state[name])
        spent = {m.key: self._mask(m) for m in self.surgery.masked}
        folded: set[SetAttribute] = set()
        notes = [*self.streams.notes, *self._fold(folded), *self._told(spent)]
        edits = [e for n in self.streams.norms if (e := n.eps()) is not None]
        edits += rotary(self.dense, self.structure, self.live)
        edits += self._as_before(folded)
        for edit in edits:
            owner = self.new.get_submodule(edit.owner)
            if edit.name in owner._buffers:
                owner.get_buffer(edit.name).fill_(edit.value)
            else:
                owner.__dict__[edit.name] = edit.value
        return {k: s.mask for k, s in spent.items()}, notes, edits

    def _fold(self, folded: set[SetAttribute]) -> Iterator[str]:
        return fold_scales(
            self.new, self.dense, self.surgery, self.structure, self.live, self.products, self.streams.norms, folded
        )

    def _as_before(self, folded: set[SetAttribute]) -> Iterator[SetAttribute]:
        """Numbers that surgery made to follow a width, and that the forward multiplies with, with their dense values.

        The scale of an embedding, say. Not those that shapes depend on, nor those that weights were multiplied for.
        """
        modules = dict(self.dense.named_modules())
        for edit in self.surgery.attributes:
            tied = (edit.owner, edit.name, edit.index) in self.structure.attributes
            factor = type(edit.value) is float or (edit.owner, edit.name) in self.structure.formulas
            if tied or not factor or edit in folded or edit.owner not in modules:
                continue
            yield SetAttribute(edit.owner, edit.name, number(modules[edit.owner], edit.name))

    # --- values ---

    def _adjusted(self, name: str, value: Tensor) -> Tensor:
        """The dense values as the wide model needs them: a writer of a LayerNorm's stream centred, a gain scaled."""
        if name in self.streams.centred:
            exact = value.double()
            return (exact - exact.mean(self.streams.centred[name], keepdim=True)).to(value.dtype)
        norm = self.gains.get(name)
        return value if norm is None else norm.gains(value, math.sqrt(norm.share))

    def _place(self, name: str, value: Tensor, target: Tensor) -> None:
        dims = self.structure.shapes[name]
        if target.shape == value.shape:
            target.copy_(value)
            return
        target.copy_(self._background(name, value, target))
        target[self.live.grid(dims)] = value
        if name in self.streams.filled:
            axis = self.streams.filled[name] % value.dim()
            where = list(self.live.grid(dims))
            added = self.live.added(dims[axis]).nonzero().flatten()
            where[axis] = added.view([-1 if i == axis else 1 for i in range(value.dim())])
            target[tuple(where)] = value.double().mean(axis, keepdim=True).to(value.dtype)

    def _background(self, name: str, value: Tensor, fresh: Tensor) -> Tensor:
        """What stands where the dense model has nothing."""
        path, _, last = name.rpartition(".")
        module = self.dense.get_submodule(path)
        table = name in self.streams.filled or name in self.summands  # a head tied to it reads what norms make zero
        if name in self.by_name and not table:
            return self._rows(self.by_name[name], fresh)
        if name in self.gains:
            norm = self.gains[name]
            return torch.full_like(fresh, norm.gains(torch.tensor(1 - norm.offset), math.sqrt(norm.share)).item())
        if isinstance(module, (_NormBase, nn.GroupNorm)) or is_layer_norm(module):
            return torch.full_like(fresh, _NEUTRAL.get(last, 0.0))
        if name not in dict(self.dense.named_parameters()):
            return fresh.clone()
        if value.dim() == 1 and "bias" not in last and name not in self.summands:  # a layer scale, the slope of a PReLU
            return torch.full_like(fresh, float(value.mean()))
        return torch.zeros_like(fresh)

    def _rows(self, product: Product, fresh: Tensor) -> Tensor:
        """A layer's weight: nothing on added inputs, fresh weights for added outputs that nothing mixes with live ones."""
        weight = fresh.clone()
        if product.masked:
            return weight
        outputs, inputs = weight.movedim(product.axis, 0), weight.movedim(1 - product.axis, 0)
        if not (self.slack and product.key in self.streams.quiet) and len(inputs) == self.live.new(product.inputs):
            inputs[self.live.added(product.inputs)] = 0
        outputs[self.live.added(product.outputs) & ~self._free_outputs(product)] = 0
        return weight

    # --- masks ---

    def _free_outputs(self, product: Product) -> Tensor:
        """Added outputs that may compute anything: no norm sees them, and no attention score (its key may, its query not)."""
        free = self.live.added(product.outputs)
        if product.key in self.streams.silent:
            free[:] = False
        queries = query_rows(product, self.structure, self.live)
        if queries is not None:
            free[queries if len(queries) else slice(None)] = False
        return free

    def _mask(self, masked: Masked) -> Spent:
        weight = self.new.get_parameter(masked.key)
        product = self.products.get(masked.key)
        places: list[Places] = []
        if product is not None:
            outputs, inputs = self.live.of(product.outputs), self.live.of(product.inputs)
            free = self._free_outputs(product).nonzero().flatten()
            places.append(Places.of(weight.shape, product.axis, free, 1 - product.axis, inputs))
            if product.key in self.streams.quiet:
                added = self.live.added(product.inputs).nonzero().flatten()
                places.append(Places.of(weight.shape, 1 - product.axis, added, product.axis, outputs))
        live = self.live.grid(self.structure.shapes[masked.key])
        generator = generator_for(self.seed, "preserve", masked.key)
        spent = spend(weight.detach().cpu(), live, masked.nnz, self.slack, places, generator)
        mask = spent.mask.to(weight.device)
        weight.mul_(mask)
        weight.view(-1)[spent.blank.to(weight.device)] = 0
        axis = self.streams.centred.get(self.names[masked.key])
        if axis is not None and spent.kept < spent.dense:  # what was left out had a mean of its own
            exact = weight.double()
            mean = exact.sum(axis, keepdim=True) / mask.sum(axis, keepdim=True).clamp(min=1)
            weight.copy_((exact - mean) * mask)
        return spent

    def _told(self, spent: Mapping[str, Spent]) -> Iterator[str]:
        """What the masks mean for the function and for training."""
        short = {k: s for k, s in spent.items() if self._nnz(k) < s.dense}
        if short:
            worst = max(short, key=lambda k: short[k].lost)
            yield (
                f"not exact: the plan has fewer non-zeros than the dense model in {len(short)} layers "
                f"({sum(self._nnz(k) for k in short):,} for {sum(s.dense for s in short.values()):,}), so the smallest "
                f"weights are left out: up to {short[worst].lost:.2%} of a layer's norm ({worst})"
            )
        if not self.slack:
            read = self.summands & self.streams.filled.keys() & self.by_name.keys()
            but = f" (but for what {min(read)} fills, which the head reads too)" if read else ""
            yield (
                f"warning: without slack the added channels have no gradient{but}: static training stays the dense network, "
                "RigL sees only ties and SET grows weights that stay zero (--preserve-slack 0.1 sets some weights free)"
            )
            return
        random, dropped = sum(s.random for s in spent.values()), sum(s.dense - s.kept for s in spent.values())
        total = sum(s.dense for s in spent.values())
        lost = max(s.lost for s in spent.values())
        yield (
            f"slack {self.slack:g}: the {dropped:,} smallest of {total:,} dense weights gave way to {random:,} random ones on "
            f"added channels, which no live output reads; up to {lost:.2%} of a layer's norm is gone"
        )
        kept = [k for k, s in spent.items() if not s.random]
        if kept:
            yield (
                f"{len(kept)} of {len(spent)} sparse layers spend no slack ({', '.join(kept[:2])}, ...): they write to no "
                "added channel, or to one that a norm or an attention score sees"
            )

    def _nnz(self, key: str) -> int:
        return next(m.nnz for m in self.surgery.masked if m.key == key)
