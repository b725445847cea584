"""Runs of one recipe whose audits differ are of different models: kept apart, and with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparseift_cli.report.collect import collect
from sparseift_cli.report.frame import groups_frame, records, runs_frame
from sparseift_cli.report.grouping import labels
from sparseift_cli.report.make import ReportOptions, make
from tests.helpers.report_runs import make_run, seeds, write


def audit(params: int = 1000, flops: int = 6000, made: dict[str, int] | None = None) -> dict[str, Any]:
    dense = {"forward_macs": flops // 6, "forward_flops": flops // 3, "training_flops": flops, "params": params}
    return {
        "schema": "sparseift.flops/1",
        "training": {"steps": 780},
        "totals": {"dense": dense, "transformed": None if made is None else dense | made},
    }


def test_an_edited_model_is_another_group(sparseift, tmp_path: Path) -> None:
    for seed, params in enumerate((1000, 2000, 1000)):
        make_run(tmp_path, "net_dense", seed, audit=audit(params, 6 * params))
    code, out, _ = sparseift("report", str(tmp_path), "--columns", "group,n")
    assert code == 0
    assert "net_dense [parameters=1000]   2" in out and "net_dense [parameters=2000]   1" in out
    assert (
        "net_dense: 2 groups, because runs differ in parameters: with the same settings these are different models"
        in out
    )


@pytest.mark.parametrize(
    ("one", "other", "names"),
    [
        (audit(), audit(flops=7200), "dense training FLOPs a sample"),
        (audit(made={"training_flops": 6100}), audit(made={"training_flops": 6101}), "training FLOPs a sample"),
        (audit(made={"nonzero_params": 250}), audit(made={"nonzero_params": 251}), "non-zero parameters"),
    ],
)
def test_models_differ_where_any_count_differs(tmp_path: Path, one: Any, other: Any, names: str) -> None:
    make_run(tmp_path, seed=0, audit=one)
    make_run(tmp_path, seed=1, audit=other)
    report = make([tmp_path], ReportOptions(), [])
    assert len(report.groups) == 2
    assert report.notes[0].startswith(f"net_dense: 2 groups, because runs differ in {names}: ")
    (note,) = make([tmp_path], ReportOptions(by=("recipe",)), []).notes
    assert (
        note.startswith(f"recipe=net_dense: its 2 runs differ in {names}")
        and "not repetitions of one experiment" in note
    )


def test_a_run_that_does_not_tell_its_counts_stays_with_the_first(tmp_path: Path) -> None:
    for seed, counted in enumerate((None, audit(1000), {"schema": "sparseift.flops/1", "totals": {}}, audit(2000))):
        make_run(tmp_path, seed=seed, audit=counted)
    make_run(tmp_path, seed=4, audit=audit(1000), finished=False)
    found = labels(collect([tmp_path]).runs)
    assert [found.index(label) for label in found] == [0, 0, 0, 3, 0]


def test_code_that_was_edited_without_other_counts_is_noted(tmp_path: Path) -> None:
    for seed, digest in enumerate(("aa", "bb", None)):
        run = make_run(tmp_path, seed=seed, audit=audit())
        content = json.loads((run / "provenance.json").read_text())
        if digest:
            content["sessions"][0]["source"] = {"mym": digest}
        write(run / "provenance.json", content)
    report = make([tmp_path], ReportOptions(), [])
    assert len(report.groups) == 1
    assert report.notes == ["net_dense: the source of mym was edited between its runs, or in one of them"]


def test_old_spelling_of_a_model_is_the_same_model(tmp_path: Path) -> None:
    seeds(tmp_path / "old", "net_dense", [70.0, 72.0], model="sparseift_cli.quickstart:digits_mlp")
    make_run(tmp_path / "new", "net_dense", 2, model="digits_mlp", stamp=1)
    (row,) = records(groups_frame(runs_frame(collect([tmp_path]).runs)))
    assert (row["group"], row["model"], row["n"]) == ("net_dense", "digits_mlp", 3)
