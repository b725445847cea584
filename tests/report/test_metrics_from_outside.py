"""Reports of runs that measured a metric which this process does not know: its facts are those that the runs recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparseift_cli.base.metrics import METRICS, MetricFacts
from sparseift_cli.report.collect import collect
from sparseift_cli.report.frame import records
from sparseift_cli.report.make import ReportOptions, make
from sparseift_cli.report.plots.families import families
from sparseift_cli.report.read import RunReader
from tests.conftest import Sparseift
from tests.helpers.report_runs import seeds

NAME = "own_metric:SURE"
LOW, HIGH = 70.0, 72.0


def facts(*, lower: bool, unit: str = "points", key: str = "sure") -> dict[str, MetricFacts]:
    return {NAME: MetricFacts(key, "sure predictions (%)", unit, lower_is_better=lower)}


def two_groups(root: Path, **how: Any) -> Path:
    """Three seeds of a dense net at about 70, of a wide one at about 72."""
    seeds(root, "net_dense", [LOW, LOW + 0.5, LOW + 1], **how)
    seeds(root, "net_wide75_rigl", [HIGH, HIGH + 0.4, HIGH + 1], member="wide", **how)
    return root


@pytest.mark.parametrize(("lower", "outcome"), [(True, "worse"), (False, "better")])
@pytest.mark.parametrize("metric", [None, "sure", NAME])
def test_direction_unit_and_label_are_those_of_the_runs(
    tmp_path: Path, lower: bool, outcome: str, metric: str | None
) -> None:
    assert "sure" not in METRICS
    made = make([two_groups(tmp_path, recorded=facts(lower=lower))], ReportOptions("dense", metric=metric), [])
    (comparison,) = made.comparisons
    assert (comparison.metric, comparison.outcome, comparison.lower_is_better) == ("sure", outcome, lower)
    assert comparison.verdict.startswith("+1.97 points [")
    best = [row["best"] for row in records(made.groups)]
    assert best == pytest.approx([60.5, 62.4667] if lower else [70.5, 72.4667], abs=1e-3)
    (family,) = families(made)
    assert family.metric_name == "sure predictions (%)" + (" (lower is better)" if lower else "")


def test_commands_take_its_name(tmp_path: Path, sparseift: Sparseift) -> None:
    root = str(two_groups(tmp_path, recorded=facts(lower=True)))
    code, out, err = sparseift("report", root, "--columns", "group,sure", "--sort=-sure", "-f", "csv")
    assert (code, out.splitlines()[:2]) == (0, ["group,sure", f"net_wide75_rigl,{HIGH + 1.4 / 3}"]), err
    assert sparseift("report", root, "--fail-if", "sure > 80")[0] == 0
    code, _, err = sparseift("report", root, "--fail-if", "sure > 71")
    assert code == 1 and "net_wide75_rigl: sure = 72.4667" in err
    assert sparseift("report", root, "--filter", "sure > 80")[0] == 2
    assert "did you mean 'sure'?" in sparseift("report", root, "--metric", "surr")[2]
    code, out, err = sparseift("report", root, "--metric", "test_sure")
    assert code == 0 and "finished without test_sure" in out, err
    code, out, err = sparseift("report", root, "--baseline", "dense", "-f", "html")
    assert code == 0 and "sure predictions (%) (lower is better)" in out, err


def test_kept_runs_have_it_too(tmp_path: Path, sparseift: Sparseift) -> None:
    two_groups(tmp_path / "runs", recorded=facts(lower=True))
    assert sparseift("report", "keep", str(tmp_path / "runs"), "-o", str(tmp_path / "kept"))[0] == 0
    made = make([tmp_path / "kept"], ReportOptions("dense"), [])
    assert [c.outcome for c in made.comparisons] == ["worse"]
    assert "points" in made.comparisons[0].verdict


@pytest.mark.parametrize("other", [{"lower": False}, {"lower": True, "unit": "nats"}])
@pytest.mark.parametrize("metric", [None, "sure"])
def test_runs_that_contradict_each_other_are_not_compared(
    tmp_path: Path, other: dict[str, Any], metric: str | None
) -> None:
    seeds(tmp_path, "net_dense", [70.0, 70.5, 71.0], recorded=facts(lower=True))
    seeds(tmp_path, "net_wide75_rigl", [72.0, 72.4, 73.0], member="wide", recorded=facts(**other))
    made = make([tmp_path], ReportOptions("dense", metric=metric), [])
    assert not made.comparisons
    assert any("net_dense measures it in points (lower is better) but net_wide75_rigl" in note for note in made.notes)
    assert any("net_wide75_rigl: not compared" in note for note in made.notes)


def test_seeds_that_contradict_each_other_are_two_groups(tmp_path: Path) -> None:
    seeds(tmp_path / "a", "net_dense", [70.0, 70.5], recorded=facts(lower=True))
    seeds(tmp_path / "b", "net_dense", [70.0, 70.5], recorded=facts(lower=False))
    made = make([tmp_path], ReportOptions(), [])
    assert len(made.groups) == 2 and [row["n"] for row in records(made.groups)] == [2, 2]
    assert any("because runs differ in metric sure" in note for note in made.notes)


def test_a_metric_of_the_package_is_as_the_package_says(tmp_path: Path) -> None:
    made = make([two_groups(tmp_path, recorded=facts(lower=True, key="top1"))], ReportOptions("dense"), [])
    assert [(c.metric, c.outcome) for c in made.comparisons] == [("top1", "better")]


@pytest.mark.parametrize("key", ["n", "group", "comparison_key", "path", "seconds"])
def test_one_that_has_the_name_of_a_column_hides_nothing(tmp_path: Path, key: str) -> None:
    seeds(tmp_path, "net_dense", [70.0, 70.5], recorded=facts(lower=True, key=key))
    (row,) = records(make([tmp_path], ReportOptions(metric="loss"), []).groups)
    assert (row["group"], row["n"], row["metric"]) == ("net_dense", 2, "loss")


@pytest.mark.parametrize("wrong", [[], {NAME: "sure"}, {NAME: {"key": "sure", "label": "s", "unit": "p"}}])
def test_facts_of_another_form_are_not_read(tmp_path: Path, wrong: Any) -> None:
    (path,) = seeds(tmp_path, "net_dense", [70.0], recorded=facts(lower=True))
    whole = json.loads((path / "provenance.json").read_text("utf-8"))
    whole["sessions"][0]["metrics"] = wrong
    (path / "provenance.json").write_text(json.dumps(whole), "utf-8")
    run = RunReader().read(path)
    assert run.provenance is None and list(run.warnings) == ["provenance.json is not what a run writes"]
    assert run.measured == {} and collect([tmp_path]).runs
