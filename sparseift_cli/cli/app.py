"""The `sparseift` command: one thin file per subcommand, every heavy import inside the function that needs it."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer

from ..errors import SparseiftError
from ..version import __version__
from . import flops, inspect, quick_help, recipe, report, train, transform

app = typer.Typer(
    name="sparseift",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Sparse Iso-FLOP Transformations: larger, sparse layers at the FLOPs of the dense ones, audited to the MAC.",
)
app.command("flops", help=flops.HELP)(flops.flops)
app.command("transform", help=transform.HELP)(transform.transform)
app.command("inspect", help=inspect.HELP)(inspect.inspect)
app.command("train", help=train.HELP)(train.train)
app.add_typer(report.app, name="report", help=report.HELP)
app.add_typer(recipe.app, name="recipe", help=recipe.HELP)

debugging = False


def _version(asked: bool) -> None:
    if asked:
        print(f"sparseift {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    global debugging
    debugging = debug


def main() -> None:
    """Entry point of the script: every error the user can act on is two lines on stderr and the right exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # LANG=C, or a file name that is no text: shown escaped, as on stderr
        sys.stdout.reconfigure(errors="backslashreplace")
    quick_help.prepare(sys.argv[1:])
    try:
        app()
    except SparseiftError as error:
        if debugging:
            raise
        print(f"sparseift: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  hint: {error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `sparseift flops ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
