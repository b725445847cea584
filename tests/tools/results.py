"""The page of every folder of kept results, recipes/<model>/results/README.md, and its pictures, made from the runs in it.

`python -m tests.tools.results --write` (or `make results`) writes them anew; without --write it prints what differs and exits 1.
Nothing on a page is written by hand except the text of the folder's notes.md: means and spreads are those of the report, and
the commands name every setting in which a kept run differs from the shipped recipe of its name.
"""

from __future__ import annotations

import difflib
import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from sparseift_cli.base.durations import in_words
from sparseift_cli.base.metrics import facts_of
from sparseift_cli.recipe.catalog import shipped
from sparseift_cli.recipe.load import load
from sparseift_cli.recipe.strict_yaml import flow
from sparseift_cli.recipe.write import resolved_yaml
from sparseift_cli.report import frame as frames
from sparseift_cli.report.budgets import BUDGETS, SECONDS, BudgetName
from sparseift_cli.report.compare import ComparisonRules
from sparseift_cli.report.grouping import IRRELEVANT_SETTINGS, flat
from sparseift_cli.report.html.page import command
from sparseift_cli.report.make import ReportOptions, make
from sparseift_cli.report.plots.pictures import pictures
from sparseift_cli.report.plots.style import to_svg
from sparseift_cli.report.published import evidence, published, same_task
from sparseift_cli.report.read import Run, is_kept_file
from sparseift_cli.report.report import Comparison, Report
from sparseift_cli.report.statistics import mean_interval

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = "README.md"
OTHER_METRICS = (
    "perplexity_per_token",
    "perplexity_per_word",
    "test_top1",
    "test_loss",
    "test_perplexity_per_token",
    "test_perplexity_per_word",
)
"""Metrics that a page shows in addition to that of the recipes, where runs have measured them."""
SHARED = ", longer where several runs (their number in brackets) shared the device"


def folders(root: Path = ROOT) -> list[Path]:
    """Every folder of kept results with a run in it."""
    return [f for f in sorted(root.glob("recipes/*/results")) if any(map(is_kept_file, f.glob("*/*.json")))]


def made(folder: Path) -> Report:
    """The report that the page and the pictures of `folder` show: at equal time too where a group has the baseline's."""
    plain = make([folder], ReportOptions(), [])
    has_baseline = any(row["transform"] == row["algorithm"] == "dense" for row in frames.records(plain.groups))

    def at(*budgets: BudgetName) -> Report:
        rules = ComparisonRules(allow_unequal=True, at=budgets)
        return make([folder], ReportOptions("dense" if has_baseline else None, rules, "paper"), [])

    both = at(*BUDGETS)
    return both if at_equal_time(both) else at()


def at_equal_time(report: Report) -> list[Comparison]:
    """The comparisons of groups whose wall time equals the baseline's, on one device with the same versions."""
    return [c for c in report.comparisons if c.at == "seconds" and c.allowed]


def figures(report: Report) -> dict[str, tuple[str, str]]:
    """Name -> (title, SVG) of the metric against training FLOPs, for every model with a transformed group.

    Where groups are compared at equal time, also against wall time. Letters are text, so that a picture is small; the bytes are
    those of the matplotlib of .ci/constraints.txt.
    """
    drawn = {}
    timed = {c.candidate for c in at_equal_time(report)}
    for family, of_family in pictures(report):
        endings = ("-flops", "-seconds") if any(g.name in timed for g in family.groups) else ("-flops",)
        for picture in of_family:
            if family.transformed and picture.name.endswith(endings):
                figure = picture.draw()
                title = figure.get_suptitle().replace("\n", " ")
                drawn[f"{picture.name}.svg"] = (title, to_svg(figure, picture.title, text=True))
    return drawn


def page(folder: Path, shown: str) -> str:
    """The page of the runs in `folder`, which commands call `shown`."""
    report = made(folder)
    return _page(report, figures(report), shown, _discussion(folder))


def _discussion(folder: Path) -> str:
    """The text of notes.md about the results: the only part of a page that is written by hand."""
    notes = folder / "notes.md"
    return notes.read_text("utf-8").strip() if notes.is_file() else ""


