"""`sparseift report` and its subcommands diff, keep and figure4: signatures, help, and the order of work.

Tables are in report_view.py and report_subcommands_view.py, gates in report_gates.py.
"""

from __future__ import annotations

import sys
from contextlib import closing, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..base.metrics import metric_names
from . import options
from .options import Format, without_github
from .progress import Spinner

if TYPE_CHECKING:
    from ..report.budgets import BudgetName
    from ..report.compare import ComparisonRules
    from ..report.filters import Expression
    from ..report.report import Report

HELP = """\
Runs that differ in the seed alone are one group: n is its finished runs, the interval is Student's t at 95 %. A comparison
needs equal audited training FLOPs, or with --at equal wall time. `sparseift report diff A B` compares two runs, `report keep`
keeps finished ones without checkpoints, `report figure4` shows published results with audited FLOPs; each has its own --help.

Examples:

  sparseift report runs/                                    # a line for every group of runs

  sparseift report runs/ --baseline dense                   # the difference, its interval, the verdict

  sparseift report runs/ --baseline dense --allow-unequal-flops --format md

  sparseift report runs/ --baseline dense --at both         # at equal FLOPs, and at equal wall time on one device

  sparseift report runs/ --filter "sparsity >= 0.5 and algorithm == rigl" --sort=-mean

  sparseift report runs/ --metric test_loss --baseline dense   # of runs with evaluation.test

  sparseift report runs/ --group-by run --columns path,state,step,top1,loss

  sparseift report recipes/*/results --reference paper      # published numbers and ours

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

KEEP_HELP = """Keep finished runs: recipe, metrics, summary, audit and provenance in one file each, without checkpoints.

The files are FOLDER/<recipe>/<run>.json, and `sparseift report FOLDER` reads them. Of absolute paths only the last part is
kept, so that no home folder or machine is named. Keeping a run twice changes nothing. If a run is not finished, it is named
and nothing is kept. Folders of kept runs that older versions wrote are read too; kept again in place, they are replaced by files.

Examples:

  sparseift report keep runs/ -o kept/

  sparseift report keep runs/resnet18_cifar100_* -o recipes/resnet18_cifar100/results
"""

FIGURE4_HELP = """The article's Figure 4: published results against training FLOPs as audited here.

Nothing is trained for it, and torch is not needed. The rows are the models of the figure; below them are the article's claims
about larger dense models and the audit's counts.

Examples:

  sparseift report figure4                        # the rows, and the claims

  sparseift report figure4 -o figure4.svg         # the picture; .png too

  sparseift report figure4 --json
"""

_RUNS = "Runs and groups"
_COMPARISON = "Comparison"

_DEFAULT = "show"


class ReportFormat(StrEnum):
    """How a report is printed."""

    table = "table"
    json = "json"
    csv = "csv"
    md = "md"
    html = "html"


class BudgetChoice(StrEnum):
    """The budgets at which groups are compared."""

    flops = "flops"
    seconds = "seconds"
    both = "both"


class ReportGroup(TyperGroup):
    """`report PATH...` and `report diff A B`: a first word that is not a subcommand is a path, as in `report ./diff`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = args if args and args[0] in self.commands and args[0] != _DEFAULT else [_DEFAULT, *args]
        return super().parse_args(ctx, given)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return "" if name == _DEFAULT else name, command, rest  # so that its usage is `sparseift report PATH...`


class ReportCommand(TyperCommand):
    """The command without a name of its own."""

    def get_usage(self, ctx: Any) -> str:
        return " ".join(super().get_usage(ctx).split())


app = typer.Typer(help=options.help_of("report", HELP), cls=ReportGroup, add_completion=False, rich_markup_mode="rich")


