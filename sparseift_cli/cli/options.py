"""Options that several commands share, each defined once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .formats import Format

Source = Annotated[
    str, typer.Argument(help="A zoo model (resnet18), a recipe (x.yaml) or pkg.module:callable.", show_default=False)
]
Transform = Annotated[
    str | None, typer.Option("--transform", "-t", help="wide, parallel, factorized or doped.", show_default="wide")
]
Sparsity = Annotated[
    str | None,
    typer.Option("--sparsity", "-s", help="0.9, or a list to compare: 0.5,0.75,0.9. Without it: the dense model."),
]
Scope = Annotated[str | None, typer.Option(help="all widths, or inner ones only (Sparse Wide).", show_default="all")]
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
