"""`sparseift flops`: the signature and the order of work; the tables are in flops_view.py, the gates in gates.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .formats import Format

if TYPE_CHECKING:
    from ..models.source import Request
    from ..plan.audit import Audit
    from ..plan.spec import TrainingSpec, TransformSpec
    from ..table.table import LayerTable
    from ..trace.verify import Verification
    from .gates import Problem

HELP = """Count a model's FLOPs exactly, dense and transformed, layer by layer.

Examples:

  sparseift flops resnet18 --sparsity 0.9

  sparseift flops gpt3-small --sparsity 0.5,0.75,0.9 --match model

  sparseift flops my_package.models:make_net --input 3x32x32 --sparsity 0.75 --transform parallel

  sparseift flops resnet18 -s 0.9 --match model --max-flops-ratio 1.0 --summary      # exit 1 above the budget
"""


@options.taking_spec
def flops(
    source: options.Source,
    transform: options.Transform = None,
    sparsity: options.Sparsity = None,
    algorithm: Annotated[
        str | None,
        typer.Option(help="Training FLOPs of: dense, static, set, snfs, rigl, gmp, granet.", show_default="static"),
    ] = None,
    delta_t: Annotated[int | None, typer.Option(help="Steps between mask updates.", show_default="100")] = None,
    stop: Annotated[
        str | None, typer.Option(help="Part of the run after which masks stay.", show_default="0.75")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the run; without it its long-run mean.")] = None,
    recompute: Annotated[bool, typer.Option(help="Activation checkpointing: a second forward of every block.")] = False,
    causal: Annotated[str, typer.Option(help="Causal attention counted full, half or exact.")] = "full",
    num_classes: options.NumClasses = None,
    input_shape: options.Input = None,
    batch: options.Batch = 1,
    seq: options.Seq = None,
    depth: Annotated[int | None, typer.Option(help="Fold rows into modules N names deep.")] = None,
    sort: Annotated[str | None, typer.Option(help="Sort rows: name, dense_macs, transformed_macs, ratio, nnz.")] = None,
    summary: Annotated[bool, typer.Option("--summary", help="Totals only.")] = False,
    max_flops_ratio: Annotated[float | None, typer.Option(help="Exit 1 if the whole model exceeds this ratio.")] = None,
    max_layer_ratio: Annotated[
        float | None, typer.Option(help="Exit 1 if a transformed row exceeds this ratio.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Count again with FlopCounterMode and fvcore.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 if an op could not be counted.")] = False,
    fmt: options.FormatOption = Format.table,
    json: options.Json = False,
    output: options.Output = None,
    *,
    spec: dict[str, Any],
) -> None:
    from ..errors import UsageError
    from ..models.request import Request, parse_input
    from ..models.source import load_table, resolve
    from ..plan.audit import audit
    from ..transforms.artifact import is_artifact
    from . import gates

    fmt = Format.json if json else fmt
    asked = Request(source, num_classes, parse_input(input_shape), seq, batch)
    counted = {"algorithm": algorithm, "delta_t": delta_t, "stop": stop, "steps": steps, "recompute": recompute or None}
    if is_artifact(source):
        fixed = bool(spec or transform) or sparsity is not None or not asked.default
        result = _stored(source, counted, causal, fixed=fixed, verify=verify)
        problems = gates.check(result, max_flops_ratio, max_layer_ratio, strict=strict)
        _tell(result, problems, fmt, output, depth=depth, sort=sort, summary=summary)
        return
    request, recipe = resolve(asked)
    given: dict[str, Any] = (dict(recipe.transform) if recipe else {}) | spec
    if transform:
        given["member"] = transform
    sparsities = (
        [s.strip() for s in sparsity.split(",")]
        if sparsity is not None
        else [given["sparsity"]]
        if "sparsity" in given
        else []
    )
    if given and not sparsities:
        raise UsageError(
            "a transform needs its sparsity", hint="add --sparsity 0.9, or a list: --sparsity 0.5,0.75,0.9"
        )
    specs = [_spec(given | {"sparsity": s}) for s in sparsities]
    training = _training(recipe.training if recipe else {}, counted)
    table = load_table(request)
    if len(specs) > 1:
        if verify:
            raise UsageError("--verify counts the dense model again, once", hint="leave out --sparsity, or give one")
        _compare(table, specs, training, causal, fmt, output, max_flops_ratio, max_layer_ratio, strict=strict)
        return
    result = audit(table, specs[0] if specs else None, training, causal=causal)
    verification = _verify(request, table) if verify else None
    problems = gates.check(result, max_flops_ratio, max_layer_ratio, strict=strict)
    if verification is not None and not verification.agree:
        problems.append(gates.Problem(None, verification.verdict))
    _tell(result, problems, fmt, output, depth=depth, sort=sort, summary=summary, verification=verification)


def _tell(result: Audit, problems: list[Problem], fmt: Format, output: Any, **view: Any) -> None:
    """Show an audit, then let the gates speak."""
    from . import flops_view, gates
    from .output import patient

    with patient():  # a gate has its say even where nobody reads on
        if fmt is Format.github:
            gates.annotate([result], problems, output)
        else:
            flops_view.show(result, fmt, output, **view)
    gates.stop_on(problems, told=fmt is Format.github)


def _stored(source: str, counted: dict[str, Any], causal: str, *, fixed: bool, verify: bool) -> Audit:
    """What a folder of `sparseift transform` costs: its plan is made, so it can only be counted and shown otherwise."""
    from ..errors import UsageError
    from ..transforms.artifact import open_artifact

    if fixed:
        raise UsageError(f"{source} is a transformed model; its plan is fixed", hint="transform its source again")
    if verify:
        raise UsageError("--verify counts a dense model again", hint=f"the source that {source} was made from")
    stored = open_artifact(source)
    return stored.audit(_training(asdict(stored.training), counted), causal)


def _spec(given: dict[str, Any]) -> TransformSpec:
    from ..plan.spec import TransformSpec, member_named

    return TransformSpec.of(given | {"member": member_named(given.get("member", "wide"))})


def _training(recipe: dict[str, Any], given: dict[str, Any]) -> TrainingSpec:
    from ..plan.spec import TrainingSpec

    return TrainingSpec(**(recipe | {k: v for k, v in given.items() if v is not None}))


def _compare(
    table: LayerTable,
    specs: list[TransformSpec],
    training: TrainingSpec,
    causal: str,
    fmt: Format,
    output: Any,
    max_flops_ratio: float | None,
    max_layer_ratio: float | None,
    *,
    strict: bool,
) -> None:
    """One line per sparsity; a sparsity that cannot be matched says so in its line, and the command exits 1."""
    from ..errors import CheckFailed
    from ..plan.audit import audit
    from . import flops_view, gates
    from .output import patient

    results: list[tuple[str, Audit | CheckFailed]] = []
    problems: list[gates.Problem] = []
    for spec in specs:
        try:
            result = audit(table, spec, training, causal=causal)
            problems += gates.check(result, max_flops_ratio, max_layer_ratio, prefix=f"sparsity {spec.sparsity}: ")
            results.append((spec.sparsity, result))
        except CheckFailed as error:
            problems.append(gates.Problem(None, error.message))
            results.append((spec.sparsity, error))
    problems += gates.uncounted(table) if strict else []
    with patient():
        if fmt is Format.github:
            gates.annotate([r for _, r in results if not isinstance(r, CheckFailed)], problems, output)
        else:
            flops_view.compare(table, results, training, causal, fmt, output)
    gates.stop_on(problems, told=fmt is Format.github)


def _verify(request: Request, table: LayerTable) -> Verification:
    """The dense model, counted again by FlopCounterMode and fvcore."""
    from ..models.source import build
    from ..trace.verify import verify

    def build_on(device: str) -> tuple[Any, tuple[Any, ...], Mapping[str, Any]]:
        built = build(request, device=device)
        return built.model, built.args, built.kwargs

    return verify(build_on, table)
