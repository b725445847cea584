"""The `sparseift` command. Its subcommands have a file each, which is imported when the command runs."""

from __future__ import annotations

import faulthandler
import io
import os
import sys
from contextlib import suppress
from importlib import import_module
from types import ModuleType
from typing import Annotated, Any, NoReturn, TextIO

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from ..errors import SparseiftError, UsageError
from ..version import __version__
from .options import SUMMARIES


class Commands(TyperGroup):
    """The subcommands by name and summary; one is built, with its options, when it runs or its help is asked for.

    To build the options of all takes longer than to print the help.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = {name: TyperCommand(name, help=summary) for name, summary in SUMMARIES.items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, subcommand(name) if name in SUMMARIES else command, rest


def subcommand(name: str) -> Any:
    """The command `name` with its options."""
    command = get_command(import_module(f"{__package__}.{name}").app)
    command.name = name
    return command


app = typer.Typer(
    name="sparseift",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Sparse Iso-FLOP Transformations: larger, sparse layers at the FLOPs of the dense ones, audited to the MAC.",
)

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
        with suppress(OSError, ValueError):  # stderr is not a file
            faulthandler.enable()  # after a crash in native code the stack is printed, not an exit code alone
    if isinstance(sys.stdout, io.TextIOWrapper):  # with LANG=C, or a file name that is not text: escaped, as on stderr
        sys.stdout.reconfigure(errors="backslashreplace")
    if len(sys.argv) == 1 or {"-h", "--help"} & set(sys.argv):
        _load_help_renderer()
    try:
        _run()
    except SparseiftError as error:
        if debugging:
            raise
        print_error(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `sparseift flops ... | head`: the reader has gone
        _silence(sys.stdout)
        sys.exit(0)
    except OSError as error:
        if debugging or error.filename is not None:  # an error of a stream that is open has no file name
            raise
        _silence(sys.stdout)
        print_error(UsageError(f"cannot write the result: {error.strerror or error}", hint="is there space?"))


def _run() -> None:
    try:
        app()
    except SystemExit as done:
        if not done.code:
            sys.stdout.flush()  # at the interpreter's end a failure could not be reported
        raise


def _load_help_renderer() -> None:
    """Import what prints help without two modules of rich that it imports and never calls: a fifth of the time of `--help`.

    They are replaced only during this import, so that an import of them afterwards finds the real ones.
    """
    unused = {"rich.markdown": "Markdown", "rich.traceback": "Traceback"}
    empty = {name: ModuleType(name) for name in unused if name not in sys.modules}
    for name, module in empty.items():
        setattr(module, unused[name], None)
    sys.modules.update(empty)
    try:
        with suppress(ImportError):  # another version of typer: it imports what it needs itself
            import_module("typer.rich_utils")
    finally:
        for name in empty:
            del sys.modules[name]


def print_error(error: SparseiftError) -> NoReturn:
    """Message and hint on stderr, and the exit code of the error."""
    with suppress(OSError):  # where stderr is closed, the exit code is left
        print(f"sparseift: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  hint: {error.hint}", file=sys.stderr)
    sys.exit(error.exit_code)


def _open_streams() -> None:
    """Replace streams that were closed (`>&-`): they are None, and what is printed to a stderr of None goes to stdout."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115


def _silence(stream: TextIO) -> None:
    """Discard what the stream still buffers; the interpreter would fail on it once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
