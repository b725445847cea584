"""Transforms every model of a set with every member, and writes what came of it as a table.

    python -m tests.tools.survey torchvision --out tests/tools/survey/torchvision.md
    python -m tests.tools.survey transformers --real all
    python -m tests.tools.survey zoo

For each model, member and sparsity: traced, planned, transformed and counted again on the meta device. A model passes when its
output shape is the dense one's, every transformed row costs at most the dense row and less than one non-zero below it, and
measured MACs, parameters and non-zeros equal the planned ones. Sparse Wide is *strict* when both sides of every transformed
layer grew. `--real` also runs a forward and a backward on CPU tensors for the named models (`all`, or names).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sparseift_cli.errors import SparseiftError
from sparseift_cli.plan.members import MEMBERS
from sparseift_cli.plan.plan import Plan, make_plan
from sparseift_cli.plan.spec import TransformSpec
from sparseift_cli.table.table import LayerTable
from sparseift_cli.trace.build import trace
from sparseift_cli.transforms.check import measure, require_as_planned
from sparseift_cli.transforms.surgery import apply_surgery, surgery_for
from sparseift_cli.transforms.transformation import transform_module

from .families import SETS, Subject

SPARSITIES = ("0.5", "0.9")


@dataclass
class Outcome:
    """What became of one model."""

    name: str
    seconds: float = 0.0
    passed: Counter[str] = field(default_factory=Counter)
    strict: bool = False
    narrow: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    real: int = 0


def examine(subject: Subject) -> Outcome:
    """Every member at every sparsity, on meta."""
    outcome = Outcome(subject.name)
    start = time.perf_counter()
    model = subject.build("meta").eval()
    args, kwargs = subject.args("meta"), subject.kwargs("meta")
    before = trace(model, args, kwargs, name=subject.name, input_shape=())
    for member in MEMBERS:
        for sparsity in SPARSITIES:
            try:
                plan = make_plan(before.table, TransformSpec(member=member, sparsity=sparsity))
                surgery = surgery_for(plan, before.structure, model)
                new = apply_surgery(model, surgery)
                measured, after = measure(new, args, kwargs, plan, surgery, None)
                require_as_planned(measured, plan, before, after)
                off = [
                    p.layer.name
                    for p in plan.layers
                    if p.status == "transformed" and not p.dense_macs - p.positions < p.macs <= p.dense_macs
                ]
                if off:
                    outcome.problems.append(f"{member} {sparsity}: not iso-FLOP: {off[:3]}")
                    continue
                outcome.passed[member] += 1
                if plan.widening is not None:
                    outcome.narrow = narrow(before.table, plan)
                    outcome.strict = not outcome.narrow
            except SparseiftError as error:
                outcome.problems.append(f"{member} {sparsity}: {error.message}")
            except Exception as error:
                outcome.problems.append(f"{member} {sparsity}: BROKE {type(error).__name__}: {error}")
    outcome.seconds = time.perf_counter() - start
    return outcome


def narrow(table: LayerTable, plan: Plan) -> list[str]:
    """Body layers with a side that did not grow, apart from sides that are a count of heads or a constant of the code."""
    found = []
    for row in plan.layers:
        if row.layer.weighted and row.layer.role == "body":
            for side in (row.layer.inputs, row.layer.outputs):
                counts = all(table.widths[v].kind in ("heads", "count") for v in side.variables)
                if side.evaluate(plan.sizes) <= side.evaluate(table.sizes) and not counts:
                    found.append(row.layer.name)
    return list(dict.fromkeys(found))


def run_for_real(subject: Subject) -> tuple[int, list[str]]:
    """A forward and a backward on CPU tensors for every member at 0.5: finite outputs, a gradient for every used weight."""
    done, problems = 0, []
    for member in MEMBERS:
        torch.manual_seed(0)
        model = subject.build("cpu")
        args, kwargs = _random(subject.args("cpu")), _random(subject.kwargs("cpu"))
        spec = TransformSpec(member=member, sparsity="0.5")
        try:
            new, _ = transform_module(model.eval(), args, kwargs, spec, name=subject.name, input_shape=())
            outputs = [
                t for t in tree_leaves(_values(new(*args, **kwargs))) if isinstance(t, Tensor) and t.is_floating_point()
            ]
            sum(t.float().square().mean() for t in outputs).backward()
            finite = all(t.isfinite().all() for t in outputs)
            gradients = all(p.grad.isfinite().all() for p in new.parameters() if p.grad is not None)
            if not finite or not gradients:
                problems.append(f"{member}: not finite")
            else:
                done += 1
        except Exception as error:
            problems.append(f"{member} for real: {type(error).__name__}: {error}")
    return done, problems


def _random(arguments: Any) -> Any:
    """Zero images as noise; token ids stay."""
    if isinstance(arguments, dict):
        return {k: _random(v) for k, v in arguments.items()}
    if isinstance(arguments, tuple):
        return tuple(_random(v) for v in arguments)
    return torch.randn_like(arguments) if arguments.is_floating_point() else arguments


def _values(output: Any) -> Any:
    return dict(output) if hasattr(output, "items") else output


def report(outcomes: list[Outcome], what: str) -> str:
    """The table, as Markdown."""
    total = len(SPARSITIES)
    heads = " | ".join(m for m in MEMBERS)
    lines = [
        f"# {what}: {len(outcomes)} models, four members, s = {' and '.join(SPARSITIES)}",
        "",
        f"Written by `python -m tests.tools.survey {what}` (torch {torch.__version__.split('+')[0]}); {__doc__.split(chr(10) * 2)[2]}",
        "",
        f"| model | {heads} | wide is strict | real forward + backward | seconds | remarks |",
        "| --- |" + " ---: |" * 7 + " --- |",
    ]
    lines[5] = "| --- |" + " ---: |" * (len(MEMBERS.names) + 3) + " --- |"
    for o in outcomes:
        cells = [f"{o.passed[m]}/{total}" for m in MEMBERS]
        real = f"{o.real}/{len(MEMBERS.names)}" if o.real else ""
        remarks = "; ".join([*o.problems, *([f"not grown: {', '.join(o.narrow[:3])}"] if o.narrow else [])])
        lines.append(
            f"| {o.name} | {' | '.join(cells)} | {'yes' if o.strict else 'no'} | {real} | {o.seconds:.1f} | {remarks} |"
        )
    sums = [f"{m} {sum(o.passed[m] == total for o in outcomes)}/{len(outcomes)}" for m in MEMBERS]
    lines += [
        "",
        f"Models that pass at every sparsity: {', '.join(sums)}. "
        f"Sparse Wide strict: {sum(o.strict for o in outcomes)}/{len(outcomes)}. "
        f"Real runs: {sum(o.real == len(MEMBERS.names) for o in outcomes)} models with all members.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run a set and write its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--real", nargs="*", default=[], metavar="NAME", help="models to run on CPU tensors, or `all`")
    parser.add_argument("--only", nargs="*", metavar="NAME")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    outcomes = []
    for subject in SETS[options.set]():
        if options.only and subject.name not in options.only:
            continue
        outcome = examine(subject)
        if "all" in options.real or subject.name in options.real:
            outcome.real, problems = run_for_real(subject)
            outcome.problems += problems
        outcomes.append(outcome)
        print(
            f"{subject.name}: {dict(outcome.passed)} {outcome.seconds:.1f} s {outcome.problems or ''}", file=sys.stderr
        )
    text = report(outcomes, options.set)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
