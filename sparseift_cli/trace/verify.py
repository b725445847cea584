"""`flops --verify`: count the dense model again with two public counters, and say whether all counts are equal.

The three counters and what is known about each:

sparseift
    The trace in this folder (`build.trace`). Convolutions, linear layers and attention products, in MACs.
FlopCounterMode (torch.utils.flop_counter)
    PyTorch's own counter, in FLOPs of 2 per MAC. It runs one forward pass of the model in eval mode on *meta* tensors
    (shapes without memory), so a model of any size can be checked. On real CPU tensors it would count 0 for fused
    attention, whose CPU kernel it has no formula for, and for the fast path of nn.MultiheadAttention; on meta tensors
    PyTorch computes both from plain matrix products. Only the forward pass is used: its count of the backward of
    grouped convolutions is wrong. It has no formula for products with vectors, distances, bilinear layers and products in
    place: those are named.
fvcore (FlopCountAnalysis)
    Counts MACs, under the name "flop", on a torch.jit trace of real tensors. It has no rule for fused attention, recurrent
    layers and what runs in a torch.autograd.Function; those are named. It is run twice: as it is, and with a rule for
    attention that we give to it. It also counts norms and elementwise work, which is left out here, and sums of three or
    more factors (einsum) in an order of its own.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from ..table.table import LayerTable
from .gradients import tensors_in
from .record import is_product
from .symbolise import set_training

Build = Callable[[str], tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]]]

MAX_PARAMETERS = 2_000_000_000  # of a model that fvcore counts: real tensors of float32 take 4 bytes each
_MAC_OPS = ("conv", "linear", "addmm", "matmul", "bmm", "mm", "einsum", "baddbmm")  # fvcore's names
# in the name of an op that costs MACs, or inside of which ops that do are hidden
_UNSEEN_WORDS = (
    *(
        "attention",
        "lstm",
        "gru",
        "rnn",
        "conv",
        "mm",
        "mv",
        "dot",
        "inner",
        "bilinear",
        "cdist",
        "matrix_power",
        "matmul",
    ),
    *("PythonOp", "CallFunction", "CallMethod", "_efficientzerotensor"),
)
_ATTENTION_OP = "aten::scaled_dot_product_attention"


@dataclass(frozen=True)
class _FvcoreCount:
    """fvcore's count in MACs: as it is (`by_operator`), and what its attention rule adds (`attention`)."""

    by_operator: Mapping[str, int]
    attention: int
    unseen: dict[str, int]

    @property
    def unaided(self) -> int:
        return sum(self.by_operator.values())

    @property
    def total(self) -> int:
        return self.unaided + self.attention