Paths = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="PATH",
        help="Run directories, kept runs, or folders that hold some at any depth.",
        show_default="runs",
    ),
]
Filter = Annotated[
    str | None,
    typer.Option(
        "--filter",
        metavar="EXPR",
        help="Only these runs or groups: NAME OP VALUE, joined by and/or.",
        rich_help_panel=_RUNS,
    ),
]
GroupBy = Annotated[
    str | None,
    typer.Option(
        metavar="COLUMNS",
        help="Columns that make a group; run: a line for each run.",
        show_default="group",
        rich_help_panel=_RUNS,
    ),
]
Metric = Annotated[
    str | None,
    options.choice(names=metric_names(), help="Judge all runs by this, not by their recipe's.", panel=_RUNS),
]
Baseline = Annotated[
    str | None,
    typer.Option(
        metavar="GROUP",
        help="Compare every group with this one: dense, a recipe, or the end of its name.",
        rich_help_panel=_COMPARISON,
    ),
]
FlopsTolerance = Annotated[
    str,
    typer.Option(
        metavar="SHARE",
        help="Largest difference of budgets that count as equal: 0.001, or 0.1%.",
        rich_help_panel=_COMPARISON,
    ),
]
AtBudget = Annotated[
    BudgetChoice | None,
    typer.Option(
        "--at",
        help="What must be equal for a comparison: training FLOPs, wall time in seconds, or one verdict for each.",
        show_default="flops",
        rich_help_panel=_COMPARISON,
    ),
]
TimeTolerance = Annotated[
    str,
    typer.Option(
        metavar="SHARE",
        help="Largest difference of wall times that count as equal: 0.02, or 2%.",
        rich_help_panel=_COMPARISON,
    ),
]
PeakTflops = Annotated[
    float | None,
    typer.Option(
        help="What one device can do, in TFLOP/s, for MFU.",
        show_default="that of the data sheet, where it is known",
        rich_help_panel=_COMPARISON,
    ),
]
AllowUnequalFlops = Annotated[
    bool,
    typer.Option("--allow-unequal-flops", help="Compare unequal budgets too.", rich_help_panel=_COMPARISON),
]
Reference = Annotated[
    str | None, options.choice(names=("paper",), help="Show published results and ours.", panel=_COMPARISON)
]
Spectral = Annotated[
    bool,
    typer.Option(
        "--spectral",
        help="Spectral and Ramanujan gaps of the masks in every kept checkpoint; slow.",
        rich_help_panel=_RUNS,
    ),
]
FailIf = Annotated[
    list[str] | None,
    typer.Option(
        metavar="EXPR", help="Exit 1 where this holds for a group. Repeatable.", rich_help_panel=options.GATES
    ),
]
MaxFlopsRatio = Annotated[
    float | None,
    typer.Option(
        help="Exit 1 above this ratio of training FLOPs to the baseline's, else to dense.",
        rich_help_panel=options.GATES,
    ),
]
MaxTimeRatio = Annotated[
    float | None,
    typer.Option(help="Exit 1 above this ratio of wall time to the baseline's.", rich_help_panel=options.GATES),
]
ReportFormatOption = Annotated[
    ReportFormat, typer.Option("--format", "-f", help="How the result is printed.", rich_help_panel=options.OUTPUT)
]
Columns = Annotated[
    str | None,
    typer.Option(metavar="COLUMNS", help="Columns to show, in this order.", rich_help_panel=options.OUTPUT),
]
Sort = Annotated[
    str | None,
    typer.Option(metavar="COLUMNS", help="Columns to sort by; -name from the highest.", rich_help_panel=options.OUTPUT),
]
Plots = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Draw the pictures into this folder.", rich_help_panel=options.OUTPUT),
]


@app.command(_DEFAULT, help=options.help_of("report", HELP), hidden=True, cls=ReportCommand)
def report(
    paths: Paths = None,
    where: Filter = None,
    group_by: GroupBy = None,
    metric: Metric = None,
    baseline: Baseline = None,
    at: AtBudget = None,
    flops_tolerance: FlopsTolerance = "0.1%",
    time_tolerance: TimeTolerance = "2%",
    allow_unequal_flops: AllowUnequalFlops = False,
    peak_tflops: PeakTflops = None,
    reference: Reference = None,
    spectral: Spectral = False,
    fail_if: FailIf = None,
    max_flops_ratio: MaxFlopsRatio = None,
    max_time_ratio: MaxTimeRatio = None,
    fmt: ReportFormatOption = ReportFormat.table,
    json: options.Json = False,
    output: options.Output = None,
    columns: Columns = None,
    sort: Sort = None,
    plots: Plots = None,
) -> None:
    from ..base.sheets import one_line
    from ..report.make import ReportOptions, make
    from . import report_gates, report_view
    from .output import ignore_broken_pipe

    fmt = ReportFormat.json if json else fmt
    wanted = ReportOptions(
        baseline,
        _rules(at, flops_tolerance, time_tolerance, allow_unequal_flops),
        _reference(reference),
        _group_columns(group_by, baseline),
        _expression(where),
        tuple(_names(sort) or ()),
        spectral,
        metric,
        _peak(peak_tflops),
    )
    gates = report_gates.parse(fail_if or [])
    with closing(Spinner()) if spectral else nullcontext() as spinner:
        progress = spinner.show if spinner else None
        made = make(paths or [Path("runs")], wanted, ["sparseift", *sys.argv[1:]], progress)
    view = report_view.ReportView(made, _names(columns), wanted)
    for gate in gates:
        gate.require(report_gates.known(made), "--fail-if")
    with ignore_broken_pipe():  # gates decide the exit code even if the reader of stdout has closed it
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
    report_gates.check(made, gates, {"flops": max_flops_ratio, "seconds": max_time_ratio})


