"""The options of the commands: those that a spec declares, made from its declarations, and those that several commands share.

Imports nothing heavy: every command's `--help` imports it.
"""

from __future__ import annotations

import functools
import inspect
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_origin

import typer
from typer.core import TyperCommand

from ..base.options import DeclaredOption, options_of
from ..errors import UsageError

SUMMARIES = {
    "flops": "Count a model's FLOPs exactly, dense and transformed, layer by layer.",
    "transform": "Transform a model or checkpoint, and write it: weights, masks, plan and audit.",
    "export": "Write a trained or transformed model for other programs: Hugging Face, PyTorch, safetensors, ONNX.",
    "inspect": "Show what a checkpoint holds, what the layers of a model are, or how far a training run got.",
    "train": "Train by a recipe: dense, or transformed with static or moving masks.",
    "report": "Report from run directories whether a transform helped, by how much, how sure that is, and at what cost.",
    "recipe": "List, show, copy, check and import recipes: a model, its data, its transform and how it is trained, in YAML.",
}
"""The subcommands, each a module of this folder with a typer `app`, and the first line of its help."""


def help_of(command: str, details: str) -> str:
    """The help of a subcommand: its summary, then `details`, whose paragraphs of prose are joined to one line each."""
    paragraphs = details.rstrip().split("\n\n")
    written = [text if text.startswith("  ") else " ".join(text.split()) for text in paragraphs]
    return "\n\n".join([SUMMARIES[command], *written])


# The headings of `--help`, in the order in which commands list them; specs name those of their options.
INPUT = "Model and input"
GATES = "Gates"
OUTPUT = "Output"


class Format(StrEnum):
    """How a reading command prints its result."""

    table = "table"
    json = "json"
    csv = "csv"
    md = "md"
    github = "github"


def without_github(fmt: Format, json: bool, command: str) -> Format:
    """The format of a command without gates; `--json` is short for `--format json`.

    Raises:
        UsageError: GitHub annotations, which only gates write.
    """
    if json:
        return Format.json
    if fmt is Format.github:
        raise UsageError(f"{command} has no gates to annotate", hint="--format table, json, csv or md")
    return fmt


def listed(names: Collection[str]) -> str:
    """Choices as `--help` shows them in place of a type: `[wide|parallel]`, over several lines on a narrow terminal."""
    lines, room = ["["], shutil.get_terminal_size().columns * 28 // 100
    for i, name in enumerate(names):
        word = name + ("|" if i + 1 < len(names) else "]")
        if len(lines[-1]) > 1 and len(lines[-1]) + len(word) > room:
            lines.append(" ")
        lines[-1] += word
    return "\n".join(lines)


def choice(*flags: str, names: Collection[str], help: str, panel: str | None = None) -> Any:
    """An option of one command, not of a spec, whose value is one of `names`."""
    return typer.Option(*flags, help=help, metavar=listed(names), rich_help_panel=panel)


def checkpoint_of_a_run(panel: str) -> Any:
    """`--checkpoint`: which one of a run is read."""
    text = "Of a run: best by its metric (where none is given), last, or a step."
    return typer.Option("--checkpoint", metavar="best|last|STEP", help=text, show_default=False, rich_help_panel=panel)


def trust_of_a_folder(panel: str) -> Any:
    """`--trust`: code that a folder names may run."""
    return typer.Option(
        "--trust", help="Let a run or folder name code of yours to run (package.module:Name).", rich_help_panel=panel
    )


Source = Annotated[
    str,
    typer.Argument(
        help="A zoo model (resnet18), recipe, torchvision:NAME, timm:NAME, hf:FOLDER or pkg.module:callable.",
        show_default=False,
    ),
]
NumClasses = Annotated[int | None, typer.Option(help="Classes of an image model.", rich_help_panel=INPUT)]
Input = Annotated[
    str | None,
    typer.Option("--input", metavar="CxHxW", help="One sample's shape: 3x224x224.", rich_help_panel=INPUT),
]
Batch = Annotated[int, typer.Option(help="Samples in the input.", rich_help_panel=INPUT)]
Seq = Annotated[int | None, typer.Option(help="Tokens in the input of a language model.", rich_help_panel=INPUT)]
Depth = Annotated[
    int | None, typer.Option(metavar="N", help="Fold rows into modules N names deep.", rich_help_panel=OUTPUT)
]
Summary = Annotated[bool, typer.Option("--summary", help="Totals only.", rich_help_panel=OUTPUT)]
FormatOption = Annotated[
    Format, typer.Option("--format", "-f", help="How the result is printed.", rich_help_panel=OUTPUT)
]
Json = Annotated[bool, typer.Option("--json", help="Short for --format json.", rich_help_panel=OUTPUT)]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Write to this file instead of stdout.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]


class Command(TyperCommand):
    """A command whose results alone go to stdout, and that still reads former spellings of options, which no help lists."""

    FORMER: Mapping[str, str] = {"--out": "--output"}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        return super().parse_args(ctx, [*map(self._current, args[:end]), *args[end:]])

    def invoke(self, ctx: Any) -> Any:
        from ..base.sheets import results_alone_on_stdout

        with results_alone_on_stdout():
            return super().invoke(ctx)

    def _current(self, word: str) -> str:
        name, equals, value = word.partition("=")
        return self.FORMER.get(name, name) + equals + value


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """The options that a dataclass declares, as a command takes them.

    Args:
        by: the dataclass.
        only: the options to take; all of them if none are named.
        help: help texts in place of the declared ones, where an option means something else to this command.
        panel: one heading for all of them, in place of those declared.
    """

    by: type = field(kw_only=False)
    only: Sequence[str] = ()
    help: Mapping[str, str] = field(default_factory=dict)
    panel: str | None = None

    def parameters(self) -> dict[str, inspect.Parameter]:
        """A keyword parameter for typer by the name of each option; None where it was not given."""
        found = options_of(self.by)
        return {
            name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=self._annotation(d))
            for name, d in found.items()
            if not self.only or name in self.only
        }

    def _annotation(self, declared: DeclaredOption) -> Any:
        named, metavar = self.help.get(declared.name, declared.help), declared.option.metavar
        flags, shown = declared.flags, declared.shown_default
        if declared.choices and metavar is None:
            metavar = listed(declared.choices)
        if get_origin(declared.type) is tuple:
            kind, named = list[str], f"{named} Repeatable."
        else:
            kind = declared.type if declared.type in (int, float, bool) else str
        if kind is bool:
            shown = None
            if declared.default:
                flags = (f"{flags[0]}/--no-{flags[0].removeprefix('--')}", *flags[1:])
        option = typer.Option(
            *flags,
            help=named,
            metavar=metavar,
            show_default=shown or False,
            rich_help_panel=self.panel or declared.option.panel or None,
        )
        return Annotated[kind | None, option]


def takes(**groups: Declared) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of each group, in place of its parameter of that name: a dict of those that were given.

    @options.takes(spec=options.Declared(TransformSpec))
    def flops(source: Source, *, spec: dict[str, Any], ...) -> None:
    """
    made = {name: group.parameters() for name, group in groups.items()}

    def with_options(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)

        @functools.wraps(command)
        def run(**given: Any) -> None:
            for name, parameters in made.items():
                values = {key: given.pop(key) for key in parameters}
                given[name] = {
                    key: tuple(value) if isinstance(value, list) else value
                    for key, value in values.items()
                    if value is not None and value != []
                }
            command(**given)

        parameters = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name, old in own.parameters.items()
            for parameter in (made[name].values() if name in made else (old,))
        ]
        run.__dict__["__signature__"] = own.replace(parameters=parameters)
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return with_options
