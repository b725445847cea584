"""Metrics: what an evaluation measures, in one table of objects that training, recipes and reports read.

A metric from outside is a `Metric` that `METRICS.register` adds, an entry point `sparseift.metrics`, or
`package.module:Name` in a recipe's evaluation.metrics:

    def in_top3(logits, targets):
        return logits.topk(3, dim=-1).indices.eq(targets[:, None]).any(1).sum()

    TOP3 = Metric("top3", "top-3 accuracy (%)", "points", lower_is_better=False, total=in_top3, value=percent)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from .registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

TEST = "test_"
"""Before the name of what was measured on a test split that training never watched (`evaluation.test`)."""


class Counted(Protocol):
    """What an evaluation predicted, over the whole split (`data.Targets`)."""

    @property
    def tokens(self) -> int:
        """Images, or predicted tokens."""
        ...

    @property
    def words(self) -> int | None: ...

    @property
    def bytes(self) -> int | None: ...


@dataclass(frozen=True, slots=True)
class Metric:
    """How one number is computed from all outputs and targets of a split.

    Args:
        name: its key in metrics.jsonl and its column in a report.
        label: what it is called on an axis, with its unit.
        unit: what a difference of it is measured in.
        lower_is_better: False where larger values are better.
        total: called for every batch with logits [N, C] and targets int64 [N] (-100: no target, for tokens past the end);
            gives a scalar tensor, and these are summed in float64 over all batches and processes. Metrics with the same
            `total` share one call.
        value: the number, from that sum and from how much was predicted; None where the data does not allow it.
        kinds: the kinds of data that it is for; for others it is left out.
    """

    name: str
    label: str
    unit: str
    lower_is_better: bool
    total: Callable[[Tensor, Tensor], Tensor]
    value: Callable[[float, Counted], float | None]
    kinds: tuple[Literal["image", "tokens"], ...] = ("image", "tokens")


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats, summed: logits [N, C] and targets [N] give a scalar."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits.float(), targets, reduction="sum")


_LARGEST_RANK = 5  # top1 is the first of these five, so that two metrics need one ranking and ties fall alike


def _hits_top1(logits: Tensor, targets: Tensor) -> Tensor:
    return _hits(logits, targets)[:, 0].sum()


def _hits_top5(logits: Tensor, targets: Tensor) -> Tensor:
    return _hits(logits, targets).any(1).sum()


def _hits(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits [N, C] and targets [N] to booleans [N, up to 5]: is the k-th largest logit the target's?"""
    return logits.topk(min(_LARGEST_RANK, logits.shape[-1]), dim=-1).indices.eq(targets[:, None])


def percent(total: float, counted: Counted) -> float:
    """The part of all predictions that `total` counts, in per cent."""
    return 100 * total / counted.tokens


def _mean(total: float, counted: Counted) -> float:
    return total / counted.tokens


def _perplexity(total: float, counted: Counted) -> float:
    return math.exp(min(total / (counted.words or counted.tokens), 700.0))  # exp(710) overflows


def _bits_per_byte(total: float, counted: Counted) -> float | None:
    return total / math.log(2) / counted.bytes if counted.bytes else None


LOSS = Metric("loss", "validation loss", "loss", lower_is_better=True, total=summed_loss, value=_mean)
"""Cross-entropy in nats; measured in every evaluation."""

_SHIPPED = (
    LOSS,
    Metric("top1", "top-1 accuracy (%)", "points", lower_is_better=False, total=_hits_top1, value=percent),
    Metric("top5", "top-5 accuracy (%)", "points", lower_is_better=False, total=_hits_top5, value=percent),
    Metric("perplexity", "perplexity", "perplexity", lower_is_better=True, total=summed_loss, value=_perplexity),
    Metric(
        "bits_per_byte",
        "bits per byte",
        "bits per byte",
        lower_is_better=True,
        total=summed_loss,
        value=_bits_per_byte,
        kinds=("tokens",),
    ),
)


def _not_a_metric(entry: object) -> str | None:
    return None if isinstance(entry, Metric) else f"it is a {type(entry).__name__}, not a Metric"


METRICS: Registry[Metric] = Registry("metric", "metrics", {m.name: m for m in _SHIPPED}, check=_not_a_metric)
"""Every metric, in the order in which tables show them."""


def metric_names() -> tuple[str, ...]:
    """The keys that metrics.jsonl may have: every metric, and every metric on the test split.

    >>> metric_names()[:2], metric_names()[-1]
    (('loss', 'top1'), 'test_bits_per_byte')
    """
    return (*METRICS, *(TEST + name for name in METRICS))


def lower_is_better(name: str) -> bool:
    """Whether smaller values of a metric are better, also of `test_` and its name. False for one that is not known."""
    metric = _find(name)
    return metric is not None and metric.lower_is_better


def label_of(name: str) -> str:
    """What a metric is called on an axis: `top-1 accuracy (%)`, `test loss`.

    >>> label_of("top1"), label_of("loss"), label_of("test_loss")
    ('top-1 accuracy (%)', 'validation loss', 'test loss')
    """
    metric = _find(name)
    label = metric.label if metric else name
    return f"test {label.removeprefix('validation ')}" if metric and name.startswith(TEST) else label


def unit_of(name: str) -> str:
    """What a difference of a metric is measured in; its name where it is not known."""
    metric = _find(name)
    return metric.unit if metric else name


def _find(name: str) -> Metric | None:
    """A registered metric. Never imports `package.module:Name`: a report reads runs of other people."""
    bare = name.removeprefix(TEST)
    return METRICS.get(bare) if ":" not in bare and bare in METRICS else None
