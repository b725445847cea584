"""One table of metrics: what recipes may ask for, with `test_` before each on the test split."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sparseift_cli.base.metrics import (
    LOSS,
    METRICS,
    TEST,
    Metric,
    label_of,
    lower_is_better,
    metric_names,
    percent,
    unit_of,
)
from sparseift_cli.data import Targets
from sparseift_cli.errors import UsageError


def test_names_and_directions() -> None:
    assert metric_names()[:5] == ("loss", "top1", "top5", "perplexity", "bits_per_byte")
    assert {name for name in metric_names() if "top" in name} == {n for n in metric_names() if not lower_is_better(n)}
    assert (label_of("top1"), label_of(TEST + "loss"), label_of("seconds")) == (
        "top-1 accuracy (%)",
        "test loss",
        "seconds",
    )
    assert (unit_of("test_top5"), unit_of("seconds")) == ("points", "seconds")


def hits(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.argmax(-1).eq(targets).sum()


@pytest.fixture
def accuracy() -> Iterator[Metric]:
    metric = Metric("accuracy", "accuracy (%)", "points", lower_is_better=False, total=hits, value=percent)
    yield METRICS.register(metric.name, metric)
    del METRICS._entries[metric.name]


def test_a_metric_from_outside(accuracy: Metric) -> None:
    assert "test_accuracy" in metric_names() and label_of("test_accuracy") == "test accuracy (%)"
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    targets = torch.tensor([0, 1, 1])
    assert float(accuracy.total(logits, targets)) == 2
    assert accuracy.value(2.0, Targets(4)) == 50


def test_what_is_no_metric_is_refused() -> None:
    with pytest.raises(UsageError, match="not a Metric"):
        METRICS.register("accuracy", hits)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="unknown metric 'tpo1'") as caught:
        METRICS.get("tpo1")
    assert caught.value.hint == "did you mean 'top1'?"


def test_targets_past_the_end_do_not_count() -> None:
    logits, targets = torch.randn(6, 9), torch.tensor([0, 3, -100, 8, -100, 1])
    kept = targets != -100
    for name in ("loss", "top1", "top5"):
        total = METRICS.get(name).total
        assert float(total(logits, targets)) == pytest.approx(float(total(logits[kept], targets[kept])))
    assert LOSS.value(8.0, Targets(4)) == 2
    assert METRICS.get("bits_per_byte").value(8.0, Targets(4)) is None
