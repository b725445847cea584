"""The axes of a sweep in a report: tables of a metric over two of them, and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparseift_cli.report.make import ReportOptions, make
from sparseift_cli.report.sweep import sweep_tables
from tests.helpers.report_runs import make_run, seeds

Command = Callable[..., tuple[int, str, str]]


def of_sweep(axes: dict[str, Any], recipe: str = "net") -> dict[str, Any]:
    return {"sweep": {"recipe": recipe, "axes": axes}}


def write_sweep(root: Path) -> None:
    """Dense, and sparsity 0.5, 0.75 and 0.95 with set and rigl; 0.95 with set failed."""
    seeds(root, "dense", [60.0, 62.0], session=of_sweep({}))
    for i, sparsity in enumerate((0.95, 0.5, 0.75)):
        for j, algorithm in enumerate(("set", "rigl")):
            if (sparsity, algorithm) != (0.95, "set"):
                how: dict[str, Any] = {"member": "sparse_wide", "sparsity": sparsity, "algorithm": algorithm}
                session = of_sweep({"sparsity": sparsity, "algorithm": algorithm})
                name = f"sparsity={sparsity},algorithm={algorithm}"
                seeds(root, name, [70.0 + 10 * i + j, 72.0 + 10 * i + j], session=session, **how)


def test_a_table_over_two_axes(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    (table,) = sweep_tables(make([tmp_path], ReportOptions(), []))
    assert (table.recipe, table.row_axis, table.column_axis) == ("net", "sparsity", "algorithm")
    assert list(table.rows) == [0.5, 0.75, 0.95] and set(table.columns) == {"set", "rigl"}
    means = {place: row["mean"] for place, row in table.groups.items()}
    assert means == {(0.5, "set"): 81, (0.5, "rigl"): 82, (0.75, "set"): 91, (0.75, "rigl"): 92, (0.95, "rigl"): 72}
    assert [(row["group"], row["mean"]) for row in table.off_axes] == [("dense", 61)]


def test_every_value_of_a_third_axis_has_a_table(tmp_path: Path) -> None:
    for lr in (0.1, 0.2):
        make_run(tmp_path, f"dense,lr={lr}", lr=lr, session=of_sweep({"lr": lr}))
        for sparsity in (0.5, 0.75):
            for n in (1, 2):
                axes = {"sparsity": sparsity, "width": n, "lr": lr}
                name, how = f"{sparsity}-{n}-{lr}", {"member": "sparse_wide", "sparsity": sparsity}
                make_run(tmp_path, name, lr=lr, values=(1.0, n), session=of_sweep(axes), **how)
    tables = sweep_tables(make([tmp_path], ReportOptions(), []))
    assert [(t.row_axis, t.column_axis, t.others) for t in tables] == [
        ("sparsity", "width", {"lr": 0.1}),
        ("sparsity", "width", {"lr": 0.2}),
    ]
    assert [[row["group"] for row in t.off_axes] for t in tables] == [["dense,lr=0.1"], ["dense,lr=0.2"]]
    assert all(len(t.groups) == 4 for t in tables)


def test_a_dense_baseline_with_a_value_on_one_axis_is_in_the_table(tmp_path: Path) -> None:
    for lr in (0.1, 0.2):
        make_run(tmp_path, f"dense,lr={lr}", lr=lr, session=of_sweep({"lr": lr}))
        for s in (0.5, 0.75):
            how: dict[str, Any] = {"member": "sparse_wide", "sparsity": s}
            make_run(tmp_path, f"{s},{lr}", lr=lr, session=of_sweep({"sparsity": s, "lr": lr}), **how)
    (table,) = sweep_tables(make([tmp_path], ReportOptions(), []))
    assert (list(table.rows), list(table.columns)) == ([None, 0.5, 0.75], [0.1, 0.2])
    assert len(table.groups) == 6 and not table.off_axes


def test_the_command_shows_tables_and_axes_of_kept_runs_too(sparseift: Command, tmp_path: Path) -> None:
    write_sweep(tmp_path / "runs")
    code, out, err = sparseift("report", str(tmp_path / "runs"))
    assert code == 0, err
    assert "net: top-1 accuracy (%) by sparsity and algorithm" in out and "dense: 61.000 +- 1.41 (2)" in out
    row = next(line for line in out.splitlines() if line.startswith(" 0.75 "))
    assert sorted(part.strip() for part in row.split("  ") if "+-" in part) == [
        "91.000 +- 1.41 (2)",
        "92.000 +- 1.41 (2)",
    ]
    assert sparseift("report", "keep", str(tmp_path / "runs"), "-o", str(tmp_path / "kept"))[0] == 0
    for folder in ("runs", "kept"):
        code, out, err = sparseift("report", str(tmp_path / folder), "--json")
        assert code == 0, err
        (sweep,) = json.loads(out)["sweeps"]
        assert sweep["recipe"] == "net" and sweep["axes"]["sparsity"] == [0.5, 0.75, 0.95]
        axes = {group["group"]: group["axes"] for group in sweep["groups"]}
        assert axes["dense"] == {} and axes["sparsity=0.5,algorithm=set"] == {"sparsity": 0.5, "algorithm": "set"}


def test_what_is_no_sweep_is_none(tmp_path: Path) -> None:
    for i, odd in enumerate((None, 3, {"recipe": "net"}, {"recipe": "net", "axes": [1]})):
        make_run(tmp_path, f"net{i}", session={"sweep": odd})
    report = make([tmp_path], ReportOptions(), [])
    assert [run.sweep for run in report.runs] == [None] * 4 and sweep_tables(report) == []


def test_two_sweeps_are_two_tables(tmp_path: Path) -> None:
    for recipe in ("one", "two"):
        for s in (0.5, 0.75):
            for lr in (0.1, 0.2):
                how: dict[str, Any] = {"member": "sparse_wide", "sparsity": s, "lr": lr}
                session = of_sweep({"sparsity": s, "lr": lr}, recipe)
                make_run(tmp_path / recipe, f"{recipe} {s} {lr}", session=session, **how)
    tables = sweep_tables(make([tmp_path], ReportOptions(), []))
    assert [table.recipe for table in tables] == ["one", "two"] and all(len(t.groups) == 4 for t in tables)
