"""A recipe that trains a model, on data, with an optimiser and a schedule, by a metric, none of which is in the package."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparseift_cli.base.metrics import METRICS, NOT_METRICS, metrics_in
from sparseift_cli.base.registry import Registry
from sparseift_cli.cli.options import Format
from sparseift_cli.cli.progress import row_fields
from sparseift_cli.cli.train_view import show_runs
from sparseift_cli.data import DATASETS
from sparseift_cli.errors import UsageError
from sparseift_cli.models.zoo.catalog import MODELS
from sparseift_cli.optim.optimizers import OPTIMIZERS
from sparseift_cli.optim.schedules import SCHEDULES
from sparseift_cli.recipe.load import load
from sparseift_cli.recipe.write import resolved_yaml
from sparseift_cli.runs.metrics import read_metrics
from sparseift_cli.train.run import run_jobs
from tests.helpers import outside

RECIPE = """
model: {model}
data: {data}
transform: wide
sparsity: 0.5
algorithm: {{name: rigl, delta_t: 4}}
optimizer: {{name: "{optimizer}", lr: 0.005, alpha: 0.8}}
schedule: {{name: "{schedule}", period: 10 steps}}
training: {{steps: 24, batch_size: 16}}
evaluation: {{every: 8 steps, metrics: [loss, "{metric}"]}}
checkpoint: {{best: "{metric}"}}
"""
BY_PATH = {
    "model": "tests.helpers.outside:SMALL_NET",
    "data": "tests.helpers.outside:STRIPES",
    "optimizer": "tests.helpers.outside:RMSProp",
    "schedule": "tests.helpers.outside:Halving",
    "metric": "tests.helpers.outside:ERROR",
}
BY_NAME = {"model": "small_net", "data": "stripes", "optimizer": "rmsprop", "schedule": "halving", "metric": "error"}
KINDS: dict[str, tuple[Registry[Any], Any]] = {
    "model": (MODELS, outside.SMALL_NET),
    "data": (DATASETS, outside.STRIPES),
    "optimizer": (OPTIMIZERS, outside.RMSProp),
    "schedule": (SCHEDULES, outside.Halving),
    "metric": (METRICS, outside.ERROR),
}


@pytest.fixture
def registered() -> Iterator[None]:
    for kind, (registry, entry) in KINDS.items():
        registry.register(BY_NAME[kind], entry)
    yield
    for kind, (registry, _) in KINDS.items():
        del registry._entries[BY_NAME[kind]]


def trained(tmp_path: Path, names: dict[str, str]) -> list[dict[str, Any]]:
    tmp_path.mkdir()
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(**names), "utf-8")
    recipe = load(path)
    again = tmp_path / "again.yaml"
    again.write_text(resolved_yaml(recipe.spec), "utf-8")
    assert load(again).spec == recipe.spec
    (summary,) = run_jobs([(recipe, 0)], tmp_path / "runs", None, lambda row: None, lambda *_: None)
    return list(read_metrics(Path(summary["path"]) / "metrics.jsonl"))


@pytest.mark.filterwarnings("ignore:RMSprop may move weights")
def test_by_path_and_by_name_they_train_alike(tmp_path: Path, registered: None) -> None:
    by_path, by_name = (trained((tmp_path / str(i)), names) for i, names in enumerate((BY_PATH, BY_NAME)))
    assert [row["lr"] for row in by_path] == [0.005, 0.0025, 0.00125]
    assert [row["loss"] for row in by_path] == [row["loss"] for row in by_name]
    assert by_path[-1]["error"] == by_name[-1]["error"] <= 50
    assert by_path[-1]["density"] < 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "tests.helpers.outside:RMSProp"}, "RMSProp is not a metric"),
        ({"data": "tests.helpers.outside:ERROR"}, "ERROR is not a data set"),
        ({"optimizer": "tests.helpers.outside:Halving"}, "Halving is not an optimiser"),
        ({"schedule": "tests.helpers.outside:NONE"}, "has no 'NONE'"),
    ],
)
def test_what_is_of_another_kind_is_refused(tmp_path: Path, change: dict[str, str], message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(**BY_PATH | change), "utf-8")
    with pytest.raises(UsageError, match=message):
        load(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("alpha: 0.8", "alpha: 1", "must be below 1"),
        ("alpha: 0.8", "momentum: 0.9", "momentum"),
        ("period: 10 steps", "period: often", "expected a duration"),
    ],
)
def test_options_from_outside_are_checked(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(**BY_PATH).replace(old, new), "utf-8")
    with pytest.raises(UsageError, match=message):
        load(path)


OWN_METRIC = """
from sparseift.base.metrics import Metric, percent

def wrong(logits, targets):
    return logits.argmax(-1).ne(targets).sum()

MISSED = Metric("missed", "missed predictions (%)", "points", lower_is_better=True, total=wrong, value=percent)
"""


@pytest.mark.filterwarnings("ignore:RMSprop may move weights")
def test_a_metric_from_outside_is_shown_and_reported_without_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "missed_metric.py").write_text(OWN_METRIC, "utf-8")
    monkeypatch.syspath_prepend(str(code))
    path = tmp_path / "own.yaml"
    text = RECIPE.format(**BY_PATH | {"metric": "missed_metric:MISSED"}).replace("[loss, ", "[").replace("24", "8")
    path.write_text(text.replace("every: 8", "every: 4").replace("period: 10", "period: 20"), "utf-8")
    rows: list[Any] = []
    (summary,) = run_jobs([(load(path), 0)], tmp_path / "runs", None, rows.append, lambda *_: None)
    row = rows[-1]
    assert metrics_in(row) == ["loss", "missed"] and {*row} <= {"loss", "missed", *NOT_METRICS}
    assert f"missed {row['missed']:.4g}" in row_fields(row, 8)
    show_runs([summary], Format.table)
    assert "missed" in capsys.readouterr().out
    provenance = json.loads((Path(summary["path"]) / "provenance.json").read_text("utf-8"))
    assert provenance["sessions"][0]["metrics"]["missed_metric:MISSED"] == {
        "key": "missed",
        "label": "missed predictions (%)",
        "unit": "points",
        "lower_is_better": True,
    }
    command = [sys.executable, "-m", "sparseift_cli", "report", "runs", "--json"]
    for more in ([], ["--metric", "missed", "--sort=-missed", "--filter", "missed >= 0"]):
        done = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (group,) = json.loads(done.stdout)["groups"]
        assert (group["metric"], group["mean"]) == ("missed", row["missed"])
        assert group["best"] == min(line["missed"] for line in rows)


def test_two_metrics_of_one_name_are_refused(tmp_path: Path, registered: None) -> None:
    path = tmp_path / "recipe.yaml"
    both = RECIPE.format(**BY_PATH).replace("metrics: [loss, ", 'metrics: ["tests.helpers.outside:OTHER_ERROR", ')
    path.write_text(both, "utf-8")
    with pytest.raises(UsageError, match="are both called 'error'"):
        load(path)
