"""What a transform is called in a report, what is kept apart, and which of it may stand beside a published row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparseift_cli.report.frame import records, transform_columns
from sparseift_cli.report.make import ReportOptions, make
from tests.helpers.report_runs import seeds

WIDE: dict[str, Any] = {
    "member": "wide",
    "match": "layer",
    "scope": "all",
    "pattern": "unstructured",
    "width_multiple": 1,
}
CONTROL = {"scope": "none", "match": "off"}


def group(root: Path, name: str, values: list[float], sparsity: float = 0.9, **transform: Any) -> None:
    """Seeds of a wide transform with other settings."""
    for run in seeds(
        root, name, values, member="wide", sparsity=sparsity, epochs=200, algorithm=transform.pop("algorithm", None)
    ):
        text = (run / "recipe.yaml").read_text("utf-8")
        more = "".join(
            f"  {key}: {json.dumps(value)}\n"
            for key, value in (WIDE | transform).items()
            if key not in ("member", "match")
        )
        text = text.replace("  match: layer\n", f'  match: "{transform.get("match", "layer")}"\n{more}')
        (run / "recipe.yaml").write_text(text, "utf-8")


def test_the_control_is_no_wide() -> None:
    assert transform_columns(WIDE | CONTROL)["transform"] == "sparse"
    assert transform_columns(WIDE) == {
        "transform": "wide",
        "match": "layer",
        "scope": "all",
        "pattern": "unstructured",
        "widths": None,
    }
    assert transform_columns({"member": "sparse_doped"})["transform"] == "doped"
    assert set(transform_columns({}).values()) == {"dense", None}
    assert transform_columns(WIDE | {"width_multiple": 8})["widths"] == "multiples of 8"
    assert transform_columns(WIDE | {"base_width": 96})["widths"] == "base 96"


def test_what_is_not_the_same_transform_is_kept_apart(tmp_path: Path) -> None:
    seeds(tmp_path, "net_dense", [70, 71, 72], epochs=200)
    ways = [{}, CONTROL, {"scope": "inner"}, {"pattern": "4x4"}, {"width_multiple": 8}, {"base_width": 96}]
    for i, how in enumerate(ways):  # one name for all, as `train --set` leaves it
        group(tmp_path / str(i), "net_wide", [71, 72, 73 + i / 10], **how)
    rows = records(make([tmp_path], ReportOptions(), []).groups)
    assert [row["n"] for row in rows] == [3] * 7
    assert len({row["group"] for row in rows}) == 7
    assert {(row["transform"], row["scope"], row["pattern"], row["widths"]) for row in rows} == {
        ("dense", None, None, None),
        ("wide", "all", "unstructured", None),
        ("sparse", "none", "unstructured", None),
        ("wide", "inner", "unstructured", None),
        ("wide", "all", "4x4", None),
        ("wide", "all", "unstructured", "multiples of 8"),
        ("wide", "all", "unstructured", "base 96"),
    }


def test_pooled_groups_say_what_their_runs_differ_in(tmp_path: Path) -> None:
    seeds(tmp_path, "net_dense", [70, 71, 72], epochs=200)
    group(tmp_path, "net_wide", [71, 72, 73])
    group(tmp_path, "net_inner", [71, 72, 74], scope="inner")
    notes = make([tmp_path], ReportOptions(by=("transform",)), []).notes
    assert notes == [
        "transform=wide: its 6 runs differ in transform.scope, so they are not repetitions of one experiment"
    ]


@pytest.mark.parametrize(
    "how", [CONTROL, {"scope": "inner"}, {"pattern": "4x4"}, {"base_width": 96}, {"algorithm": "dense"}], ids=str
)
def test_only_the_published_transform_is_shown_with_it(tmp_path: Path, how: dict[str, Any]) -> None:
    seeds(tmp_path, "net_dense", [70, 71, 72], epochs=200)
    group(tmp_path, "net_other", [71, 72, 73], **how)
    assert [b.group for b in make([tmp_path], ReportOptions(reference="paper"), []).reference if b.group] == []


def test_what_else_differs_from_the_published_row_is_said(tmp_path: Path) -> None:
    group(tmp_path, "net_wide", [71, 72, 73], match="model", width_multiple=8)
    (beside,) = [b for b in make([tmp_path], ReportOptions(reference="paper"), []).reference if b.group]
    assert beside.note and "ours has match model and widths in multiples of 8" in beside.note


def test_a_wide_network_trained_dense_is_no_dense_baseline(tmp_path: Path) -> None:
    seeds(tmp_path, "base", [70, 71, 72])
    seeds(tmp_path, "upper", [75, 76, 77.5], member="wide", algorithm="dense", flops=4 * 10**15)
    found = make([tmp_path], ReportOptions("dense"), []).comparisons
    assert [(c.baseline, c.candidate, c.outcome) for c in found] == [("base", "upper", "refused")]
