"""`sparseift export`: a run, or a folder of `sparseift transform`, as a model that other programs load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .options import Format, without_github

if TYPE_CHECKING:
    from ..transforms.export import Exported

HELP = """\
Weights are dense, with their zeros. hf is a folder that from_pretrained of transformers loads: it is loaded and compared before
anything is at OUT, and what the configuration of the class cannot say is refused. state_dict and safetensors are files
for load_state_dict; onnx is run by onnxruntime, where that is installed. A folder that sparseift itself reads is written by
`sparseift transform`, or in Python by save(load(RUN), OUT).

Examples:

  sparseift export runs/net/20260101T120000Z-0123abcd --to safetensors -o net.safetensors

  sparseift export runs/llm/20260101T120000Z-0123abcd --to hf -o out/llm    # the best checkpoint

  sparseift export runs/net/20260101T120000Z-0123abcd --checkpoint last --to onnx -o net.onnx

  sparseift export out/wide75 --to state_dict -o wide75.pt                  # what sparseift transform wrote
"""
SCHEMA = "sparseift.export/1"
NAMES = ("hf", "state_dict", "safetensors", "onnx")

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@app.command(cls=options.Command, help=options.help_of("export", HELP))
def export(
    source: Annotated[
        str,
        typer.Argument(metavar="RUN|FOLDER", help="A run, or a folder of sparseift transform.", show_default=False),
    ],
    *,
    to: Annotated[str, options.choice("--to", names=NAMES, help="What is written.", panel=options.OUTPUT)],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="OUT", help="Folder (hf) or file.", rich_help_panel=options.OUTPUT),
    ],
    force: Annotated[
        bool, typer.Option("--force", help="Replace what an export wrote at OUT.", rich_help_panel=options.OUTPUT)
    ] = False,
    checkpoint: Annotated[str | None, options.checkpoint_of_a_run(options.INPUT)] = None,
    trust: Annotated[bool, options.trust_of_a_folder(options.INPUT)] = False,
    fmt: options.FormatOption = Format.table,
    json: options.Json = False,
) -> None:
    from ..errors import UsageError, one_of
    from ..transforms.artifact import is_run

    fmt = without_github(fmt, json, "export")
    one_of("--to", to, NAMES)
    if checkpoint is not None and not is_run(source):
        raise UsageError(f"{source} is no run, so it has no checkpoints", hint="leave out --checkpoint")
    from .. import api

    done = api.export(source, output, to, checkpoint=checkpoint or "best", trust=trust, force=force)
    _show(source, done, fmt)


def _show(source: str, done: Exported, fmt: Format) -> None:
    from ..base.sheets import Column, Sheet
    from .output import render

    size = sum(done.files.values())
    facts: dict[str, Any] = {
        "step": done.step,
        "parameters": done.parameters,
        "nonzeros": done.nonzeros,
        "bytes": size,
        "difference": done.difference,
    }
    payload = {"schema": SCHEMA, "source": source, "path": str(done.path), "to": done.to}
    payload |= {**facts, "files": dict(done.files), "notes": list(done.notes)}
    names = {
        "step": "checkpoint of step",
        "nonzeros": "of these not zero",
        "difference": "largest difference of an output",
    }
    rows = [{"fact": names.get(k, k), "value": v} for k, v in facts.items() if v is not None]
    columns = [
        Column("fact", "fact"),
        Column("value", "value", lambda v: f"{v:,}" if isinstance(v, int) else f"{v:.2g}", right=True),
    ]
    render([Sheet(f"{source} as {done.to}", columns, rows)], payload, fmt)
    for note in done.notes:
        typer.echo(note, err=True)
    typer.echo(f"Written to {done.path}", err=True)
