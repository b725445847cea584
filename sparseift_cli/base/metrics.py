"""What a run is measured by: the names in metrics.jsonl, and which way is better."""

from __future__ import annotations

_WATCHED = ("loss", "top1", "top5", "perplexity", "bits_per_byte")
_LOWER = ("loss", "perplexity", "bits_per_byte")
TEST = "test_"
"""Before the name of what was measured on a test split that nobody watched (`evaluation.test`)."""

METRICS = (*_WATCHED, *(TEST + name for name in _WATCHED))
LOWER_IS_BETTER = frozenset({*_LOWER, *(TEST + name for name in _LOWER)})