def _page(report: Report, drawn: Mapping[str, tuple[str, str]], shown: str, discussion: str = "") -> str:
    groups = frames.records(report.groups)
    parts = [
        f"# Results of {PurePosixPath(shown).parent.name}",
        "Written by `make results` from the runs kept in this folder, each a file with recipe, audit, provenance and every evaluation.\n"
        "Means and sample deviations are over seeds, at the end of training. FLOPs are audited, of a whole run, mask updates\n"
        "included; × dense is their ratio to those of the dense model in as many steps.",
    ]
    for task in dict.fromkeys((row["comparison_key"], row["steps"]) for row in groups):
        rows = [row for row in groups if (row["comparison_key"], row["steps"]) == task and row["n"]]
        parts += [_heading(rows[0]), _table(report, rows)] if rows else []
    parts += [
        "\n".join(_notes(report, groups)),
        *(f"![{title}]({name})" for name, (title, _) in drawn.items()),
    ]
    parts += _against_dense(report)
    parts += ["## Discussion", discussion] if discussion else []
    parts += [
        "## How to repeat the runs",
        "```bash\n" + "\n".join([*commands(report.runs), *_after(report.runs, shown)]) + "\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _against_dense(report: Report) -> list[str]:
    """The verdicts at equal FLOPs, and those at equal time where there are any."""
    at_flops = [c for c in report.comparisons if c.at == "flops"]
    if not at_flops:
        return []
    unequal = any(not c.equal for c in at_flops)
    how = "Differences with 95 % intervals by Student's t." + (" Unequal budgets are marked." if unequal else "")
    found = ["## Against dense", how, _verdicts(sorted(at_flops, key=lambda c: not c.equal))]
    if timed := at_equal_time(report):
        how = (
            f"Of runs whose wall time is dense's within {100 * SECONDS.tolerance:g} %, on one device with the same versions: "
            "steps, compilation and evaluations."
        )
        found += ["## Against dense at equal time", how, _verdicts(timed)]
    return found


def _verdicts(comparisons: Sequence[Comparison]) -> str:
    return "\n".join(f"- {c.candidate}: {c.verdict}{c.pairing}" for c in comparisons)


def _heading(row: Mapping[str, Any]) -> str:
    epochs = f"{in_words(row['epochs'], 'epoch')}, " if isinstance(row["epochs"], float) and row["epochs"] >= 1 else ""
    return f"## {str(row['model']).rpartition(':')[2]} on {row['data']}, {epochs}{row['steps']:,} steps"


def _table(report: Report, rows: Sequence[Mapping[str, Any]]) -> str:
    metric = rows[0]["metric"]
    others = [name for name in OTHER_METRICS if name != metric and any(row[name] is not None for row in rows)]
    head = [
        "recipe",
        "seeds",
        f"{_name(metric)} {'↓' if facts_of(metric).lower_is_better else '↑'}",
        "best",
        *map(_name, others),
        "training FLOPs",
        "× dense",
        "parameters",
        "non-zero",
        "wall time",
        "published",
    ]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    for row in rows:
        counted = [run for run in frames.records(report.frame) if run["group"] == row["group"] and run["counted"]]
        ratio = "" if row["flops_ratio"] is None else f"{row['flops_ratio']:.4f}"
        cells = [
            row["group"],
            row["n"],
            _spread([run["value"] for run in counted]),
            _digits(row["best"]),
            *(_spread([run[name] for run in counted]) for name in others),
            f"{row['flops']:#.4g}" if row["flops"] else "",
            ratio,
            f"{row['params'] or 0:,}",
            f"{row['nonzero_params'] or 0:,}",
            f"{_clock(row['seconds'])}{_shared(report, row)}",
            _published(report, row),
        ]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _name(metric: str) -> str:
    """`top-1 (%)`: as on an axis, but shorter."""
    return facts_of(metric).label.replace(" accuracy", "")


def _spread(values: Sequence[float | None]) -> str:
    """Mean and sample deviation of the values that are there."""
    interval = mean_interval([v for v in values if v is not None])
    if interval.mean is None:
        return ""
    return _digits(interval.mean) + ("" if interval.deviation is None else f" ± {_digits(interval.deviation, 2)}")


def _digits(value: float, digits: int = 4) -> str:
    """So many significant digits, trailing zeros included."""
    return f"{value:#.{digits}g}".rstrip(".")


def _published(report: Report, row: Mapping[str, Any]) -> str:
    """The published number of the same model, data, transform, sparsity and algorithm, with its tag."""
    if row["transform"] == row["algorithm"] == "dense":
        found = [
            (p.dense, p.evidence)
            for p in published()
            if p.dense is not None and same_task(p, row) and p.epochs in (None, round(row["epochs"] or 0))
        ]
    else:
        found = [(b.published.value, b.published.evidence) for b in report.reference if b.group == row["group"]]
    return ", ".join(dict.fromkeys(f"{value:g} [{tag}]" for value, tag in found if value is not None))


def _notes(report: Report, groups: Sequence[Mapping[str, Any]]) -> list[str]:
    devices: dict[str, list[str]] = {}
    for row in groups:
        devices.setdefault(str(row["device"]), []).append(str(row["group"]))
    most, *others = sorted(devices, key=lambda device: -len(devices[device]))
    others = [f"{', '.join(devices[device])}: {device}" for device in others]
    where = most + (f" (but {'; '.join(others)})" if others else "")
    shared = any(_shared(report, row) for row in groups)
    found = [f"- Ran on {where}. Wall time is of training and evaluation{SHARED if shared else ''}."]
    if any(_published(report, row) for row in groups if row["n"]):
        tags = ", ".join(f"[{tag}] {meaning}" for tag, meaning in evidence().items())
        found.append(f"- Published: {published()[0].source}; {tags}.")
    found += [f"- {b.group}: {b.note}." for b in report.reference if b.group and b.note]
    return [*found, *(f"- {note}." for note in report.notes)]


def _shared(report: Report, row: Mapping[str, Any]) -> str:
    """How many runs shared the device with those of a group: ` (2)`; ` (1 or 2)` where seeds differ."""
    seen = sorted({run["at_once"] or 1 for run in frames.records(report.frame) if run["group"] == row["group"]})
    return "" if seen == [1] else f" ({' or '.join(map(str, seen))})"


def commands(runs: Sequence[Run]) -> list[str]:
    """Commands that train these runs again: the shipped recipe with changed settings, or else the recorded command."""
    recipes = {entry.name.replace("/", "_"): entry for entry in shipped()}
    seeds: dict[str, list[int]] = {}
    for run in runs:
        entry = recipes.get(run.name)
        if entry is None or run.seed is None:
            line = command(run)
            seeds.setdefault(line, []) if line else None
            continue
        now = _settings(entry.path)
        then = flat(run.recipe)
        changed = {k: v for k, v in then.items() if k not in IRRELEVANT_SETTINGS and k in now and now[k] != v}
        words = [
            "sparseift",
            "train",
            entry.name,
            *(w for k, v in changed.items() for w in ("--set", f"{k}={flow(v)}")),
        ]
        seeds.setdefault(shlex.join(words), []).append(run.seed)
    return [f"{line} --seeds {_seeds(sorted(set(of)))}" if of else line for line, of in seeds.items()]


@cache
def _settings(recipe: Path) -> Mapping[str, Any]:
    """Every setting of a recipe by its path of keys, `optimizer.lr`."""
    return flat(yaml.safe_load(resolved_yaml(load(recipe).spec)))


def _seeds(seeds: Sequence[int]) -> str:
    span = range(seeds[0], seeds[-1] + 1)
    return f"{span[0]}..{span[-1]}" if len(span) > 1 and list(span) == list(seeds) else ",".join(map(str, seeds))


def _after(runs: Sequence[Run], shown: str) -> list[str]:
    names = " \\\n  ".join(dict.fromkeys(f"runs/{shlex.quote(run.name)}" for run in runs))
    return [
        f"sparseift report keep -o {shown} \\\n  {names}",
        f"sparseift report {shown} --reference paper",
        "make results",
    ]


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return (
        f"{seconds:.1f} s"
        if seconds < 120
        else f"{seconds / 60:.1f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def stale(folder: Path, root: Path = ROOT) -> str:
    """How the page of `folder` and its pictures differ from what its runs give, as a unified diff; empty if current."""
    return _difference(folder, root, _files(folder, root))


def _difference(folder: Path, root: Path, files: Mapping[Path, str]) -> str:
    shown = folder.relative_to(root).as_posix()
    difference = ""
    for file, new in files.items():
        old = file.read_text("utf-8") if file.exists() else ""
        name = f"{shown}/{file.relative_to(folder).as_posix()}"
        difference += "".join(
            difflib.unified_diff(old.splitlines(True), new.splitlines(True), name, "as made from its runs", n=0)
        )
    return difference


def _files(folder: Path, root: Path) -> dict[Path, str]:
    """The page of `folder` and its pictures, as made from its runs."""
    report, shown = made(folder), folder.relative_to(root).as_posix()
    drawn = figures(report)
    pictured = {folder / name: svg for name, (_, svg) in drawn.items()}
    return {folder / PAGE: _page(report, drawn, shown, _discussion(folder))} | (pictured if _draws_as_pinned() else {})


def _draws_as_pinned() -> bool:
    """Whether this is the pinned matplotlib: another one places letters differently, and its pictures are not compared."""
    pins = (ROOT / ".ci" / "constraints.txt").read_text("utf-8")
    return f"matplotlib=={version('matplotlib')}\n" in pins


def main(write: bool, root: Path = ROOT) -> int:
    """Write every page anew, or print how it differs. Returns the exit code."""
    for folder in folders(root):
        files = _files(folder, root)
        if difference := _difference(folder, root, files):
            if not write:
                print(difference)
                return 1
            for file, content in files.items():
                file.write_text(content, "utf-8")
            print(f"{folder.relative_to(root).as_posix()}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main("--write" in sys.argv[1:]))
