"""`sparseift report keep`: finished runs without their checkpoints, one small file each, fit to be committed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .options import Format, without_github

SCHEMA = "sparseift.report-keep/1"
HELP = """Keep finished runs: recipe, metrics, summary, audit and provenance in one file each, without checkpoints.

The files are FOLDER/<recipe>/<run>.json, and `sparseift report FOLDER` reads them. Of absolute paths only the last part is
kept, so that no home folder or machine is named. Keeping a run twice changes nothing. If a run is not finished, it is named
and nothing is kept. Folders of kept runs that older versions wrote are read too; kept again in place, they become files.

Examples:

  sparseift report keep runs/ -o kept/

  sparseift report keep runs/resnet18_cifar100_* -o recipes/resnet18_cifar100/results
"""


def keep(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH", help="Run directories, or folders that hold some at any depth.", show_default=False
        ),
    ],
    folder: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where to keep them.")],
    fmt: options.FormatOption = Format.table,
    json: options.Json = False,
) -> None:
    fmt = without_github(fmt, json, "report keep")
    from ..report.keep import keep as keep_runs
    from .output import Column, Sheet, integer, render

    kept = keep_runs(paths, folder)
    rows = [{"run": str(k.run.path), "kept": str(k.path), "bytes": k.bytes, "state": k.state} for k in kept]
    columns = [
        Column("run", "run", priority=1),
        Column("kept", "kept as", lambda path: str(Path(path).relative_to(folder))),
        Column("bytes", "bytes", integer, right=True),
        Column("state", "state"),
    ]
    title = f"{len(kept)} {'run' if len(kept) == 1 else 'runs'} kept in {folder}: {sum(k.bytes for k in kept):,} bytes"
    render([Sheet(title, columns, rows)], {"schema": SCHEMA, "runs": rows}, fmt)
