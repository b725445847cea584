"""Metrics of runs of older versions under the names that they have today."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..base.metrics import TEST, WITHOUT_UNIT

Rows = Sequence[Mapping[str, Any]]


def todays_names(
    recipe: Mapping[str, Any], rows: Rows, summary: Mapping[str, Any] | None
) -> tuple[Mapping[str, Any], Rows, Mapping[str, Any] | None] | None:
    """Recipe, lines of metrics and summary of a run that measured `perplexity`, with the unit in its name; None for others.

    It was per word where the number of words was known, else per token: then it is exp(loss).
    """
    unit = "word" if _per_word(recipe, rows) else "token"
    names = {before + WITHOUT_UNIT: f"{before}{WITHOUT_UNIT}_per_{unit}" for before in ("", TEST)}
    if not any(name in row for row in rows for name in names) and WITHOUT_UNIT not in _asked(recipe):
        return None

    def renamed(row: Mapping[str, Any]) -> dict[str, Any]:
        return {names.get(key, key): value for key, value in row.items()}

    found = dict(recipe)
    if isinstance(evaluation := recipe.get("evaluation"), Mapping) and _asked(recipe):
        found["evaluation"] = {**evaluation, "metrics": [names.get(name, name) for name in _asked(recipe)]}
    if isinstance(checkpoint := recipe.get("checkpoint"), Mapping) and checkpoint.get("best") == WITHOUT_UNIT:
        found["checkpoint"] = {**checkpoint, "best": names[WITHOUT_UNIT]}
    last = (summary or {}).get("metrics")
    done = {**summary, "metrics": renamed(last)} if summary is not None and isinstance(last, Mapping) else summary
    return found, [renamed(row) for row in rows], done


def _asked(recipe: Mapping[str, Any]) -> list[str]:
    """evaluation.metrics of a recipe."""
    evaluation = recipe.get("evaluation")
    metrics = evaluation.get("metrics") if isinstance(evaluation, Mapping) else None
    return [str(name) for name in metrics] if isinstance(metrics, list) else []


def _per_word(recipe: Mapping[str, Any], rows: Rows) -> bool:
    if recipe["data"].get("level") == "words":
        return True  # every token is a word
    for row in reversed(rows):
        loss, perplexity = row.get("loss"), row.get(WITHOUT_UNIT)
        if isinstance(loss, float) and isinstance(perplexity, float) and perplexity > 0:
            return not math.isclose(math.log(perplexity), loss, rel_tol=1e-6)
    return False
