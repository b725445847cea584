"""`sparseift inspect`: a checkpoint by what it holds, a model by its layers, a run by how far it got."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..base.options import options_of
from ..errors import UsageError
from ..plan.spec import InitSpec, TransformSpec
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
_EXPLAINED = ("member", "sparsity", "scope", "include", "exclude")

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@app.command(cls=options.Command, help=options.help_of("inspect", HELP))
@options.takes(
    state_dict=options.Declared(InitSpec, only=("key",), panel=_CHECKPOINT),
    spec=options.Declared(
        TransformSpec, only=_EXPLAINED, panel=_MODEL, help={"sparsity": "Share of zeros to explain: 0.9."}
    ),
)
def inspect(
    source: Annotated[
        str, typer.Argument(help="A checkpoint file, model name, recipe, package.module:callable, or a folder of ours.")
    ],
    *,
    values: Annotated[
        bool, typer.Option("--values", help="Scan the values: zeros, NaN, inf, patterns.", rich_help_panel=_CHECKPOINT)
    ] = False,
    state_dict: dict[str, Any],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Compare with this zoo model: names and shapes of the tensors.",
            rich_help_panel=_CHECKPOINT,
        ),
    ] = None,
    spectral: Annotated[
        bool,
        typer.Option(
            "--spectral",
            help="Spectral and Ramanujan gaps of the masks, also of a transformed model's folder or a run.",
            rich_help_panel=_CHECKPOINT,
        ),
    ] = False,
    every_checkpoint: Annotated[
        bool,
        typer.Option("--every-checkpoint", help="With --spectral: all kept checkpoints.", rich_help_panel=_CHECKPOINT),
    ] = False,
    why: Annotated[
        bool,
        typer.Option("--why", help="What each transform would change, and why not the rest.", rich_help_panel=_MODEL),
    ] = False,
    spec: dict[str, Any],
    num_classes: options.NumClasses = None,
    input_: options.Input = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Samples in the input.", rich_help_panel=options.INPUT)
    ] = None,
    seq: options.Seq = None,
    fmt: options.FormatOption = Format.table,
    as_json: options.Json = False,
    output: options.Output = None,
    depth: options.Depth = None,
    sort: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="Sort rows. Checkpoint: name, parameters, bytes, zeros or density.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
) -> None:
    fmt = without_github(fmt, as_json, "inspect")
    size = {"--input": input_, "--batch": batch, "--seq": seq, "--num-classes": num_classes}
    asked = InspectArguments(
        values, state_dict.get("key"), model, spectral, every_checkpoint, why, spec, size, depth, sort
    )
    _inspect(source, asked, fmt, output)


@dataclass(frozen=True, slots=True)
class InspectArguments:
    """What the command line asks of a source, apart from the format. Most options are for one kind of source."""

    values: bool
    key: str | None
    model: str | None
    spectral: bool
    every_checkpoint: bool
    why: bool
    spec: Mapping[str, Any]
    size: Mapping[str, Any]
    """Options of the model's input, by their flags."""
    depth: int | None
    sort: str | None

    def of_models(self) -> dict[str, object]:
        flags = {name: declared.flags[0] for name, declared in options_of(TransformSpec).items()}
        return {"--why": self.why, **{flags[name]: value for name, value in self.spec.items()}, **self.size}

    def of_checkpoints(self) -> dict[str, object]:
        return {"--values": self.values, "--key": self.key, "--model": self.model}

    def of_rows(self) -> dict[str, object]:
        return {"--depth": self.depth, "--sort": self.sort}


def _inspect(source: str, asked: InspectArguments, fmt: Format, output: Path | None) -> None:
    """Find out what `source` is, refuse the options that are not for it, and show it."""
    from ..report.read import is_kept_file
    from ..transforms.artifact import is_artifact, is_run, open_artifact

    if asked.spectral or asked.every_checkpoint:
        _spectral(source, asked, fmt, output)
        return
    if is_run(source) or is_kept_file(Path(source)):
        _refuse(asked.of_models() | asked.of_checkpoints() | asked.of_rows(), f"{source} is a run", "not for it")
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
        _refuse(asked.of_models(), f"{source} is a checkpoint", "for models")
        from .inspect_checkpoint import inspect_checkpoint

        inspect_checkpoint(
            source,
            values=asked.values,
            key=asked.key,
            model=asked.model,
            depth=asked.depth,
            sort=asked.sort,
            fmt=fmt,
            output=output,
            transformed=transformed,
        )
        return
    _refuse(asked.of_checkpoints(), f"{source} is a model", "for checkpoint files")
    from ..models.request import Request, parse_input
    from .inspect_model import inspect_model

    size = asked.size
    request = Request(source, size["--num-classes"], parse_input(size["--input"]), size["--seq"], size["--batch"] or 1)
    inspect_model(request, why=asked.why, spec=asked.spec, depth=asked.depth, sort=asked.sort, fmt=fmt, output=output)


def _spectral(source: str, asked: InspectArguments, fmt: Format, output: Path | None) -> None:
    """The masks of a checkpoint, a folder of ours or a run."""
    _refuse({} if asked.spectral else {"--every-checkpoint": True}, "masks are read with --spectral", "for it")
    others = {**asked.of_models(), "--values": asked.values, "--model": asked.model, **asked.of_rows()}
    _refuse(others, "--spectral reads masks", "not for it")
    from .inspect_spectral import inspect_spectral

    inspect_spectral(
        source, is_file=is_checkpoint(source), every=asked.every_checkpoint, key=asked.key, fmt=fmt, output=output
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
