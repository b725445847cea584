"""`sparseift inspect` of a run directory: what it is, how far it got, what next. Never taken for a transformed model."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from sparseift_cli.transforms.artifact import is_artifact
from tests.helpers.report_runs import make_run


@pytest.fixture(autouse=True)
def inside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands run in `tmp_path`."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished wide run with a plan, two checkpoints and a name that a shell must quote."""
    path = make_run(tmp_path / "my runs", "net_wide75_rigl", 3, (50.0, 70.0), member="wide", plan={"layers": []})
    for step in (390, 780):
        (path / "checkpoints" / f"step-{step:08}").mkdir(parents=True)
    return path.relative_to(tmp_path)


def test_a_finished_run(sparseift, run: Path) -> None:
    code, out, _ = sparseift("inspect", str(run), "--json")
    data = json.loads(out)
    assert code == 0 and data["schema"] == "sparseift.run/1"
    assert [data[k] for k in ("path", "recipe", "seed", "state", "step", "steps", "metric", "value", "checkpoint")] == [
        str(run),
        "net_wide75_rigl",
        3,
        "finished",
        780,
        780,
        "top1",
        70.0,
        780,
    ]
    assert data["checkpoints"] == [390, 780] and data["last"]["train_loss"] == 0.5
    assert data["next"] == [f"sparseift report '{run}'", f"sparseift inspect '{run}' --spectral"]
    table, markdown = sparseift("inspect", str(run))[1], sparseift("inspect", str(run), "-f", "md")[1]
    facts, last = (
        list(csv.DictReader(io.StringIO(part))) for part in sparseift("inspect", str(run), "-f", "csv")[1].split("\n\n")
    )
    assert {"name": "state", "value": "finished"} in facts and {"name": "top1", "value": "70.0"} in last
    for shown in (table, markdown):
        assert "a finished run" in shown and "newest checkpoint" in shown and data["next"][0] in shown


def test_kernels_and_executed_flops(sparseift, run: Path) -> None:
    plain = json.loads(sparseift("inspect", str(run), "--json")[1])
    assert plain["kernels"] is None and plain["flops_executed"] is None  # older versions did not write them
    file, summary = run / "provenance.json", run / "summary.json"
    found = json.loads(file.read_text())
    group = {"backend": "blocks", "block": 64, "how": "Triton, pointers", "reason": "", "weights": ["a", "b"]}
    found["sessions"][-1]["kernels"] = [group]
    file.write_text(json.dumps(found))
    done = json.loads(summary.read_text())
    done["flops"]["executed"] = 3 * done["flops"]["spent"]
    summary.write_text(json.dumps(done))
    data = json.loads(sparseift("inspect", str(run), "--json")[1])
    assert data["kernels"] == "2 layers in blocks of 64 (Triton, pointers)"
    assert data["flops_executed"] == 3 * data["flops_spent"]
    assert "FLOPs executed" in sparseift("inspect", str(run))[1]
    row = json.loads(sparseift("report", str(run), "--columns", "flops_spent,flops_executed", "--json")[1])["groups"][0]
    assert row["flops_executed"] == 3 * row["flops_spent"]


def test_a_kept_run(sparseift, run: Path) -> None:
    sparseift("report", "keep", str(run), "-o", "kept")
    (kept,) = Path("kept").glob("*/*.json")
    code, out, _ = sparseift("inspect", str(kept), "--json")
    of_run = json.loads(sparseift("inspect", str(run), "--json")[1])
    data = json.loads(out)
    assert code == 0 and data["path"] == str(kept) and data["checkpoints"] == []
    assert data["last"] == of_run["last"] and data["value"] == of_run["value"]
    kept.write_text(kept.read_text().replace("70.0", "71.0"))
    code, _, err = sparseift("inspect", str(kept))
    assert code == 4 and "its SHA-256 differs" in err


def test_a_stopped_run_says_how_to_go_on(sparseift, tmp_path: Path) -> None:
    path = make_run(tmp_path / "runs", "net_dense", 0, (50.0,), finished=False).relative_to(tmp_path)
    out = sparseift("inspect", str(path))[1]
    assert "a stopped run" in out and "newest checkpoint" not in out
    assert f"sparseift train {path}/recipe.yaml --resume {path}" in out
    (path / "metrics.jsonl").unlink()
    code, out, _ = sparseift("inspect", str(path))
    assert code == 0 and "newest line" not in out and "next, " in out


def test_a_damaged_run_and_options_of_others(sparseift, run: Path) -> None:
    code, out, err = sparseift("inspect", str(run), "--values", "--why")
    assert (code, out) == (2, "") and "is a run; --why, --values are not for it" in err
    (run / "summary.json").write_text("{")
    code, out, err = sparseift("inspect", str(run))
    assert (code, out) == (4, "") and "summary.json is not JSON" in err and "hint:" in err


def test_it_is_no_transformed_model(sparseift, run: Path) -> None:
    assert (run / "plan.json").is_file() and (run / "provenance.json").is_file() and not is_artifact(run)
    code, _, err = sparseift("transform", "resnet20", "-s", "0.5", "-o", str(run), "--force", "--plan-only")
    assert code == 4 and "was not written by sparseift transform" in err and (run / "plan.json").is_file()


def test_a_folder_of_runs_is_told_what_reads_it(sparseift, tmp_path: Path) -> None:
    (tmp_path / "runs" / "net").mkdir(parents=True)
    code, out, err = sparseift("inspect", "runs")
    assert (code, out) == (2, "")
    assert "runs is a directory, not a checkpoint" in err and "sparseift report runs" in err
