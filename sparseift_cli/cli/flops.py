"""`sparseift flops`: the signature and the order of work; the tables are in flops_view.py, the gates in gates.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..plan.spec import TrainingSpec, TransformSpec
from . import options
from .options import Format

if TYPE_CHECKING:
    from ..models.request import Request
    from ..plan.audit import Audit
    from ..table.table import LayerTable
    from ..trace.verify import Verification
    from .gates import Limits, Problem

HELP = """\
Examples:

  sparseift flops resnet18 --sparsity 0.9

  sparseift flops gpt3_small --sparsity 0.5,0.75,0.9 --match model

  sparseift flops my_package.models:make_net --input 3x32x32 --sparsity 0.75 --transform parallel

  sparseift flops resnet18 -s 0.9 --match model --max-flops-ratio 1.0 --summary      # exit 1 above the budget
"""

_SPARSITY = "Share of zeros: 0.9, or a list to compare: 0.5,0.75,0.9. Without it: the dense model."
_TRAINING = "Training FLOPs"


@dataclass(frozen=True, slots=True)
class OutputChoices:
    """How the result is shown and where it goes."""

    fmt: Format
    output: Path | None
    depth: int | None
    sort: str | None
    summary: bool


app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@app.command(cls=options.Command, help=options.help_of("flops", HELP))
@options.takes(
    spec=options.Declared(TransformSpec, help={"sparsity": _SPARSITY}), training=options.Declared(TrainingSpec)
)
def flops(
    source: options.Source,
    *,
    num_classes: options.NumClasses = None,
    input_shape: options.Input = None,
    batch: options.Batch = 1,
    seq: options.Seq = None,
    spec: dict[str, Any],
    training: dict[str, Any],
    causal: Annotated[
        str, options.choice(names=("full", "half", "exact"), help="How causal attention counts.", panel=_TRAINING)
    ] = "full",
    max_flops_ratio: Annotated[
        float | None,
        typer.Option(help="Exit 1 if the model costs more than this ratio to dense.", rich_help_panel=options.GATES),
    ] = None,
    max_layer_ratio: Annotated[
        float | None,
        typer.Option(help="Exit 1 if a transformed layer exceeds this ratio.", rich_help_panel=options.GATES),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Exit 1 if an operation could not be counted, or a body layer grows untransformed.",
            rich_help_panel=options.GATES,
        ),
    ] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Count again with FlopCounterMode and fvcore.", rich_help_panel=options.GATES),
    ] = False,
    fmt: options.FormatOption = Format.table,
    json: options.Json = False,
    output: options.Output = None,
    summary: options.Summary = False,
    depth: options.Depth = None,
    sort: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="Sort rows by name, dense_macs, transformed_macs, ratio or nnz.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
) -> None:
    from ..models.request import Request, parse_input
    from ..transforms.artifact import is_artifact
    from .gates import Limits

    view = OutputChoices(Format.json if json else fmt, output, depth, sort, summary)
    limits = Limits(max_flops_ratio, max_layer_ratio, strict)
    request = Request(source, num_classes, parse_input(input_shape), seq, batch)
    if is_artifact(source):
        fixed = bool(spec) or not request.default
        result = _stored(source, training, causal, fixed=fixed, verify=verify)
        _show(result, limits.check(result), view)
    else:
        _count(request, spec, training, causal, limits, view, verify=verify)


def _count(
    request: Request,
    spec: dict[str, Any],
    training: dict[str, Any],
    causal: str,
    limits: Limits,
    view: OutputChoices,
    *,
    verify: bool,
) -> None:
    """A model or recipe: dense, at one sparsity, or at several to compare."""
    from ..errors import UsageError
    from ..models.source import load_table
    from ..plan.audit import audit
    from ..plan.plan import make_plan
    from ..recipe.load import resolve_request
    from .gates import Problem

    request, recipe = resolve_request(request)
    given: dict[str, Any] = TransformSpec.overridden(recipe.transform if recipe else {}, spec)
    sparsities = [s.strip() for s in given["sparsity"].split(",")] if "sparsity" in given else []
    if given and not sparsities:
        raise UsageError(
            "a transform needs its sparsity", hint="add --sparsity 0.9, or a list: --sparsity 0.5,0.75,0.9"
        )
    specs = [_spec(given | {"sparsity": s}) for s in sparsities]
    counted = TrainingSpec(**((recipe.training if recipe else {}) | training))
    table = load_table(request)
    if len(specs) > 1:
        if verify:
            raise UsageError("--verify counts the dense model again, once", hint="leave out --sparsity, or give one")
        _compare(table, specs, counted, causal, limits, view)
        return
    planned = make_plan(table, specs[0], counted, causal=causal) if specs else table
    result = audit(planned, counted, causal=causal)
    verification = _verify(request, table) if verify else None
    problems = limits.check(result)
    if verification is not None and not verification.agree:
        problems.append(Problem(None, verification.verdict))
    _show(result, problems, view, verification)


def _show(
    result: Audit, problems: list[Problem], view: OutputChoices, verification: Verification | None = None
) -> None:
    """Show an audit, then exit 1 where a gate has a problem, also where the reader of stdout has gone (`| head`)."""
    from . import flops_view, gates
    from .output import ignore_broken_pipe

    with ignore_broken_pipe():
        if view.fmt is Format.github:
            gates.annotate([result], problems, view.output)
        else:
            flops_view.show(
                result,
                view.fmt,
                view.output,
                depth=view.depth,
                sort=view.sort,
                summary=view.summary,
                verification=verification,
            )
    gates.stop_on(problems, printed=view.fmt is Format.github)


def _stored(source: str, training: dict[str, Any], causal: str, *, fixed: bool, verify: bool) -> Audit:
    """What a folder of `sparseift transform` costs. Its plan is fixed; how its training is counted is not."""
    from ..errors import UsageError
    from ..transforms.artifact import open_artifact

    if fixed:
        raise UsageError(f"{source} is a transformed model; its plan is fixed", hint="transform its source again")
    if verify:
        raise UsageError("--verify counts a dense model again", hint=f"the source that {source} was made from")
    stored = open_artifact(source)
    return stored.audit(TrainingSpec(**(asdict(stored.training) | training)), causal)


def _spec(given: dict[str, Any]) -> TransformSpec:
    return TransformSpec.of(given)


def _compare(
    table: LayerTable,
    specs: list[TransformSpec],
    training: TrainingSpec,
    causal: str,
    limits: Limits,
    view: OutputChoices,
) -> None:
    """One line per sparsity; where a sparsity cannot be matched its line has the reason, and the command exits 1."""
    from ..errors import CheckFailed
    from ..plan.audit import audit
    from ..plan.plan import make_plan
    from . import flops_view, gates
    from .output import ignore_broken_pipe

    results: list[tuple[str, Audit | CheckFailed]] = []
    problems: list[Problem] = []
    for spec in specs:
        try:
            result = audit(make_plan(table, spec, training, causal=causal))
            problems += limits.check_ratios(result, prefix=f"sparsity {spec.sparsity}: ")
            results.append((spec.sparsity, result))
        except CheckFailed as error:
            problems.append(gates.Problem(None, error.message))
            results.append((spec.sparsity, error))
    problems += limits.check_counted(table)
    with ignore_broken_pipe():
        if view.fmt is Format.github:
            gates.annotate([r for _, r in results if not isinstance(r, CheckFailed)], problems, view.output)
        else:
            flops_view.compare(table, results, training, causal, view.fmt, view.output)
    gates.stop_on(problems, printed=view.fmt is Format.github)


def _verify(request: Request, table: LayerTable) -> Verification:
    """The dense model, counted again by FlopCounterMode and fvcore."""
    from ..models.source import build
    from ..trace.verify import verify

    def build_on(device: str) -> tuple[Any, tuple[Any, ...], Mapping[str, Any]]:
        built = build(request, device=device)
        return built.model, built.args, built.kwargs

    return verify(build_on, table)