@dataclass(frozen=True)
class Verification:
    """The counts of one dense forward pass, in MACs, and whether they are equal.

    `flop_counter` or `fvcore` is None where that counter could not run; `notes` say why. `unseen`: products that
    FlopCounterMode met and has no formula for.
    """

    ours: int
    flop_counter: int | None
    fvcore: _FvcoreCount | None
    notes: tuple[str, ...] = ()
    unseen: Mapping[str, int] = field(default_factory=dict)

    @property
    def agree(self) -> bool:
        """At least one other counter ran, and no difference is left unexplained.

        A counter that counts less is explained where it names ops that it has no rule for.
        """
        counts = (self.flop_counter, self.fvcore.total if self.fvcore else None)
        if self.flop_counter is None:
            return counts[1] == self.ours
        known = (self._flop_counter_gap_is_known, self._fvcore_gap_is_known)
        return all(macs in (None, self.ours) or why for macs, why in zip(counts, known, strict=True))

    @property
    def _flop_counter_gap_is_known(self) -> bool:
        return self.flop_counter is not None and bool(self.unseen) and self.flop_counter < self.ours

    @property
    def _fvcore_gap_is_known(self) -> bool:
        if self.fvcore is None:
            return False
        if "einsum" in self.fvcore.by_operator:
            return True
        return self.fvcore.total < self.ours and any(op != _ATTENTION_OP for op in self.fvcore.unseen)

    @property
    def verdict(self) -> str:
        """Who agrees, who does not and by how much, and why where that is known; then what could not run."""
        counts = {"FlopCounterMode": self.flop_counter, "fvcore": self.fvcore.total if self.fvcore else None}
        same = [name for name, macs in counts.items() if macs == self.ours]
        sentences = []
        if same:
            sentences.append(f"{', '.join(same)} and sparseift agree to the MAC.")
        for name, macs in counts.items():
            if macs is not None and macs != self.ours:
                known = self._fvcore_gap_is_known if name == "fvcore" else self._flop_counter_gap_is_known
                verb = "counts" if known else "DISAGREES:"
                why = ", having no rule for some ops" if known and macs < self.ours else ""
                why = why or (", by an order of its own for einsum" if known else "")
                sentences.append(f"{name} {verb} {macs:,} MACs where sparseift counts {self.ours:,}{why}.")
        if self.unseen:
            sentences.append(f"FlopCounterMode cannot see: {_listed(self.unseen)}.")
        if self.fvcore and self.fvcore.unseen:
            sentences.append(f"By itself fvcore does not count: {_listed(self.fvcore.unseen)}.")
        if not any(macs is not None for macs in counts.values()):
            sentences.append("No other counter could run on this model: nothing is verified.")
        return " ".join([*sentences, *self.notes])

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row a comparison, in MACs: `ours`, `flop_counter`, `fvcore` (None: this counter has no such number)."""

        def row(what: str, ours: int | None, flop_counter: int | None, fvcore: int | None, note: str | None) -> Any:
            return {"what": what, "ours": ours, "flop_counter": flop_counter, "fvcore": fvcore, "note": note}

        if self.fvcore is None:
            return [row("whole model", self.ours, self.flop_counter, None, None)]
        unaided, attention = self.fvcore.unaided, self.fvcore.attention
        by_operator = ", ".join(f"{k} {v:,}" for k, v in sorted(self.fvcore.by_operator.items()))
        rows = [row("whole model, fvcore as it is", self.ours, self.flop_counter, unaided, f"fvcore: {by_operator}")]
        if attention:
            whole = "whole model, fvcore given a rule for attention"
            rows.append(row("fused attention products", None, None, attention, "fvcore, by the rule given to it"))
            rows.append(row(whole, self.ours, self.flop_counter, unaided + attention, None))
        return rows

    def to_json(self) -> dict[str, Any]:
        return {
            "agree": self.agree,
            "rows": self.rows,
            "unseen_by_flop_counter": dict(self.unseen),
            "unseen_by_fvcore": self.fvcore.unseen if self.fvcore else {},
            "verdict": self.verdict,
        }


def verify(build: Build, table: LayerTable) -> Verification:
    """Count the model of `table` again.

    Args:
        build: device -> (model, positional inputs, keyword inputs); called with "meta" for FlopCounterMode and "cpu"
        for fvcore. table: our count of the same model on inputs of the same shapes.
    """
    notes: list[str] = []
    flop_counter = fvcore = None
    unseen: dict[str, int] = {}
    try:
        flop_counter, unseen = _flop_counter_and_unseen(build)
    except Exception as error:  # whatever a forward raises on meta tensors: the other counter can still run
        notes.append(f"FlopCounterMode could not run: {_first_line(error)}.")
    if table.params > MAX_PARAMETERS:
        notes.append(
            f"fvcore was not run: it needs real tensors, and {table.params:,} parameters are too many "
            f"(up to {MAX_PARAMETERS:,} are run)."
        )
    else:
        try:
            fvcore = _count_with_fvcore(*build("cpu"))
        except Exception as error:  # torch.jit cannot trace every model
            notes.append(f"fvcore could not run: {_first_line(error)}.")
    return Verification(table.macs, flop_counter, fvcore, tuple(notes), unseen)


def _flop_counter_and_unseen(build: Build) -> tuple[int, dict[str, int]]:
    """MACs by FlopCounterMode, and the products that it has no formula for; with gradients if it does not run without."""
    with _Unseen() as unseen:
        try:
            macs = count_with_flop_counter(*build("meta"))
        except RuntimeError:
            unseen.found.clear()
            macs = count_with_flop_counter(*build("meta"), gradients=True)
    return macs, unseen.found


class _Unseen(TorchDispatchMode):
    """Collects products that FlopCounterMode has no formula for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = getattr(func, "overloadpacket", None)
        if is_product(packet, args) and packet not in flop_registry:
            self.found[str(packet)] = self.found.get(str(packet), 0) + 1
        return func(*args, **(kwargs or {}))


