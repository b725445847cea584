"""Directories that somebody else filled: each is named, or read with a warning, and no report hangs or breaks over one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from sparseift_cli.report.collect import collect
from sparseift_cli.report.html.page import page
from sparseift_cli.report.make import ReportOptions, make
from sparseift_cli.report.plots.pictures import save_all
from sparseift_cli.report.read import Run
from tests.helpers.report_runs import make_run, seeds, write


def changed(run: Path, name: str, **values: Any) -> Path:
    """The run, with other values in one of its JSON files."""
    write(run / name, json.loads((run / name).read_text("utf-8")) | values)
    return run


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "provenance.json", "audit.json"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path)
    (run / name).unlink()
    os.mkfifo(run / name)
    found = collect([tmp_path])
    assert [reason for _, reason in found.skipped] == [f"{name} is not a file"] and not found.runs


def test_a_pipe_in_the_place_of_the_lock_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(make_run(tmp_path, finished=False) / "lock")
    assert collect([tmp_path]).runs[0].state == "stopped"


@pytest.mark.parametrize("steps", [True, -3, "780", None])
def test_a_summary_without_a_count_of_steps_is_damaged(tmp_path: Path, steps: Any) -> None:
    changed(make_run(tmp_path), "summary.json", steps=steps)
    assert "lacks its steps" in collect([tmp_path]).skipped[0][1]


SESSION = {"started": "2026-01-01", "git": {"commit": "c0ffee"}, "versions": {"torch": "2.13.0"}}
LAYER = {"name": "a", "status": "transformed", "dense_macs": 1, "transformed_macs": 1, "nnz": 1, "weights": 1}
ODD = {
    "commit": ("provenance.json", {"sessions": [SESSION | {"git": {"commit": 7}}]}),
    "started": ("provenance.json", {"sessions": [SESSION | {"started": 5}]}),
    "device": ("provenance.json", {"sessions": [SESSION | {"device": ["cpu"]}]}),
    "at once": ("provenance.json", {"sessions": [SESSION | {"at_once": "many"}]}),
    "environment": ("provenance.json", {"sessions": [SESSION | {"environment": ["OMP_NUM_THREADS"]}]}),
    "kernels": ("provenance.json", {"sessions": [SESSION | {"kernels": [{"backend": "masked"}]}]}),
    "torch": ("provenance.json", {"sessions": [SESSION | {"versions": {"torch": [1]}}]}),
    "row": ("audit.json", {"layers": [None]}),
    "macs": ("audit.json", {"layers": [LAYER | {"dense_macs": "x"}]}),
    "status": ("audit.json", {"layers": [LAYER | {"status": "odd"}]}),
    "weights": ("audit.json", {"layers": [LAYER | {"weights": "x"}]}),
    "totals": ("audit.json", {"totals": []}),
    "side": ("audit.json", {"totals": {"dense": 7}}),
}


@pytest.mark.parametrize("what", ODD)
def test_odd_content_beside_a_run_is_a_warning(tmp_path: Path, what: str) -> None:
    name, values = ODD[what]
    changed(make_run(tmp_path), name, **values)
    (run,) = collect([tmp_path]).runs
    assert run.warnings == (f"{name} is not what a run writes",)
    page(make([tmp_path], ReportOptions(), []))


def control_characters(root: Path) -> Run:
    run = changed(make_run(root, "net"), "summary.json", recipe="net\x1b[31m")
    changed(run, "audit.json", transform={"sparsity": 0.5}, layers=[LAYER | {"name": "conv\x07"}])
    text = (run / "recipe.yaml").read_text("utf-8").replace('"resnet18_cifar"', '"net\\e[1m"')
    (run / "recipe.yaml").write_text(text, "utf-8")
    return collect([root]).runs[0]


def test_no_name_reaches_the_terminal_as_a_command_to_it(tmp_path: Path) -> None:
    run = control_characters(tmp_path)
    assert run.name == "net\\x1b[31m"
    assert run.recipe["model"]["name"] == "net\\x1b[1m"
    assert run.audit and run.audit["layers"][0]["name"] == "conv\\x07"
    made = make([tmp_path], ReportOptions(), [])
    assert "\x1b" not in page(made) and "\x07" not in page(made)
    assert save_all(made, tmp_path / "figures")


def test_a_recipe_that_is_no_name_is_called_as_its_folder(tmp_path: Path) -> None:
    changed(make_run(tmp_path, "net_dense"), "summary.json", recipe=["a"])
    assert collect([tmp_path]).runs[0].name == "net_dense"


def test_numbers_beyond_a_float_break_nothing(tmp_path: Path) -> None:
    make_run(tmp_path, "net_dense", 0, flops=10**400)
    make_run(tmp_path, "net_dense", 1, (1e308, 1e308))
    make_run(tmp_path, "net_dense", 2, (1e308, -1e308))
    make_run(tmp_path, "net_wide", 0, member="wide", more={"flops": [1]})
    seeds(tmp_path, "net_far", [1e308, -1e308, 1e308], member="wide", sparsity=0.5)
    made = make([tmp_path], ReportOptions("dense"), [])
    dense = made.groups.iloc[0]
    assert dense["flops"] == 10**15  # of the runs that say it
    assert page(made)


def test_a_link_to_a_folder_is_named_and_not_followed(tmp_path: Path) -> None:
    make_run(tmp_path / "elsewhere", "net_dense")
    make_run(tmp_path / "runs", "net_wide", member="wide")
    (tmp_path / "runs" / "far").symlink_to(tmp_path / "elsewhere")
    found = collect([tmp_path / "runs"])
    assert found.skipped == [(tmp_path / "runs" / "far", "foreign: a link to a folder is not followed")]
    assert not found.damaged and len(found.runs) == 1
