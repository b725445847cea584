"""`sparseift report figure4`: the article's Figure 4 against FLOPs that were audited here, and its two claims answered."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..errors import UsageError
from . import options
from .options import Format, without_github

SCHEMA = "sparseift.figure4/1"
HELP = """The article's Figure 4 again: published results against training FLOPs that are audited here.

Nothing is trained for it, and torch is not needed. The rows are the models of the figure; below stand what the article says
about larger dense models, and what the audit says to that.

Examples:

  sparseift report figure4                        # the rows, and the claims answered

  sparseift report figure4 -o figure4.svg         # the picture; .png too

  sparseift report figure4 --json
"""
_PICTURES = (".svg", ".png")
_OTHERS = (".pdf", ".jpg", ".jpeg", ".gif", ".eps", ".webp")


def figure4(
    fmt: options.FormatOption = Format.table,
    json: options.Json = False,
    output: options.Output = None,
) -> None:
    fmt = without_github(fmt, json, "report figure4")
    ending = output.suffix.lower() if output else ""
    if ending in _OTHERS:
        raise UsageError(f"{output}: the picture is written as .svg or .png", hint="give -o figure4.svg")
    if output is None or ending not in _PICTURES:
        _show(fmt, output)
        return
    if fmt is not Format.table:
        raise UsageError(
            f"{output} is a picture, which has no format {fmt}", hint="leave the format out, or give another file"
        )
    _draw(output)


def _show(fmt: Format, output: Path | None) -> None:
    from ..report.figure4 import claims, rows
    from ..report.published import evidence, published
    from .output import Column, Sheet, integer, render

    found: list[dict[str, Any]] = [
        {k: getattr(c, k) for k in ("claim", "claimed", "counted", "holds", "answer")} for c in claims()
    ]
    source, tags = published()[0].source, evidence()
    told = fmt in (Format.table, Format.md)
    columns = [
        Column("model", "model"),
        Column("transform", "transform", priority=4),
        Column("sparsity", "sparsity", right=True),
        Column("match", "match"),
        Column("algorithm", "algorithm", priority=3),
        Column("samples", "samples", integer, right=True, priority=5),
        Column("training_flops", "training FLOPs", _flops if told else integer, right=True),
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
        Column("claimed", "says", lambda v: f"{v:g}x", right=True, priority=1),
        Column("counted", "counted", lambda v: f"{v:.3f}x", right=True),
        Column("holds", "holds", lambda v: "yes" if v else "no"),
        *([] if told else [Column("answer", "answer")]),
    ]
    sheets = [
        Sheet("Published results beside audited training FLOPs", columns, rows(), notes if told else []),
        Sheet(
            "What the article says, and what is counted",
            claim_columns,
            found,
            [c["answer"] for c in found] if told else [],
        ),
    ]
    payload = {"schema": SCHEMA, "rows": rows(), "claims": found, "source": source, "evidence": dict(tags)}
    render(sheets, payload, fmt, output)


def _draw(output: Path) -> None:
    from ..report.plots.figure4 import TITLE, figure
    from ..report.plots.style import to_png, to_svg
    from .output import write_whole

    drawn = figure()
    write_whole(output, to_svg(drawn, TITLE) if output.suffix.lower() == ".svg" else to_png(drawn))
    print(f"drew {output}", file=sys.stderr)


def _flops(value: int) -> str:
    """To five digits in a table; JSON and CSV hold every one."""
    return f"{value:.4e}"
