"""What the subcommands of `sparseift report` show: diff, keep and figure4."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..base.sheets import Column, Sheet, integer
from ..errors import UsageError
from ..report.diff import Change, Diff
from ..report.figure4 import claims, rows
from ..report.keep import KeptRun
from ..report.published import evidence, published
from ..report.read import Run
from .options import Format
from .output import render, write_whole
from .report_view import clean

DIFF_SCHEMA = "sparseift.report-diff/1"
KEEP_SCHEMA = "sparseift.report-keep/1"
FIGURE4_SCHEMA = "sparseift.figure4/1"
_TENSORS_SHOWN = 10
_PICTURES = (".svg", ".png")
_OTHER_PICTURES = (".pdf", ".jpg", ".jpeg", ".gif", ".eps", ".webp")


def show_diff(found: Diff, fmt: Format, output: Path | None) -> None:
    """Print both runs side by side, and the verdict of --exact; or write it to `output`."""
    parts = [("recipes", _sheet("Recipe", found.recipe)), ("environments", _sheet("Environment", found.environment))]
    same = [f"the {what} are the same" for what, sheet in parts if not sheet.rows]
    metrics = _sheet("Metrics", found.metrics, numbers=True)
    metrics.notes = [f"A: {_about(found.a)}", f"B: {_about(found.b)}", *same, *found.notes]
    sheets = [*(sheet for _, sheet in parts if sheet.rows), metrics, *_exact_sheets(found)]
    render(sheets, diff_payload(found), fmt, output)


def diff_payload(found: Diff) -> dict[str, Any]:
    """The JSON, schema sparseift.report-diff/1. A key that a run does not have is null."""
    exact: dict[str, Any] | None = None
    if found.exact is not None:
        exact = {"equal": found.exact.equal, **asdict(found.exact)}
        for tensor in exact["differing"]:
            tensor["largest"] = clean(tensor["largest"])
    return {
        "schema": DIFF_SCHEMA,
        "a": _run(found.a),
        "b": _run(found.b),
        "recipe": [{"key": c.key, "a": c.a, "b": c.b} for c in found.recipe],
        "environment": [{"key": c.key, "a": c.a, "b": c.b} for c in found.environment],
        "metrics": [
            {"key": c.key, "a": clean(c.a), "b": clean(c.b), "difference": clean(c.difference)} for c in found.metrics
        ],
        "exact": exact,
        "notes": found.notes,
    }


def _run(run: Run) -> dict[str, Any]:
    return {
        "path": str(run.path),
        "recipe": run.name,
        "seed": run.seed,
        "state": run.state,
        "step": run.last.get("step", 0),
    }


def _about(run: Run) -> str:
    return f"{run.path} ({run.name}, seed {run.seed}, {run.state} at step {run.last.get('step', 0):,})"


def _sheet(title: str, changes: Sequence[Change], *, numbers: bool = False) -> Sheet:
    columns = [Column("key", "key"), Column("a", "A", _shown, right=numbers), Column("b", "B", _shown, right=numbers)]
    if numbers:
        columns.append(Column("difference", "B - A", _signed, right=True, priority=1))
    return Sheet(title, columns, [{"key": c.key, "a": c.a, "b": c.b, "difference": c.difference} for c in changes])


def _exact_sheets(found: Diff) -> list[Sheet]:
    """What --exact compared, and the tensors that differ."""
    exact = found.exact
    if exact is None:
        return []
    rows = [
        {"what": "evaluations", "compared": exact.evaluations, "differing": exact.first_difference},
        {
            "what": "tensors",
            "compared": exact.tensors,
            "differing": f"{len(exact.differing)}" if exact.differing else None,
        },
        {
            "what": "state",
            "compared": int(exact.checkpoint_step is not None),
            "differing": ", ".join(exact.state) or None,
        },
    ]
    columns = [Column("what", "what"), Column("compared", "compared", right=True), Column("differing", "differing")]
    verdict = "equal to the bit" if exact.equal else "NOT equal"
    if exact.checkpoint_step is not None:
        verdict += f"; tensors and state are those of step {exact.checkpoint_step:,}"
    sheets = [Sheet("Bit for bit", columns, rows, [verdict, *exact.notes])]
    if exact.differing:
        shown = [{"tensor": t.name, "what": t.what, "largest": t.largest} for t in exact.differing[:_TENSORS_SHOWN]]
        more = len(exact.differing) - len(shown)
        columns = [
            Column("tensor", "tensor"),
            Column("what", "difference"),
            Column("largest", "largest", lambda v: f"{v:.6g}", right=True, priority=1),
        ]
        sheets.append(Sheet("Tensors", columns, shown, [f"and {more} more: --json has all of them"] if more else []))
    return sheets


def show_kept(kept: Sequence[KeptRun], folder: Path, fmt: Format) -> None:
    """Print a row for every run that was kept in `folder`."""
    kept_rows = [{"run": str(k.run.path), "kept": str(k.path), "bytes": k.bytes, "state": k.state} for k in kept]
    columns = [
        Column("run", "run", priority=1),
        Column("kept", "kept as", lambda path: str(Path(path).relative_to(folder))),
        Column("bytes", "bytes", integer, right=True),
        Column("state", "state"),
    ]
    title = f"{len(kept)} {'run' if len(kept) == 1 else 'runs'} kept in {folder}: {sum(k.bytes for k in kept):,} bytes"
    render([Sheet(title, columns, kept_rows)], {"schema": KEEP_SCHEMA, "runs": kept_rows}, fmt)


def show_figure4(fmt: Format, output: Path | None) -> None:
    """Print or write the numbers of Figure 4; draw the picture where `output` ends in .svg or .png.

    Raises:
        UsageError: `output` is a picture of another kind, or a format was given for a picture.
    """
    ending = output.suffix.lower() if output else ""
    if ending in _OTHER_PICTURES:
        raise UsageError(f"{output}: the picture is written as .svg or .png", hint="give -o figure4.svg")
    if output is None or ending not in _PICTURES:
        _show_figure4_numbers(fmt, output)
    elif fmt is not Format.table:
        raise UsageError(
            f"{output} is a picture; --format {fmt} does not apply", hint="leave --format out, or give another file"
        )
    else:
        _draw_figure4(output)


def _show_figure4_numbers(fmt: Format, output: Path | None) -> None:
    found: list[dict[str, Any]] = [
        {k: getattr(c, k) for k in ("claim", "claimed", "counted", "holds", "answer")} for c in claims()
    ]
    source, tags = published()[0].source, evidence()
    for_reader = fmt in (Format.table, Format.md)
    columns = [
        Column("model", "model"),
        Column("transform", "transform", priority=4),
        Column("sparsity", "sparsity", right=True),
        Column("match", "match"),
        Column("algorithm", "algorithm", priority=3),
        Column("samples", "samples", integer, right=True, priority=5),
        Column("training_flops", "training FLOPs", _flops if for_reader else integer, right=True),
        Column("ratio", "x dense", lambda v: f"{v:.4f}x", right=True),
        Column("metric", "metric", priority=2),
        Column("value", "published", lambda v: f"{v:g}", right=True),
        Column("evidence", "tag", lambda v: f"[{v}]"),
    ]
    notes = [
        "ResNets: ImageNet, 90 epochs of 1,281,167 images. GPT-3: one sequence of 2,048 tokens, attention counted in full.",
        f"published: {source}; {', '.join(f'[{tag}] {meaning}' for tag, meaning in tags.items())}",
    ]
    claim_columns = [
        Column("claim", "claim"),
        Column("claimed", "article", lambda v: f"{v:g}x", right=True, priority=1),
        Column("counted", "counted", lambda v: f"{v:.3f}x", right=True),
        Column("holds", "holds", lambda v: "yes" if v else "no"),
        *([] if for_reader else [Column("answer", "answer")]),
    ]
    sheets = [
        Sheet("Published results and audited training FLOPs", columns, rows(), notes if for_reader else []),
        Sheet(
            "Claims of the article, and the audit's counts",
            claim_columns,
            found,
            [c["answer"] for c in found] if for_reader else [],
        ),
    ]
    payload = {"schema": FIGURE4_SCHEMA, "rows": rows(), "claims": found, "source": source, "evidence": dict(tags)}
    render(sheets, payload, fmt, output)


def _draw_figure4(output: Path) -> None:
    from ..report.plots.figure4 import TITLE, figure
    from ..report.plots.style import to_png, to_svg

    drawn = figure()
    write_whole(output, to_svg(drawn, TITLE) if output.suffix.lower() == ".svg" else to_png(drawn))
    print(f"drew {output}", file=sys.stderr)


def _flops(value: int) -> str:
    """To five digits in a table; JSON and CSV hold every one."""
    return f"{value:.4e}"


def _signed(value: float) -> str:
    whole = value.is_integer() and abs(value) < 2**53
    return f"{int(value):+,}" if whole else f"{value:+.6g}"


def _shown(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return repr(value) if isinstance(value, float) else str(value)
