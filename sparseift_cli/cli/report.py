"""`sparseift report`: the signatures and the order of work; the tables are in report_view.py, the gates in report_gates.py."""

from __future__ import annotations

import sys
from contextlib import closing, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from . import options, report_figure4, report_keep
from .options import Format, without_github
from .ticker import Ticker

if TYPE_CHECKING:
    from ..report.make import Options
    from ..report.report import Report

HELP = """\
Runs that differ in the seed alone are one group: n is its finished runs, the interval is Student's t at 95 %. A comparison
needs equal audited training FLOPs. `sparseift report diff A B` compares two runs, `report keep` keeps finished ones without
checkpoints, `report figure4` holds published results against audited FLOPs; each has its own --help.

Examples:

  sparseift report runs/                                    # a line for every group of runs

  sparseift report runs/ --baseline dense                   # the difference, its interval, the verdict

  sparseift report runs/ --baseline dense --allow-unequal-flops --format md

  sparseift report runs/ --filter "sparsity >= 0.5 and algorithm == rigl" --sort=-mean

  sparseift report runs/ --metric test_loss --baseline dense   # of runs with evaluation.test

  sparseift report runs/ --group-by run --columns path,state,step,top1,loss

  sparseift report recipes/*/results --reference paper      # published numbers beside ours

  sparseift report runs/ --fail-if "top1 < 76" --max-flops-ratio 1.001   # for CI: exit 1

  sparseift report runs/ --baseline dense --format html -o report.html --plots figures/

  sparseift report runs/ --spectral                         # do the masks connect? slow for large models
"""

DIFF_HELP = """Compare two runs: recipes, environments, metrics.

Examples:

  sparseift report diff runs/digits/20260101T120000Z-0123abcd runs/digits/20260102T120000Z-0123abcd

  sparseift report diff A B --exact        # exit 1 unless evaluations and tensors are equal to the bit

  sparseift report diff A B --json
"""

_DEFAULT = "show"


class ReportFormat(StrEnum):
    """How a report is printed."""

    table = "table"
    json = "json"
    csv = "csv"
    md = "md"
    html = "html"


