"""What a report contains, before it is printed: runs, groups of them, comparisons, and published numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

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

    def runs_of(self, label: str) -> list[Run]:
        """The runs of a group, whether in its means or not."""
        return [run for run, group in zip(self.runs, self.frame["group"], strict=True) if group == label]
