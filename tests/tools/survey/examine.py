"""What a survey finds out about one model: is every number right, and how much of the model does Sparse Wide reach?"""

from __future__ import annotations

import math
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from sparseift_cli.errors import CheckFailed, SparseiftError
from sparseift_cli.plan.audit import audit
from sparseift_cli.plan.layer_plan import LayerPlan
from sparseift_cli.plan.members import MEMBERS
from sparseift_cli.plan.plan import Plan, make_plan
from sparseift_cli.plan.spec import TransformSpec
from sparseift_cli.plan.widths import Solution, solve
from sparseift_cli.table.poly import Poly
from sparseift_cli.table.table import LayerTable
from sparseift_cli.trace.build import TraceResult, trace
from sparseift_cli.trace.fake_mode import no_init
from sparseift_cli.trace.outputs import returned
from sparseift_cli.transforms.check import measure, require_as_planned
from sparseift_cli.transforms.surgery import apply_surgery, surgery_for
from sparseift_cli.transforms.transformation import Options, transform_module

from .subject import Subject

aten = torch.ops.aten
SPARSITIES = ("0.5", "0.9")
LARGEST_REAL = 20_000_000  # parameters of a model that also runs on CPU tensors
# Reasons that no tool can help: what a model returns, counts with the values of tensors, writes as a literal, or multiplies
# as data (coordinates of positions).
JUSTIFIED = (
    "output of the model",
    "computes with the values of tensors",
    "constant of the code",
    "no layer to transform",
    "which a product reads",
)
EXACT = 1e-4  # a deviation that float32 explains
# What a plan says of numbers that count something else than channels.
COUNTS = ("a count, not a width", "number of heads (head_dim scales instead)", "places in it are chosen by index")


@dataclass
class Outcome:
    """What became of one model."""

    name: str
    set: str = ""
    seconds: float = 0.0
    error: str = ""  # it cannot be built, or does not run as it is: no fault of ours
    macs: int = 0  # dense, forward
    torch_macs: int | None = None  # the same by FlopCounterMode
    training_macs: float = 0.0  # of one step: forward and backward
    torch_training_macs: int | None = None
    passed: dict[str, int] = field(default_factory=dict)  # member -> sparsities at which it passes
    ratio: str = ""  # forward MACs of Wide over dense, at the last sparsity
    reached: float = 0.0  # share of the body's MACs in layers that Wide makes sparse
    real: int = 0  # members that ran forward and backward on CPU tensors
    deviation: float | None = None  # of a Wide model started with preserve from the dense function
    preserve_notes: list[str] = field(default_factory=list)
    held: dict[str, int] = field(default_factory=dict)  # reason -> body layers with a side that did not grow
    refused: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """`full`, `half` (some body layers did not grow), `refused`, `wrong`, or `broken` where the dense model does not run."""
        if self.error:
            return "broken"
        if self.wrong:
            return "wrong"
        if self.passed.get("wide", 0) < len(SPARSITIES):
            return "refused"
        return "half" if self.held else "full"

    @property
    def justified(self) -> bool:
        """Whether every reason for which it is not full is one that no tool can help."""
        reasons = [*self.held, *(r for r in self.refused if r.startswith("wide"))]
        return all(any(known in reason for known in JUSTIFIED) for reason in reasons)

    def to_json(self) -> dict[str, Any]:
        """Its fields, the verdict, and the version of PyTorch."""
        version = torch.__version__.partition("+")[0]
        return asdict(self) | {"verdict": self.verdict, "justified": self.justified, "torch": version}


