"""A recipe that trains a model, on data, with an optimiser and a schedule, by a metric, none of which is in the package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparseift_cli.base.metrics import METRICS
from sparseift_cli.base.registry import Registry
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