@app.command("diff", help=DIFF_HELP)
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A run directory or kept run.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.", show_default=False)],
    exact: Annotated[
        bool,
        typer.Option("--exact", help="Bit for bit: exit 1 where anything differs.", rich_help_panel=options.GATES),
    ] = False,
    fmt: options.FormatOption = Format.table,
    json: options.Json = False,
    output: options.Output = None,
) -> None:
    from ..errors import CheckFailed
    from ..report.diff import diff as compare
    from . import report_subcommands_view
    from .output import ignore_broken_pipe

    fmt = without_github(fmt, json, "report diff")
    found = compare(a, b, bit_for_bit=exact)
    with ignore_broken_pipe():  # --exact decides the exit code even if the reader of stdout has closed it
        report_subcommands_view.show_diff(found, fmt, output)
    if found.exact is not None and not found.exact.equal:
        raise CheckFailed("the runs are not equal bit for bit")


@app.command("keep", help=KEEP_HELP)
def keep(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH", help="Run directories, or folders that hold some at any depth.", show_default=False
        ),
    ],
    folder: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FOLDER", help="Where to keep them.", rich_help_panel=options.OUTPUT),
    ],
    fmt: options.FormatOption = Format.table,
    json: options.Json = False,
) -> None:
    from ..report.keep import keep as keep_runs
    from .report_subcommands_view import show_kept

    fmt = without_github(fmt, json, "report keep")
    show_kept(keep_runs(paths, folder), folder, fmt)


@app.command("figure4", help=FIGURE4_HELP)
def figure4(
    fmt: options.FormatOption = Format.table,
    json: options.Json = False,
    output: options.Output = None,
) -> None:
    from .report_subcommands_view import show_figure4

    show_figure4(without_github(fmt, json, "report figure4"), output)


def _reference(name: str | None) -> str | None:
    """The reference, if there is one of that name: an error before any run is read."""
    from ..report.published import published

    if name is not None:
        published(name)
    return name


def _group_columns(group_by: str | None, baseline: str | None) -> tuple[str, ...]:
    from ..errors import UsageError

    by = tuple("path" if name == "run" else name for name in _names(group_by) or ["group"])
    if "path" in by and baseline is not None:
        raise UsageError("--baseline compares groups, and --group-by run makes none", hint="leave one of them out")
    return by


def _expression(text: str | None) -> Expression | None:
    from ..report.filters import parse

    return None if text is None else parse(text)


def _rules(at: BudgetChoice | None, flops_tolerance: str, time_tolerance: str, allow_unequal: bool) -> ComparisonRules:
    """The rules of comparisons."""
    from ..report.budgets import BUDGETS
    from ..report.compare import ComparisonRules

    budgets: tuple[BudgetName, ...] = tuple(name for name in BUDGETS if at is not None and at.value in (name, "both"))
    return ComparisonRules(
        _share("--flops-tolerance", flops_tolerance),
        allow_unequal,
        at=budgets,
        time_tolerance=_share("--time-tolerance", time_tolerance),
    )


def _share(option: str, text: str) -> float:
    """A tolerance as a share (0.001) or per cent (0.1%)."""
    from ..errors import UsageError

    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise UsageError(f"{option} {text!r} is not a share", hint="0.001, or 0.1%")
    return share


def _peak(tflops: float | None) -> float | None:
    from ..errors import UsageError

    if tflops is not None and not 0 < tflops < float("inf"):
        raise UsageError(
            f"--peak-tflops must be above 0, not {tflops}", hint="--peak-tflops 989.4, of one H200 in bf16"
        )
    return tflops


def _names(text: str | None) -> list[str] | None:
    """`a, b` -> [a, b]; None for None."""
    from ..errors import UsageError

    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError("a list of columns is empty", hint="separate names by commas: group,n,mean")
    return names


def _page(made: Report, output: Path | None) -> None:
    from ..report.html.page import page
    from .output import write_result

    write_result(page(made), output)


def _draw(made: Report, folder: Path) -> None:
    from ..report.plots.pictures import save_all

    for path in save_all(made, folder):
        print(f"drew {path}", file=sys.stderr)
