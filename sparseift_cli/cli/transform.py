"""`sparseift transform`: the signature and the order of work; the audit is shown by flops_view.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .formats import Format, without_github

if TYPE_CHECKING:
    from ..transforms.transformation import Transformation

HELP = """Transform a model or checkpoint, and write it: weights, masks, plan and audit.

SOURCE is what `sparseift flops` takes, or a checkpoint file. OUT is a folder; `sparseift_cli.load(OUT)` gives the module,
and `sparseift flops OUT` and `sparseift inspect OUT` read it.

Examples:

  sparseift transform resnet18 --sparsity 0.9 -o out/resnet18-wide90

  sparseift transform model.pth -s 0.75 --init preserve -o out/wide75   # the same function at the start

  sparseift transform torchvision:resnet50 -s 0.9 -t parallel -o out/parallel90

  sparseift transform hf:path/to/folder -s 0.5 --seq 128 -o out/llm     # a local Hugging Face folder

  sparseift transform gpt3_13b -s 0.5 --plan-only                       # no memory for weights
"""

_START = "How it starts"


@options.taking_spec
def transform(
    source: Annotated[str, typer.Argument(help="As for flops, or a checkpoint file.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder to write. Needed without --plan-only.", show_default=False),
    ] = None,
    transform: options.Transform = None,
    sparsity: Annotated[str | None, typer.Option("--sparsity", "-s", help="0.9: nine of ten weights are zero.")] = None,
    init: Annotated[
        str,
        typer.Option(
            help="fresh weights, or preserve the dense model's function (with --scope none: its largest weights).",
            rich_help_panel=_START,
        ),
    ] = "fresh",
    preserve_slack: Annotated[
        float,
        typer.Option(
            help="preserve: this part of the weights, the smallest, goes to new channels.", rich_help_panel=_START
        ),
    ] = 0.1,
    weight_init: Annotated[
        str,
        typer.Option(help="fresh: as the dense model's, or density_scaled.", rich_help_panel=_START),
    ] = "dense",
    masks: Annotated[
        str, typer.Option(help="fresh: random, or magnitude (the largest weights).", rich_help_panel=_START)
    ] = "random",
    connect: Annotated[
        bool, typer.Option(help="Give every output a non-zero where the count allows.", rich_help_panel=_START)
    ] = True,
    seed: Annotated[int, typer.Option(help="Of weights and masks.", rich_help_panel=_START)] = 0,
    model: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="What the checkpoint is of, where the zoo does not know it.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(metavar="PATH", help="Dotted path of the state dict in the checkpoint, as in 'ema'.")
    ] = None,
    num_classes: options.NumClasses = None,
    input_shape: options.Input = None,
    batch: options.Batch = 1,
    seq: options.Seq = None,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="Plan, operate and count on the meta device; write no weights.")
    ] = False,
    export: Annotated[
        str | None, typer.Option(help="dense: also OUT/state_dict.pt, zeros stored, for any PyTorch code.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a transformed model at OUT.")] = False,
    summary: Annotated[bool, typer.Option("--summary", help="Totals only.")] = False,
    depth: Annotated[int | None, typer.Option(help="Fold rows into modules N names deep.")] = None,
    fmt: options.FormatOption = Format.table,
    json: options.Json = False,
    *,
    spec: dict[str, Any],
) -> None:
    from ..errors import UsageError, one_of
    from ..models.request import Request, parse_input
    from ..models.source import resolve
    from ..transforms.artifact import require_writable

    fmt = without_github(fmt, json, "transform")
    one_of("--init", init, ("fresh", "preserve"))
    one_of("--masks", masks, ("random", "magnitude"))
    one_of("--weight-init", weight_init, ("dense", "density_scaled"))
    one_of("--export", export or "dense", ("dense",))
    if not 0 <= preserve_slack < 1:
        raise UsageError(f"--preserve-slack {preserve_slack} is not in [0, 1)")
    if out is None and not plan_only:
        raise UsageError("where should it go?", hint="-o FOLDER, or --plan-only to see the plan and write nothing")
    if out is not None:
        require_writable(out, force=force)
    if export and plan_only:
        raise UsageError("--plan-only has no weights to export", hint="leave out one of the two")
    if init == "preserve" and plan_only:
        raise UsageError("--plan-only has no weights to preserve", hint="leave out one of the two")
    checkpoint = source if _is_checkpoint_file(source) else None
    if checkpoint is None and (model or key):
        raise UsageError("--model and --key are for checkpoint files", hint=f"{source} is a model")
    request = Request(model or "" if checkpoint else source, num_classes, parse_input(input_shape), seq, batch)
    request, recipe = resolve(request) if request.source else (request, None)
    given: dict[str, Any] = (dict(recipe.transform) if recipe else {}) | spec
    given |= {k: v for k, v in {"member": transform, "sparsity": sparsity}.items() if v is not None}
    if "sparsity" not in given:
        raise UsageError("a transform needs its sparsity", hint="--sparsity 0.9")
    from ..plan.spec import TrainingSpec, TransformSpec, member_named
    from ..transforms.convert import convert
    from ..transforms.transformation import Options

    wanted = TransformSpec.of(given | {"member": member_named(given.get("member", "wide"))})
    start: Any = {"start": init, "init": weight_init, "scores": None if masks == "random" else masks}
    new, done = convert(
        request,
        wanted,
        checkpoint=checkpoint,
        key=key,
        plan_only=plan_only,
        training=TrainingSpec(**recipe.training) if recipe else None,
        options=Options(seed=seed, connect=connect, preserve_slack=preserve_slack, **start),
    )
    if out is not None:
        from ..api import save

        save(new, out, force=force, state_dict=export == "dense")
    _show(done, out, fmt, summary=summary, depth=depth)


def _is_checkpoint_file(source: str) -> bool:
    from ..errors import UsageError
    from ..transforms.artifact import is_artifact
    from .inspect import is_checkpoint

    if is_artifact(source):
        raise UsageError(f"{source} is a transformed model already", hint="transform its source again")
    return is_checkpoint(source) and not source.startswith(("hf:", "torchvision:", "timm:"))


def _show(done: Transformation, out: Path | None, fmt: Format, *, summary: bool, depth: int | None) -> None:
    from ..plan.audit import audit
    from . import flops_view

    result = audit(done.plan.table, done.plan.spec, done.plan.training)
    extra = {
        "out": None if out is None else str(out),
        "measured": {
            "forward_macs": done.measured.forward_macs,
            "params": done.measured.params,
            "nonzero_params": done.measured.nonzero_params,
        },
        "deviation": done.deviation,
        "outputs_without_a_weight": done.unconnected[0],
        "inputs_not_read": done.unconnected[1],
        "notes": list(done.notes),
    }
    flops_view.show(result, fmt, None, depth=depth, sort=None, summary=summary, extra=extra)
    for line in _lines(done, out):
        typer.echo(line, err=True)


def _lines(done: Transformation, out: Path | None) -> list[str]:
    m = done.measured
    lines = [
        f"Counted again after the surgery: {m.forward_macs:,} MACs, {m.nonzero_params:,} non-zero of {m.params:,} "
        "parameters, as planned."
    ]
    if done.deviation is not None:
        lines.append(f"Largest difference to the dense model's output: {done.deviation:.2g} of its largest value.")
    if any(done.unconnected):
        lines.append(
            f"{done.unconnected[0]:,} outputs have no weight, {done.unconnected[1]:,} inputs are read by nothing."
        )
    lines += done.notes
    if out is not None:
        lines.append(f"Written to {out}")
    return lines
