"""What a report contains, before it is printed: runs, groups of them, comparisons, and published numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .budgets import BudgetName
from .read import Run

if TYPE_CHECKING:
    from pandas import DataFrame

    from .published import PublishedRow
    from .spectral.history import RunSpectra

Outcome = Literal["better", "worse", "no difference shown", "no claim", "refused"]


@dataclass(frozen=True, slots=True)
class Costs:
    """What one run of a group costs: the mean over its finished runs; None where no run records it."""

    flops: int | None
    """Audited training FLOPs of the whole run: forward, backward and mask updates (summary's flops.audited)."""
    seconds: float | None
    """Wall time of training and evaluation, in seconds."""
    peak_bytes: float | None
    """Peak memory in bytes, of the process (CPU) or of the GPU's allocator."""
    optimizer_bytes: float | None
    rates: Mapping[str, float | None] = field(default_factory=dict)
    """FLOPs a second and MFU, by the names of `rates.RATES`."""


@dataclass(frozen=True, slots=True)
class CurveReading:
    """The candidate's learning curves where the baseline ended: what was measured, no verdict.

    Of every run the value of its last evaluation that is not later; nothing is interpolated.
    """

    limit: float
    """Where the baseline ended: the mean over its runs, in FLOPs or seconds."""
    taken: float
    """Where the evaluations were made: the mean over the runs."""
    progress: float
    """The share of the run's steps at that evaluation: below 1 the schedule of the learning rate was not at its end."""
    mean: float
    n: int
    paired: bool
    difference: float | None
    """From the baseline's final value, with its interval as in `Comparison`."""
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """A group against its baseline in one metric: the difference of means is candidate minus baseline.

    `low` and `high` bound the difference at `confidence`, by Student's t: of the pairs of equal seeds where `paired`, by
    Welch's otherwise. Where budgets differ too much the comparison is not `allowed`: it has the costs and no difference.
    """

    baseline: str
    """The group's label, as in the column `group` of Report.groups."""
    candidate: str
    metric: str
    lower_is_better: bool
    outcome: Outcome
    verdict: str
    """A sentence: `+1.3 points [0.9, 1.7], n=3, at 1.0000x training FLOPs: better`."""
    baseline_mean: float
    """Over its finished runs, at the end of training, in the metric's own unit (top1 and top5 in per cent)."""
    candidate_mean: float
    baseline_costs: Costs
    candidate_costs: Costs
    flops_ratio: float | None
    """The candidate's audited training FLOPs over the baseline's."""
    allowed: bool
    paired: bool
    n: int
    """Pairs of seeds where `paired`, else runs of the smaller group."""
    baseline_n: int
    candidate_n: int
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    degrees_of_freedom: float | None = None
    confidence: float = 0.95
    equal_flops: bool = True
    """Whether the budgets are equal within the tolerance; where an unequal comparison is `allowed`, every output says so."""
    notes: Sequence[str] = field(default=())
    """Facts that limit what the difference means."""
    seeds: Sequence[int] = field(default=())
    """The seeds that both groups have, where `paired`."""
    at: BudgetName = "flops"
    """What must be equal for the comparison: training FLOPs, or wall time."""
    seconds_ratio: float | None = None
    """The candidate's wall time over the baseline's, whatever they were measured on."""
    equal_seconds: bool = False
    """Whether wall times are equal within the tolerance, and of the same device and versions."""
    conditions: Sequence[str] = field(default=())
    """What wall times depend on and the groups have not in common, in words: with any, times are not compared."""
    curve: CurveReading | None = None
    """Where budgets are not equal and this was asked for."""

    @property
    def equal(self) -> bool:
        """Whether the budgets of this comparison are equal."""
        return self.equal_flops if self.at == "flops" else self.equal_seconds

    @property
    def pairing(self) -> str:
        """` (paired by seed)`, with the seeds where other runs have no partner, and means are over more runs than pairs."""
        if not (self.paired and self.allowed and self.n > 1):
            return ""
        if self.n == self.candidate_n == self.baseline_n or not self.seeds:
            return " (paired by seed)"
        *first, last = map(str, self.seeds)
        return f" (paired by seed, over seeds {', '.join(first)} and {last})"


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that a report shows.

    `groups` has a row a group; its columns are those of `frame.groups_frame`, among them: group (the label), recipe, model,
    data, transform, sparsity, algorithm, steps, metric, n (finished runs, one a seed), mean, std, low, high (of the metric at
    the end of training; 95 % by Student's t), best (mean of each run's best evaluation), the mean of every metric under its
    name, flops and flops_ratio (audited training FLOPs, and over the dense model's), seconds, peak_bytes, optimizer_bytes.

    `frame` has a row a run (`frame.runs_frame`), in the order of `runs`: its `group` is the label, and `counted` says
    whether the run is in the means (finished, and the newest of its seed).
    """

    runs: Sequence[Run]
    skipped: Sequence[tuple[Path, str]]
    """Directories that were left out, and why."""
    groups: DataFrame
    comparisons: Sequence[Comparison]
    command: Sequence[str]
    frame: DataFrame
    reference: Sequence[PublishedRow] = field(default=())
    """The published rows, each with a group of ours where one matches."""
    notes: Sequence[str] = field(default=())
    spectra: Sequence[RunSpectra] = field(default=())
    """Of the masks in the checkpoints of the runs, where they were asked for."""
    at: Sequence[BudgetName] = field(default=())
    """The budgets at which a comparison was asked for; empty: none, so groups are compared at equal FLOPs."""

    def runs_of(self, label: str) -> list[Run]:
        """The runs of a group, whether in its means or not."""
        return [run for run, group in zip(self.runs, self.frame["group"], strict=True) if group == label]
