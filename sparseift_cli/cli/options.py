"""Options that several commands share, each defined once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .formats import Format

Source = Annotated[
    str,
    typer.Argument(
        help="A zoo model (resnet18), recipe, torchvision:NAME, timm:NAME, hf:FOLDER or pkg.module:callable.",
        show_default=False,
    ),
]
Transform = Annotated[
    str | None, typer.Option("--transform", "-t", help="wide, parallel, factorized or doped.", show_default="wide")
]
Sparsity = Annotated[
    str | None,
    typer.Option("--sparsity", "-s", help="0.9, or a list to compare: 0.5,0.75,0.9. Without it: the dense model."),
]
Scope = Annotated[
    str | None,
    typer.Option(
        help="Sparse Wide: all widths, inner ones only, or none: sparse at the dense widths, a control (--match off).",
        show_default="all",
    ),
]
Include = Annotated[list[str] | None, typer.Option(help="Transform only layers that match this glob. Repeatable.")]
Exclude = Annotated[list[str] | None, typer.Option(help="Leave layers that match this glob as they are. Repeatable.")]
NumClasses = Annotated[int | None, typer.Option(help="Classes of an image model.")]
Input = Annotated[str | None, typer.Option("--input", help="One sample's shape: 3x224x224.")]
Batch = Annotated[int, typer.Option(help="Samples in the input.")]
Seq = Annotated[int | None, typer.Option(help="Tokens in the input of a language model.")]
FormatOption = Annotated[Format, typer.Option("--format", "-f", help="How to print the result.")]
Json = Annotated[bool, typer.Option("--json", help="Short for --format json.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Write to this file instead of stdout.", show_default=False)
]

Match = Annotated[str | None, typer.Option(help="Hold iso-FLOP: layer, model, train, or off.", show_default="layer")]
WidthMultiple = Annotated[int | None, typer.Option(help="Round widths to this multiple.", show_default="1")]
BaseWidth = Annotated[int | None, typer.Option(help="New width of the stem; all others keep their proportion.")]
Heads = Annotated[str | None, typer.Option(help="scale_dim or scale_count.", show_default="scale_dim")]
Depthwise = Annotated[str | None, typer.Option(help="Depthwise convs stay dense, or sparse.", show_default="dense")]
BranchActivation = Annotated[
    str | None,
    typer.Option(help="Parallel: norm and activation in each branch, or after the sum.", show_default="each"),
]
Inner = Annotated[
    str | None, typer.Option(help="Factorized: activation, norm or linear between U and V.", show_default="activation")
]
Norm = Annotated[
    str | None, typer.Option(help="Inside a member: the model's, batch_norm or none.", show_default="model")
]
Activation = Annotated[
    str | None, typer.Option(help="Inside a member: the model's, none, relu, gelu, silu, ...", show_default="model")
]
Projections = Annotated[
    str | None,
    typer.Option(help="Attention projections under local members: untouched, transformed.", show_default="untouched"),
]
Pattern = Annotated[
    str | None, typer.Option(help="unstructured, N:M (2:4) or blocks (4x4).", show_default="unstructured")
]
Distribution = Annotated[str | None, typer.Option(help="uniform, er or erk.", show_default="uniform")]

SPEC: dict[str, Any] = {
    "match": Match,
    "scope": Scope,
    "include": Include,
    "exclude": Exclude,
    "width_multiple": WidthMultiple,
    "base_width": BaseWidth,
    "heads": Heads,
    "depthwise": Depthwise,
    "branch_activation": BranchActivation,
    "inner": Inner,
    "norm": Norm,
    "activation": Activation,
    "projections": Projections,
    "pattern": Pattern,
    "distribution": Distribution,
}
"""The options that say how to transform, beside --transform and --sparsity, by their field of TransformSpec."""


def taking_spec(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command every option of SPEC; it takes them as one dict `spec`, of those that were given."""
    own = inspect.signature(command, eval_str=True)
    before = [p for p in own.parameters.values() if p.name != "spec"]
    shared = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=a) for n, a in SPEC.items()]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        spec = {name: given.pop(name) for name in SPEC}
        spec = {k: tuple(v) if isinstance(v, list) else v for k, v in spec.items() if v is not None and v != []}
        command(**given, spec=spec)

    at = next((i for i, p in enumerate(before) if p.name == "algorithm"), len(before))
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*before[:at], *shared, *before[at:])]
    run.__dict__["__signature__"] = own.replace(parameters=parameters)
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run
