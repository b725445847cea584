"""One table of metrics: what recipes may ask for, with `test_` before each on the test split."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sparseift_cli.base.metrics import (
    LOSS,
    METRICS,
    TEST,
    Metric,
    MetricFacts,
    facts_of,
    metric_names,
    percent,
)
from sparseift_cli.data import Targets
from sparseift_cli.errors import UsageError


def test_names_and_directions() -> None:
    assert metric_names()[:6] == (
        "loss",
        "top1",
        "top5",
        "perplexity_per_token",
        "perplexity_per_word",
        "bits_per_byte",
    )
    assert {name for name in metric_names() if "top" in name} == {
        n for n in metric_names() if not facts_of(n).lower_is_better
    }
    labels = [facts_of(name).label for name in ("top1", TEST + "loss", "seconds")]
    assert labels == ["top-1 accuracy (%)", "test loss", "seconds"]
    assert (facts_of("test_top5").unit, facts_of("seconds").unit) == ("points", "seconds")


def hits(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.argmax(-1).eq(targets).sum()


@pytest.fixture
def accuracy() -> Iterator[Metric]:
    metric = Metric("accuracy", "accuracy (%)", "points", lower_is_better=False, total=hits, value=percent)
    yield METRICS.register(metric.name, metric)
    del METRICS._entries[metric.name]


def test_a_metric_from_outside(accuracy: Metric) -> None:
    assert "test_accuracy" in metric_names() and facts_of("test_accuracy").label == "test accuracy (%)"
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    targets = torch.tensor([0, 1, 1])
    assert float(accuracy.total(logits, targets)) == 2
    assert accuracy.value(2.0, Targets(4)) == 50


def test_what_is_no_metric_is_refused() -> None:
    with pytest.raises(UsageError, match="not a Metric"):
        METRICS.register("accuracy", hits)
    with pytest.raises(UsageError, match="unknown metric 'tpo1'") as caught:
        METRICS.get("tpo1")
    assert caught.value.hint == "did you mean 'top1'?"


@pytest.mark.parametrize("name", ["top1", "test_accuracy", "seconds", "own accuracy"])
def test_a_name_that_reports_use_otherwise_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="its name"):
        METRICS.register("accuracy", Metric(name, "accuracy (%)", "points", False, total=hits, value=percent))
    assert "accuracy" not in METRICS


def test_what_a_run_recorded_is_used_where_the_metric_is_not_known() -> None:
    recorded = {
        "sure": MetricFacts("sure", "sure (%)", "points", lower_is_better=True),
        "top1": MetricFacts("top1", "?", "?", lower_is_better=True),
    }
    assert facts_of("test_sure", recorded) == MetricFacts("test_sure", "test sure (%)", "points", lower_is_better=True)
    assert facts_of("sure") == MetricFacts("sure", "sure", "sure", lower_is_better=False)
    assert facts_of("top1", recorded) == facts_of("top1")
    assert MetricFacts.from_json(recorded["sure"].to_json()) == recorded["sure"]


def test_targets_past_the_end_do_not_count() -> None:
    logits, targets = torch.randn(6, 9), torch.tensor([0, 3, -100, 8, -100, 1])
    kept = targets != -100
    for name in ("loss", "top1", "top5"):
        total = METRICS.get(name).total
        assert float(total(logits, targets)) == pytest.approx(float(total(logits[kept], targets[kept])))
    assert LOSS.value(8.0, Targets(4)) == 2
    assert METRICS.get("bits_per_byte").value(8.0, Targets(4)) is None


def test_a_perplexity_says_of_what() -> None:
    """Of 4 tokens in 2 words, at 3 nats in all."""
    counted = Targets(4, words=2, bytes=8)
    values = {name: METRICS.get(name).value(3.0, counted) for name in ("perplexity_per_token", "perplexity_per_word")}
    assert values == {
        "perplexity_per_token": pytest.approx(math.exp(0.75)),
        "perplexity_per_word": pytest.approx(math.exp(1.5)),
    }
    assert METRICS.get("perplexity_per_word").value(3.0, Targets(4)) is None
    assert METRICS.get("perplexity_per_token").value(1e9, counted) == math.exp(700)
    assert facts_of("test_perplexity_per_word").label == "test perplexity per word"
    with pytest.raises(UsageError, match="did you mean 'perplexity_per_"):
        METRICS.get("perplexity")
    with pytest.raises(UsageError, match="does not say of what"):
        METRICS.register(
            "perplexity", Metric("perplexity", "p", "p", lower_is_better=True, total=LOSS.total, value=LOSS.value)
        )
