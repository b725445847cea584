"""The `sparseift` command: one thin file per subcommand, every heavy import inside the function that needs it."""

from __future__ import annotations

import faulthandler
import io
import os
import sys
from contextlib import suppress
from typing import Annotated, NoReturn, TextIO

import typer

from ..errors import SparseiftError, UsageError
from ..version import __version__
from . import flops, inspect, quick_help, recipe, report, train, transform
from .options import Command

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
app.command("transform", help=transform.HELP, cls=Command)(transform.transform)
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
    _open_streams()
    if not faulthandler.is_enabled():
        with suppress(OSError, ValueError):  # a stderr that is no file: nobody can be told
            faulthandler.enable()  # a crash in a library's native code says where, in place of an exit code alone
    if isinstance(sys.stdout, io.TextIOWrapper):  # LANG=C, or a file name that is no text: shown escaped, as on stderr
        sys.stdout.reconfigure(errors="backslashreplace")
    quick_help.prepare(sys.argv[1:])
    try:
        _run()
    except SparseiftError as error:
        if debugging:
            raise
        _complain(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `sparseift flops ... | head`: the reader has seen enough
        _hush(sys.stdout)
        sys.exit(0)
    except OSError as error:
        if debugging or error.filename is not None:  # what fails on a stream that is open already names no file
            raise
        _hush(sys.stdout)
        _complain(UsageError(f"cannot write the result: {error.strerror or error}", hint="is there space?"))


def _run() -> None:
    try:
        app()
    except SystemExit as done:
        if not done.code:
            sys.stdout.flush()  # at the interpreter's end it would be too late to say that it failed
        raise


def _complain(error: SparseiftError) -> NoReturn:
    with suppress(OSError):  # the exit code says it to scripts where stderr cannot
        print(f"sparseift: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  hint: {error.hint}", file=sys.stderr)
    sys.exit(error.exit_code)


def _open_streams() -> None:
    """A stream that was closed (`>&-`) is None, and what is printed to a stderr of None lands on stdout."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115


def _hush(stream: TextIO) -> None:
    """What it still holds goes nowhere, or the interpreter would fail on it once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