def examine(subject: Subject, real: bool) -> Outcome:
    """Every member at every sparsity on meta; with `real`, the first sparsity on CPU tensors too."""
    outcome = Outcome(subject.name, subject.set)
    start = time.perf_counter()
    try:
        with no_init("meta"):
            model = subject.build("meta").eval()
        args, kwargs = subject.args("meta"), subject.kwargs("meta")
        outcome.torch_macs = _counted_by_torch(model, args, kwargs)
        if outcome.torch_macs is None and _size(model) <= LARGEST_REAL:
            _run_dense(subject)  # a model that does not run is no fault of a transform
    except Exception as error:
        outcome.error = f"{type(error).__name__}: {_first_line(error)}"
        return outcome
    try:
        before = trace(model, args, kwargs, name=subject.name, input_shape=())
    except SparseiftError as error:
        outcome.refused.append(f"wide: {error.message}")
        return outcome
    counted = audit(before.table)
    outcome.training_macs = float(counted.dense.training_macs)
    outcome.torch_training_macs = _training_counted_by_torch(model, args, kwargs)
    outcome.macs = sum(row.macs.evaluate(before.table.sizes) for row in before.table.layers)
    for member in MEMBERS:
        for sparsity in SPARSITIES:
            _check_plan(outcome, model, args, kwargs, before, TransformSpec(member=member, sparsity=sparsity))
    if real and _size(model) <= LARGEST_REAL:
        for member in MEMBERS:
            if outcome.passed.get(member):
                _check_real(outcome, subject, member)
        if outcome.passed.get("wide"):
            _check_preserve(outcome, subject)
    outcome.seconds = time.perf_counter() - start
    return outcome


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@dataclass
class _Dense:
    """A dense model on CPU tensors: its arguments, the shapes of its outputs, and whether it can be trained."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: list[torch.Size]
    trains: bool = True


def _run_dense(subject: Subject) -> _Dense:
    torch.manual_seed(0)
    model = subject.build("cpu").eval()
    args, kwargs = _random(subject.args("cpu")), _random(subject.kwargs("cpu"))
    outputs = _tensors(model(*args, **kwargs))
    dense = _Dense(model, args, kwargs, [t.shape for t in outputs])
    try:
        _backward(outputs)
    except Exception:  # in place in its own forward, or nothing that has a gradient
        dense.trains = False
    model.zero_grad()
    return dense


def _backward(outputs: list[Tensor]) -> None:
    torch.stack([t.float().square().mean() for t in outputs if t.requires_grad and t.numel()]).sum().backward()


def _counted_by_torch(model: nn.Module, args: Any, kwargs: Any) -> int | None:
    """Forward MACs by PyTorch's own counter; None where the model does not run on meta."""
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(*args, **kwargs)
    except Exception:
        return None
    return counter.get_total_flops() // 2


def _training_counted_by_torch(model: nn.Module, args: Any, kwargs: Any) -> int | None:
    """MACs of a step whose loss is the sum of all results, by the same counter; None where that does not run on meta."""
    try:
        with FlopCounterMode(
            display=False, custom_mapping={aten.convolution_backward: _flops_of_conv_backward}
        ) as counter:
            results = [t for t in returned(model(*args, **kwargs)).results.values() if t.requires_grad]
            sum(t.sum() for t in results).backward()
    except Exception:
        return None
    finally:
        model.zero_grad()
    return counter.get_total_flops() // 2


def _flops_of_conv_backward(grad: Any, x: Any, weight: Any, *rest: Any, **_: Any) -> int:
    """FLOPs of aten.convolution_backward; PyTorch's own formula is wrong for grouped convolutions."""
    transposed, wanted = rest[4], rest[7]
    return 2 * math.prod(x if transposed else grad) * math.prod(weight[1:]) * sum(wanted[:2])


def _check_plan(
    outcome: Outcome, model: nn.Module, args: Any, kwargs: Any, before: TraceResult, spec: TransformSpec
) -> None:
    """Plan, transform and count again on meta; every transformed row within one non-zero of its budget."""
    what = f"{spec.member} {spec.sparsity}"
    try:
        plan = make_plan(before.table, spec)
        surgery = surgery_for(plan, before.structure, model)
        new = apply_surgery(model, surgery)
        measured, after = measure(new, args, kwargs, plan, surgery, None)
        require_as_planned(measured, plan, before, after)
    except CheckFailed as error:
        outcome.wrong.append(f"{what}: {error.message}")
    except SparseiftError as error:
        outcome.refused.append(f"{what}: {error.message}")
    except Exception as error:
        outcome.wrong.append(f"{what}: BROKE {type(error).__name__}: {_first_line(error)}")
    else:
        off = [p.layer.name for p in plan.layers if p.status == "transformed" and not _within_a_nonzero(p)]
        if off:
            outcome.wrong.append(f"{what}: not iso-FLOP: {', '.join(off[:3])}")
        else:
            outcome.passed[spec.member] = outcome.passed.get(spec.member, 0) + 1
        if plan.widening is not None:
            _note_reach(outcome, before.table, plan)


def _within_a_nonzero(row: LayerPlan) -> bool:
    return row.dense_macs - row.positions < row.macs <= row.dense_macs