class _NoModules:
    """In place of FlopCounterMode's follower of modules, which hinders a forward pass that differentiates."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def count_with_flop_counter(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, gradients: bool = False
) -> int:
    """MACs of one forward pass by torch's FlopCounterMode, on meta tensors of the shapes of the inputs (any shape).

    The model is moved to the meta device, which drops its values. `gradients`: leave them on, as in training.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 10))
    >>> count_with_flop_counter(model, (torch.empty(1, 3, 4, 4),), {})  # 16 pixels * 8 * 27 taps + 128 * 10
    4736
    """
    args, named = tree_map_only(Tensor, lambda t: t.to("meta"), (args, dict(kwargs)))
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = cast(Any, _NoModules())
    set_training(model, False)
    with torch.device("meta"), torch.set_grad_enabled(gradients), counter:
        model.to("meta")(*args, **named)
    return counter.get_total_flops() // 2  # it counts the multiplication and the addition


def _count_with_fvcore(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _FvcoreCount:
    """MACs by fvcore, on real tensors. What is no tensor among the inputs and outputs is kept from its torch.jit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fvcore uses torch.jit, which warns that it is deprecated
        from fvcore.nn import FlopCountAnalysis

        logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
        wrapped = _Tensors(model, args, kwargs)
        unaided = FlopCountAnalysis(wrapped, wrapped.given)
        unaided.tracer_warnings("none")
        by_operator = {op: int(macs) for op, macs in unaided.by_operator().items() if op in _MAC_OPS}
        missed = unaided.unsupported_ops().items()
        unseen = {op: n for op, n in missed if any(word in op for word in _UNSEEN_WORDS)}
        aided = FlopCountAnalysis(wrapped, wrapped.given).set_op_handle(_ATTENTION_OP, _attention_macs)
        aided.tracer_warnings("none")
        attention = int(aided.by_operator().get("scaled_dot_product_attention", 0))
    return _FvcoreCount(by_operator, attention, unseen)


class _Tensors(nn.Module):
    """A module that takes the tensors among the inputs of another one, and returns those among its results.

    Args:
        args, kwargs: the inputs; `given` are their tensors, of any shape, in order.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.leaves, self.form = tree_flatten((args, dict(kwargs)))
        self.given = tuple(leaf for leaf in self.leaves if isinstance(leaf, Tensor))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        left = iter(tensors)
        leaves = [next(left) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.form)
        return tuple(tensors_in(self.model(*args, **kwargs)))


def _listed(ops: Mapping[str, int]) -> str:
    return ", ".join(f"{op} x{n}" for op, n in sorted(ops.items()))


def _attention_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """MACs of fused attention from its jit values: queries x keys x (d + d_v) for every head of every sample."""
    from fvcore.nn.jit_handles import get_shape

    q, k, v = (get_shape(x) or [] for x in inputs[:3])  # [..., queries, d], [..., keys, d], [..., keys, d_v]
    pairs = k[-2]
    for dim in q[:-1]:
        pairs *= dim
    return pairs * (q[-1] + v[-1])


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
