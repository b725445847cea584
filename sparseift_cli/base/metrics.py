"""Metrics: what an evaluation measures, in one table of objects that training, recipes and reports read.

A metric from outside is a `Metric` that `METRICS.register` adds, an entry point `sparseift.metrics`, or
`package.module:Name` in a recipe's evaluation.metrics:

    def in_top3(logits, targets):
        return logits.topk(3, dim=-1).indices.eq(targets[:, None]).any(1).sum()

    TOP3 = Metric("top3", "top-3 accuracy (%)", "points", lower_is_better=False, total=in_top3, value=percent)

A run records the `MetricFacts` of what it measures, so that a report needs none of that code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

TEST = "test_"
"""Before the name of what was measured on a test split that training never watched (`evaluation.test`)."""
NOT_METRICS = (
    "step",
    "epoch",
    "lr",
    "train_loss",
    "flops",
    "executed_flops",
    "seconds",
    "peak_bytes",
    "optimizer_bytes",
    "density",
    "itop_rate",
    "churn",
    "skipped_steps",
    "masks",
)
"""Keys of a line of metrics.jsonl besides the metrics, so no metric may be called one of them."""


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
class MetricFacts:
    """How a metric is named, shown and compared; see `Metric`."""

    name: str
    label: str
    unit: str
    lower_is_better: bool

    def to_json(self) -> dict[str, str | bool]:
        """As provenance.json records it: key, label, unit, lower_is_better."""
        return {"key": self.name, "label": self.label, "unit": self.unit, "lower_is_better": self.lower_is_better}

    @classmethod
    def from_json(cls, recorded: Mapping[str, Any]) -> MetricFacts:
        """The facts that `to_json` gave."""
        return cls(recorded["key"], recorded["label"], recorded["unit"], recorded["lower_is_better"])


@dataclass(frozen=True, slots=True)
class Metric(MetricFacts):
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


def _perplexity_per_token(total: float, counted: Counted) -> float:
    return _exp(total / counted.tokens)


def _perplexity_per_word(total: float, counted: Counted) -> float | None:
    return _exp(total / counted.words) if counted.words else None


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # exp(710) overflows


def _bits_per_byte(total: float, counted: Counted) -> float | None:
    return total / math.log(2) / counted.bytes if counted.bytes else None


LOSS = Metric("loss", "validation loss", "loss", lower_is_better=True, total=summed_loss, value=_mean)
"""Cross-entropy in nats; measured in every evaluation."""


def _of_text(name: str, value: Callable[[float, Counted], float | None]) -> Metric:
    """A metric of text that is called what its name says."""
    label = name.replace("_", " ")
    return Metric(name, label, label, lower_is_better=True, total=summed_loss, value=value, kinds=("tokens",))


WITHOUT_UNIT = "perplexity"
"""What older versions called a perplexity, per word or per token; `report.renamed` reads their runs."""

_SHIPPED = (
    LOSS,
    Metric("top1", "top-1 accuracy (%)", "points", lower_is_better=False, total=_hits_top1, value=percent),
    Metric("top5", "top-5 accuracy (%)", "points", lower_is_better=False, total=_hits_top5, value=percent),
    _of_text("perplexity_per_token", _perplexity_per_token),
    _of_text("perplexity_per_word", _perplexity_per_word),
    _of_text("bits_per_byte", _bits_per_byte),
)


def _not_a_metric(entry: object) -> str | None:
    if not isinstance(entry, Metric):
        return f"it is a {type(entry).__name__}, not a Metric"
    name = entry.name
    if not name.isidentifier() or name.startswith(TEST) or name in NOT_METRICS:
        return f"its name {name!r} must be letters, digits and _, not begin with {TEST}, and not be {', '.join(NOT_METRICS)}"
    if name == WITHOUT_UNIT:
        return f"its name {name!r} does not say of what: {name}_per_NAME does"
    if any(name == shipped.name and entry is not shipped for shipped in _SHIPPED):
        return f"its name {name!r} is that of a metric of this package"
    return None


METRICS: Registry[Metric] = Registry("metric", "metrics", {m.name: m for m in _SHIPPED}, check=_not_a_metric)
"""Every metric, in the order in which tables show them."""


def metric_names() -> tuple[str, ...]:
    """The keys that metrics.jsonl may have: every metric, and every metric on the test split.

    >>> metric_names()[:2], metric_names()[-1]
    (('loss', 'top1'), 'test_bits_per_byte')
    """
    return (*METRICS, *(TEST + name for name in METRICS))


def metrics_in(line: Iterable[str]) -> list[str]:
    """The metrics among the keys of a line of metrics.jsonl: registered ones first, then others as they come.

    >>> metrics_in({"step": 10, "train_loss": 0.7, "sure": 61.0, "top1": 88.0, "loss": 0.4, "flops": 10**9})
    ['loss', 'top1', 'sure']
    """
    keys, registered = [key for key in line if key not in NOT_METRICS], metric_names()
    return [*(name for name in registered if name in keys), *(key for key in keys if key not in registered)]


def facts_of(name: str, recorded: Mapping[str, MetricFacts] | None = None) -> MetricFacts:
    """What a metric is called on an axis, what a difference of it is measured in, and which direction is better.

    >>> facts_of("test_loss")
    MetricFacts(name='test_loss', label='test loss', unit='loss', lower_is_better=True)

    Args:
        name: a key of metrics.jsonl; with `test_` before it, the same on the test split.
        recorded: by key, what a run recorded of its metrics. It is asked for all but the metrics of this package.

    Returns:
        What is known; a name that is not is its own label and unit, and larger values are better.
    """
    bare = name.removeprefix(TEST)
    shipped = next((metric for metric in _SHIPPED if metric.name == bare), None)
    found = shipped or (recorded or {}).get(bare) or _registered(bare)
    if found is None:
        return MetricFacts(name, name, name, lower_is_better=False)
    label = f"test {found.label.removeprefix('validation ')}" if name.startswith(TEST) else found.label
    return MetricFacts(name, label, found.unit, found.lower_is_better)


def is_shipped(name: str) -> bool:
    """Whether a key of metrics.jsonl is that of a metric of this package."""
    return name.removeprefix(TEST) in {metric.name for metric in _SHIPPED}


def _registered(name: str) -> Metric | None:
    """A registered metric. Never imports `package.module:Name`: a report reads runs of other people."""
    return METRICS.get(name) if ":" not in name and name in METRICS else None