def _note_reach(outcome: Outcome, table: LayerTable, plan: Plan) -> None:
    """How far Wide came: the model's ratio, the share of the body that it made sparse, and what held the rest."""
    body = [row for row in plan.layers if row.layer.weighted and row.layer.role == "body"]
    total = sum(row.dense_macs for row in body)
    outcome.reached = sum(row.dense_macs for row in body if row.status == "transformed") / total if total else 0.0
    outcome.ratio = f"{sum(r.macs for r in plan.layers) / max(1, sum(r.dense_macs for r in plan.layers)):.3f}"
    held: Counter[str] = Counter()
    solution = solve(table.widths, table.equations, plan.spec.heads)
    for row in body:
        held.update(set(_why_held(row, table, plan, solution)))
        if row.status != "transformed" and row.macs > row.dense_macs and row.layer.kind != "depthwise":
            held[f"grows untouched: {row.reason}"] += 1
    outcome.held = dict(held)


def _why_held(row: LayerPlan, table: LayerTable, plan: Plan, solution: Solution) -> Iterator[str]:
    """Why a side of a body layer did not grow. Numbers of heads and of experts, which a router has as outputs, never do."""
    for side in (row.layer.inputs, row.layer.outputs):
        if side.evaluate(plan.sizes) > side.evaluate(table.sizes) or side == Poly.const(1):
            continue
        reasons = [solution.reasons[v] for v in _behind(side, solution) if v in solution.reasons]
        reasons = [r for r in reasons if r not in COUNTS]
        if reasons or not side.variables:
            yield re.sub(r"\.\d+\.", ".*.", reasons[0]) if reasons else f"constant of the code: {side}"
        elif not _behind(side, solution):
            yield row.reason or "no reason given"


def _behind(side: Poly, solution: Solution) -> list[int]:
    """The widths of a side and, where elimination made them follow others, those too."""
    found = [*side.variables]
    return [*found, *(u for v in found for u in solution.free_widths(v) if u not in found)]


def _check_real(outcome: Outcome, subject: Subject, member: str) -> None:
    """A forward and a backward on CPU tensors: outputs of the dense shapes, all finite, a gradient for every used weight."""
    dense = _run_dense(subject)
    args, kwargs, want = dense.args, dense.kwargs, dense.shapes
    try:
        spec = TransformSpec(member=member, sparsity=SPARSITIES[0])
        new, _ = transform_module(
            dense.model, args, kwargs, spec, name=subject.name, input_shape=(), options=Options(start="fresh")
        )
        outputs = _tensors(new(*args, **kwargs))
        if dense.trains:
            _backward(outputs)
    except Exception as error:
        outcome.wrong.append(f"{member} for real: {type(error).__name__}: {_first_line(error)}")
        return
    if (have := [t.shape for t in outputs]) != want:
        different = [f"{tuple(a)} became {tuple(b)}" for a, b in zip(want, have, strict=False) if a != b]
        outcome.wrong.append(f"{member} for real: output {different[:2]}")
    elif not all(t.isfinite().all() for t in outputs):
        outcome.wrong.append(f"{member} for real: the output is not finite")
    elif not all(p.grad.isfinite().all() for p in new.parameters() if p.grad is not None):
        outcome.wrong.append(f"{member} for real: a gradient is not finite")
    else:
        outcome.real += 1


def _check_preserve(outcome: Outcome, subject: Subject) -> None:
    """Start preserve, exact: the transformed model is the dense function, or says why it is not."""
    dense = _run_dense(subject)
    args, kwargs = dense.args, dense.kwargs
    options = Options(start="preserve", preserve_slack=0.0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spec = TransformSpec(member="wide", sparsity=SPARSITIES[0])
            _, done = transform_module(
                dense.model, args, kwargs, spec, name=subject.name, input_shape=(), options=options
            )
    except SparseiftError as error:
        outcome.preserve_notes = [f"refused: {error.message}"]
    except Exception as error:
        outcome.wrong.append(f"preserve: {type(error).__name__}: {_first_line(error)}")
    else:
        notes = [note for note in done.notes if not note.startswith("warning: ")]
        outcome.deviation, outcome.preserve_notes = done.deviation, notes
        if not (done.deviation or 0.0) <= EXACT and not notes:
            outcome.wrong.append(f"preserve: deviates by {done.deviation:.2g} and does not say why")


def _tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors among the results of an output; by-products may be wider."""
    return [t for t in returned(output).results.values() if t.is_floating_point()]


def _random(arguments: Any) -> Any:
    """Zero images as noise; token ids stay."""
    return tree_map_only(Tensor, lambda t: torch.randn_like(t) if t.is_floating_point() else t, arguments)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0][:300]
