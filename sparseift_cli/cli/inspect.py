"""`sparseift inspect`: a checkpoint by what it holds, a model by its layers, a run by how far it got."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from . import options
from .options import Format, without_github

HELP = """\
A checkpoint is opened by its header: nothing in it is executed, and tensor data is read only with --values or --spectral.
SOURCE is a file (.safetensors, *.index.json, .pt, .pth, .th, .bin), a model name, a recipe, package.module:callable, a
folder of `sparseift transform`, a run directory of `sparseift train`, or a run that `report keep` wrote.

Examples:

  sparseift inspect model.safetensors              # what is it, what fits?

  sparseift inspect model.pth --values             # zeros, NaN, patterns

  sparseift inspect model.pth --key ema            # another state dict in it

  sparseift inspect model.bin.index.json --depth 2 # shards, folded by module

  sparseift inspect resnet18 --why                 # what transforms touch

  sparseift inspect out/ --spectral                # do the masks connect?

  sparseift inspect runs/net/20260101T120000Z-0123abcd   # state, newest checkpoint, last metrics
"""

SUFFIXES = (".safetensors", ".pt", ".pth", ".th", ".bin", ".ckpt", ".pkl", ".index.json", ".json", ".h5", ".npz")
RECIPES = (".yaml", ".yml")

_CHECKPOINT = "For a checkpoint"
_MODEL = "For a model"


app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@app.command(cls=options.Command, help=options.help_of("inspect", HELP))
def inspect(
    source: Annotated[
        str, typer.Argument(help="A checkpoint file, model name, recipe, package.module:callable, or a folder of ours.")
    ],
    values: Annotated[
        bool,
        typer.Option("--values", help="Scan the values: zeros, NaN, inf, patterns.", rich_help_panel=_CHECKPOINT),
    ] = False,
    key: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Dotted path of the state dict in the file, as in 'ema'.", rich_help_panel=_CHECKPOINT
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Compare with this zoo model, name by name.", rich_help_panel=_CHECKPOINT),
    ] = None,
    spectral: Annotated[
        bool,
        typer.Option(
            "--spectral",
            help="Spectral and Ramanujan gaps of the masks: also of a transformed model's folder, a run directory, "
            "or one checkpoint of a run.",
            rich_help_panel=_CHECKPOINT,
        ),
    ] = False,
    every_checkpoint: Annotated[
        bool,
        typer.Option(
            "--every-checkpoint",
            help="With --spectral, of a run: all checkpoints it has kept.",
            rich_help_panel=_CHECKPOINT,
        ),
    ] = False,
    why: Annotated[
        bool,
        typer.Option("--why", help="What each transform would touch, and why not the rest.", rich_help_panel=_MODEL),
    ] = False,
    transform: Annotated[
        str | None,
        typer.Option("--transform", "-t", help="wide, parallel, factorized or doped.", rich_help_panel=_MODEL),
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option("--sparsity", "-s", metavar="S", help="Sparsity of the transform: 0.9.", rich_help_panel=_MODEL),
    ] = None,
    scope: Annotated[
        str | None, typer.Option(help="Widths that Sparse Wide grows: all or inner.", rich_help_panel=_MODEL)
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Only layers of these names.", rich_help_panel=_MODEL)
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="No layers of these names.", rich_help_panel=_MODEL)
    ] = None,
    input_: Annotated[
        str | None, typer.Option("--input", metavar="CxHxW", help="Input of one sample.", rich_help_panel=_MODEL)
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Samples per forward.", rich_help_panel=_MODEL)] = None,
    seq: Annotated[int | None, typer.Option(min=1, help="Tokens per sequence.", rich_help_panel=_MODEL)] = None,
    num_classes: Annotated[int | None, typer.Option(min=1, help="Size of the head.", rich_help_panel=_MODEL)] = None,
    depth: Annotated[int | None, typer.Option(min=1, help="Fold the table to this many name parts.")] = None,
    sort: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint: name, parameters, bytes, and with --values zeros, density. Default: file order."
        ),
    ] = None,
    fmt: options.FormatOption = Format.table,
    as_json: options.Json = False,
    output: options.Output = None,
) -> None:
    fmt = without_github(fmt, as_json, "inspect")
    of_model = {
        "--why": why,
        "--transform": transform,
        "--sparsity": sparsity,
        "--scope": scope,
        "--include": include,
        "--exclude": exclude,
        "--input": input_,
        "--batch": batch,
        "--seq": seq,
        "--num-classes": num_classes,
    }
    if spectral or every_checkpoint:
        _refuse({} if spectral else {"--every-checkpoint": True}, "masks are looked at by --spectral", "for it")
        _refuse(
            {**of_model, "--values": values, "--model": model, "--depth": depth, "--sort": sort},
            "--spectral looks at masks",
            "not for it",
        )
        from .inspect_spectral import inspect_spectral

        inspect_spectral(source, is_file=is_checkpoint(source), every=every_checkpoint, key=key, fmt=fmt, output=output)
        return
    from ..report.read import is_kept_file
    from ..transforms.artifact import is_artifact, is_run, open_artifact

    if is_run(source) or is_kept_file(Path(source)):
        _refuse(
            {**of_model, "--values": values, "--key": key, "--model": model, "--depth": depth, "--sort": sort},
            f"{source} is a run",
            "not for it",
        )
        from .inspect_run import inspect_run

        inspect_run(source, fmt, output)
        return
    transformed = open_artifact(source) if is_artifact(source) else None
    if transformed is not None:
        if not transformed.weights.is_file():
            raise UsageError(
                f"{source} holds a plan without weights (--plan-only)",
                hint=f"sparseift flops {source} shows what every layer costs",
            )
        source = str(transformed.weights)
    if is_checkpoint(source):
        _refuse(of_model, f"{source} is a checkpoint", "for models")
        from .inspect_checkpoint import inspect_checkpoint

        inspect_checkpoint(
            source,
            values=values,
            key=key,
            model=model,
            depth=depth,
            sort=sort,
            fmt=fmt,
            output=output,
            transformed=transformed,
        )
        return
    _refuse({"--values": values, "--key": key, "--model": model}, f"{source} is a model", "for checkpoint files")
    from .inspect_model import inspect_model

    inspect_model(
        source,
        why=why,
        transform=transform,
        sparsity=sparsity,
        scope=scope,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        input_=input_,
        batch=batch or 1,
        seq=seq,
        num_classes=num_classes,
        depth=depth,
        sort=sort,
        fmt=fmt,
        output=output,
    )


def is_checkpoint(source: str) -> bool:
    """Is `source` a checkpoint file rather than a model? A model name wins over a folder of the same name."""
    if source.lower().endswith(RECIPES):
        return False
    path = Path(source)
    if _exists(path):
        return "/" in source or not path.is_dir() or not _is_zoo_name(source)
    if source.lower().endswith(SUFFIXES):
        return True
    from ..recipe.load import find

    return ("/" in source or "\\" in source) and ":" not in source and find(source) is None


def _exists(path: Path) -> bool:
    try:
        return path.exists() or path.is_symlink()
    except (OSError, ValueError):  # a name too long, or with a NUL in it
        return False


def _is_zoo_name(source: str) -> bool:
    """Is there a layer table of that name? Dashes and underscores are the same."""
    from ..checkpoint.recognise import table_names

    return source.lower().replace("-", "_") in table_names()


def _refuse(given_options: Mapping[str, object], what: str, kind: str) -> None:
    given = [name for name, value in given_options.items() if value]
    if given:
        verb = "is" if len(given) == 1 else "are"
        raise UsageError(f"{what}; {', '.join(given)} {verb} {kind}", hint="see `sparseift inspect --help`")