class ReportGroup(TyperGroup):
    """`report PATH...` and `report diff A B`: what is no subcommand is a path, so `report ./diff` shows a folder diff."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = args if args and args[0] in self.commands and args[0] != _DEFAULT else [_DEFAULT, *args]
        return super().parse_args(ctx, given)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return "" if name == _DEFAULT else name, command, rest  # its usage reads `sparseift report PATH...`


class ReportCommand(TyperCommand):
    """The command without a name of its own."""

    def get_usage(self, ctx: Any) -> str:
        return " ".join(super().get_usage(ctx).split())


app = typer.Typer(help=options.help_of("report", HELP), cls=ReportGroup, add_completion=False, rich_markup_mode="rich")


@app.command(_DEFAULT, help=options.help_of("report", HELP), hidden=True, cls=ReportCommand)
def report(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="PATH", help="Run directories, or folders that hold some at any depth.", show_default="runs"
        ),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Compare every group with this one: dense, a recipe, or the end of its name.")
    ] = None,
    reference: Annotated[str | None, typer.Option(help="Put published numbers beside ours: paper.")] = None,
    group_by: Annotated[
        str | None, typer.Option(help="Columns that make a group; run: a line for each.", show_default="group")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="Judge all by this: top1, loss, test_top1, ...", show_default="each recipe's best"),
    ] = None,
    where: Annotated[
        str | None, typer.Option("--filter", metavar="EXPR", help="Only these: NAME OP VALUE, joined by and/or.")
    ] = None,
    sort: Annotated[str | None, typer.Option(help="Columns to sort by; -name from the highest.")] = None,
    columns: Annotated[str | None, typer.Option(help="Columns to show, in this order.")] = None,
    fail_if: Annotated[
        list[str] | None, typer.Option(metavar="EXPR", help="Exit 1 where this holds for a group. Repeatable.")
    ] = None,
    max_flops_ratio: Annotated[
        float | None, typer.Option(help="Exit 1 above this ratio of training FLOPs to the baseline's, else to dense.")
    ] = None,
    flops_tolerance: Annotated[str, typer.Option(help="How far apart equal budgets may be: 0.001, or 0.1%.")] = "0.1%",
    allow_unequal_flops: Annotated[
        bool, typer.Option("--allow-unequal-flops", help="Compare in spite of unequal budgets.")
    ] = False,
    fmt: Annotated[ReportFormat, typer.Option("--format", "-f", help="How to print the result.")] = ReportFormat.table,
    json: options.Json = False,
    output: options.Output = None,
    plots: Annotated[Path | None, typer.Option(metavar="DIR", help="Draw the pictures into this folder.")] = None,
    spectral: Annotated[
        bool,
        typer.Option("--spectral", help="Spectral and Ramanujan gaps of the masks in every kept checkpoint; slow."),
    ] = False,
) -> None:
    from ..report.make import make
    from . import report_gates, report_view
    from .output import ignore_broken_pipe, one_line

    fmt = ReportFormat.json if json else fmt
    asked = _options(baseline, reference, group_by, metric, where, sort, flops_tolerance, allow_unequal_flops, spectral)
    gates = report_gates.parse(fail_if or [])
    with closing(Ticker()) if spectral else nullcontext() as ticker:
        tell = ticker.show if ticker else None
        made = make(paths or [Path("runs")], asked, ["sparseift", *sys.argv[1:]], tell)
    view = report_view.View(made, _names(columns), asked)
    for gate in gates:
        gate.require(report_gates.known(made), "--fail-if")
    with ignore_broken_pipe():  # a gate has its say even where nobody reads on
        if fmt is ReportFormat.html:
            _page(made, output)
        else:
            view.show(Format(fmt.value), output)
    for path, reason in made.skipped:
        print(one_line(f"skipped {path}: {reason}"), file=sys.stderr)
    for run in made.runs:
        for text in run.warnings:
            print(one_line(f"warning: {run.path}: {text}"), file=sys.stderr)
    if plots is not None:
        _draw(made, plots)
    report_gates.stop_on(made, gates, max_flops_ratio)


@app.command("diff", help=DIFF_HELP)
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A run directory.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.", show_default=False)],
    exact: Annotated[bool, typer.Option("--exact", help="Bit for bit: exit 1 where anything differs.")] = False,
    fmt: options.FormatOption = Format.table,
    json: options.Json = False,
    output: options.Output = None,
) -> None:
    from ..errors import CheckFailed
    from ..report.diff import diff as compare
    from . import report_diff_view
    from .output import ignore_broken_pipe

    fmt = without_github(fmt, json, "report diff")
    found = compare(a, b, bit_for_bit=exact)
    with ignore_broken_pipe():  # a check has its say even where nobody reads on
        report_diff_view.show(found, fmt, output)
    if found.exact is not None and not found.exact.equal:
        raise CheckFailed("the runs are not equal bit for bit")


app.command("figure4", help=report_figure4.HELP)(report_figure4.figure4)
app.command("keep", help=report_keep.HELP)(report_keep.keep)


def _options(
    baseline: str | None,
    reference: str | None,
    group_by: str | None,
    metric: str | None,
    where: str | None,
    sort: str | None,
    tolerance: str,
    allow_unequal: bool,
    spectral: bool,
) -> Options:
    from ..errors import UsageError
    from ..report.compare import Rules
    from ..report.filters import parse
    from ..report.make import Options
    from ..report.published import published

    if reference is not None:
        published(reference)  # a wrong name is told before anything is read
    by = tuple("path" if name == "run" else name for name in _names(group_by) or ["group"])
    if "path" in by and baseline is not None:
        raise UsageError("--baseline compares groups, and --group-by run makes none", hint="leave one of them out")
    rules = Rules(_share(tolerance), allow_unequal)
    return Options(
        baseline,
        rules,
        reference,
        by,
        parse(where) if where is not None else None,
        tuple(_names(sort) or ()),
        spectral,
        metric,
    )


def _share(text: str) -> float:
    from ..errors import UsageError

    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise UsageError(f"--flops-tolerance {text!r} is no share", hint="0.001, or 0.1%")
    return share


def _names(text: str | None) -> list[str] | None:
    """`a, b` -> [a, b]; None where nothing was given."""
    from ..errors import UsageError

    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError("a list of columns is empty", hint="names with commas between them: group,n,mean")
    return names


def _page(made: Report, output: Path | None) -> None:
    from ..report.html.page import page
    from .output import write_whole

    text = page(made)
    if output is None:
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        write_whole(output, text)


def _draw(made: Report, folder: Path) -> None:
    from ..report.plots.pictures import save_all

    for path in save_all(made, folder):
        print(f"drew {path}", file=sys.stderr)
