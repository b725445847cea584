"""`sparseift transform`: the signature and the order of work; the audit is shown by flops_view.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..plan.spec import InitSpec, TrainingSpec, TransformSpec
from . import options
from .options import Format, without_github

if TYPE_CHECKING:
    from torch import nn

    from ..models.request import Request
    from ..recipe.load import Recipe
    from ..runs.model import Trained
    from ..transforms.transformation import Transformation

HELP = """\
SOURCE is what `sparseift flops` takes, a checkpoint file, or a run that trained a dense model. OUT is a folder;
`sparseift_cli.load(OUT)` gives the module,
and `sparseift flops OUT` and `sparseift inspect OUT` read it.

Examples:

  sparseift transform resnet18 --sparsity 0.9 -o out/resnet18-wide90

  sparseift transform model.pth -s 0.75 --init preserve -o out/wide75   # the same function at the start

  sparseift transform torchvision:resnet50 -s 0.9 -t parallel -o out/parallel90

  sparseift transform hf:path/to/folder -s 0.5 --seq 128 -o out/llm     # a local Hugging Face folder

  sparseift transform gpt3_13b -s 0.5 --plan-only                       # no memory for weights
"""

_START = ("start", "slack", "weights", "masks", "connect")
_NEED_DATA = ("snip", "grasp", "force")


Model = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="The model of a checkpoint that the zoo does not recognise.",
        rich_help_panel=options.INPUT,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="OUT",
        help="Folder to write. Needed without --plan-only.",
        show_default=False,
        rich_help_panel=options.OUTPUT,
    ),
]

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@app.command(cls=options.Command, help=options.help_of("transform", HELP))
@options.takes(
    state_dict=options.Declared(InitSpec, only=("key",), panel=options.INPUT),
    spec=options.Declared(TransformSpec),
    start=options.Declared(InitSpec, only=_START),
)
def transform(
    source: Annotated[str, typer.Argument(help="As for flops, or a checkpoint file or run.", show_default=False)],
    *,
    model: Model = None,
    state_dict: dict[str, Any],
    num_classes: options.NumClasses = None,
    input_shape: options.Input = None,
    batch: options.Batch = 1,
    seq: options.Seq = None,
    spec: dict[str, Any],
    start: dict[str, Any],
    seed: Annotated[int, typer.Option(help="Seed of weights and masks.", rich_help_panel=options.OUTPUT)] = 0,
    output: Out = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a transformed model at OUT.", rich_help_panel=options.OUTPUT)
    ] = False,
    plan_only: Annotated[
        bool,
        typer.Option(
            "--plan-only",
            help="Plan, transform and count on the meta device; write no weights.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = False,
    export: Annotated[
        str | None,
        options.choice(
            names=("dense",),
            help="Also OUT/state_dict.pt, zeros stored, for any PyTorch code.",
            panel=options.OUTPUT,
        ),
    ] = None,
    of_run: Annotated[str | None, options.checkpoint_of_a_run(options.INPUT)] = None,
    trust: Annotated[bool, options.trust_of_a_folder(options.INPUT)] = False,
    fmt: options.FormatOption = Format.table,
    json: options.Json = False,
    summary: options.Summary = False,
    depth: options.Depth = None,
) -> None:
    from ..errors import UsageError
    from ..models.request import Request, parse_input

    fmt = without_github(fmt, json, "transform")
    run = _opened_run(source, of_run, trust=trust)
    init = InitSpec(**start, **state_dict)
    _require_output(output, init, force=force, plan_only=plan_only, export=export)
    checkpoint = source if run is None and _is_checkpoint_file(source) else None
    if checkpoint is None and (model or init.key):
        raise UsageError("--model and --key are for checkpoint files", hint=f"{source} is a model")
    request = Request(model or "" if checkpoint else source, num_classes, parse_input(input_shape), seq, batch)
    new, done = _convert(request, spec, start, init, checkpoint, seed, plan_only=plan_only, run=run)
    if output is not None:
        from ..api import save

        save(new, output, force=force, state_dict=export == "dense")
    _show(done, output, fmt, summary=summary, depth=depth)


def _require_output(out: Path | None, init: InitSpec, *, force: bool, plan_only: bool, export: str | None) -> None:
    """Raise UsageError where the options contradict each other, or OUT cannot be written."""
    from ..errors import UsageError, one_of
    from ..transforms.artifact import require_writable

    if init.masks in _NEED_DATA:
        raise UsageError(
            f"--masks {init.masks} reads training batches, which a recipe has",
            hint="sparseift train, or --masks magnitude",
        )
    one_of("--export", export or "dense", ("dense",))
    if out is None and not plan_only:
        raise UsageError(
            "no output folder is given", hint="-o FOLDER, or --plan-only to see the plan and write nothing"
        )
    if out is not None:
        require_writable(out, force=force)
    if export and plan_only:
        raise UsageError("--plan-only has no weights to export", hint="leave out one of the two")
    if init.start == "preserve" and plan_only:
        raise UsageError("--plan-only has no weights to preserve", hint="leave out one of the two")


def _convert(
    request: Request,
    spec: dict[str, Any],
    start: dict[str, Any],
    init: InitSpec,
    checkpoint: str | None,
    seed: int,
    *,
    plan_only: bool,
    run: Trained | None,
) -> tuple[nn.Module, Transformation]:
    """The transformed module; what the command line gives wins over the recipe."""
    from ..errors import UsageError
    from ..recipe.load import resolve_request

    recipe: Recipe | None = None
    if run is not None:
        known = run.request
        size = {"image": request.image or known.image, "seq": request.seq or known.seq, "batch": request.batch}
        request = replace(known, **size)
    elif request.source:
        request, recipe = resolve_request(request)
    given: dict[str, Any] = TransformSpec.overridden(recipe.transform if recipe else {}, spec)
    if "sparsity" not in given:
        raise UsageError("a transform needs its sparsity", hint="--sparsity 0.9")
    wanted = TransformSpec.of(given)

    from ..transforms.convert import convert  # imports torch: what is wrong above is found without it
    from ..transforms.transformation import Options

    return convert(
        request,
        wanted,
        checkpoint=checkpoint,
        key=init.key,
        dense=run.model if run and not plan_only else None,
        plan_only=plan_only,
        training=TrainingSpec(**recipe.training) if recipe else None,
        options=Options(
            start=start.get("start"),
            init=init.weights,
            scores="magnitude" if init.masks == "magnitude" else None,
            seed=seed,
            connect=init.connect,
            preserve_slack=init.slack,
        ),
    )


def _opened_run(source: str, checkpoint: str | None, *, trust: bool) -> Trained | None:
    """The trained dense module of a run; None of any other source.

    Raises:
        UsageError: `source` is no run and an option for runs is given, or its model was transformed.
    """
    from ..errors import UsageError
    from ..transforms.artifact import is_run

    if not is_run(source):
        if checkpoint is not None or trust:
            raise UsageError("--checkpoint and --trust are for runs", hint=f"{source} is none")
        return None
    from ..runs.model import load_dense

    return load_dense(source, checkpoint or "best", trust=trust)


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

    result = audit(done.plan)
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
